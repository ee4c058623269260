"""Pictures in: anything a user calls an image -> oriented RGB -> square uint8 -> floats.

    load_image    path, URL, bytes, file, PIL image or array -> upright 8-bit RGB
    fit_image     -> (size, size, 3) uint8, the reference pipeline's bytes exactly
    to_pixels     -> (B, size, size, 3) float32 in [0, 1] on the device

The reference is Apple's predict.py (`pad`) and the CLIP image processor (`crop`). Everything stays
uint8 until the last step. Every failure is an ImageError; nothing of PIL's own leaks out.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import io
import ipaddress
import math
import os
import re
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, cast
from urllib.parse import SplitResult, quote, unquote_to_bytes, urljoin, urlsplit
from urllib.request import url2pathname

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import ImageError, OptionError

if TYPE_CHECKING:
    import http.client

    import mlx.core as mx
    from PIL.ImageCms import ImageCmsTransform

__all__ = ["MAX_PIXELS", "Fit", "ImageSource", "fit_image", "load_image", "to_pixels"]

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO"
    " | Image.Image | npt.NDArray[Any] | mx.array"
)
Fit = Literal["pad", "crop"]

# The largest phone sensors give 200 megapixels; decoded that is 0.8 GB, and a bomb is far beyond.
MAX_PIXELS = 200_000_000
# A padded square costs side * side; past this the work takes longer than a person waits.
_MAX_SIDE = 32_768
# One resampling pass is done in strips of this many pixels, so that they stay in the cache.
_STRIP_PIXELS = 1 << 20
# A JPEG decoded at a reduced scale keeps its shorter side at least this many times the target.
_DRAFT_MARGIN = 1.4

_MAX_DOWNLOAD = 100_000_000
_MAX_REDIRECTS = 5
_SOCKET_SECONDS = 20.0
_FETCH_SECONDS = 60.0

# An allow-list, because PIL would hand EPS to Ghostscript; TGA has no signature to recognise.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
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


def load_image(
    source: ImageSource,
    *,
    allow_private_urls: bool = False,
    max_pixels: int = MAX_PIXELS,
    draft: int | None = None,
) -> Image.Image:
    """Open any image source as a new, upright, 8-bit RGB image.

    `str` may be a path, an http(s) or file URL, or a `data:` URI; proxy variables are not used for
    URLs, because the address that is checked must be the address that is connected to.
    Arrays are (H, W, 3), (H, W, 4) or (H, W), uint8 or floating in [0, 1].

    Upright, opaque, 8-bit pictures equal `Image.open(f).convert("RGB")` bit for bit. EXIF
    orientation is applied; transparency is laid on white; deeper greyscale is scaled, not clipped;
    of animations the first frame is taken. A colour profile that differs from sRGB stays in
    `info["icc_profile"]`, and `fit_image` applies it after the resize, where it is cheap.

    `draft` is the size the picture will be fitted to: a JPEG may then be decoded at 1/2, 1/4 or
    1/8 scale, which is faster and no longer bit-identical.
    """
    if draft is not None and draft < 1:
        raise OptionError(f"draft is {draft}; expected a positive number of pixels, or None")
    if isinstance(source, Image.Image):
        _check_size(source.size, "the PIL image", max_pixels)
        with _decoding("the PIL image"):
            return _upright_rgb(source, ours=False)
    if isinstance(source, np.ndarray) or _is_mlx_array(source):
        image = _image_from_array(source)
        _check_size(image.size, "the array", max_pixels)
        return _upright_rgb(image)
    with contextlib.ExitStack() as stack:
        stream, name = _open_source(source, allow_private_urls, stack)
        with _decoding(name):
            image = _open_encoded(stream, name, max_pixels)
            if draft is not None and image.format in ("JPEG", "MPO"):
                shortest = math.ceil(draft * _DRAFT_MARGIN)
                image.draft(None, (shortest, shortest))
            return _upright_rgb(image)


def fit_image(image: Image.Image, size: int, fit: Fit = "pad") -> npt.NDArray[np.uint8]:
    """Make an RGB image a (size, size, 3) uint8 array with the reference's bytes.

    `pad` centres it on a black square and resizes that; `crop` resizes the shorter side to `size`
    and cuts the centre out. Both are PIL's bicubic on uint8, enlarging too.
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
    fitted = _pad(image, size) if fit == "pad" else _crop(image, size)
    if profile and (transform := _to_srgb(profile, "RGB")):
        fitted = _apply(transform, fitted)
    return np.asarray(fitted)


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


# --- fitting ---


def _pad(image: Image.Image, size: int) -> Image.Image:
    # PIL resizes a square along x, then along y, rounding to bytes between: so do we, without
    # ever building the square. The tests hold this against the installed PIL.
    side = max(image.size)
    image, left = _resample_centred(image, 0, side, size)
    image, top = _resample_centred(image, 1, side, size)
    return _shifted(image, (size, size), (left, top))


def _crop(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    scaled = int(size * max(image.size) / min(image.size))
    if scaled > _MAX_SIDE:
        raise ImageError(
            f"the image is {width}x{height}: too narrow for fit='crop', which would make it "
            f"{size}x{scaled}; use fit='pad'"
        )
    # In one call: which axis PIL takes first, and so how it rounds, depends on its version.
    target = (size, scaled) if width <= height else (scaled, size)
    resized = image.resize(target, Image.Resampling.BICUBIC)
    return _shifted(resized, (size, size), (-((target[0] - size) // 2), -((target[1] - size) // 2)))


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


# --- colour: whatever PIL decoded -> upright 8-bit RGB ---


def _upright_rgb(image: Image.Image, ours: bool = True) -> Image.Image:
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
        if transform := _to_srgb(profile, image.mode):
            return _apply(transform, image), None
        profile = None
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    # Dropping alpha would show hidden colours, usually black under black text; viewers show white.
    if alpha is not None and alpha.getextrema() != (255, 255):
        page = Image.new("RGB", rgb.size, (255, 255, 255))
        page.paste(rgb, mask=alpha)
        rgb = page
    return rgb, profile if profile and _to_srgb(profile, "RGB") else None


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


@functools.lru_cache(maxsize=8)
def _to_srgb(profile: bytes, mode: str) -> ImageCmsTransform | None:
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


def _is_mlx_array(source: object) -> bool:
    core = sys.modules.get("mlx.core")  # whoever holds an MLX array has imported it
    return core is not None and isinstance(source, core.array)


def _image_from_array(source: Any) -> Image.Image:
    if _is_mlx_array(source):
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


# --- encoded images ---


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height}, expected at least one pixel")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is {width}x{height}, {width * height / 1e6:.0f} megapixels, expected at most "
            f"{max_pixels / 1e6:g}: scale it down, or raise max_pixels if you trust it"
        )


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # PIL's plugins raise over a dozen types for damaged files
        raise ImageError(
            f"{name} cannot be decoded ({_reason(error)}); expected a complete, undamaged image: "
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
    tried: set[str] = set()
    for register in (Image.preinit, Image.init):  # the second imports every plugin
        register()
        for kind in _FORMATS:
            if kind in tried or kind not in Image.OPEN:
                continue
            tried.add(kind)
            factory, accept = Image.OPEN[kind]
            answer = accept is None or accept(head[:16])
            if isinstance(answer, str):  # recognised, but this Pillow was built without it
                reasons.append(answer)
            elif answer:
                stream.seek(0)
                try:
                    image = factory(stream, "")
                except Exception as error:
                    reasons.append(f"as {kind}: {_reason(error)}")
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
        f"{', '.join(kind for kind in _FORMATS if kind in tried)} or HEIF: check the file, or "
        "convert it to JPEG or PNG"
    )


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
        raise ImageError(
            f"{name} is a HEIF/HEIC image, which needs an extra package: "
            'pip install "fastvlm-mlx[heif]", or convert it to JPEG'
        ) from error
    heif = pillow_heif.open_heif(stream)
    _check_size(heif.size, name, max_pixels)
    image: Image.Image = heif.to_pillow()
    return image


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)  # without the number, and the path once more
    return " ".join(str(error).split()) or type(error).__name__


# --- sources ---


def _open_source(
    source: Any, allow_private_urls: bool, stack: contextlib.ExitStack
) -> tuple[BinaryIO, str]:
    """A seekable stream with something in it, and the name to call it by in messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _in_memory(bytes(source), "the image data")
    if isinstance(source, str):
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", source)
        kind = scheme[1].lower() if scheme else ""
        if kind in ("http", "https"):
            return _in_memory(*_fetch(source, allow_private_urls))
        if kind == "data":
            return _in_memory(_decode_data_uri(source), "the data: URI")
        if kind == "file":
            source = _path_of_file_url(source)
        elif kind and source[len(kind) :].startswith("://"):
            raise ImageError(
                f"got a {kind}:// address, expected a path or an http, https, file or data URL: "
                "download the image first"
            )
    if isinstance(source, (str, os.PathLike)):
        return _open_file(os.fsdecode(source), stack)
    if hasattr(source, "read"):
        return _read_file_object(source)
    raise ImageError(
        f"got {type(source).__name__}, expected one image: a path, URL, bytes, binary file, "
        "PIL image, or NumPy or MLX array"
    )


def _in_memory(data: bytes, name: str) -> tuple[BinaryIO, str]:
    if not data:
        raise ImageError(f"{name}: got 0 bytes, expected an image")
    return io.BytesIO(data), name


def _open_file(name: str, stack: contextlib.ExitStack) -> tuple[BinaryIO, str]:
    try:
        stream = stack.enter_context(Path(name).expanduser().open("rb"))
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):  # a pipe cannot seek, and a device may never end
            return _in_memory(stream.read(_MAX_DOWNLOAD), name)
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise ImageError(
            f"{name} is a directory, expected an image file: name one in it"
        ) from error
    except PermissionError as error:
        raise ImageError(f"{name}: permission denied; make the file readable first") from error
    except (OSError, ValueError, RuntimeError) as error:  # name too long, NUL in it, unknown ~user
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        raise ImageError(
            f"{shown!r} cannot be opened ({_reason(error)}); expected a path"
        ) from error
    if status.st_size == 0:
        raise ImageError(f"{name}: the file is empty, expected an image: fetch or export it again")
    return stream, name


def _read_file_object(source: Any) -> tuple[BinaryIO, str]:
    name = f"the file object {getattr(source, 'name', '')}".rstrip()
    try:
        data = source.read()
    except (OSError, ValueError) as error:  # ValueError: closed, or text that is not UTF-8
        raise ImageError(
            f"{name} cannot be read ({_reason(error)}); expected a file opened with mode 'rb'"
        ) from error
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ImageError(
            f"{name} gives {type(data).__name__}, expected bytes: open it with mode 'rb'"
        )
    return _in_memory(bytes(data), name)


def _path_of_file_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ImageError(
            f"{url} names the host {parts.netloc}, expected file:///path: use a local path"
        )
    return url2pathname(parts.path)


def _decode_data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma:
        raise ImageError("the data: URI has no comma; expected data:image/...;base64,...")
    data = unquote_to_bytes(body)
    if not header.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ImageError(
            f"the data: URI is not valid base64 ({_reason(error)}); expected it complete: "
            "check that it was not cut off"
        ) from error


# --- http: one address is looked up, judged, and connected to ---


def _fetch(url: str, allow_private: bool) -> tuple[bytes, str]:
    """The body, and the URL with its content type as a name for messages."""
    import http.client

    deadline = time.monotonic() + _FETCH_SECONDS
    target = url
    for _ in range(_MAX_REDIRECTS + 1):
        parts = _split_url(target)
        try:
            with contextlib.closing(_connect(parts, target, allow_private)) as connection:
                query = f"?{parts.query}" if parts.query else ""
                connection.request(
                    "GET",
                    quote((parts.path or "/") + query, safe="/%?:@!$&'()*+,;=~-._[]"),
                    headers={"User-Agent": "fastvlm-mlx", "Accept": "image/*"},
                )
                with connection.getresponse() as response:
                    location = response.getheader("Location")
                    if response.status in (301, 302, 303, 307, 308) and location:
                        target = urljoin(target, location)
                        continue
                    if response.status != 200:
                        raise ImageError(
                            f"{target}: the server answered {response.status} {response.reason}, "
                            "expected 200: check the address in a browser"
                        )
                    kind = response.getheader("Content-Type") or "no content type"
                    return _read_body(response, target, deadline), f"{target} ({kind})"
        except TimeoutError as error:
            raise ImageError(
                f"{target}: no answer within {_SOCKET_SECONDS:g} s; try again, or download it first"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ImageError(
                f"{target} cannot be fetched ({_reason(error)}); check the address and your "
                "connection (proxies are not used), or download it first"
            ) from error
    raise ImageError(
        f"{url} redirects more than {_MAX_REDIRECTS} times; use the address of the image itself"
    )


def _split_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            if parts.username is None and parts.password is None:
                return parts
            raise ValueError("a user name or password in it is not supported")
        raise ValueError("not http or https, or without a host")
    except ValueError as error:  # also a port that is no number, or an unclosed [
        raise ImageError(
            f"{url!r} is not a usable address ({_reason(error)}); expected https://host/path"
        ) from error


def _connect(parts: SplitResult, url: str, allow_private: bool) -> http.client.HTTPConnection:
    """A connection to an address that was checked: one look-up, so DNS cannot change its mind."""
    import http.client
    import ssl

    secure = parts.scheme == "https"
    try:
        host = cast(str, parts.hostname).encode("idna").decode("ascii")
        port = parts.port or (443 if secure else 80)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ImageError(
            f"{url}: the host {parts.hostname} is not known ({_reason(error)}); check the address "
            "and your connection"
        ) from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allow_private and (private := [a for a in addresses if not _is_public(a)]):
        raise ImageError(
            f"{url} leads to {private[0]}, which is not a public address: download the image "
            "yourself, or allow it with allow_private_urls"
        )
    plain = _first_connection(addresses, port)
    connection: http.client.HTTPConnection
    if secure:
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, port, context=context)
        try:
            connection.sock = context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
    else:
        connection = http.client.HTTPConnection(host, port)
        connection.sock = plain
    connection.auto_open = 0  # never connect again, by name
    return connection


def _first_connection(addresses: list[str], port: int) -> socket.socket:
    problem = OSError("the host has no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=_SOCKET_SECONDS)
        except OSError as error:
            problem = error
    raise problem


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        # These forms carry an IPv4 address, and the packet ends up there.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _read_body(response: http.client.HTTPResponse, url: str, deadline: float) -> bytes:
    expected = response.length
    too_big = ImageError(
        f"{url} is larger than {_MAX_DOWNLOAD / 1e6:g} MB, the most that is fetched: "
        "download it and scale it down first"
    )
    if expected is not None and expected > _MAX_DOWNLOAD:
        raise too_big
    body = bytearray()
    while chunk := response.read1(1 << 16):
        body += chunk
        if len(body) > _MAX_DOWNLOAD:
            raise too_big
        if time.monotonic() > deadline:
            raise ImageError(
                f"{url}: {len(body)} bytes in {_FETCH_SECONDS:g} s, too slow; download it first"
            )
    if expected is not None and len(body) != expected:
        raise ImageError(
            f"{url}: the connection ended after {len(body)} of {expected} bytes; try again"
        )
    return bytes(body)
