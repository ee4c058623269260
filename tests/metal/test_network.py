"""The whole encoder on its kernels, at the smallest sizes, against its plain forms in float32."""

import mlx.core as mx
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.ops import device, selfcheck
from fastvlm_mlx.vision import FastViTHD
from tests.metal.conftest import Device
from tests.metal.emulator import Emulator
from tests.metal.modules import MODULES

# Of the largest feature: 90 layers' roundings. float16 alone takes 1.2e-3 (CONTRIBUTING.md).
ERROR = {mx.float32: 5e-5, mx.float16: 4e-3}


def encoder(dtype: mx.Dtype) -> FastViTHD:
    tower = fv.load("nano", dtype="float32").network.vision
    tower.set_dtype(dtype)
    return tower


@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 64, 128), (5, 128, 64)], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_nano_at_the_smallest_sizes(
    kernels: Device | Emulator,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    dtype: mx.Dtype,
) -> None:
    """A last map of a single pixel, maps narrower than a tile, more than one picture."""
    pixels = mx.random.uniform(shape=(*shape, 3), key=mx.random.key(0))
    with mx.stream(mx.cpu):
        monkeypatch.setenv("FASTVLM_OPS", "reference")
        expected = encoder(mx.float32)(pixels)
        mx.eval(expected)
        monkeypatch.delenv("FASTVLM_OPS")
    for module in MODULES:
        if hasattr(module, "backend"):
            monkeypatch.setattr(module, "backend", lambda: "metal")
    monkeypatch.setattr(device, "device_info", lambda: {"architecture": "applegpu_g14g"})
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    got = encoder(dtype)(pixels)
    assert got.dtype == dtype and got.shape == expected.shape
    assert selfcheck.relative_error(got, expected) <= ERROR[dtype]
    assert {v.op for v in selfcheck.verdicts() if v.passed} >= {"attention", "depthwise_conv"}
    assert all(v.passed for v in selfcheck.verdicts())
