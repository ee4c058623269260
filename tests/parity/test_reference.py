"""The references themselves: right names, well-scaled weights, and no weight without a say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.utils import reparameterize_model

import checkpoints
import reference
from conftest import Figure


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "training-form"])
def test_tower_is_well_scaled(fused: bool) -> None:
    model = reference.tower(fused=fused)
    g = torch.Generator().manual_seed(1)
    pixels = np.concatenate([reference.noise_pixels(256, 256, g) for _ in range(3)])
    for name, value in reference.stages(model, pixels).items():
        rms = float(np.sqrt(np.square(value).mean()))
        assert 0.1 < rms < 30, f"{name} has an RMS of {rms:.3g}"
        over_image = value.std(axis=(1, 2)).mean() / rms
        over_images = value.mean(axis=(1, 2)).std(axis=0).mean() / rms
        assert over_image > 0.2, f"{name} hardly varies over the image: {over_image:.3g}"
        assert over_images > 0.05, f"{name} hardly varies with the image: {over_images:.3g}"


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "training-form"])
def test_every_weight_of_the_tower_matters(fused: bool, figure: Figure) -> None:
    model = reference.tower(fused=fused)
    g = torch.Generator().manual_seed(2)
    pixels = reference.nchw(reference.noise_pixels(128, 192, g))
    with torch.enable_grad():
        features = model.forward_features(pixels)
        probe = torch.rand(features.shape, generator=g) - 0.5
        names, weights = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad((features * probe).sum(), weights)
    scale = float(features.norm())
    # What making each of these weights a bit larger or smaller, at random, does to the output.
    effect = {
        name: float((gradient * weight).norm()) / scale
        for name, weight, gradient in zip(names, weights, gradients, strict=True)
    }
    weakest = min(effect, key=effect.__getitem__)
    figure(f"weakest weight, {weakest}: 1 / effect", 1 / effect[weakest], 1e3)


def test_fusing_does_not_change_timm(figure: Figure) -> None:
    training = reference.tower(fused=False)
    pixels = reference.noise_pixels(256, 256, torch.Generator().manual_seed(4))
    before = reference.stages(training, pixels)
    after = reference.stages(reparameterize_model(training), pixels)
    error = reference.relative_error(after["head"], before["head"])
    figure("timm fused by timm vs. its training form", error, 1e-4)


def test_tower_names(shared: Path) -> None:
    table = json.loads((shared / "checkpoints/tensors_fastvithd_fused.json").read_text())
    oracle = {timm: apple for apple, timm in table["apple_to_timm"].items()}
    assert {timm: checkpoints.apple_tower_name(timm) for timm in oracle} == oracle
    table = json.loads((shared / "checkpoints/tensors_fastvithd_trainform.json").read_text())
    made = {checkpoints.apple_tower_name(timm): shape for timm, shape in table["timm"].items()}
    assert made == table["apple"]


def test_whole_checkpoint_names(shared: Path) -> None:
    maps = json.loads((shared / "checkpoints/name_map_0.5b.json").read_text())
    native = {n: a for a, n in maps["apple_to_native_0.5b"].items() if n and a != "lm_head.weight"}
    assert {n: checkpoints.apple_name(n) for n in native} == native
    mlx_vlm = maps["apple_to_mlxvlm_0.5b"]
    assert {a: checkpoints.mlx_vlm_name(a, tied=True) for a in mlx_vlm} == mlx_vlm


def test_small_model_has_the_genuine_tensors(shared: Path, small_tokenizer: Path) -> None:
    """Tower and projector of the written files against the genuine files' tables."""
    made = checkpoints.build(checkpoints.TINY, small_tokenizer)
    written = {
        "apple": checkpoints.apple_tensors(made),
        "mlxvlm": checkpoints.mlx_vlm_tensors(made),
        "native": dict(made.model.state_dict()),
    }
    for dialect, tensors in written.items():
        table = json.loads((shared / f"checkpoints/tensors_{dialect}_0.5b.json").read_text())
        genuine = {n: s for n, (_, s) in table["tensors"].items() if "vision" in n}
        assert {n: list(t.shape) for n, t in tensors.items() if "vision" in n} == genuine, dialect
