"""The matrix products around a GELU: the first with it, and both with the residual."""

import functools
from typing import Literal

import mlx.core as mx

from . import choice, host, metal_linear, selfcheck
from .device import backend, has_matrix_units
from .gelu import exact_gelu
from .gelu import plain as plain_gelu

Form = Literal["plain", "added", "strips"]
LinearForm = Literal["plain", "added", "kernel"]

FEWEST_ROWS = 32  # half a tile of the kernel's; with fewer it computes more than it saves
# Multiply-adds and elements of the largest product timed: any of a 1024 x 1024 picture is smaller.
TIMED, TIMED_ELEMENTS = 2**32, 2**25
HIDDEN = 1_000_000  # elements of the hidden map made at once on the CPU: it stays in the L3 cache


def plain_linear_gelu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """The specification."""
    return plain_gelu(x @ weight.T + bias)


def linear_gelu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Return gelu(x @ weight.T + bias); x is (..., K), weight (N, K), bias (N,)."""
    if backend() == "reference":
        return plain_linear_gelu(x, weight, bias)
    if kernel := _fused(x, weight, bias):
        return metal_linear.run(x, weight, bias, kernel)
    return exact_gelu(mx.addmm(bias, x, weight.T))


def linear_gelu_form(x: mx.array, weight: mx.array, bias: mx.array) -> LinearForm:
    """How `linear_gelu` computes this call."""
    if backend() == "reference":
        return "plain"
    return "kernel" if _fused(x, weight, bias) else "added"


def _fused(x: mx.array, weight: mx.array, bias: mx.array) -> metal_linear.Spec | None:
    """The fused kernel for this call; none where the library's product and a GELU are faster.

    Timed once per size; the first form listed stands where nothing can be timed. With matrix
    units in the GPU cores (M5, 16-bit types), which only the library uses, that is the library's.
    """
    n, k = weight.shape
    m, dtype = x.size // k, x.dtype
    if backend() != "metal" or m < FEWEST_ROWS or not metal_linear.fits(x, weight, bias):
        return None
    library_first = has_matrix_units() and x.dtype != mx.float32
    small = m * n * k < choice.WORTH
    if library_first and small:
        return None
    specs = [metal_linear.spec(x, tile) for tile in metal_linear.TILES[: 1 if small else None]]
    kernels = {str(kernel): kernel for kernel in specs if _checked(kernel)}
    if small:
        return next(iter(kernels.values()), None)
    forms = ("added", *kernels) if library_first else (*kernels, "added")
    rows = choice.typical(m, min(TIMED // (n * k), TIMED_ELEMENTS // max(n, k)))

    def prepare() -> dict[str, choice.Run]:
        x, weight, bias = (a.astype(dtype) for a in _examples(rows, n, k))
        mx.eval(x, weight, bias)
        runs: dict[str, choice.Run] = {"added": lambda: exact_gelu(mx.addmm(bias, x, weight.T))}
        for name, kernel in kernels.items():
            runs[name] = functools.partial(metal_linear.run, x, weight, bias, kernel)
        return runs

    return kernels.get(choice.fastest("linear_gelu", f"{rows}x{n}x{k} {dtype}", forms, prepare))


def _checked(kernel: metal_linear.Spec) -> bool:
    """The kernel and the plain form on sides that its tiles do not divide, the longer one each."""

    def check() -> tuple[mx.array, mx.array]:
        got, wanted = [], []
        for rows in (77, 140):
            inputs = _examples(rows, 100, 3 * kernel.depth)
            x, weight, bias = (a.astype(kernel.dtype) for a in inputs)
            got.append(metal_linear.run(x, weight, bias, kernel))
            wanted.append(selfcheck.expected(plain_linear_gelu, x, weight, bias))
        return mx.concatenate(got), mx.concatenate(wanted)

    return selfcheck.passes("linear_gelu", str(kernel), kernel.dtype, check)


def _examples(m: int, n: int, k: int) -> list[mx.array]:
    shapes = (m, k), (n, k), (n,)
    return [
        mx.random.normal(shape, scale=shape[-1] ** -0.5, key=mx.random.key(seed))
        for seed, shape in enumerate(shapes)
    ]


def plain(x: mx.array, residual: mx.array, w1: mx.array, b1: mx.array, w2: mx.array) -> mx.array:
    """The specification."""
    return residual + plain_gelu(x @ w1.T + b1) @ w2.T


def ffn(x: mx.array, residual: mx.array, w1: mx.array, b1: mx.array, w2: mx.array) -> mx.array:
    """Return residual + gelu(x @ w1.T + b1) @ w2.T.

    x and residual are (..., C), w1 (F, C), b1 (F,), w2 (C, F).
    """
    match form(x):
        case "strips":
            return _in_strips(x, residual, w1, b1, w2)
        case "added":
            return _added(x, residual, w1, b1, w2)
        case "plain":
            return plain(x, residual, w1, b1, w2)


def form(x: mx.array) -> Form:
    """How `ffn` computes this call."""
    match backend():
        case "reference":
            return "plain"
        case "cpu" if x.dtype == mx.float32:
            return "strips"
        case _:
            return "added"


def _added(x: mx.array, residual: mx.array, w1: mx.array, b1: mx.array, w2: mx.array) -> mx.array:
    """Bias and residual as addends of the products, not as passes over memory of their own."""
    return mx.addmm(residual, linear_gelu(x, w1, b1), w2.T)


def _in_strips(
    x: mx.array, residual: mx.array, w1: mx.array, b1: mx.array, w2: mx.array
) -> mx.array:
    """Some rows at a time, so that the hidden map, four times as wide, never leaves the cache.

    One stream, because the products use all threads of the BLAS already.
    """
    host.keep_freed_memory()
    rows, residual_rows = x.reshape(-1, x.shape[-1]), residual.reshape(-1, w2.shape[0])
    strips = [
        _added(rows[a:b], residual_rows[a:b], w1, b1, w2)
        for a, b in host.strips(rows.shape[0], w1.shape[0], size=HIDDEN)
    ]
    return mx.concatenate(strips).reshape(residual.shape)
