"""Preprocessing against PIL done by hand (pad) and transformers' CLIP processor (crop)."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil

import reference
from fastvlm_mlx.images import fit_image, load_image, to_pixels

SIZES = [(256, 256), (640, 480), (131, 700), (701, 130), (1500, 1100), (33, 32), (1, 9)]


def cropped(path: Path, size: int) -> np.ndarray:
    """CLIP's processor as FastVLM's native layout sets it: (1, size, size, 3)."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
    )
    pixels = processor(Image.open(path), return_tensors="np")["pixel_values"]
    return pixels.transpose(0, 2, 3, 1)


def as_bytes(pixels: np.ndarray) -> np.ndarray:
    """(1, H, W, 3) floats in [0, 1] back to (H, W, 3) uint8."""
    return np.round(pixels[0] * 255).astype(np.uint8)


@pytest.mark.parametrize("size", [256, 448, 1024])
@pytest.mark.parametrize(("width", "height"), SIZES, ids=str)
def test_pad(tmp_path: Path, width: int, height: int, size: int) -> None:
    path = reference.picture(tmp_path, width, height, seed=1)
    ours = fit_image(load_image(path), size)
    np.testing.assert_array_equal(ours, reference.padded(path, size))


@pytest.mark.parametrize("size", [256, 448, 1024])
@pytest.mark.parametrize(("width", "height"), SIZES, ids=str)
def test_crop(tmp_path: Path, width: int, height: int, size: int) -> None:
    path = reference.picture(tmp_path, width, height, seed=1)
    ours = fit_image(load_image(path), size, "crop")
    np.testing.assert_array_equal(ours, as_bytes(cropped(path, size)))


@pytest.mark.parametrize("quality", [30, 95])
def test_jpeg(tmp_path: Path, quality: int) -> None:
    path = tmp_path / "picture.jpg"
    Image.open(reference.picture(tmp_path, 900, 611, seed=2)).save(path, quality=quality)
    ours = fit_image(load_image(path), 512)
    np.testing.assert_array_equal(ours, reference.padded(path, 512))


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    width=st.integers(1, 900),
    height=st.integers(1, 900),
    size=st.sampled_from([64, 192, 256, 448]),
    seed=st.integers(0, 99),
)
def test_any_size(tmp_path: Path, width: int, height: int, size: int, seed: int) -> None:
    path = reference.picture(tmp_path, width, height, seed)
    image = load_image(path)
    np.testing.assert_array_equal(fit_image(image, size), reference.padded(path, size))
    if max(width, height) <= 40 * min(width, height):
        ours = fit_image(image, size, "crop")
        np.testing.assert_array_equal(ours, as_bytes(cropped(path, size)))
    path.unlink()


def test_every_byte_becomes_the_same_float() -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    ours = np.array(to_pixels([image]))
    np.testing.assert_allclose(ours, reference.to_unit(image), rtol=0, atol=6e-8)
