"""float16: residual streams that would overflow are scaled exactly, others are left alone."""

import dataclasses
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.fold import fold_vision
from fastvlm_mlx.checkpoint.half import choose_residual_scales, probe_pixels
from fastvlm_mlx.checkpoint.loading import examine_checkpoint
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.convert.verification import unscaled_maps
from fastvlm_mlx.vision import FastViTHD, Head

TOWER = "model.vision_tower.vision_tower.model.network"


@pytest.fixture(scope="module")
def loud(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower whose stage 5 carries values beyond float16, as the genuine ones nearly do."""
    folder = tmp_path_factory.mktemp("loud") / "checkpoint"
    shutil.copytree(tiny, folder)
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    for layer in ("8.proj.1.reparam_conv", "9.reparam_conv"):
        for part in ("weight", "bias"):
            name = f"{TOWER}.{layer}.{part}"
            tensors[name] = tensors[name] * 1000
    # As after training, BatchNorm knows how large its input is.
    statistics = f"{TOWER}.10.0.convffn.conv.bn.running_"
    tensors[f"{statistics}mean"] = tensors[f"{statistics}mean"] * 1e6
    tensors[f"{statistics}var"] = tensors[f"{statistics}var"].astype(mx.float32) * 1e12
    # The last convolution brings it back, so that the features are as before.
    name = "model.vision_tower.vision_tower.model.conv_exp.reparam_conv.weight"
    tensors[name] = tensors[name].astype(mx.float32) * 1e-6
    mx.eval(tensors)
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    return folder


def _pixels() -> mx.array:
    return mx.random.uniform(shape=(1, 128, 128, 3), key=mx.random.key(5))


def _error(got: mx.array, exact: mx.array) -> float:
    return float(mx.abs(got.astype(mx.float32) - exact).max() / mx.abs(exact).max())


def test_the_stream_really_overflows_without_scaling(
    loud: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastvlm_mlx.checkpoint.loading.choose_residual_scales", lambda config, _: (1.0,) * 5
    )
    features = fv.load(loud, dtype="float16").vision(_pixels())
    assert not bool(mx.isfinite(features).all().item())


def test_scaled_float16_is_as_close_as_float16_can_be(loud: Path, tiny: Path) -> None:
    exact = fv.load(loud, dtype="float32")
    half = fv.load(loud, dtype="float16")
    scales = half.config.vision.residual_scales
    assert scales[:4] == (1.0, 1.0, 1.0, 1.0)
    assert scales[4] < 1 and np.log2(scales[4]).is_integer()
    error = _error(half.vision(_pixels()), exact.vision(_pixels()))
    small = {dtype: fv.load(tiny, dtype=dtype).vision for dtype in ("float16", "float32")}
    quiet = _error(small["float16"](_pixels()), small["float32"](_pixels()))
    assert error < 4 * quiet < 0.02


def test_scaling_changes_nothing_in_float32(loud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power of two is exact: the scaled network gives the unscaled one's features bit for bit."""
    from fastvlm_mlx.checkpoint import loading

    exact = fv.load(loud, dtype="float32").vision(_pixels())
    original = loading.load_checkpoint

    def scaled(folder: Path, **options: object) -> object:
        source = loading.examine_checkpoint(folder)
        config = loading.in_float16_range(source.config, dict(source.refs))
        monkeypatch.setattr(
            loading,
            "examine_checkpoint",
            lambda _: __import__("dataclasses").replace(source, config=config),
        )
        return original(folder, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("fastvlm_mlx.opening.load_checkpoint", scaled)
    other = fv.load(loud, dtype="float32")
    assert other.config.vision.residual_scales[4] < 1
    assert mx.array_equal(other.vision(_pixels()), exact)


@pytest.mark.parametrize("side", [16, 32])
def test_the_gate_of_a_large_map(side: int) -> None:
    """Squeeze and excitation: the sum over a map leaves float16's range long before its mean."""
    head = Head(16, 2, 4)
    head.conv.weight = mx.zeros((3, 3, 32)).at[1, 1].add(1)
    head.reduce.weight = mx.ones((8, 32)) / 32
    # Logits of a few units: at hundreds, as drawn weights may give, a rounded input moves the gate.
    head.expand.weight = mx.random.normal((32, 8), key=mx.random.key(1)) / 1000
    x = mx.random.uniform(300, 400, (1, side, side, 16), key=mx.random.key(0))
    expected = head(x)
    head.set_dtype(mx.float16)
    got = head(x.astype(mx.float16))
    assert got.dtype == mx.float16
    error = mx.abs(got.astype(mx.float32) - expected).max() / mx.abs(expected).max()
    assert error.item() < 2e-3


def test_a_folded_tower_keeps_the_scales_it_was_written_with() -> None:
    assert fv.load("nano", dtype="float16").config == fv.load("nano").config


def test_a_quiet_tower_is_left_alone(tiny: Path) -> None:
    assert fv.load(tiny, dtype="float16").config.vision == VisionConfig(
        layers=(1, 1, 1, 1, 1), dims=fv.load(tiny).config.vision.dims,
        mlp_ratios=fv.load(tiny).config.vision.mlp_ratios, image_size=256,
    )  # fmt: skip


def test_the_probe_is_a_picture() -> None:
    pixels = probe_pixels(128)
    assert pixels.shape == (1, 128, 128, 3)
    assert float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    assert float(mx.var(pixels)) > 0.05
    top, bottom = mx.split(pixels[0], 2)
    flat, smooth, stripes, noise = (h for half in (top, bottom) for h in mx.split(half, 2, axis=1))
    assert mx.abs(flat - flat[0, 0]).max().item() == 0
    assert 0 < mx.abs(smooth[1:] - smooth[:-1]).max().item() < 0.01
    assert set(np.unique(np.array(stripes)).tolist()) == {0, 1}
    assert len(np.unique(np.array(noise))) > 10_000


def test_maps_are_compared_without_the_scales(loud: Path) -> None:
    exact, half = (fv.load(loud, dtype=dtype) for dtype in ("float32", "float16"))
    scales = half.config.vision.residual_scales
    found = unscaled_maps(half.vision, _pixels(), scales)
    for name, expected in exact.vision.feature_maps(_pixels()).items():
        assert _error(found[name], expected) < 0.02


def test_the_chosen_scale_brings_the_probe_below_the_target(loud: Path) -> None:
    source = examine_checkpoint(loud)
    vision = source.config.vision

    def get(name: str) -> mx.array:
        return source.refs[name].load().astype(mx.float32)

    scales = choose_residual_scales(vision, get)
    again = choose_residual_scales(dataclasses.replace(vision, residual_scales=scales), get)
    assert again == scales, "the choice does not depend on scales already in the config"
    config = dataclasses.replace(vision, residual_scales=scales)
    tower = FastViTHD(config)
    tower.load_weights(list(fold_vision(config, get)), strict=True)
    peak = mx.abs(tower.feature_maps(probe_pixels(vision.image_size))["stage5"]).max().item()
    assert 100 < peak <= 1024
