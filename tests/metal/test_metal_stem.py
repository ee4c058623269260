"""The first convolution against the plain form in float32: on a GPU, or emulated."""

from collections.abc import Callable

import mlx.core as mx
import pytest

from fastvlm_mlx.ops import metal_stem, selfcheck
from fastvlm_mlx.ops.selfcheck import relative_error
from fastvlm_mlx.ops.stem import plain
from tests.metal.conftest import Device
from tests.metal.emulator import Emulator, KernelError

# One rounding to the type, relative to the largest output; what the order of float32 sums adds.
ERROR = {mx.float32: 2e-6, mx.float16: 2**-11 + 2e-6, mx.bfloat16: 2**-8 + 2e-6}
SIZES = [(1, 1, 3), (2, 7, 9), (1, 8, 8), (3, 5, 16), (1, 2, 37), (1, 40, 24)]


def arrays(size: tuple[int, int, int], channels: int, dtype: mx.Dtype) -> list[mx.array]:
    shapes = (*size, 3), (channels, 3, 3, 3), (channels,)
    return [
        mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
        for seed, shape in enumerate(shapes)
    ]


def call(inputs: list[mx.array]) -> Callable[[], object]:
    return lambda: metal_stem.run(*inputs)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_every_size(kernels: Device | Emulator, dtype: mx.Dtype) -> None:
    """Odd sides, sides below a tile, groups of one tile and of many, the widest layer."""
    cases = {(s, c): arrays(s, c, dtype) for s in SIZES for c in (8, 96)}
    cases[(1, 6, 10), 256] = arrays((1, 6, 10), 256, dtype)
    kernels.prepare([call(inputs) for inputs in cases.values()])
    for name, inputs in cases.items():
        got, expected = metal_stem.run(*inputs), selfcheck.expected(plain, *inputs)
        assert got.shape == expected.shape and got.dtype == dtype, name
        assert relative_error(got, expected) <= ERROR[dtype], name


def test_missing_barrier_is_seen(emulator: Emulator) -> None:
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    emulator.edit = lambda source: source.replace(barrier, "")
    inputs = arrays((1, 8, 8), 8, mx.float32)
    assert relative_error(metal_stem.run(*inputs), plain(*inputs)) > 1e-3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ix >= 0 && ix < W", "true"),
        ("iy < 0 || iy >= H", "iy < 0"),
        ("oy + t < HO && ox + i < WO", "true"),
        ("if (tile >= x_shape[0] * NY * NX)", "if (false)"),
        ("taps[27 * CG]", "taps[27 * CG - 1]"),
    ],
)
def test_access_out_of_bounds_is_seen(emulator: Emulator, old: str, new: str) -> None:
    def edit(source: str) -> str:
        assert old in source
        return source.replace(old, new)

    emulator.edit = edit
    with pytest.raises(KernelError, match="out of bounds"):
        metal_stem.run(*arrays((1, 5, 7), 8, mx.float32))


def test_what_does_not_fit() -> None:
    good = arrays((1, 4, 4), 8, mx.float32)
    assert metal_stem.fits(*good)
    assert not metal_stem.fits(*arrays((1, 1, 2), 8, mx.float32))
    assert not metal_stem.fits(*arrays((1, 4, 4), 10, mx.float32))
    assert not metal_stem.fits(*arrays((1, 4, 4), 260, mx.float32))
    assert not metal_stem.fits(good[0].astype(mx.float16), *good[1:])
