"""Values to files: each tensor is read, cast or quantized in row pieces, and written at once.

Memory holds one source tensor and a few pieces of it, however large the model is.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from fastvlm_mlx.checkpoint.quantized import Quantization
from fastvlm_mlx.checkpoint.writing import ShardedWriter
from fastvlm_mlx.errors import CheckpointError

from .plan import Plan

__all__ = [
    "DTYPES",
    "Streams",
    "dequantize",
    "float_dtype",
    "quantize",
    "small_cache",
    "weight_error",
    "write_values",
]

_PIECE_BYTES = 32 << 20
DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_SAMPLED_ROWS = 128


def write_values(
    plan: Plan, values: Iterator[tuple[str, mx.array]], writer: ShardedWriter
) -> dict[str, float]:
    """Write everything; returns module -> relative error of its quantized matrix.

    The error is the root mean square of the difference over that of the weights, on evenly spaced
    rows. Raises CheckpointError for values that are NaN, infinite or out of the dtype's range.
    """
    streams = Streams()
    errors: dict[str, float] = {}
    for name, array in values:
        module = name.removesuffix(".weight")
        if name.rpartition(".")[0] in plan.kept and not name.endswith(".bias"):
            writer.write(plan.tensors[name].name, array)
            continue
        how = plan.quantization.get(module) if name.endswith(".weight") else None
        mx.eval(array)
        if how is None:
            _write_floats(plan, name, array, writer, streams)
        else:
            errors[module] = _write_quantized(plan, module, how, array, writer, streams)
        del array
    return errors


@contextmanager
def small_cache() -> Iterator[None]:
    """Give freed memory back at once: MLX would keep what the largest tensors took."""
    limit = mx.set_cache_limit(_PIECE_BYTES)
    mx.clear_cache()
    try:
        yield
    finally:
        mx.set_cache_limit(limit)


class Streams:
    """Two queues on the CPU, whose kernels here are single-threaded; the GPU has its own."""

    def __init__(self) -> None:
        cpu = mx.default_device() == mx.cpu
        self.all = (
            [mx.new_stream(mx.cpu), mx.new_stream(mx.cpu)]
            if cpu
            else [mx.default_stream(mx.default_device())]
        )

    def rows(self, shape: tuple[int, ...]) -> Iterator[list[tuple[slice, mx.Stream]]]:
        """The rows of an array of this shape, a piece for each stream at a time."""
        width = max(1, math.prod(shape[1:]))
        step = max(1, min(_PIECE_BYTES // (4 * width), -(-shape[0] // len(self.all))))
        parts = [slice(at, at + step) for at in range(0, shape[0], step)]
        for at in range(0, len(parts), len(self.all)):
            yield list(zip(parts[at:], self.all, strict=False))


def _pieces(array: mx.array, streams: Streams) -> Iterator[list[tuple[mx.array, mx.Stream]]]:
    for batch in streams.rows(array.shape):
        yield [(array[rows], stream) for rows, stream in batch]


def _write_floats(
    plan: Plan, name: str, array: mx.array, writer: ShardedWriter, streams: Streams
) -> None:
    target = plan.tensors[name]
    for batch in _pieces(array, streams):
        cast = [part.astype(DTYPES[target.dtype], stream=s) for part, s in batch]
        sums = [c.astype(mx.float32, stream=s).sum(stream=s) for c, (_, s) in zip(cast, batch)]  # noqa: B905
        mx.eval(cast, sums)
        for piece, total in zip(cast, sums, strict=True):
            _check_finite(name, total, target.dtype)
            writer.write(target.name, piece)


def _write_quantized(
    plan: Plan,
    module: str,
    how: Quantization,
    array: mx.array,
    writer: ShardedWriter,
    streams: Streams,
) -> float:
    names = [f"{module}.{part}" for part in ("weight", "scales", "biases")]
    targets = [plan.tensors[name] for name in names if name in plan.tensors]
    vision = module.startswith("vision.")
    dtype = DTYPES[targets[-1].dtype] if how.mode == "affine" else float_dtype(plan, vision)
    for batch in _pieces(array, streams):
        packed = [quantize(part, how, dtype, s) for part, s in batch]
        sums = [part.astype(mx.float32, stream=s).sum(stream=s) for part, s in batch]
        mx.eval(packed, sums)
        for parts, total in zip(packed, sums, strict=True):
            _check_finite(module, total, "F32")
            for target, part in zip(targets, parts, strict=True):
                writer.write(target.name, part)
    return weight_error(array, how, dtype)


def float_dtype(plan: Plan, vision: bool) -> mx.Dtype:
    """The dtype of unquantized tensors in the tower, or in the rest."""
    kinds = [t.dtype for n, t in plan.tensors.items() if n.startswith("vision.") == vision]
    return next(DTYPES[kind] for kind in kinds if kind in DTYPES)


def quantize(
    array: mx.array, how: Quantization, dtype: mx.Dtype, stream: mx.Stream | None = None
) -> list[mx.array]:
    """`mx.quantize` of the rows, cast to `dtype` first, as mlx-lm and mlx-vlm do."""
    weights = array.astype(dtype, stream=stream)
    return list(mx.quantize(weights, how.group_size, how.bits, how.mode, stream=stream))


def dequantize(parts: list[mx.array], how: Quantization) -> mx.array:
    """The float32 weights that packed parts stand for."""
    scales, biases = parts[1], parts[2] if len(parts) > 2 else None
    if how.mode == "affine":
        scales = scales.astype(mx.float32)
    return mx.dequantize(
        parts[0],
        scales,
        None if biases is None else biases.astype(mx.float32),
        group_size=how.group_size,
        bits=how.bits,
        mode=how.mode,
    ).astype(mx.float32)


def weight_error(array: mx.array, how: Quantization, dtype: mx.Dtype) -> float:
    """Relative error of a quantized matrix, on evenly spaced rows."""
    rows = array[:: max(1, array.shape[0] // _SAMPLED_ROWS)].astype(mx.float32)
    difference = dequantize(quantize(rows, how, dtype), how) - rows
    ratio: Any = mx.sqrt(difference.square().mean() / (rows.square().mean() + 1e-30)).item()
    return float(ratio)


def _check_finite(name: str, total: mx.array, dtype: str) -> None:
    value: Any = total.item()
    if not abs(value) < float("inf"):
        raise CheckpointError(
            f"{name} holds NaN or infinite values, or values that do not fit {dtype}; the source "
            "is damaged, or another --dtype is needed."
        )
