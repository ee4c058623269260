"""GELU, exact (erf form): what PyTorch's `nn.GELU()` computes."""

import functools
import math
from typing import Any, Literal

import mlx.core as mx

from . import host, rational, selfcheck
from .device import backend

Form = Literal["plain", "compiled", "rational", "kernel"]


def plain(x: mx.array) -> mx.array:
    """The specification: x (1 + erf(x / sqrt 2)) / 2 in float32, rounded once to x's dtype."""
    f = x.astype(mx.float32)
    return (0.5 * f * (1 + mx.erf(f * math.sqrt(0.5)))).astype(x.dtype)


def exact_gelu(x: mx.array) -> mx.array:
    """Exact GELU of any array, in the array's own dtype."""
    match form(x):
        case "kernel":
            return kernel(x)
        case "rational":
            host.keep_freed_memory()
            return _compiled_rational(x)
        case "compiled":
            return _compiled_plain(x)
        case "plain":
            return plain(x)


def form(x: mx.array) -> Form:
    """How `gelu` computes this array."""
    where = backend()
    if where == "reference":
        return "plain"
    if where == "cpu" and x.dtype == mx.float32:
        return "rational"
    # Fewer than 8 elements would reach the kernel as `constant` memory, not `device`.
    if where == "metal" and x.size % 4 == 0 and x.size >= 8 and _checked(x.dtype):
        return "kernel"
    return "compiled"


_compiled_plain = mx.compile(plain)
_compiled_rational = mx.compile(rational.normal_gelu)

SOURCE = """
  const uint i = thread_position_in_grid.x;
  const float4 v = float4(((const device vec<T, 4>*)x)[i]);
  ((device vec<T, 4>*)y)[i] = vec<T, 4>(fastvlm_gelu(v));
"""


def kernel(x: mx.array, **options: Any) -> mx.array:
    """The Metal form: one vector of four per thread. x.size is a multiple of 4 and at least 8."""
    (y,) = _metal_kernel()(
        inputs=[x],
        template=[("T", x.dtype)],
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        grid=(x.size // 4, 1, 1),
        threadgroup=(256, 1, 1),
        **options,
    )
    result: mx.array = y
    return result


@functools.cache
def _metal_kernel() -> Any:
    return mx.fast.metal_kernel(
        name="fastvlm_gelu",
        input_names=["x"],
        output_names=["y"],
        source=SOURCE,
        header=rational.METAL,
    )


def _checked(dtype: mx.Dtype) -> bool:
    def check() -> tuple[mx.array, mx.array]:
        x = mx.linspace(-12, 12, 4096).astype(dtype)
        return kernel(x), selfcheck.expected(plain, x)

    return selfcheck.passes("gelu", str(dtype), dtype, check)
