"""The emulator notices what it is there for: faults planted in kernels that are right."""

import mlx.core as mx
import pytest

from fastvlm_mlx.ops import metal_attention, metal_depthwise
from fastvlm_mlx.ops.selfcheck import relative_error
from tests.metal.emulator import Emulator, KernelError
from tests.metal.modules import attention_module

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def replaced(old: str, new: str, count: int = 1):
    def edit(source: str) -> str:
        assert old in source
        return source.replace(old, new, count)

    return edit


def attention_error(length: int) -> float:
    qkv = mx.random.normal((1, length, 96), key=mx.random.key(0))
    return relative_error(metal_attention.run(qkv, 1), attention_module.plain(qkv, 1))


def depthwise() -> mx.array:
    x, w = mx.ones((1, 7, 9, 8)), mx.ones((3, 3, 8))
    return metal_depthwise.run(x, w, None, 1, None, False)


def test_missing_barrier_before_reading(emulator: Emulator) -> None:
    emulator.edit = lambda source: "".join(source.rsplit(BARRIER, 1))
    assert attention_error(32) > 1e-3


def test_missing_barrier_before_overwriting(emulator: Emulator) -> None:
    emulator.edit = replaced(BARRIER, "")
    assert attention_error(100) > 1e-3


def test_barrier_that_some_threads_skip(emulator: Emulator) -> None:
    emulator.edit = replaced(BARRIER, f"if (row < N) {{ {BARRIER} }}")
    with pytest.raises(KernelError, match="barrier"):
        attention_error(40)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ix >= 0 && ix < W", "true"),
        ("iy < 0 || iy >= H", "iy < 0"),
        ("oy + t < HO && ox + i < WO", "ox + i < WO"),
    ],
)
def test_device_memory_out_of_bounds(emulator: Emulator, old: str, new: str) -> None:
    emulator.edit = replaced(old, new)
    with pytest.raises(KernelError, match="out of bounds"):
        depthwise()


def test_threadgroup_memory_out_of_bounds(emulator: Emulator) -> None:
    emulator.edit = replaced("keys[KEYS * VECTORS]", "keys[KEYS * VECTORS - 1]")
    with pytest.raises(KernelError, match="threadgroup memory"):
        attention_error(32)


def test_output_that_is_never_written(emulator: Emulator) -> None:
    emulator.edit = replaced("ox + i < WO", "ox + i + 1 < WO")
    assert mx.isnan(depthwise()).any()


def test_order_of_threads_does_not_matter(emulator: Emulator) -> None:
    qkv = mx.random.normal((1, 70, 96), key=mx.random.key(0))
    results = []
    for emulator.seed in range(4):
        results.append(metal_attention.run(qkv, 1))
    assert all(mx.array_equal(results[0], r) for r in results[1:])
