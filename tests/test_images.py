"""Pictures: bit-identity with the reference pipeline, every source, every mode, every bad input."""

from __future__ import annotations

import base64
import errno
import http.server
import io
import os
import socket
import ssl
import struct
import sys
import threading
import time
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from fastvlm_mlx import fetching, images
from fastvlm_mlx.errors import ImageError, OptionError
from fastvlm_mlx.images import fit_image, load_image, to_pixels


def noise(width: int, height: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> list[Any]:
    return np.asarray(image).reshape(-1, 3).tolist()


def reference(image: Image.Image, size: int, fit: str) -> np.ndarray:
    """predict.py's expand2square + resize, and the CLIP processor's resize + centre crop."""
    width, height = image.size
    if fit == "pad":
        side = max(width, height)
        square = Image.new("RGB", (side, side), (0, 0, 0))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    short, long = min(width, height), max(width, height)
    scaled = int(size * long / short)
    target = (size, scaled) if width <= height else (scaled, size)
    resized = np.asarray(image.resize(target, Image.Resampling.BICUBIC))
    top, left = int((target[1] - size) / 2), int((target[0] - size) / 2)
    return resized[top : top + size, left : left + size]


# --- fit_image ---

sides = st.one_of(st.integers(1, 40), st.integers(1, 400))


@settings(max_examples=150, deadline=None)
@given(sides, sides, st.sampled_from([64, 96, 128, 200, 256]), st.integers(0, 2**32 - 1))
def test_pad_has_the_bytes_of_the_reference(width: int, height: int, size: int, seed: int) -> None:
    image = Image.fromarray(noise(width, height, seed))
    np.testing.assert_array_equal(fit_image(image, size, "pad"), reference(image, size, "pad"))


@settings(max_examples=100, deadline=None)
@given(sides, sides, st.sampled_from([32, 50, 64]), st.integers(0, 2**32 - 1))
def test_crop_has_the_bytes_of_the_reference(width: int, height: int, size: int, seed: int) -> None:
    image = Image.fromarray(noise(width, height, seed))
    np.testing.assert_array_equal(fit_image(image, size, "crop"), reference(image, size, "crop"))


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(256, 256, 256), (256, 100, 256), (1601, 1203, 512), (1203, 1601, 512), (900, 1300, 448)],
)
def test_ordinary_photographs(width: int, height: int, size: int, fit: Any) -> None:
    image = Image.fromarray(noise(width, height))
    fitted = fit_image(image, size, fit)
    assert fitted.shape == (size, size, 3) and fitted.dtype == np.uint8
    np.testing.assert_array_equal(fitted, reference(image, size, fit))


@pytest.mark.parametrize(("width", "height"), [(1, 4000), (4000, 1), (3, 3999), (3999, 4)])
def test_pad_of_a_very_long_picture(width: int, height: int) -> None:
    image = Image.fromarray(noise(width, height))
    np.testing.assert_array_equal(fit_image(image, 256), reference(image, 256, "pad"))


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1)])
def test_one_pixel_wide_and_20000_long(size: tuple[int, int]) -> None:
    white = Image.new("RGB", size, (255, 255, 255))
    fitted = fit_image(white, 1024)  # the square would hold 400 megapixels
    long_axis = 0 if size[1] > size[0] else 1
    assert fitted.max() > 0
    assert (fitted.max(axis=long_axis) > 0).any(axis=1).sum() <= 4  # a thin line in the middle
    with pytest.raises(ImageError, match="use fit='pad'"):
        fit_image(white, 1024, "crop")


def test_sides_beyond_the_limit_are_refused() -> None:
    with pytest.raises(ImageError, match=r"40000x1.*32768"):
        fit_image(Image.new("RGB", (40000, 1)), 64)


def test_fit_options_are_checked() -> None:
    image = Image.new("RGB", (4, 4))
    with pytest.raises(OptionError, match="size is 0"):
        fit_image(image, 0)
    with pytest.raises(OptionError, match="'pad' or 'crop'"):
        fit_image(image, 4, "stretch")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="mode L, expected RGB"):
        fit_image(Image.new("L", (4, 4)), 4)


# --- to_pixels ---


def test_every_byte_becomes_itself_over_255() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    batch = to_pixels([ramp, ramp[::-1]])
    assert batch.shape == (2, 16, 16, 3) and batch.dtype == mx.float32
    expected = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    np.testing.assert_array_equal(np.array(batch[0, :, :, 1]).ravel(), expected)
    np.testing.assert_array_equal(np.array(batch[1, ::-1, :, 2]).ravel(), expected)


def test_a_nearly_black_image_stays_nearly_black() -> None:
    dark = fit_image(load_image(np.full((5, 7, 3), 1, np.uint8)), 8, "crop")
    assert float(to_pixels([dark]).max()) == np.float32(1 / 255)


def test_to_pixels_refuses_what_does_not_stack() -> None:
    good = np.zeros((4, 4, 3), np.uint8)
    for bad in (good.astype(np.float32), good[:3], good[..., :1], good[0]):
        with pytest.raises(ImageError, match="prepare every image with fit_image"):
            to_pixels([good, bad])
    with pytest.raises(ImageError, match="no images"):
        to_pixels([])


# --- orientation ---

# What each EXIF orientation says about the stored rows and columns, undone.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(noise(5, 3))
    data = encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    # What the file says without the tag: JPEG loses a little, equally in both.
    plain = Image.open(
        io.BytesIO(encoded(stored, kind, **({"lossless": True} if kind == "WEBP" else {})))
    )
    expected = UPRIGHT[orientation](np.asarray(plain.convert("RGB")))
    upright = load_image(data)
    np.testing.assert_array_equal(np.asarray(upright), expected)
    np.testing.assert_array_equal(np.asarray(load_image(upright)), expected)  # not turned twice
    np.testing.assert_array_equal(np.asarray(load_image(Image.open(io.BytesIO(data)))), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL's own, and right
def test_damaged_exif_is_ignored() -> None:
    data = encoded(Image.new("RGB", (4, 4)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert load_image(data).size == (4, 4)


# --- modes ---


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_opaque_modes_equal_pil_convert(mode: str) -> None:
    image = Image.fromarray(noise(9, 7)).convert(mode)
    before = image.tobytes()
    rgb = load_image(image)
    assert rgb is not image and rgb.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(rgb), np.asarray(image.convert("RGB")))
    assert image.tobytes() == before and image.mode == mode


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "GIF"), ("1", "BMP"), ("RGB", "BMP"),
     ("CMYK", "TIFF"), ("RGB", "WEBP"), ("RGB", "PPM"), ("RGB", "JPEG2000"), ("P", "PNG"),
     ("RGBA", "PNG"), ("LA", "PNG"), ("RGB", "AVIF")],
)  # fmt: skip
def test_opaque_files_equal_pil_convert(mode: str, kind: str) -> None:
    if kind == "AVIF" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    data = encoded(Image.fromarray(noise(20, 10)).convert(mode), kind)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(load_image(data)), np.asarray(expected))


def test_transparency_is_laid_on_white() -> None:
    # Hidden red, half black, opaque green.
    rgba = np.array([[[255, 0, 0, 0], [0, 0, 0, 127], [0, 200, 0, 255]]], np.uint8)
    expected = [[255, 255, 255], [128, 128, 128], [0, 200, 0]]
    assert pixels(load_image(encoded(Image.fromarray(rgba)))) == expected
    assert pixels(load_image(rgba)) == expected
    premultiplied = load_image(Image.fromarray(rgba).convert("RGBa"))
    assert pixels(premultiplied) == expected


def test_a_picture_that_is_half_transparent_everywhere() -> None:
    assert pixels(load_image(Image.new("RGBA", (2, 1), (0, 0, 0, 127)))) == [[128] * 3] * 2


def test_transparency_of_grey_and_palette() -> None:
    grey = Image.fromarray(np.array([[[10, 0], [10, 255]]], np.uint8), "LA")
    assert pixels(load_image(encoded(grey))) == [[255] * 3, [10] * 3]
    assert pixels(load_image(grey.convert("La"))) == [[255] * 3, [10] * 3]

    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 50, 60, 70])
    assert pixels(load_image(encoded(palette, transparency=0))) == [[255] * 3, [50, 60, 70]]
    assert pixels(load_image(encoded(palette, "GIF", transparency=0))) == [[255] * 3, [50, 60, 70]]
    assert pixels(load_image(encoded(palette))) == [[9] * 3, [50, 60, 70]]

    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(load_image(encoded(keyed, transparency=(1, 2, 3)))) == [[255] * 3, [4, 5, 6]]


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [[v] * 3 for v in (0, 0, 1, 1, 128, 255)]
    assert pixels(load_image(encoded(Image.fromarray(values)))) == expected
    assert pixels(load_image(encoded(Image.fromarray(values), "TIFF"))) == expected
    assert pixels(load_image(Image.fromarray(values.astype(np.int32)))) == expected
    pgm = b"P5 6 1 65535\n" + values.astype(">u2").tobytes()
    assert pixels(load_image(pgm)) == expected


def test_deep_grey_out_of_range_is_refused() -> None:
    with pytest.raises(ImageError, match="-1 to 70000, expected 0 to 65535"):
        load_image(Image.fromarray(np.array([[-1, 70000]], np.int32)))


def test_floating_point_grey() -> None:
    assert pixels(load_image(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)))) == [
        [0] * 3, [128] * 3, [255] * 3,
    ]  # fmt: skip
    with pytest.raises(ImageError, match=r"expected \[0, 1\]"):
        load_image(encoded(Image.fromarray(np.array([[0, 200.0]], np.float32)), "TIFF"))


def test_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "MPO", "TIFF"):
        data = encoded(frames[0].copy(), kind, save_all=True, append_images=[frames[1].copy()])
        assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
        red, _, blue = pixels(load_image(data))[0]
        assert red > 240 and blue < 15, kind


# --- colour profiles ---

SRGB_COLUMNS = (
    (0.43607, 0.22249, 0.01392),
    (0.38515, 0.71687, 0.09708),
    (0.14307, 0.06061, 0.7141),
)
P3_COLUMNS = (
    (0.51512, 0.24120, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.15710, 0.06657, 0.78407),
)


def profile(columns: Any = None, gamma: float | None = None) -> bytes:
    """A minimal ICC profile: RGB with these primaries, or grey with this gamma."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    if gamma is None:
        srgb = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
        curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + fixed(*srgb)
    else:
        curve = b"para" + bytes(4) + struct.pack(">HH", 0, 0) + fixed(gamma)
    white = fixed(0.9642, 1.0, 0.8249)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 3) + b"by hand\0"[5:] + bytes(79),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + white,
    }
    if columns is None:
        tags[b"kTRC"] = curve
    else:
        for letter, column in zip(b"rgb", columns, strict=True):
            tags[bytes([letter]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*column)
            tags[bytes([letter]) + b"TRC"] = curve
    table, body = b"", b""
    start = 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    space = b"GRAY" if columns is None else b"RGB "
    header = struct.pack(">I4xI4s4s4s12x4s", start + len(body), 0x04000000, b"mntr", space,
                         b"XYZ ", b"acsp")  # fmt: skip
    header = (header + bytes(28) + white).ljust(128, b"\0")
    return header + struct.pack(">I", len(tags)) + table + body


def linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def test_display_p3_is_converted() -> None:
    colour = np.array([180, 120, 90])
    xyz = np.array(P3_COLUMNS).T @ linear(colour / 255)
    rgb = np.linalg.inv(np.array(SRGB_COLUMNS).T) @ xyz
    expected = 255 * (1.055 * rgb ** (1 / 2.4) - 0.055)
    assert np.abs(expected - colour).max() > 5  # else this test shows nothing
    plain = Image.new("RGB", (8, 8), tuple(colour.tolist()))
    image = load_image(encoded(plain, icc_profile=profile(P3_COLUMNS)))
    for again in (image, load_image(image)):  # the profile travels with the image
        fitted = fit_image(again, 8)
        np.testing.assert_allclose(fitted, np.broadcast_to(expected, (8, 8, 3)), atol=1.5)


@pytest.mark.parametrize(
    "icc",
    [
        profile(SRGB_COLUMNS),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"not a profile",
        profile(gamma=3.0),  # a grey profile cannot apply to colours
        profile(P3_COLUMNS)[:200],
    ],
    ids=["srgb-by-another-name", "srgb", "garbage", "grey", "truncated"],
)
def test_srgb_and_unusable_profiles_change_nothing(icc: bytes) -> None:
    image = Image.fromarray(noise(16, 16))
    loaded = load_image(encoded(image, icc_profile=icc))
    assert "icc_profile" not in loaded.info
    np.testing.assert_array_equal(fit_image(loaded, 16), np.asarray(image))


def test_a_profile_that_differs_a_little_is_applied() -> None:
    data = encoded(Image.new("RGB", (2, 2), (60, 60, 60)), icc_profile=profile(SRGB_COLUMNS, 1.8))
    expected = 255 * (1.055 * ((60 / 255) ** 1.8) ** (1 / 2.4) - 0.055)
    assert 10 < expected - 60 < 20
    np.testing.assert_allclose(fit_image(load_image(data), 2), expected, atol=1.5)


def test_a_grey_profile_is_applied_to_grey() -> None:
    data = encoded(Image.new("L", (2, 2), 100), icc_profile=profile(gamma=1.0))
    expected = 255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(np.asarray(load_image(data)), expected, atol=1.5)


# --- arrays ---


def test_arrays() -> None:
    rgb = noise(6, 4)
    for array in (rgb, mx.array(rgb), rgb[:, ::-1][:, ::-1], (rgb / 255), (rgb / 255).astype("f4"),
                  mx.array(rgb).astype(mx.float32) / 255):  # fmt: skip
        np.testing.assert_array_equal(np.asarray(load_image(array)), rgb)
    half = np.asarray(load_image((rgb / 255).astype(np.float16))).astype(int)
    assert np.abs(half - rgb).max() <= 1
    brain = np.asarray(load_image((mx.array(rgb) / 255).astype(mx.bfloat16))).astype(int)
    assert np.abs(brain - rgb).max() <= 1
    grey = noise(6, 4, channels=1)
    np.testing.assert_array_equal(np.asarray(load_image(grey))[..., 2], grey)


def test_the_array_is_copied() -> None:
    array = noise(6, 4)
    image = load_image(array)
    array[:] = 0
    assert np.asarray(image).max() > 0


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 0, 3), np.uint8), r"\(0, 0, 3\)"),
        (np.zeros((0, 5), np.uint8), r"\(0, 5\)"),
        (np.zeros((3, 8, 9), np.uint8), "channels last"),
        (np.zeros((2, 8, 8, 3), np.uint8), "one by one"),
        (np.zeros((8, 8, 1), np.uint8), r"\(8, 8, 1\)"),
        (np.zeros(5, np.uint8), r"\(5,\)"),
        (np.zeros((4, 4, 3), np.int64), "int64, expected uint8"),
        (np.zeros((4, 4), bool), "bool, expected uint8"),
        (np.full((4, 4, 3), 255.0), r"255.0, expected \[0, 1\]"),
        (np.full((4, 4, 3), -0.1), r"expected \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"nan.*expected \[0, 1\]"),
        (mx.zeros((4, 4, 3), mx.int32), "int32, expected uint8"),
    ],
)
def test_arrays_that_are_no_image(array: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(array)


# --- paths, bytes, files, data URIs ---

PNG = encoded(Image.new("RGB", (3, 2), (1, 2, 3)))


def test_every_local_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a picture %41.png"
    path.write_bytes(PNG)
    monkeypatch.setenv("HOME", str(tmp_path))
    text = base64.b64encode(PNG).decode()
    behind = io.BytesIO(b"header" + PNG)
    behind.seek(6)
    with path.open("rb") as file:
        for source in (path, str(path), f"~/{path.name}", path.as_uri(), PNG, bytearray(PNG),
                       memoryview(PNG), file, behind, f"data:image/png;base64,{text}",
                       "DATA:;base64," + text.replace("+", "%2B"),
                       f"data:image/png;base64,{text[:20]}\n{text[20:]}"):  # fmt: skip
            assert pixels(load_image(source)) == [[1, 2, 3]] * 6


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(PNG,))
    writer.start()
    assert load_image(tmp_path / "pipe").size == (3, 2)
    writer.join()


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_paths_that_are_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{tmp_path}/no.png: no such file" in refusal(tmp_path / "no.png")
    assert "is a directory" in refusal(tmp_path)
    (tmp_path / "empty.jpg").touch()
    assert "file is empty" in refusal(tmp_path / "empty.jpg")
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html>")
    assert "<!DOCTYPE html>" in refusal(tmp_path / "page.jpg")
    assert "expected a path" in refusal("x" * 5000)
    assert len(refusal("x" * 5000)) < 300
    assert "expected a path" in refusal("a\0b")
    assert "file:///path" in refusal("file://elsewhere/a.png")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "permission denied" in refusal("secret.png")


def test_other_things_that_are_no_image(tmp_path: Path) -> None:
    assert "0 bytes" in refusal(b"")
    assert "starts with b'hello'" in refusal(b"hello")
    assert "got list" in refusal([1, 2])
    assert "got NoneType" in refusal(None)
    assert "mode 'rb'" in refusal(io.StringIO("text"))
    closed = io.BytesIO(PNG)
    closed.close()
    assert "mode 'rb'" in refusal(closed)
    assert "no comma" in refusal("data:image/png;base64")
    assert "not valid base64" in refusal("data:image/png;base64,####")
    assert "is not an image" in refusal("data:text/plain,hello%20there")
    assert "ftp://" in refusal("ftp://host/a.png")
    assert "0x5" in refusal(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "AVIF"])
def test_truncated_files_are_errors(kind: str) -> None:
    if kind == "AVIF" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    data = encoded(Image.fromarray(noise(64, 64)), kind)
    for keep in (len(data) // 2, 40):
        assert "expected a complete, undamaged image" in refusal(data[:keep])


def test_a_damaged_lazy_pil_image_is_an_error_too() -> None:
    data = encoded(Image.fromarray(noise(64, 64)))
    assert "cannot be decoded" in refusal(Image.open(io.BytesIO(data[: len(data) // 2])))


def png_header(width: int, height: int) -> bytes:
    """A 1-bit PNG that claims this size and holds almost nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0"))


def test_decompression_bombs_are_refused_before_they_are_decoded() -> None:
    started = time.process_time()
    message = refusal(png_header(60000, 60000))
    assert "60000x60000, 3600 megapixels, expected at most 200" in message
    assert time.process_time() - started < 0.5
    assert "3x2" in refusal(PNG, max_pixels=5)
    assert load_image(PNG, max_pixels=6).size == (3, 2)
    assert "3x2" in refusal(Image.open(io.BytesIO(PNG)), max_pixels=5)


def test_pil_has_no_say_in_the_limit() -> None:
    # 110 megapixels: PIL would warn (an error in this suite). 187: it would refuse.
    assert "110 megapixels, expected at most 100:" in refusal(
        png_header(11000, 10000), max_pixels=10**8
    )
    assert "187 megapixels" in refusal(png_header(17000, 11000), max_pixels=10**8)


def test_postscript_is_never_run() -> None:
    assert "is not an image" in refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


# --- HEIF ---

HEIC = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"mif1", 0, b"mif1", b"heic") + bytes(40)


def test_heif_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert 'pip install "fastvlm-mlx[heif]"' in refusal(HEIC)


def test_heif_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class Opened:
        size = (4, 3)

        def to_pillow(self) -> Image.Image:
            return Image.new("RGB", self.size, (7, 8, 9))

    module = types.ModuleType("pillow_heif")
    module.open_heif = lambda stream: Opened()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    assert pixels(load_image(HEIC)) == [[7, 8, 9]] * 12
    assert "4x3" in refusal(HEIC, max_pixels=11)


def test_a_picture_that_is_in_the_cloud_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is listed like any other, with its size; reading it is what fails."""

    class Dataless(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise OSError(errno.EDEADLK, "Resource deadlock avoided")

    monkeypatch.setattr(images, "open_source", lambda *_: (Dataless(), "IMG_1.HEIC"))
    assert "IMG_1.HEIC is kept in the cloud" in refusal("IMG_1.HEIC")
    assert "download it first" in refusal("IMG_1.HEIC")


def test_a_real_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 40))).save(buffer)
    image = load_image(buffer.getvalue())
    assert image.size == (64, 48)
    np.testing.assert_allclose(np.asarray(image)[20, 20], (200, 30, 40), atol=6)
    assert "undamaged" in refusal(buffer.getvalue()[:200])


def test_a_real_heif_is_turned_once_and_keeps_its_profile() -> None:
    """A telephone held upright writes a picture that lies, and Display P3."""
    heif = pytest.importorskip("pillow_heif")
    lying = Image.new("RGB", (64, 48), (220, 30, 30))
    lying.paste((30, 30, 220), (0, 0, 64, 24))  # blue above, which is right when upright
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    wide = profile(P3_COLUMNS)
    heif.from_pillow(lying).save(buffer, exif=exif.tobytes(), icc_profile=wide)
    image = load_image(buffer.getvalue())
    assert image.size == (48, 64)
    np.testing.assert_allclose(np.asarray(image)[30, 40], (30, 30, 220), atol=12)
    np.testing.assert_allclose(np.asarray(image)[30, 5], (220, 30, 30), atol=12)
    assert image.info["icc_profile"] == wide


# --- URLs ---

LARGE = 5000


class Handler(http.server.BaseHTTPRequestHandler):
    """One path per behaviour; remembers the Host headers it saw."""

    hosts: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: Any) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.hosts.append(self.headers["Host"])
        match self.path.split("?")[0]:
            case "/ok.png" | "/caf%C3%A9%20au%20lait.png":
                self.reply(200, PNG, Content_Length=len(PNG), Content_Type="image/png")
            case "/no-length.png":
                self.reply(200, PNG)
            case "/kept-open.png":
                self.protocol_version, self.close_connection = "HTTP/1.1", False
                self.reply(200, PNG, Content_Length=len(PNG), Connection="keep-alive")
            case "/page":
                self.reply(200, b"<html>sorry</html>", Content_Type="text/html")
            case "/short.png":
                self.reply(200, PNG[:30], Content_Length=len(PNG))
            case "/large":
                self.reply(200, bytes(LARGE), Content_Length=LARGE)
            case "/large-claimed":
                self.reply(200, PNG, Content_Length=10**12)
            case "/large-unannounced":
                self.reply(200, bytes(LARGE))
            case "/slow.png":
                time.sleep(2)
            case "/once":
                self.reply(302, Location="ok.png")
            case "/loop":
                self.reply(302, Location="/loop")
            case "/to-private":
                self.reply(302, Location="http://10.1.2.3/secret.png")
            case "/to-file":
                self.reply(302, Location="file:///etc/passwd")
            case "/not-http":
                self.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n")
            case _:
                self.reply(404)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    Handler.hosts = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "path",
    [
        "/ok.png",
        "/ok.png?a=1#top",
        "/café au lait.png",
        "/no-length.png",
        "/kept-open.png",
        "/once",
    ],
)
def test_a_url_is_fetched(server: str, path: str) -> None:
    assert pixels(load_image(server + path, allow_private_urls=True)) == [[1, 2, 3]] * 6
    assert Handler.hosts[-1] == server.removeprefix("http://")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing.png", "answered 404 Not Found"),
        ("/page", "text/html) is not an image"),
        ("/short.png", f"after 30 of {len(PNG)} bytes"),
        ("/loop", "redirects more than 5 times"),
        ("/to-file", "'file:///etc/passwd' is not a usable address"),
        ("/not-http", "cannot be fetched"),
    ],
)
def test_urls_that_give_no_image(server: str, path: str, message: str) -> None:
    assert message in refusal(server + path, allow_private_urls=True)


@pytest.mark.parametrize("path", ["/large", "/large-unannounced"])
def test_a_download_has_a_limit(server: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not an image" in refusal(server + path, allow_private_urls=True)
    assert "100 MB" in refusal(server + "/large-claimed", allow_private_urls=True)
    monkeypatch.setattr(fetching, "_MAX_DOWNLOAD", LARGE - 1)
    assert "is larger than" in refusal(server + path, allow_private_urls=True)


def test_a_silent_server(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_SOCKET_SECONDS", 0.1)
    assert "no answer within 0.1 s" in refusal(server + "/slow.png", allow_private_urls=True)


def test_a_slow_download(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_FETCH_SECONDS", 0.0)
    assert "too slow" in refusal(server + "/ok.png", allow_private_urls=True)


def test_private_addresses_are_refused_unless_allowed(server: str) -> None:
    seen = len(Handler.hosts)
    message = refusal(server + "/ok.png")
    assert "127.0.0.1, which is not a public address" in message and "allow_private_urls" in message
    assert "not a public address" in refusal(server.replace("127.0.0.1", "localhost") + "/ok.png")
    assert len(Handler.hosts) == seen


def test_redirects_are_followed_five_times(server: str) -> None:
    Handler.hosts.clear()
    refusal(server + "/loop", allow_private_urls=True)
    assert len(Handler.hosts) == 6


def test_redirects_are_checked_too(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_is_public", lambda address: address == "127.0.0.1")
    assert load_image(server + "/once").size == (3, 2)
    assert "10.1.2.3, which is not a public address" in refusal(server + "/to-private")


@pytest.mark.parametrize(
    ("address", "public"),
    [("93.184.216.34", True), ("2606:2800:220:1::1", True), ("127.0.0.1", False),
     ("10.0.0.1", False), ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False),
     ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False), ("240.0.0.1", False),
     ("255.255.255.255", False), ("::1", False), ("::", False), ("fe80::1%eth0", False),
     ("fc00::1", False), ("ff02::1", False), ("::ffff:127.0.0.1", False),
     ("::ffff:93.184.216.34", True), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False)],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert fetching._is_public(address) is public


def test_the_checked_address_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["93.184.216.34", "127.0.0.1"])  # a DNS server that changes its mind
    connected = []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        assert host == "rebinding.example"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert "Connection refused" in refusal("http://rebinding.example:8080/a.png")
    assert connected == [("93.184.216.34", 8080)]
    assert next(answers) == "127.0.0.1"  # asked once


def test_one_private_address_among_several_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        return [(0, 0, 0, "", (address, port)) for address in ("93.184.216.34", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert "10.0.0.1" in refusal("http://mixed.example/a.png")


def test_https_checks_the_name_and_not_the_address(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []

    class Context(ssl.SSLContext):
        def wrap_socket(self, sock: Any, *_: Any, server_hostname: Any = None, **__: Any) -> Any:
            names.append(server_hostname)
            return sock  # the server here speaks no TLS

    port = int(server.rsplit(":", 1)[1])
    monkeypatch.setattr(ssl, "create_default_context", lambda: Context(ssl.PROTOCOL_TLS_CLIENT))
    connect = socket.create_connection
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("93.184.216.34", 443))]
    )
    monkeypatch.setattr(
        socket, "create_connection", lambda _, timeout: local_connection(port, timeout)
    )
    assert connect is not socket.create_connection
    assert load_image("https://pictures.example/ok.png").size == (3, 2)
    assert names == ["pictures.example"]
    assert Handler.hosts[-1] == "pictures.example"


def local_connection(port: int, timeout: float) -> socket.socket:
    sock = socket.socket()
    sock.settimeout(timeout)
    sock.connect(("127.0.0.1", port))
    return sock


def test_a_python_without_certificates_asks_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    truststore = pytest.importorskip("truststore")
    empty = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    monkeypatch.setattr(ssl, "create_default_context", lambda: empty)
    assert fetching._trust() is empty
    monkeypatch.setattr(sys, "platform", "darwin")
    assert isinstance(fetching._trust(), truststore.SSLContext)


def test_a_certificate_problem_is_one_line(server: str) -> None:
    url = server.replace("http:", "https:") + "/ok.png"  # a plain server cannot shake hands
    assert "cannot be fetched" in refusal(url, allow_private_urls=True)


def test_hosts_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert "the host nowhere.invalid is not known" in refusal("https://nowhere.invalid/a.png")
    assert "is not known" in refusal(f"http://{'x' * 70}.example/a.png")
    assert "user name" in refusal("https://me:secret@host.example/a.png")
    for url in ("http://", "http://host:port/", "http://[::1/", "http://host:99999/a"):
        assert "is not a usable address" in refusal(url)


def test_a_file_whose_name_begins_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (3, 2)).save("~0.png")
    assert load_image("~0.png").size == (3, 2)
