"""From the name of a model to an object that answers questions."""

import os
import warnings
from collections.abc import Callable

import mlx.core as mx

from .checkpoint.loading import Examined, load_checkpoint, weight_bytes
from .checkpoint.source import DEFAULT_MODEL, checkpoint_folder
from .errors import CheckpointError, OptionError
from .features import MEMORY_BYTES, FeatureCache
from .images import Fit
from .memory import available_memory, physical_memory
from .tiling import Grid, ImageSize, check_grid, check_image_size
from .vlm import FastVLM

__all__ = ["DTYPES", "default_model", "load"]

# Freed buffers that MLX may keep: the encoder needs those of a batch again (1.3 GB at 1024 x 1024),
# but by default a long run over pictures of many sizes would fill a Mac's memory with them.
_CACHE_BYTES = 4 << 30

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def default_model() -> str:
    """$FASTVLM_MODEL, else apple/FastVLM-0.5B."""
    return os.environ.get("FASTVLM_MODEL") or DEFAULT_MODEL


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    quantize: int | None = None,
    image_size: ImageSize | None = None,
    tiles: Grid = (1, 1),
    fit: Fit = "pad",
    feature_cache: int | str | os.PathLike[str] | FeatureCache | None = MEMORY_BYTES,
    revision: str | None = None,
    allow_private_urls: bool = False,
    announce: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FastVLM:
    """Load a FastVLM.

    Args:
        model: "nano" (built in), a checkpoint directory, one of Apple's .zip files, or a Hub id;
            by default $FASTVLM_MODEL, else apple/FastVLM-0.5B.
        dtype: "float32", "float16" or "bfloat16"; by default what suits the device.
        quantize: quantize the language model and projector to this many bits while loading. On
            the CPU the values are those of the quantized model, but kept as float32.
        image_size: side in pixels, a multiple of 64 up to 2048, of the square a picture is fitted
            to; by default the checkpoint's own. Fewer pixels are fewer tokens and a faster answer.
            "auto" takes the least that holds the picture, from 256 to the checkpoint's own.
        tiles: (rows, columns), up to (4, 4), of squares of that size that a picture is cut into,
            besides an overview of the whole; (1, 1) is the whole picture once.
        fit: "pad" to a square with black first (as the models are used by Apple's predict.py), or
            "crop" the centre.
        feature_cache: where to remember encoded pictures, so that a further question about one
            costs no encoder run: bytes of memory, a directory (which also outlives the process), a
            `FeatureCache`, or None for nowhere (to measure the encoder, for example).
        revision: branch, tag or commit on the Hub.
        allow_private_urls: let picture URLs point into private networks.
        announce: gets one line (size, licence) before a download, and one if the weights are more
            than a Mac's GPU should hold; without it that is a warning.
        progress: is told (tensors loaded, tensors in all).

    On Metal macOS is asked to keep the weights resident, and MLX to keep less freed memory than it
    would. Raises OptionError, CheckpointError or HubError.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    if quantize is not None and (type(quantize) is not int or quantize not in (2, 3, 4, 5, 6, 8)):
        raise OptionError(f"quantize is {quantize!r}; expected 2, 3, 4, 5, 6 or 8 bits.")
    if image_size is not None:
        check_image_size(image_size)
    check_grid(tiles)
    if fit not in ("pad", "crop"):
        raise OptionError(f"fit is {fit!r}; expected 'pad' or 'crop'.")
    cache = FeatureCache.of(feature_cache)
    on_gpu = mx.default_device() == mx.gpu
    on_metal = on_gpu and mx.metal.is_available()
    if on_metal:
        _prepare_metal()
    weights = DTYPES[dtype] if dtype else (mx.bfloat16 if on_gpu else mx.float32)
    vision = DTYPES[dtype] if dtype else (mx.float16 if on_gpu else mx.float32)

    def examined(source: Examined) -> None:
        if on_metal:
            _check_room(weight_bytes(source, weights, vision, quantize), quantize, announce)

    name = default_model() if model is None else model
    with checkpoint_folder(name, revision, announce) as folder:
        loaded = load_checkpoint(
            folder,
            dtype=weights,
            vision_dtype=vision,
            keep_quantized=on_gpu,
            quantize=quantize,
            progress=progress,
            examined=examined,
        )
    return FastVLM(
        loaded,
        image_size=image_size,
        tiles=tiles,
        fit=fit,
        feature_cache=cache,
        allow_private_urls=allow_private_urls,
    )


def _prepare_metal() -> None:
    room = int(mx.device_info()["max_recommended_working_set_size"])
    # So that macOS keeps the weights resident; 15 and later, a no-op before.
    mx.set_wired_limit(room)
    wanted = min(room // 4, _CACHE_BYTES)
    before = mx.set_cache_limit(wanted)
    if before < wanted:  # somebody has asked for less
        mx.set_cache_limit(before)


def _check_room(needed: int, quantize: int | None, announce: Callable[[str], None] | None) -> None:
    """Tell of weights beyond what the GPU may still use; refuse those beyond all memory."""
    room, whole = available_memory(), physical_memory()
    if room is None or whole is None or needed <= room:
        return
    advice = "choose a smaller model"
    if quantize is None:
        advice = "quantize it while loading (--quantize 4, quantize=4)"
    said = (
        f"The weights take {needed / 1e9:.1f} GB; of this machine's {whole / 1e9:.1f} GB macOS "
        f"has {room / 1e9:.1f} GB for the GPU"
    )
    if needed > whole:
        raise CheckpointError(f"{said}: {advice}.")
    line = f"{said}, so answers will be slow: {advice}."
    if announce:
        announce(line)
    else:
        warnings.warn(line, RuntimeWarning, stacklevel=3)
