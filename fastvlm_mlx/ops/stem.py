"""The network's first convolution, from pixels to channels, with its GELU."""

from typing import Literal

import mlx.core as mx

from . import metal_stem, selfcheck
from .device import backend
from .gelu import exact_gelu
from .gelu import plain as plain_gelu

Form = Literal["plain", "library", "kernel"]


def plain(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """The specification."""
    return plain_gelu(mx.conv2d(x, weight, 2, 1) + bias)


def stem_conv(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Exact GELU of a 3x3 convolution with stride 2 and zero padding 1.

    x is (B, H, W, 3), weight (C, 3, 3, 3) as `nn.Conv2d` stores it: output, row, column, input;
    bias (C,). Returns (B, ceil(H / 2), ceil(W / 2), C) in the dtype of x.
    """
    match form(x, weight, bias):
        case "kernel":
            return metal_stem.run(x, weight, bias)
        case "library":
            return exact_gelu(mx.conv2d(x, weight, 2, 1) + bias)
        case "plain":
            return plain(x, weight, bias)


def form(x: mx.array, weight: mx.array, bias: mx.array) -> Form:
    """How `stem_conv` computes this call.

    The kernel saves the pass over the whole map that the bias costs, and the one of the GELU.
    """
    where = backend()
    if where == "reference":
        return "plain"
    if where == "metal" and metal_stem.fits(x, weight, bias) and _checked(x.dtype, len(bias)):
        return "kernel"
    return "library"


def _checked(dtype: mx.Dtype, channels: int) -> bool:
    def check() -> tuple[mx.array, mx.array]:
        shapes = (2, 11, 13, 3), (channels, 3, 3, 3), (channels,)
        arrays = [
            mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
            for seed, shape in enumerate(shapes)
        ]
        return metal_stem.run(*arrays), selfcheck.expected(plain, *arrays)

    return selfcheck.passes("stem_conv", f"{channels} channels {dtype}", dtype, check)
