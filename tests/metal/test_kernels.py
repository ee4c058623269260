"""The Metal kernels against the plain forms in float32: on a GPU, or emulated."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx.ops import metal_attention, metal_depthwise, selfcheck
from fastvlm_mlx.ops.selfcheck import relative_error
from tests.metal.conftest import Device
from tests.metal.emulator import Emulator
from tests.metal.modules import attention_module, depthwise_module, gelu_module

# One rounding to the type, relative to the largest output; what float32 sums and exponentials add.
ERROR = {mx.float32: 4e-6, mx.float16: 2**-11 + 4e-6, mx.bfloat16: 2**-8 + 4e-6}
Kernels = Device | Emulator
Pair = Callable[[], tuple[mx.array, mx.array]]


def example(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def compare(kernels: Kernels, cases: dict[str, tuple[mx.Dtype, Pair]]) -> None:
    kernels.prepare([run for _, run in cases.values()])
    for name, (dtype, run) in cases.items():
        got, expected = run()
        assert got.shape == expected.shape and got.dtype == dtype, name
        assert relative_error(got, expected) <= ERROR[dtype], name


def depthwise_case(
    shape: tuple[int, int, int, int],
    k: int,
    stride: int,
    multiplier: int,
    flags: tuple[bool, bool, bool],
    dtype: mx.Dtype,
    tile: tuple[int, int] | None = None,
) -> Pair:
    channels, outputs = shape[3], shape[3] * multiplier
    x = example(0, *shape, dtype=dtype)
    w = example(1, k, k, outputs, dtype=dtype) / k
    pre = example(2, channels, dtype=dtype) if flags[0] else None
    bias = example(3, outputs, dtype=dtype) if flags[1] else None

    def run() -> tuple[mx.array, mx.array]:
        spec = metal_depthwise.spec(x, w, bias, stride, pre, flags[2])
        spec = spec if tile is None else replace(spec, tile=tile)
        got = metal_depthwise.run(x, w, bias, stride, pre, flags[2], spec)
        options = {"stride": stride, "pre_bias": pre, "gelu": flags[2]}
        return got, selfcheck.expected(depthwise_module.plain, x, w, bias, **options)

    return run


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=3)), ids=str)
def test_depthwise(kernels: Kernels, flags: tuple[bool, bool, bool]) -> None:
    """Every kernel size, stride, multiplier, tile and trimming; edges that no tile divides."""
    uniform = len(set(flags)) == 1
    dtypes = (mx.float32, mx.float16, mx.bfloat16) if uniform else (mx.float32,)
    cases = {}
    for k, stride, multiplier, dtype in itertools.product((3, 7), (1, 2), (1, 2), dtypes):
        for shape in ((2, 7, 9, 8), (1, 5, 37, 12)):
            case = depthwise_case(shape, k, stride, multiplier, flags, dtype)
            cases[f"{k}x{k} stride {stride} x{multiplier} {shape} {dtype}"] = (dtype, case)
    compare(kernels, cases)


def test_depthwise_sizes(kernels: Kernels) -> None:
    """Maps smaller than the kernel, single pixels, more channels than a thread group is wide."""
    shapes = [(1, 1, 1, 8), (1, 2, 3, 8), (3, 1, 70, 8), (1, 33, 2, 8), (1, 3, 4, 272)]
    flags = (True, True, True)
    compare(
        kernels,
        {
            f"{shape} stride {stride}": (
                mx.float32,
                depthwise_case(shape, 7, stride, 1, flags, mx.float32),
            )
            for shape in shapes
            for stride in (1, 2)
        },
    )


def test_depthwise_smallest_maps(kernels: Kernels) -> None:
    """The last stages of a picture of 64 x 64 or 128 x 128, in every kind that a network has."""
    kinds = [(3, 1, 1, "b"), (7, 1, 1, "p"), (7, 1, 1, "b"), (7, 2, 2, "bg"), (3, 1, 2, "b")]
    cases = {}
    for k, stride, multiplier, has in kinds:
        flags = ("p" in has, "b" in has, "g" in has)
        for tile, side in itertools.product(((8, 2), (4, 2)), (1, 2, 4)):
            case = depthwise_case(
                (2, side, side, 8), k, stride, multiplier, flags, mx.float16, tile
            )
            cases[f"{k}x{k} stride {stride} {has} {tile} {side}"] = (mx.float16, case)
    compare(kernels, cases)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_attention(kernels: Kernels, dtype: mx.Dtype) -> None:
    def case(batch: int, length: int, heads: int, spread: float) -> Pair:
        qkv = (example(length, batch, length, 96 * heads) * spread).astype(dtype)

        def run() -> tuple[mx.array, mx.array]:
            expected = selfcheck.expected(attention_module.plain, qkv, heads)
            return metal_attention.run(qkv, heads), expected

        return run

    cases = {
        f"{length} positions, {heads} heads": (dtype, case(batch, length, heads, spread))
        for batch, length, heads, spread in (
            (1, 1, 1, 1.0),
            (5, 4, 2, 1.0),
            (2, 7, 3, 1.0),
            (1, 16, 2, 3.0),
            (1, 32, 1, 1.0),
            (1, 33, 1, 1.0),
            (1, 64, 1, 5.0),
            (1, 129, 2, 1.0),
            (1, 256, 2, 1.0),
        )
    }
    compare(kernels, cases)


def test_attention_with_large_scores(kernels: Kernels) -> None:
    """Scores in the hundreds, of either sign: one key takes it all."""
    qkv = example(5, 1, 40, 96) * 12
    got = metal_attention.run(qkv, 1)
    expected = selfcheck.expected(attention_module.plain, qkv, 1)
    assert relative_error(got, expected) < 2e-5


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_gelu(kernels: Kernels, dtype: mx.Dtype) -> None:
    x = mx.linspace(-12, 12, 4 * 601).reshape(4, 601).astype(dtype)
    compare(
        kernels,
        {"": (dtype, lambda: (gelu_module.kernel(x), selfcheck.expected(gelu_module.plain, x)))},
    )


def test_gelu_of_what_is_not_a_number(kernels: Kernels) -> None:
    x = mx.array([np.inf, -np.inf, np.nan, 3e38, -3e38, 0.0, -0.0, 1e-30])
    y = np.array(gelu_module.kernel(x))
    assert y[0] == np.inf and np.isnan(y[2]) and abs(y[3] / 3e38 - 1) < 1e-6
    assert np.abs(y[[1, 4]]).max() < 2e-6 and np.abs(y[5:]).max() < 1e-29


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_gelu_at_the_ends_of_the_half_types(kernels: Kernels, dtype: mx.Dtype) -> None:
    largest = mx.finfo(dtype).max
    x = mx.array([np.inf, -np.inf, np.nan, largest, -largest, 6.0, -6.0, 0.0]).astype(dtype)
    y = np.array(gelu_module.kernel(x).astype(mx.float32))
    assert y[0] == np.inf and np.isnan(y[2]) and y[3] == largest and y[5] == 6
    assert np.abs(y[[1, 4, 6, 7]]).max() < 2e-6


def test_attention_at_the_end_of_float16(kernels: Kernels) -> None:
    """Scores of 1e10: their sums are float's, and the softmax subtracts before it exponentiates."""
    qkv = (example(3, 1, 37, 96) * 15_000).astype(mx.float16)
    assert mx.abs(qkv).max().item() > 5e4
    got = metal_attention.run(qkv, 1)
    expected = selfcheck.expected(attention_module.plain, qkv, 1)
    assert relative_error(got, expected) <= ERROR[mx.float16]


def test_attention_passes_on_what_is_not_a_number(kernels: Kernels) -> None:
    """In the rows of its own head only."""
    qkv = example(4, 2, 40, 192)
    qkv[0, 7, 64 + 3] = np.nan  # a key of the first picture's first head
    got = np.isnan(np.array(metal_attention.run(qkv, 2)))
    assert got[0, :, :32].all() and not got[0, :, 32:].any() and not got[1].any()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_depthwise_passes_on_what_is_not_a_number(kernels: Kernels, dtype: mx.Dtype) -> None:
    """To the outputs whose window holds it; float16's infinity comes of a sum beyond its end."""
    x = mx.ones((1, 9, 11, 8), dtype)
    x[0, 4, 5, 2] = np.nan
    w = mx.full((3, 3, 8), 60_000, dtype)
    y = np.array(metal_depthwise.run(x, w, None, 1, None, False).astype(mx.float32))
    held = np.zeros(y.shape, bool)
    held[0, 3:6, 4:7, 2] = True
    assert (np.isnan(y) == held).all()
    assert (np.isinf(y[~held]) == (dtype == mx.float16)).all()
