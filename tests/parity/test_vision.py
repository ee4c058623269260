"""The encoder against timm's fastvit_mci3, which is FastViTHD, with random weights."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import PIL.Image
import pytest
import torch

import checkpoints
import fastvlm_mlx as fv
import reference
from conftest import Figure
from fastvlm_mlx.images import to_pixels

LIMIT = 1e-4
Towers = Callable[[str, bool], tuple[torch.nn.Module, Any]]

WRITERS = {
    "native": checkpoints.write_native,
    "apple": checkpoints.write_apple,
    "mlx-vlm": checkpoints.write_mlx_vlm,
}


@pytest.fixture(scope="session")
def towers(workspace: Path, small_tokenizer: Path) -> Towers:
    """(dialect, fused) -> timm's tower, and ours read from a checkpoint with the same weights."""

    @cache
    def made(fused: bool) -> checkpoints.Reference:
        return checkpoints.build(checkpoints.TINY, small_tokenizer, fused=fused)

    @cache
    def read(dialect: str, fused: bool) -> tuple[torch.nn.Module, Any]:
        folder = workspace / f"tower-{dialect}-{'fused' if fused else 'training'}"
        WRITERS[dialect](made(fused), folder)
        vlm = fv.load(folder, dtype="float32", image_size=256)
        return made(fused).model.model.vision_tower.timm_model, vlm

    return read


def _pixels(height: int, width: int, batch: int = 1) -> np.ndarray:
    g = torch.Generator().manual_seed(height + width)
    return np.concatenate([reference.noise_pixels(height, width, g) for _ in range(batch)])


def _flat(feature_map: np.ndarray) -> np.ndarray:
    return feature_map.reshape(len(feature_map), -1, feature_map.shape[-1])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "training-form"])
@pytest.mark.parametrize(
    ("height", "width"),
    [(256, 256), (448, 320), pytest.param(1024, 1024, marks=pytest.mark.slow)],
    ids=lambda side: str(side),
)
def test_features(towers: Towers, height: int, width: int, fused: bool, figure: Figure) -> None:
    timm_tower, vlm = towers("native", fused)
    pixels = _pixels(height, width)
    theirs = reference.stages(timm_tower, pixels)
    ours = {n: np.array(m) for n, m in vlm.vision.feature_maps(mx.array(pixels)).items()}
    assert list(ours) == list(reference.STAGES)
    form = "fused" if fused else "training form"
    # In the order of the data, so that the first figure above the limit names the faulty stage.
    for stage in reference.STAGES:
        error = reference.relative_error(ours[stage], theirs[stage])
        figure(f"{stage} vs. timm, {form}, {height}x{width}", error, LIMIT)
    features = np.array(vlm.vision(mx.array(pixels)))
    assert features.shape == (1, height // 64 * (width // 64), 3072)
    error = reference.relative_error(features, _flat(theirs["head"]))
    figure(f"FEATURES vs. timm, {form}, {height}x{width}", error, LIMIT)


def test_as_close_to_float64_as_timm(towers: Towers, figure: Figure) -> None:
    """The errors above are two roundings; neither side's is larger than the other's."""
    timm_tower, vlm = towers("native", True)
    pixels = _pixels(256, 256)
    ours = np.array(vlm.vision.feature_maps(mx.array(pixels))["head"])
    theirs = reference.stages(timm_tower, pixels)["head"]
    exact = reference.stages(copy.deepcopy(timm_tower).double(), pixels.astype(np.float64))["head"]
    error = reference.relative_error(ours, exact)
    figure("FEATURES vs. timm in float64", error, LIMIT)
    timm_error = reference.relative_error(theirs, exact)
    figure("our distance from float64 over timm's, ratio", error / timm_error, 2)


@pytest.mark.parametrize("side", [1536, 2048])
def test_features_of_big_pictures(towers: Towers, side: int, figure: Figure) -> None:
    """A narrow strip of that length costs a tenth; the network has no positions to run out of."""
    timm_tower, vlm = towers("native", True)
    pixels = _pixels(128, side)
    theirs = _flat(reference.stages(timm_tower, pixels)["head"])
    error = reference.relative_error(np.array(vlm.vision(mx.array(pixels))), theirs)
    figure(f"FEATURES vs. timm, fused, 128x{side}", error, LIMIT)


def test_tiles(towers: Towers, figure: Figure) -> None:
    """An overview and 2x2 tiles through fitting and batch, against crop after crop in timm."""
    timm_tower, vlm = towers("native", True)
    picture = (255 * _pixels(256, 256)[0]).astype(np.uint8)
    crops = vlm.preprocess(picture, image_size=128, tiles=(2, 2)).crops
    cut = [picture[y : y + 128, x : x + 128] for y in (0, 128) for x in (0, 128)]
    small = PIL.Image.fromarray(picture).resize((128, 128), PIL.Image.Resampling.BICUBIC)
    theirs = [
        _flat(reference.stages(timm_tower, crop[None].astype(np.float32) / 255)["head"])[0]
        for crop in (np.asarray(small), *cut)
    ]
    error = reference.relative_error(np.array(vlm.vision(to_pixels(crops))), np.array(theirs))
    figure("FEATURES vs. timm, overview and 2x2 tiles", error, LIMIT)


def test_batch(towers: Towers, figure: Figure) -> None:
    timm_tower, vlm = towers("native", True)
    pixels = _pixels(128, 192, batch=3)
    theirs = _flat(reference.stages(timm_tower, pixels)["head"])
    error = reference.relative_error(np.array(vlm.vision(mx.array(pixels))), theirs)
    figure("FEATURES vs. timm, fused, batch of three 128x192", error, LIMIT)


@pytest.mark.parametrize("dialect", ["apple", "mlx-vlm"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "training-form"])
def test_other_dialects(towers: Towers, dialect: str, fused: bool, figure: Figure) -> None:
    """The native layout is what test_features reads; these are the others, stored in bfloat16."""
    if dialect == "mlx-vlm" and not fused:
        pytest.skip("mlx-vlm has no training form")
    timm_tower, vlm = towers(dialect, fused)
    pixels = _pixels(256, 256)
    theirs = _flat(reference.stages(timm_tower, pixels)["head"])
    error = reference.relative_error(np.array(vlm.vision(mx.array(pixels))), theirs)
    form = "fused" if fused else "training form"
    figure(f"FEATURES vs. timm, {form}, {dialect} dialect, 256x256", error, LIMIT)
