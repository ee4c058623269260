"""GELU, exact (erf form): what PyTorch's `nn.GELU()` computes."""

import math

import mlx.core as mx


def gelu(x: mx.array) -> mx.array:
    """x * (1 + erf(x / sqrt 2)) / 2, computed in float32 and rounded once to the dtype of x."""
    f = x.astype(mx.float32)
    return (0.5 * f * (1 + mx.erf(f * math.sqrt(0.5)))).astype(x.dtype)
