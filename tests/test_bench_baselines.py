"""The encoders that claims compare with: published sizes, shapes, and numbers by hand."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fastvlm_mlx.benchmarks.baselines import (
    BASELINES,
    ConvNeXt,
    ConvNeXtConfig,
    ViT,
    ViTBlock,
    ViTConfig,
    build,
)
from fastvlm_mlx.benchmarks.paper import ENCODERS
from fastvlm_mlx.errors import OptionError

# What follows the last block in the published count: CLIP's projection, SigLIP's attention pool
# (query, keys and values, output, MLP, norm), OpenCLIP's head of ConvNeXt-L.
_POOL = 1152 + 4 * 1152 * 1153 + 1152 * 4304 + 4304 + 4304 * 1152 + 1152 + 2 * 1152
PUBLISHED = {
    "ViT-L/14": (336, 1024 * 768, 304.3e6),
    "SigLIP-SO400M": (384, _POOL, 428.2e6),
    "DINOv2 ViT-L/14": (518, 0, 304.4e6),
    "ConvNeXt-L": (512, 2 * 1536 + 1536 * 1537 + 1536 * 768, 199.8e6),
    "ConvNeXt-XXL": (512, 2 * 3072 + 3072 * 1024, 846.5e6),
}


def _size(module: nn.Module) -> int:
    flat: Any = tree_flatten(module.parameters())
    return sum(array.size for _, array in flat)


@pytest.mark.parametrize("name", BASELINES)
def test_parameters_are_the_published_ones(name: str) -> None:
    side, head, published = PUBLISHED[name]
    counted = _size(build(name, side)) + head
    assert counted == pytest.approx(published, rel=5e-4)
    assert counted / 1e6 == pytest.approx(BASELINES[name].parameters, rel=5e-3)


def test_every_baseline_is_an_encoder_of_the_paper() -> None:
    printed = {row.encoder: row.parameters for row in ENCODERS}
    assert {name: b.parameters for name, b in BASELINES.items()} == {
        n: printed[n] for n in BASELINES
    }


@pytest.mark.parametrize(
    ("name", "side", "tokens"),
    [
        ("ViT-L/14", 336, 576),
        ("SigLIP-SO400M", 384, 729),
        ("DINOv2 ViT-L/14", 518, 1369),
        ("ConvNeXt-L", 512, 256),
        ("ConvNeXt-L", 768, 576),
        ("ConvNeXt-XXL", 512, 256),
    ],
)
def test_tokens_are_those_of_the_paper(name: str, side: int, tokens: int) -> None:
    assert BASELINES[name].config.tokens(side) == tokens


@pytest.mark.parametrize("class_token", [True, False])
def test_a_small_vit_encodes_a_batch(class_token: bool) -> None:
    config = ViTConfig(32, 2, 2, 64, class_token=class_token, pre_norm=True, quick_gelu=True)
    vit = ViT(config, 45)
    pixels = mx.random.uniform(shape=(3, 45, 45, 3), key=mx.random.key(0))
    together = np.array(vit(pixels))
    assert together.shape == (3, 9, 32)
    alone = np.array(vit(pixels[1:2]))
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3, "the result depends on the picture"


def test_a_block_is_attention_and_mlp_with_residuals() -> None:
    """Written out in float64 from the block's own weights."""
    block = ViTBlock(ViTConfig(16, 1, 2, 24))
    x = mx.random.normal((1, 5, 16), key=mx.random.key(1))
    w = {k: np.array(v, np.float64) for k, v in dict(tree_flatten(block.parameters())).items()}

    def norm(a: np.ndarray) -> np.ndarray:
        return (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)

    def linear(a: np.ndarray, name: str) -> np.ndarray:
        return a @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    y = np.array(x, np.float64)[0]
    q, k, v = np.split(linear(norm(y), "qkv"), 3, axis=-1)
    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        scores = np.exp(q[:, h] @ k[:, h].T / 8**0.5)
        heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, h])
    y = y + linear(np.concatenate(heads, -1), "proj")
    hidden = linear(norm(y), "fc1")
    erf = np.array(mx.erf(mx.array(hidden / 2**0.5)), np.float64)
    y = y + linear(0.5 * hidden * (1 + erf), "fc2")
    np.testing.assert_allclose(np.array(block(x))[0], y, atol=1e-5)


def test_a_small_convnext_halves_from_stage_to_stage() -> None:
    net = ConvNeXt(ConvNeXtConfig((1, 1, 1, 1), (8, 16, 32, 64)))
    pixels = mx.random.uniform(shape=(2, 64, 96, 3), key=mx.random.key(0))
    features = np.array(net(pixels))
    assert features.shape == (2, 2 * 3, 64) and np.isfinite(features).all()
    assert np.abs(features[0] - features[1]).max() > 1e-3


def test_unknown_encoders_and_sizes_are_option_errors() -> None:
    with pytest.raises(OptionError, match="Unknown encoder 'ViT-H'; expected one of ViT-L/14"):
        build("ViT-H", 224)
    with pytest.raises(OptionError, match="at least 14 pixels; got 8"):
        build("ViT-L/14", 8)
