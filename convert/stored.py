"""Every weight in the files against the source's, by arithmetic alone: no model runs.

The result is opened again and each tensor compared with what the source (its tower folded, where
the layout is) says. How far a weight may be off follows from the formats, whatever the weights are:

* A float is off by half a unit in the last place of its dtype.
* `affine`: a group whose weights span a range r has 2^bits - 1 steps of r / (2^bits - 1). MLX then
  stretches or shrinks the step, by half a step in at least 2^(bits - 1), so that zero is on the
  grid. Where it shrinks, the grid's far end falls short by up to r / 2^bits; every other weight is
  off by less. The scale and bias are rounded to the dtype besides; float16 has no steps finer than
  2^-24, so a small scale may be half of that off, once for each of the 2^bits steps. MLX makes no
  scale less than 1e-7.
* `mxfp4`, `mxfp8`, `nvfp4`: rounding to the nearest value, at worst between the two highest that
  count: a fifth of the group's largest magnitude for 4 bits (5 between 4 and 6), a seventeenth for
  8 (17 between 16 and 18). `nvfp4` rounds its scale to four significant bits as well, and that
  scale cannot be less than 2^-9.

So a swapped matrix, a wrong scale or a lost bias shows, in a random model as in a trained one.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.checkpoint.dialects import Dialect
from fastvlm_mlx.checkpoint.loading import Examined, examine_checkpoint, network_values, unpacked
from fastvlm_mlx.checkpoint.quantized import Quantization
from fastvlm_mlx.checkpoint.tensors import TensorRef
from fastvlm_mlx.config import Config

from .plan import Plan
from .streaming import DTYPES, Streams, dequantize, float_dtype

__all__ = ["StoredWeights", "check_stored"]

_ROUNDOFF = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
"""Half a unit in the last place; doubled for bfloat16, which some kernels truncate to."""
_RECOMPUTED = 1e-5
"""Folding again may add in another order: relative to the tensor's largest magnitude."""
_SMALLEST = 2.0**-24
"""float16's smallest step."""


@dataclass(frozen=True)
class StoredWeights:
    """What the comparison found."""

    tensors: int
    weights: int
    worst: float
    """Largest error of a weight, over what rounding may cause; above 1 is a failure."""
    worst_tensor: str
    failures: list[str] = field(default_factory=list)


def check_stored(
    source: Examined,
    folder: Path,
    plan: Plan,
    progress: Callable[[int, int], None] | None = None,
) -> StoredWeights:
    """Compare every tensor in `folder` with the source; `progress` is told (bytes done, total)."""
    result = examine_checkpoint(folder)
    failures = _config_failures(source.config, result.config)
    found = dict(result.refs)
    total = sum(t.nbytes for t in plan.tensors.values())
    streams = Streams()
    weights = done = 0
    worst, where = 0.0, ""
    compared: set[str] = set()
    for name, array in _expected(source, result, plan):
        module = name.removesuffix(".weight")
        how = plan.quantization.get(module) if name.endswith(".weight") else None
        if name.rpartition(".")[0] in plan.kept and not name.endswith(".bias"):
            names, ratio = [name], _copied(array, found[name])
        elif how is not None:
            names = [n for n in (f"{module}.{p}" for p in _PARTS) if n in found]
            dtype = float_dtype(plan, module.startswith("vision."))
            ratio = _quantized(array, [found[n] for n in names], how, dtype, streams)
            weights += array.size
        else:
            names, ratio = [name], _rounded(array, found[name], streams)
            weights += array.size
        compared.update(names)
        if not ratio <= 1:  # NaN fails
            failures.append(_failure(name, ratio, how))
        if not worst >= ratio:
            worst, where = ratio, name
        done += sum(plan.tensors[n].nbytes for n in names)
        if progress:
            progress(done, total)
    failures += [f"{n} has no counterpart in the source" for n in sorted(found.keys() - compared)]
    return StoredWeights(len(compared), weights, worst, where, failures)


_PARTS = ("weight", "scales", "biases")


def _expected(source: Examined, result: Examined, plan: Plan) -> Iterator[tuple[str, mx.array]]:
    refs = unpacked(source, plan.kept)
    if result.dialect is Dialect.FOLDED:
        # Folded for the scales that the result's own config names.
        config = dataclasses.replace(
            source.config,
            vision=dataclasses.replace(
                source.config.vision, residual_scales=result.config.vision.residual_scales
            ),
        )
        yield from network_values(refs, config, source.dialect)
    else:
        yield from ((name, ref.load()) for name, ref in refs.items())


def _config_failures(expected: Config, found: Config) -> list[str]:
    def essence(config: Config) -> Config:
        plain = (1.0,) * len(config.vision.layers)
        vision = dataclasses.replace(config.vision, residual_scales=plain)
        return dataclasses.replace(config, vision=vision, quantization=None)

    same = essence(expected) == essence(found)
    return [] if same else ["config.json describes another model than the source's"]


def _copied(expected: mx.array, ref: TensorRef) -> float:
    found = ref.load()
    same = found.dtype == expected.dtype and mx.array_equal(found, expected).item()
    return 0.0 if same else float("inf")


def _rounded(expected: mx.array, ref: TensorRef, streams: Streams) -> float:
    found = ref.load()
    if found.shape != expected.shape or ref.dtype not in DTYPES:
        return float("inf")
    mx.eval(expected, found)
    largest = mx.abs(expected).max().astype(mx.float32) * _RECOMPUTED
    mx.eval(largest)
    roundoff = _ROUNDOFF[DTYPES[ref.dtype]]

    def ratio(rows: slice) -> mx.array:
        x = expected[rows].astype(mx.float32)
        allowed = roundoff * mx.abs(x) + largest + _SMALLEST
        return (mx.abs(found[rows].astype(mx.float32) - x) / allowed).max()

    return _largest(ratio, expected.shape, streams)


def _quantized(
    expected: mx.array,
    refs: list[TensorRef],
    how: Quantization,
    dtype: mx.Dtype,
    streams: Streams,
) -> float:
    parts = [ref.load() for ref in refs]
    mx.eval(expected, parts)
    groups = (-1, expected.shape[1] // how.group_size, how.group_size)

    def ratio(rows: slice) -> mx.array:
        x = expected[rows].astype(mx.float32).reshape(groups)
        values = dequantize([part[rows] for part in parts], how).reshape(groups)
        off = mx.abs(values - x).max(axis=-1)
        return mx.max(off / _allowed(x, how, dtype))

    return _largest(ratio, expected.shape, streams)


def _allowed(x: mx.array, how: Quantization, dtype: mx.Dtype) -> mx.array:
    """How far any weight of each group (..., group size) may be off; the module says why."""
    roundoff = _ROUNDOFF[dtype]
    high, low = x.max(axis=-1), x.min(axis=-1)
    magnitude = mx.maximum(mx.abs(high), mx.abs(low))
    if how.mode == "affine":
        span, steps = high - low, 1 << how.bits
        small = 1e-7 + (steps * _SMALLEST / 2 if dtype == mx.float16 else 0)
        return 1.0001 * span / steps + roundoff * (span + 2 * magnitude) + small
    if how.mode == "nvfp4":
        return magnitude * (1 / 5 + 1 / 15 + roundoff) + 6 * 2.0**-10
    return magnitude * ((1 / 5 if how.bits == 4 else 1 / 17) + 1e-4 + roundoff) + 1e-30


def _largest(ratio: Callable[[slice], mx.array], shape: tuple[int, ...], streams: Streams) -> float:
    worst = 0.0
    for batch in streams.rows(shape):
        found = []
        for rows, stream in batch:
            with mx.stream(stream):
                found.append(ratio(rows))
        mx.eval(found)
        for value in found:
            number: Any = value.item()
            if not number <= worst:  # keeps NaN
                worst = float(number)
                if worst != worst:
                    return worst
    return worst


def _failure(name: str, ratio: float, how: Quantization | None) -> str:
    kind = "its dtype" if how is None else f"{how.bits} bits in groups of {how.group_size}"
    if ratio == float("inf"):
        return f"{name} is not what the source holds"
    return f"{name} is {ratio:.3g} times as far from the source as {kind} may put it"
