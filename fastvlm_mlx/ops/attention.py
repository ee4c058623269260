"""Self-attention over packed queries, keys and values."""

from typing import Literal

import mlx.core as mx

from . import host, metal_attention, selfcheck, softmax
from .device import backend, has_matrix_units

Form = Literal["plain", "pairs", "kernel", "strips"]


def plain(qkv: mx.array, heads: int) -> mx.array:
    """The specification: softmax(q kT / sqrt(d)) v, per head."""
    batch, length, width = qkv.shape
    head_dim = width // (3 * heads)
    q, k, v = qkv.reshape(batch, length, 3, heads, head_dim).transpose(2, 0, 3, 1, 4)
    o = mx.fast.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5)
    return o.transpose(0, 2, 1, 3).reshape(batch, length, heads * head_dim)


def self_attention(qkv: mx.array, heads: int) -> mx.array:
    """Unmasked attention; qkv (B, N, 3*C) packed as (3, heads, C // heads). Returns (B, N, C)."""
    match form(qkv, heads):
        case "kernel":
            return metal_attention.run(qkv, heads)
        case "pairs":
            return pairs(qkv, heads)
        case "strips":
            return softmax.run(qkv, heads)
        case "plain":
            return plain(qkv, heads)


def form(qkv: mx.array, heads: int) -> Form:
    """How `attention` computes this call.

    MLX's fused Metal attention has no head_dim 32: unfused, stage 4 writes and reads 0.8 GB of
    scores. Our kernel does the 32-wide products only; with matrix units in the GPU cores (M5,
    16-bit types) the fused 64-wide kernel is faster although it computes twice as much. On CUDA
    the library fuses any width.
    """
    scores = qkv.shape[0] * heads * qkv.shape[1] ** 2
    if backend() == "cpu" and qkv.dtype == mx.float32 and scores > host.SMALL:
        return "strips"
    if backend() != "metal" or qkv.shape[2] != 96 * heads:
        return "plain"
    if has_matrix_units() and qkv.dtype != mx.float32 and heads % 2 == 0:
        return "pairs"
    if metal_attention.fits(qkv, heads) and _checked(qkv.dtype):
        return "kernel"
    return "pairs" if heads % 2 == 0 else "plain"


def pairs(qkv: mx.array, heads: int) -> mx.array:
    """Two heads of 32 as one of 64: the same sums, through the library's fused 64-wide kernel.

    Keys and values of a pair lie side by side already. A query is laid out twice, each time with
    the other head's half zeroed, which makes two query heads for each key head.
    """
    batch, length, width = qkv.shape
    head_dim = width // (3 * heads)
    q, k, v = qkv.reshape(batch, length, 3, heads // 2, 2 * head_dim).transpose(2, 0, 3, 1, 4)
    own = mx.repeat(mx.eye(2, dtype=qkv.dtype), head_dim, axis=1)  # (2, 64): ones where its own
    q = (q[:, :, None] * own[:, None]).flatten(1, 2)
    o = mx.fast.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5)
    o = mx.unflatten(o, 1, (heads // 2, 2)).transpose(0, 3, 1, 2, 4)  # (B, N, pairs, query, 64)
    o = mx.where(own[0].astype(mx.bool_), o[..., 0, :], o[..., 1, :])
    return o.reshape(batch, length, heads * head_dim)


def _checked(dtype: mx.Dtype) -> bool:
    def check() -> tuple[mx.array, mx.array]:
        qkv = mx.random.normal((2, 77, 3 * 96), key=mx.random.key(0)).astype(dtype)
        return metal_attention.run(qkv, 3), selfcheck.expected(plain, qkv, 3)

    return selfcheck.passes("attention", str(dtype), dtype, check)
