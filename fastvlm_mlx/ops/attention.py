"""Self-attention over packed queries, keys and values."""

import mlx.core as mx


def attention(qkv: mx.array, heads: int) -> mx.array:
    """Unmasked attention; qkv (B, N, 3*C) packed as (3, heads, C // heads). Returns (B, N, C)."""
    batch, length, width = qkv.shape
    head_dim = width // (3 * heads)
    q, k, v = qkv.reshape(batch, length, 3, heads, head_dim).transpose(2, 0, 3, 1, 4)
    o = mx.fast.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5)
    return o.transpose(0, 2, 1, 3).reshape(batch, length, heads * head_dim)
