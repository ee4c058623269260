"""Whatever PIL decoded, or a user's array -> upright 8-bit RGB.

A colour profile that differs from sRGB is carried along in `info["icc_profile"]`, and applied with
`to_srgb` once the picture is small.
"""

from __future__ import annotations

import functools
import io
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import ImageError

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

__all__ = ["image_from_array", "is_mlx_array", "to_srgb", "upright_rgb"]

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112


def upright_rgb(image: Image.Image, ours: bool = True) -> Image.Image:
    """Decode, convert and turn; an image that is not `ours` to change is copied."""
    image.load()
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata does not make a picture unreadable
        orientation = 1
    rgb, profile = _to_rgb(image)
    if orientation in _TRANSPOSE:
        rgb = rgb.transpose(_TRANSPOSE[orientation])
    elif rgb is image and not ours:
        rgb = rgb.copy()
    # Orientation and transparency are used up; left in `info` they could be applied twice.
    rgb.info = {"icc_profile": profile} if profile else {}
    return rgb


def _to_rgb(image: Image.Image) -> tuple[Image.Image, bytes | None]:
    """RGB, and the colour profile that `fit_image` still has to apply, if any."""
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _from_deep_grey(image)
    elif image.has_transparency_data:
        image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        alpha = image.getchannel("A")
    if profile and image.mode in ("L", "CMYK"):
        image, profile = to_srgb(image, profile), None
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    # Dropping alpha would show hidden colours, usually black under black text; viewers show white.
    if alpha is not None and alpha.getextrema() != (255, 255):
        page = Image.new("RGB", rgb.size, (255, 255, 255))
        page.paste(rgb, mask=alpha)
        rgb = page
    return rgb, profile if profile and _transform_to_srgb(profile, "RGB") else None


def _from_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":
        return Image.fromarray(_bytes_from_unit(values, "the floating-point image"))
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"the greyscale image has values from {values.min()} to {values.max()}, expected "
            "0 to 65535: scale them to 8 or 16 bits first"
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


# --- colour profiles ---


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an RGB, L or CMYK image from `profile` to sRGB; as it is where that is no use."""
    transform = _transform_to_srgb(profile, image.mode)
    return _apply(transform, image) if transform else image


@functools.lru_cache(maxsize=8)
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCmsTransform | None:
    """The transform from `profile`, or None if it is sRGB in effect, damaged, or for other modes.

    Decided by what it does to a grid of colours: names like "sRGB built-in" vary without end.
    A profile that cannot be used is ignored, which is what the reference does with all of them.
    """
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB")
    except Exception:
        return None
    if mode == "CMYK":
        return transform
    if mode == "L":
        probe = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    else:
        levels = np.arange(0, 256, 51, dtype=np.uint8)
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
        probe = Image.fromarray(grid.reshape(1, -1, 3))
    before = np.asarray(probe.convert("RGB")).astype(int)
    after = np.asarray(_apply(transform, probe)).astype(int)
    return transform if np.abs(after - before).max() > 2 else None


def _apply(transform: ImageCmsTransform, image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # None only with inPlace=True
    return converted


# --- arrays ---


def is_mlx_array(source: object) -> bool:
    core = sys.modules.get("mlx.core")  # whoever holds an MLX array has imported it
    return core is not None and isinstance(source, core.array)


def image_from_array(source: Any) -> Image.Image:
    """An (H, W, 3), (H, W, 4) or (H, W) array, uint8 or floating in [0, 1], as a PIL image."""
    if is_mlx_array(source):
        import mlx.core as mx

        if mx.issubdtype(source.dtype, mx.floating):
            source = source.astype(mx.float32)  # NumPy has no bfloat16
    array = np.array(source)
    grey_or_colour = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not grey_or_colour or 0 in array.shape:
        hint = ""
        if array.ndim == 3 and array.shape[0] in (3, 4):
            hint = ": move the channels last, array.transpose(1, 2, 0)"
        elif array.ndim == 4:
            hint = ": pass the images one by one"
        raise ImageError(
            f"got an array of shape {array.shape}, expected (height, width, 3), (height, width, 4) "
            f"or (height, width), none of them 0{hint}"
        )
    if np.issubdtype(array.dtype, np.floating):
        array = _bytes_from_unit(array, "the array")
    elif array.dtype != np.uint8:
        raise ImageError(
            f"got an array of dtype {array.dtype}, expected uint8, or floating point in [0, 1]: "
            "scale and convert it first"
        )
    return Image.fromarray(array)


def _bytes_from_unit(values: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ImageError(
            f"{name} has floating-point values from {low} to {high}, expected [0, 1]: "
            "divide by the largest possible value first"
        )
    scaled: npt.NDArray[np.float32] = np.rint(values.astype(np.float32) * np.float32(255))
    return scaled.astype(np.uint8)
