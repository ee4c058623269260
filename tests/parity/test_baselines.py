"""The baselines of `fastvlm bench claims` against the timm models that they are named after."""

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import timm
import torch
from mlx.utils import tree_flatten

from conftest import Figure
from fastvlm_mlx.benchmarks.baselines import BASELINES, ConvNeXt, ConvNeXtConfig, ViT, build

LIMIT = 1e-5
SHALLOW = (1, 1, 2, 1)  # blocks per stage of a ConvNeXt, and so many of a ViT
SIDE = 84  # six patches of 14; not a multiple of ConvNeXt's 32


def _timm_model(name: str, **changes: Any) -> torch.nn.Module:
    return timm.create_model(BASELINES[name].timm, num_classes=0, **changes).eval()


def _is_folded_or_dropped(key: str) -> bool:
    """Layer scales, which our products contain, and what follows the last block."""
    return key.endswith(("gamma", ".ls1.gamma", ".ls2.gamma")) or key.startswith(
        ("head.", "attn_pool.", "fc_norm.")
    )


def _weights(model: torch.nn.Module) -> list[tuple[str, mx.array]]:
    """Weights of a timm model under our names, in our layouts, layer scales folded in."""
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    scales = {"fc2": ("mlp.fc2", "ls2.gamma"), "proj": ("attn.proj", "ls1.gamma")}
    renamed = (
        ("patch_embed.proj", "patch_embed"),
        (".attn.", "."),
        (".mlp.", "."),
        ("stem.", "stem.layers."),
        ("stages.1.downsample", "downsamples.0.layers"),
        ("stages.2.downsample", "downsamples.1.layers"),
        ("stages.3.downsample", "downsamples.2.layers"),
        (".blocks.", "."),
    )
    ours = []
    for key, value in state.items():
        if _is_folded_or_dropped(key):
            continue
        for linear, (path, scale) in scales.items():
            if f"{path}." in key and linear in key:
                block = key.partition(f".{path}.")[0]
                for gamma in (f"{block}.{scale}", f"{block}.gamma"):
                    if gamma in state:
                        folded = state[gamma]
                        value = value * (folded[:, None] if value.ndim == 2 else folded)
        if value.ndim == 4:  # a depthwise filter is tap-major, any other channels last
            depthwise = "conv_dw" in key
            value = value[:, 0].transpose(1, 2, 0) if depthwise else value.transpose(0, 2, 3, 1)
        for theirs, mine in renamed:
            key = key.replace(theirs, mine)
        ours.append((key, mx.array(np.ascontiguousarray(value))))
    return ours


def _randomize(model: torch.nn.Module) -> None:
    """Nothing left at its neutral initial value: a swapped bias or scale would go unseen."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and not name.endswith(("_token", "pos_embed")):
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.5 + 0.25 * noise


@pytest.mark.parametrize("name", BASELINES)
def test_outputs(name: str, figure: Figure) -> None:
    """The same widths at little depth, all tokens, random weights that are nowhere neutral."""
    config = BASELINES[name].config
    side = 96 if isinstance(config, ConvNeXtConfig) else SIDE
    if isinstance(config, ConvNeXtConfig):
        theirs = _timm_model(name, depths=SHALLOW)
        ours: Any = ConvNeXt(dataclasses.replace(config, depths=SHALLOW))
    else:
        pooling = {} if config.class_token else {"global_pool": ""}
        theirs = _timm_model(name, depth=2, img_size=side, **pooling)
        ours = ViT(dataclasses.replace(config, depth=2), side)
    _randomize(theirs)
    ours.load_weights(_weights(theirs), strict=True)
    pixels = np.random.default_rng(0).random((2, side, side, 3), np.float32)
    expected = theirs.forward_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    if isinstance(config, ConvNeXtConfig):
        expected = expected.flatten(2).transpose(1, 2)
    elif config.class_token:
        expected = expected[:, 1:]
    exact = expected.numpy()
    got = np.array(ours(mx.array(pixels)))
    assert got.shape == exact.shape
    figure(
        f"BASELINE {name} vs. timm {BASELINES[name].timm}",
        float(np.abs(got - exact).max() / np.abs(exact).max()),
        LIMIT,
    )


@pytest.mark.parametrize("name", BASELINES)
def test_parameters(name: str, figure: Figure) -> None:
    """Full size, without allocating it: every tensor of timm's is ours or accounted for."""
    sides = {"ViT-L/14": 336, "DINOv2 ViT-L/14": 518}
    with torch.device("meta"):
        theirs = _timm_model(name)
    expected = sum(
        p.numel() for key, p in theirs.named_parameters() if not _is_folded_or_dropped(key)
    )
    parameters: Any = tree_flatten(build(name, sides.get(name, 384)).parameters())
    ours = sum(array.size for _, array in parameters)
    figure(f"BASELINE {name} parameters beside timm's, difference", abs(ours - expected), 0)
