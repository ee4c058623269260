"""Depthwise convolution on the CPU: strips of rows, each a sum of shifted slices times weights.

MLX's own grouped convolution is a scalar loop over strided weights, ten times slower.
"""

import functools
from collections.abc import Callable

import mlx.core as mx

from . import host
from .gelu import exact_gelu

TERMS = 5  # taps per fused loop: with more than ten input pointers g++ does not vectorise it


def run(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    stride: int,
    pre_bias: mx.array | None,
    gelu: bool,
) -> mx.array:
    """What `depthwise_conv` computes, for float32."""
    host.keep_freed_memory()
    given = [a for a in (bias, pre_bias) if a is not None]
    has_bias, has_pre_bias = bias is not None, pre_bias is not None
    return _compiled(stride, has_bias, has_pre_bias, gelu)(x, weight, *given)


@functools.cache
def _compiled(
    stride: int, has_bias: bool, has_pre_bias: bool, gelu: bool
) -> Callable[..., mx.array]:
    def taps(x: mx.array, weight: mx.array, *given: mx.array) -> mx.array:
        bias = given[0] if has_bias else None
        pre_bias = given[-1] if has_pre_bias else None
        return _in_strips(x, weight, bias, stride, pre_bias, gelu)

    return mx.compile(taps)


def _in_strips(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    stride: int,
    pre_bias: mx.array | None,
    gelu: bool,
) -> mx.array:
    batch, height, width, channels = x.shape
    k, outputs = weight.shape[0], weight.shape[2]
    rows, columns = -(-height // stride), -(-width // stride)
    multiplier = outputs // channels
    weights = [mx.contiguous(weight[:, :, m::multiplier]) for m in range(multiplier)]
    biases = [None if bias is None else bias[m::multiplier] for m in range(multiplier)]
    strips = []
    cuts = host.strips(rows, batch * columns * outputs, at_least=host.parallel())
    for number, (start, stop) in enumerate(cuts):
        with host.stream(number):
            padded = _padded_rows(x, start, stop, k, stride, pre_bias)
            sums = [
                _sum_of_taps(padded, w, b, stride, (stop - start, columns))
                for w, b in zip(weights, biases, strict=True)
            ]
            strip = sums[0] if multiplier == 1 else mx.stack(sums, -1).flatten(-2)
            strips.append(exact_gelu(strip) if gelu else strip)
    return mx.concatenate(strips, axis=1)


def _padded_rows(
    x: mx.array, start: int, stop: int, k: int, stride: int, pre_bias: mx.array | None
) -> mx.array:
    """The input rows that output rows start..stop read, with the zeros around the image."""
    top, bottom = start * stride - k // 2, (stop - 1) * stride + k - k // 2
    low, high = max(top, 0), min(bottom, x.shape[1])
    rows = x[:, low:high]
    if pre_bias is not None:
        rows = rows + pre_bias
    return mx.pad(rows, [(0, 0), (low - top, bottom - high), (k // 2, k // 2), (0, 0)])


def _sum_of_taps(
    padded: mx.array, weight: mx.array, bias: mx.array | None, stride: int, size: tuple[int, int]
) -> mx.array:
    """Partial sums of a few taps, then their sum.

    One running sum would be updated in place, and g++ does not vectorise that loop.
    """
    k, (rows, columns) = weight.shape[0], size
    partial_sums = []
    for first in range(0, k * k, TERMS):
        terms = []
        for tap in range(first, min(first + TERMS, k * k)):
            i, j = divmod(tap, k)
            down = slice(i, i + (rows - 1) * stride + 1, stride)
            right = slice(j, j + (columns - 1) * stride + 1, stride)
            terms.append(padded[:, down, right] * weight[i, j])
        if bias is not None and first + TERMS >= k * k:
            terms.append(bias)
        # Flat, because mx.compile does not fuse across a reshape: here its loop shall end.
        partial_sums.append(sum(terms[1:], terms[0]).flatten())
    return sum(partial_sums[1:], partial_sums[0]).reshape(-1, rows, columns, weight.shape[2])
