"""The two matrix products around a GELU, with the residual."""

from .gelu import gelu


def ffn(x, residual, w1, b1, w2):
    return residual + gelu(x @ w1.T + b1) @ w2.T
