"""Depthwise convolution: one or two outputs per input channel, with the small things around it."""

import math
from dataclasses import replace
from functools import partial
from typing import Literal

import mlx.core as mx

from . import choice, host, metal_depthwise, selfcheck, taps
from .device import backend
from .gelu import plain as plain_gelu

Form = Literal["plain", "taps", "kernel"]

TIMED = 2**23  # elements of the largest map that is timed: above stage 1 of a 1024 x 1024 picture


def plain(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    stride: int = 1,
    pre_bias: mx.array | None = None,
    gelu: bool = False,
) -> mx.array:
    """The specification, by the library's own grouped convolution."""
    k = weight.shape[0]
    if pre_bias is not None:
        x = x + pre_bias
    filters = weight.transpose(2, 0, 1)[..., None]
    y = mx.conv2d(x, filters, stride, k // 2, groups=x.shape[-1])
    if bias is not None:
        y = y + bias
    return plain_gelu(y) if gelu else y


def depthwise_conv(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    stride: int = 1,
    pre_bias: mx.array | None = None,
    gelu: bool = False,
) -> mx.array:
    """Depthwise convolution with zero padding k // 2.

    x is (B, H, W, C); weight (k, k, C*M), tap-major, M outputs per input channel: output o reads
    channel o // M, as PyTorch's groups=C does. bias is (C*M,). pre_bias (C,) is added to x inside
    the image only, so the padding stays 0. gelu applies the exact GELU to the result.
    Returns (B, ceil(H / stride), ceil(W / stride), C*M) in the dtype of x.
    """
    match form(x, weight, bias, stride=stride, pre_bias=pre_bias, gelu=gelu):
        case "kernel":
            kernel = _kernel(x, weight, bias, stride, pre_bias, gelu)
            return metal_depthwise.run(x, weight, bias, stride, pre_bias, gelu, kernel)
        case "taps":
            return taps.run(x, weight, bias, stride, pre_bias, gelu)
        case "plain":
            return plain(x, weight, bias, stride=stride, pre_bias=pre_bias, gelu=gelu)


def form(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    stride: int = 1,
    pre_bias: mx.array | None = None,
    gelu: bool = False,
) -> Form:
    """How `depthwise_conv` computes this call. The plain form is cuDNN's on CUDA."""
    where = backend()
    outputs = x.size // x.shape[-1] // stride**2 * weight.shape[-1]
    if where == "cpu" and x.dtype == weight.dtype == mx.float32 and outputs > host.SMALL:
        return "taps"
    if where == "metal" and metal_depthwise.fits(x, weight):
        kernel = _kernel(x, weight, bias, stride, pre_bias, gelu)
        if selfcheck.passes("depthwise_conv", str(kernel), x.dtype, lambda: _check(kernel)):
            return "kernel"
    return "plain"


def _kernel(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    stride: int,
    pre_bias: mx.array | None,
    gelu: bool,
) -> metal_depthwise.Spec:
    """The kernel with the tile that is fastest for these shapes."""
    likeliest = metal_depthwise.spec(x, weight, bias, stride, pre_bias, gelu)
    tiles = metal_depthwise.tiles(stride, -(-x.shape[2] // stride))
    kernels = {f"{w}x{h}": replace(likeliest, tile=(w, h)) for w, h in tiles}
    names = tuple(kernels) if x.size * weight.shape[0] ** 2 >= choice.WORTH else (*kernels,)[:1]
    *pixels, channels = x.shape
    side = math.isqrt(choice.typical(math.prod(pixels), TIMED // channels))
    shape, dtype = (1, side, side, channels), x.dtype

    def prepare() -> dict[str, choice.Run]:
        x, filters = mx.ones(shape, dtype), mx.ones(weight.shape, dtype)
        before = None if pre_bias is None else mx.ones(pre_bias.shape, dtype)
        after = None if bias is None else mx.ones(bias.shape, dtype)
        mx.eval(x, filters, before, after)
        call = partial(metal_depthwise.run, x, filters, after, stride, before, gelu)
        return {name: partial(call, kernel) for name, kernel in kernels.items()}

    # Bias and GELU weigh the same in every tile, so they are no part of the case.
    k, multiplier = likeliest.k, likeliest.multiplier
    case = f"{k}x{k} stride {stride} x{multiplier}, {side}x{side}x{channels} {dtype}"
    return kernels[choice.fastest("depthwise_conv", case, names, prepare)]


def _check(kernel: metal_depthwise.Spec) -> tuple[mx.array, mx.array]:
    """The kernel and the plain form on a small map whose sides the tile does not divide."""
    channels, outputs = 16, 16 * kernel.multiplier

    def example(seed: int, *shape: int) -> mx.array:
        return mx.random.normal(shape, key=mx.random.key(seed)).astype(kernel.dtype)

    x, weight = example(0, 2, 11, 13, channels), example(1, kernel.k, kernel.k, outputs)
    bias = example(2, outputs) if kernel.bias else None
    pre_bias = example(3, channels) if kernel.pre_bias else None
    got = metal_depthwise.run(x, weight, bias, kernel.stride, pre_bias, kernel.gelu, kernel)
    options = {"stride": kernel.stride, "pre_bias": pre_bias, "gelu": kernel.gelu}
    return got, selfcheck.expected(plain, x, weight, bias, **options)
