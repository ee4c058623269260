"""The product with GELU against the plain form in float32: on a GPU, or emulated."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from fastvlm_mlx.ops import choice, device, linear, metal_linear, selfcheck
from fastvlm_mlx.ops.linear import plain_linear_gelu
from fastvlm_mlx.ops.selfcheck import relative_error
from tests.metal.conftest import Device
from tests.metal.emulator import Emulator, KernelError
from tests.metal.modules import gelu_module

# One rounding to the type, relative to the largest output; what the order of float32 sums adds.
ERROR = {mx.float32: 2e-6, mx.float16: 2**-11 + 2e-6, mx.bfloat16: 2**-8 + 2e-6}
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def arrays(m: int, n: int, k: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    x, w, b = (
        mx.random.normal(shape, key=mx.random.key(seed))
        for seed, shape in enumerate(((m, k), (n, k), (n,)))
    )
    return x.astype(dtype), (w / k**0.5).astype(dtype), b.astype(dtype)


def error(inputs: tuple[mx.array, mx.array, mx.array], tile: tuple[int, int]) -> float:
    got = metal_linear.run(*inputs, metal_linear.spec(inputs[0], tile))
    expected = selfcheck.expected(plain_linear_gelu, *inputs)
    assert got.shape == expected.shape and got.dtype == inputs[0].dtype
    return relative_error(got, expected)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_every_tile_and_edge(kernels: Device | Emulator, dtype: mx.Dtype) -> None:
    """Rows and outputs that no tile divides, in either order of the groups; both depths."""
    sizes = [
        *((m, 64, 32) for m in (1, 63, 64, 65)),
        *((65, n, 64) for n in (8, 36, 68, 100)),
        *((17, 40, k) for k in (16, 48, 96)),
    ]
    cases = [(arrays(*size, dtype), tile) for size in sizes for tile in metal_linear.TILES]
    kernels.prepare([_call(*case) for case in cases])
    for (size, tile), case in zip(itertools.product(sizes, metal_linear.TILES), cases, strict=True):
        assert error(*case) <= ERROR[dtype], (size, tile)


def _call(inputs: tuple[mx.array, ...], tile: tuple[int, int]) -> Callable[[], object]:
    return lambda: metal_linear.run(*inputs, metal_linear.spec(inputs[0], tile))


def test_many_rows(kernels: Device | Emulator) -> None:
    assert error(arrays(1000, 32, 32, mx.float16), (64, 32)) <= ERROR[mx.float16]


def test_leading_axes_are_kept(kernels: Device | Emulator) -> None:
    x, w, b = arrays(24, 36, 16, mx.float32)
    got = metal_linear.run(x.reshape(2, 3, 4, 16), w, b)
    expected = selfcheck.expected(plain_linear_gelu, x, w, b).reshape(2, 3, 4, 36)
    assert relative_error(got, expected) <= ERROR[mx.float32]


@pytest.mark.parametrize("first", [True, False])
def test_missing_barrier_is_seen(emulator: Emulator, first: bool) -> None:
    def edit(source: str) -> str:
        return source.replace(BARRIER, "", 1) if first else "".join(source.rsplit(BARRIER, 1))

    emulator.edit = edit
    assert error(arrays(64, 64, 64, mx.float32), (64, 64)) > 1e-3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("min(m0 + r, M - 1)", "(m0 + r)"),
        ("min(n0 + r, N - 1)", "(n0 + r)"),
        ("if (m < M)", ""),
        ("xs[BM * LX / 4]", "xs[BM * LX / 4 - 3]"),
    ],
)
def test_access_out_of_bounds_is_seen(emulator: Emulator, old: str, new: str) -> None:
    def edit(source: str) -> str:
        assert old in source
        return source.replace(old, new)

    emulator.edit = edit
    inputs = arrays(64 if "xs" in old else 60, 60, 32, mx.float32)
    with pytest.raises(KernelError, match="out of bounds"):
        metal_linear.run(*inputs)


def test_lane_that_skips_a_product_is_seen(emulator: Emulator) -> None:
    product = "simdgroup_multiply_accumulate("
    emulator.edit = lambda source: source.replace(product, f"if (lane != 7) {product}")
    with pytest.raises(KernelError, match="SIMD group"):
        metal_linear.run(*arrays(8, 8, 16, mx.float32))


def test_few_rows_are_the_librarys(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile computes 64 rows, however few there are."""
    monkeypatch.setattr(linear, "backend", lambda: "metal")
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    assert linear.linear_gelu_form(*arrays(31, 8, 16, mx.float32)) == "added"
    assert linear.linear_gelu_form(*arrays(32, 8, 16, mx.float32)) == "kernel"


def test_what_does_not_fit() -> None:
    x, w, b = arrays(4, 8, 16, mx.float32)
    assert metal_linear.fits(x, w, b)
    assert not metal_linear.fits(x, w, b.astype(mx.float16))
    assert not metal_linear.fits(*arrays(4, 8, 24, mx.float32))
    assert not metal_linear.fits(*arrays(4, 10, 16, mx.float32))
    assert not metal_linear.fits(*arrays(4, 4, 16, mx.float32))
    assert not metal_linear.fits(mx.zeros((0, 16)), w, b)


@pytest.mark.parametrize(
    ("seconds", "form"), [((2, 3, 1), "added"), ((2, 1, 2), "64x32"), ((1, 1, 1), "64x64")]
)
def test_fastest_form_is_used(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    seconds: tuple[int, ...],
    form: str,
) -> None:
    monkeypatch.setattr(linear, "backend", lambda: "metal")
    monkeypatch.setattr(device, "device_info", lambda: {"architecture": "applegpu_g14g"})
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    monkeypatch.setattr(choice, "_can_time", lambda: True)
    monkeypatch.setattr(choice, "_winners", {})
    monkeypatch.setattr(choice, "cache_file", lambda: tmp_path / "winners.json")
    monkeypatch.setattr(choice, "WORTH", 0)
    choice._remembered.cache_clear()
    monkeypatch.setattr(choice, "measure", lambda runs: dict(zip(runs, seconds, strict=True)))
    inputs = arrays(40, 36, 48, mx.float32)
    expected = plain_linear_gelu(*inputs)
    for _ in range(2):
        assert relative_error(linear.linear_gelu(*inputs), expected) <= ERROR[mx.float32]
    assert [form in winner for winner in choice.winners().values()] == [True]
    assert linear.linear_gelu_form(*inputs) == ("added" if form == "added" else "kernel")


def test_timing_and_checks_do_not_wait_for_each_other(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The library's form, timed under one lock, has its GELU checked under another."""
    for module in (linear, gelu_module):
        monkeypatch.setattr(module, "backend", lambda: "metal")
    monkeypatch.setattr(device, "device_info", lambda: {"architecture": "applegpu_g14g"})
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    monkeypatch.setattr(choice, "_can_time", lambda: True)
    monkeypatch.setattr(choice, "_winners", {})
    monkeypatch.setattr(choice, "_remembered", dict)
    monkeypatch.setattr(choice, "cache_file", lambda: tmp_path / "winners.json")
    for name, value in (("WORTH", 0), ("ROUNDS", 1), ("CALLS", 1)):
        monkeypatch.setattr(choice, name, value)
    inputs = arrays(64, 36, 48, mx.float32)
    mx.eval(inputs)
    done = []

    def ask() -> None:
        mx.eval(linear.linear_gelu(*inputs))
        done.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert done and len(choice.winners()) == 1
    assert {v.op for v in selfcheck.verdicts() if v.passed} == {"linear_gelu", "gelu"}
