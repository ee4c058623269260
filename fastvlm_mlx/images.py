"""Pictures in: anything a user calls an image -> oriented RGB -> square uint8 -> floats.

    load_image    path, URL, bytes, file, PIL image or array -> upright 8-bit RGB
    fit_image     -> (size, size, 3) uint8, the reference pipeline's bytes exactly
    to_pixels     -> (B, size, size, 3) float32 in [0, 1] on the device

The reference is Apple's predict.py (`pad`) and the CLIP image processor (`crop`). Everything stays
uint8 until the last step. Every failure is an ImageError; nothing of PIL's own leaks out.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from .colour import image_from_array, is_mlx_array, to_srgb, upright_rgb
from .errors import ImageError, OptionError
from .fetching import open_source, reason

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = [
    "MAX_PIXELS",
    "Fit",
    "ImageSource",
    "PreprocessedImage",
    "check_formats",
    "fit_image",
    "load_image",
    "to_pixels",
]

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO"
    " | Image.Image | npt.NDArray[Any] | mx.array"
)
Fit = Literal["pad", "crop"]


@dataclass(frozen=True)
class PreprocessedImage:
    """A picture decoded and fitted, but not encoded; pass it wherever a picture goes.

    Made without MLX, hence in any thread.
    """

    crops: tuple[npt.NDArray[np.uint8], ...]
    """(H, W, 3) each, equal in size: the whole picture, then its tiles row by row, if any."""
    load_image: float = 0.0
    """Seconds from bytes to an upright RGB picture."""
    preprocess: float = 0.0
    """Seconds for padding or cropping, and resizing."""


# The largest phone sensors give 200 megapixels; decoded that is 0.8 GB, and a bomb is far beyond.
MAX_PIXELS = 200_000_000
# A padded square costs side * side; past this the work takes longer than a person waits.
_MAX_SIDE = 32_768
# One resampling pass is done in strips of this many pixels, so that they stay in the cache.
_STRIP_PIXELS = 1 << 20

# An allow-list, because PIL would hand EPS to Ghostscript; TGA has no signature to recognise.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
_HEIF_ENDINGS = (".heic", ".heif", ".hif")
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def load_image(
    source: ImageSource,
    *,
    allow_private_urls: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Open any image source as a new, upright, 8-bit RGB image.

    `str` may be a path, an http(s) or file URL, or a `data:` URI; proxy variables are not used for
    URLs, because the address that is checked must be the address that is connected to.
    Arrays are (H, W, 3), (H, W, 4) or (H, W), uint8 or floating in [0, 1].

    Upright, opaque, 8-bit pictures equal `Image.open(f).convert("RGB")` bit for bit. EXIF
    orientation is applied; transparency is laid on white; deeper greyscale is scaled, not clipped;
    of animations the first frame is taken. A colour profile that differs from sRGB stays in
    `info["icc_profile"]`, and `fit_image` applies it after the resize, where it is cheap.
    """
    if isinstance(source, Image.Image):
        _check_size(source.size, "the PIL image", max_pixels)
        with _decoding("the PIL image"):
            return upright_rgb(source, ours=False)
    if isinstance(source, np.ndarray) or is_mlx_array(source):
        image = image_from_array(source)
        _check_size(image.size, "the array", max_pixels)
        return upright_rgb(image)
    with contextlib.ExitStack() as stack:
        stream, name = open_source(source, allow_private_urls, stack)
        with _decoding(name):
            image = _open_encoded(stream, name, max_pixels)
            return upright_rgb(image)


def check_formats(names: Sequence[str]) -> None:
    """Raise ImageError if files are HEIF by their ending and the package that reads it is missing.

    For before a model is loaded, or a folder is begun; whoever opens them finds out in any case.
    """
    heif = [n for n in names if n.lower().endswith(_HEIF_ENDINGS) and "://" not in n]
    if heif and importlib.util.find_spec("pillow_heif") is None:
        others = f" and {len(heif) - 1} more of {len(names)}" if len(heif) > 1 else ""
        raise _no_heif(f"{heif[0]}{others}")


def fit_image(
    image: Image.Image, size: int, fit: Fit = "pad", grid: tuple[int, int] = (1, 1)
) -> npt.NDArray[np.uint8]:
    """Make an RGB image a (size, size, 3) uint8 array with the reference's bytes.

    `pad` centres it on a black square and resizes that; `crop` resizes the shorter side to `size`
    and cuts the centre out. Both are PIL's bicubic on uint8, enlarging too. With a `grid` of
    (rows, columns) the result is (rows * size, columns * size, 3), padded or cropped to that shape.
    """
    if size < 1:
        raise OptionError(f"size is {size}; expected a positive number of pixels")
    if fit not in ("pad", "crop"):
        raise OptionError(f"fit is {fit!r}; expected 'pad' or 'crop'")
    if image.mode != "RGB":
        raise ImageError(
            f"got a PIL image of mode {image.mode}, expected RGB: use load_image first"
        )
    width, height = image.size
    _check_size(image.size, "the image", MAX_PIXELS)
    if max(width, height) > _MAX_SIDE:
        raise ImageError(
            f"the image is {width}x{height}; sides up to {_MAX_SIDE} can be prepared: "
            "cut it into pieces or scale it down first"
        )
    profile = image.info.get("icc_profile")
    target = (grid[1] * size, grid[0] * size)
    fitted = _pad(image, target) if fit == "pad" else _crop(image, target)
    return np.asarray(to_srgb(fitted, profile) if profile else fitted)


def to_pixels(images: Sequence[npt.NDArray[np.uint8]]) -> mx.array:
    """Stack (H, W, 3) uint8 images into (B, H, W, 3) float32 in [0, 1].

    The bytes travel to the device as uint8 and are divided there. 255 is always the divisor:
    an image whose brightest value is 1 is nearly black, not white.
    """
    import mlx.core as mx

    if not images:
        raise ImageError("got no images, expected at least one (H, W, 3) uint8 array")
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape != (*images[0].shape[:2], 3):
            raise ImageError(
                f"got an array of shape {image.shape} and dtype {image.dtype}, expected uint8 of "
                f"shape {(*images[0].shape[:2], 3)}: prepare every image with fit_image"
            )
    return mx.array(np.stack(images)).astype(mx.float32) * (1 / 255)


# --- encoded images ---


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height}, expected at least one pixel")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is {width}x{height}, {width * height / 1e6:.0f} megapixels, expected at most "
            f"{max_pixels / 1e6:g}: scale it down first"
        )


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # PIL's plugins raise over a dozen types for damaged files
        if isinstance(error, OSError) and error.errno == errno.EDEADLK:
            raise ImageError(
                f"{name} is kept in the cloud, and macOS did not fetch it ({reason(error)}); "
                "download it first, in Finder for example"
            ) from error
        raise ImageError(
            f"{name} cannot be decoded ({reason(error)}); expected a complete, undamaged image: "
            "fetch or export it again"
        ) from error


def _open_encoded(stream: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """What `Image.open` does, with our own formats and our own size limit.

    PIL's limit is a module global and a warning; changing either would not be ours to do.
    """
    head = stream.read(64)
    stream.seek(0)
    if _is_heif(head):
        return _open_heif(stream, name, max_pixels)
    reasons: list[str] = []
    for kind, factory, accept in _openers():
        answer = accept is None or accept(head[:16])
        if isinstance(answer, str):  # recognised, but this Pillow was built without it
            reasons.append(answer)
        elif answer:
            stream.seek(0)
            try:
                image = factory(stream, "")
            except Exception as error:
                reasons.append(f"as {kind}: {reason(error)}")
                continue
            _check_size(image.size, name, max_pixels)
            return image
    if reasons:
        raise ImageError(
            f"{name} cannot be opened ({'; '.join(reasons)}); expected a complete, undamaged image:"
            " fetch or export it again"
        )
    raise ImageError(
        f"{name} is not an image this library reads: it starts with {head[:16]!r}, expected "
        f"{', '.join(kind for kind in _FORMATS if kind in Image.OPEN)} or HEIF: check the file, or "
        "convert it to JPEG or PNG"
    )


def _openers() -> Iterator[
    tuple[str, Callable[..., Image.Image], Callable[[bytes], bool | str] | None]
]:
    """PIL's plugins for our formats; the rarer ones are imported only when it comes to them."""
    tried: set[str] = set()
    for register in (Image.preinit, Image.init):
        register()
        for kind in _FORMATS:
            if kind in Image.OPEN and kind not in tried:
                tried.add(kind)
                yield (kind, *Image.OPEN[kind])


def _is_heif(head: bytes) -> bool:
    if head[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[8:12]} | {head[at : at + 4] for at in range(16, end, 4)}
    return bool(brands & _HEIF_BRANDS) and not brands & {b"avif", b"avis"}


def _open_heif(stream: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        raise _no_heif(name) from error
    heif = pillow_heif.open_heif(stream)
    _check_size(heif.size, name, max_pixels)
    image: Image.Image = heif.to_pillow()
    return image


def _no_heif(what: str) -> ImageError:
    return ImageError(
        f"{what}: HEIF/HEIC needs an extra package: "
        'pip install "fastvlm-mlx[heif]", or convert to JPEG'
    )


# --- fitting ---


def _pad(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    # PIL resizes a square along x, then along y, rounding to bytes between: so do we, without
    # ever building the square. The tests hold this against the installed PIL.
    (width, height), (across, down) = image.size, target
    area = max(width * down, height * across)  # the smallest canvas of the target's shape
    image, left = _resample_centred(image, 0, -(-area // down), across)
    image, top = _resample_centred(image, 1, -(-area // across), down)
    return _shifted(image, target, (left, top))


def _crop(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    (width, height), (across, down) = image.size, target
    if width * down <= height * across:
        scaled = (across, int(across * height / width))
    else:
        scaled = (int(down * width / height), down)
    if max(scaled) > _MAX_SIDE:
        raise ImageError(
            f"the image is {width}x{height}: too narrow for fit='crop', which would make it "
            f"{scaled[0]}x{scaled[1]}; use fit='pad'"
        )
    # In one call: which axis PIL takes first, and so how it rounds, depends on its version.
    resized = image.resize(scaled, Image.Resampling.BICUBIC)
    return _shifted(resized, target, (-((scaled[0] - across) // 2), -((scaled[1] - down) // 2)))


def _resample_centred(
    image: Image.Image, axis: int, side: int, size: int
) -> tuple[Image.Image, int]:
    """Centre `image` along `axis` in `side` black pixels and resample those to `size`.

    Returns the part that may differ from black and where it starts.
    """
    length, across = image.size[axis], image.size[1 - axis]
    offset = (side - length) // 2
    if side == size:  # PIL leaves an axis alone whose length does not change
        return image, offset
    if length == side:
        return image.resize(_along(axis, size, across), Image.Resampling.BICUBIC), 0
    first, last, low, high = _reach(offset, length, side, size)
    start, stop = first * side / size - low, last * side / size - low
    result = Image.new("RGB", _along(axis, last - first, across))
    step = max(1, _STRIP_PIXELS // (high - low))
    for at in range(0, across, step):
        count = min(step, across - at)
        strip = _shifted(
            image, _along(axis, high - low, count), _along(axis, offset - low, -at)
        ).resize(
            _along(axis, last - first, count),
            Image.Resampling.BICUBIC,
            box=(*_along(axis, start, 0), *_along(axis, stop, count)),
        )
        result.paste(strip, _along(axis, 0, at))
    return result, first


def _reach(offset: int, length: int, side: int, size: int) -> tuple[int, int, int, int]:
    """Output range [first, last) that the picture can colour, and input range it is made from.

    PIL derives its weights from float positions. They come out equal for a part of the line only
    if no position is rounded: `size` a power of two, and the box exact in PIL's 24-bit floats.
    """
    if size & (size - 1) == 0:
        scale = side / size
        reach = 2 * max(scale, 1.0) + 1  # bicubic looks at two output pixels on either side
        first = max(0, math.floor((offset - reach) / scale) - 1)
        last = min(size, math.ceil((offset + length + reach) / scale) + 1)
        low = max(0, math.floor(first * scale - reach) - 1)
        high = min(side, math.ceil(last * scale + reach) + 1)
        box = (first * scale - low, last * scale - low, (last - first) * scale)
        if all(struct.unpack("f", struct.pack("f", value))[0] == value for value in box):
            return first, last, low, high
    return 0, size, 0, side


def _along(axis: int, value: Any, across: Any) -> tuple[Any, Any]:
    return (value, across) if axis == 0 else (across, value)


def _shifted(image: Image.Image, size: tuple[int, int], at: tuple[int, int]) -> Image.Image:
    """Place `image` at `at` on black of `size`, cutting what falls outside."""
    if image.size == size and at == (0, 0):
        return image
    canvas = Image.new("RGB", size)
    canvas.paste(image, at)
    return canvas
