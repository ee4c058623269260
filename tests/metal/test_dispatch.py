"""Choice and self-check of the Metal forms, on an emulated device."""

import warnings

import mlx.core as mx
import pytest

from fastvlm_mlx import ops
from fastvlm_mlx.ops import device, selfcheck, status
from tests.metal.emulator import Emulator
from tests.metal.modules import MODULES, attention_module, depthwise_module, gelu_module

X = mx.random.normal((1, 9, 11, 16), key=mx.random.key(0))
W = mx.random.normal((3, 3, 16), key=mx.random.key(1))
QKV = mx.random.normal((1, 20, 192), key=mx.random.key(2))


@pytest.fixture(autouse=True)
def metal(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """The default device is taken for an M2's GPU, and nothing has been checked yet."""
    for module in MODULES:
        if hasattr(module, "backend"):
            monkeypatch.setattr(module, "backend", lambda: "metal")
    monkeypatch.setattr(device, "device_info", lambda: {"architecture": "applegpu_g14g"})
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    return emulator


def test_every_operation_uses_its_kernel() -> None:
    assert depthwise_module.form(X, W) == "kernel"
    assert gelu_module.form(X) == "kernel"
    assert attention_module.form(QKV, 2) == "kernel"
    assert [v.passed for v in selfcheck.verdicts()] == [True] * 3
    assert all(v.error is not None and v.error < 2e-6 for v in selfcheck.verdicts())
    assert selfcheck.relative_error(ops.depthwise_conv(X, W), depthwise_module.plain(X, W)) < 1e-6


def test_each_configuration_is_checked_once() -> None:
    for _ in range(3):
        depthwise_module.form(X, W)
        depthwise_module.form(X, W, stride=2)
        depthwise_module.form(X, W, gelu=True)
    assert len(selfcheck.verdicts()) == 3


def test_wrong_kernel_warns_once_and_is_replaced(metal: Emulator) -> None:
    metal.edit = lambda source: source.replace("iy < 0", "iy < 1")
    with pytest.warns(RuntimeWarning, match=r"depthwise_conv .*error .*allowed"):
        got = ops.depthwise_conv(X, W)
    assert mx.array_equal(got, depthwise_module.plain(X, W))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.depthwise_conv(X, W)
        assert depthwise_module.form(X, W, gelu=True) == "plain"
    assert "self-check failed" in status._reason("depthwise_conv 3x3", "plain")
    assert gelu_module.form(X) == "kernel"


def test_kernel_that_cannot_run_is_replaced_inside_a_compiled_graph(metal: Emulator) -> None:
    def refuse(source: str) -> str:
        raise RuntimeError("no such address space")

    metal.edit = refuse
    compiled = mx.compile(lambda x: ops.depthwise_conv(x * 2, W) + 1)
    with pytest.warns(RuntimeWarning, match="no such address space"):
        got = compiled(X)
    assert selfcheck.relative_error(got, depthwise_module.plain(X * 2, W) + 1) < 1e-6
    verdict = selfcheck.verdicts()[0]
    assert not verdict.passed and verdict.error is None


def test_the_check_leaves_the_random_state_alone() -> None:
    mx.random.seed(3)
    expected = mx.random.uniform().item()
    mx.random.seed(3)
    depthwise_module.form(X, W)
    attention_module.form(QKV, 2)
    assert mx.random.uniform().item() == expected


@pytest.mark.parametrize(
    ("architecture", "dtype", "heads", "form"),
    [
        ("applegpu_g13g", mx.float16, 2, "kernel"),
        ("applegpu_g16s", mx.bfloat16, 2, "kernel"),
        ("applegpu_g17p", mx.float16, 2, "pairs"),
        ("applegpu_g17p", mx.float32, 2, "kernel"),
        ("applegpu_g17p", mx.float16, 3, "kernel"),
        ("", mx.float16, 2, "kernel"),
    ],
)
def test_attention_form_by_device(
    monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: mx.Dtype, heads: int, form: str
) -> None:
    monkeypatch.setattr(device, "device_info", lambda: {"architecture": architecture})
    assert attention_module.form(mx.zeros((1, 8, 96 * heads), dtype), heads) == form


def test_what_no_kernel_takes_is_plain() -> None:
    assert depthwise_module.form(mx.zeros((1, 4, 4, 6)), mx.zeros((3, 3, 6))) == "plain"
    assert depthwise_module.form(mx.zeros((1, 4, 4, 8)), mx.zeros((3, 3, 24))) == "plain"
    assert attention_module.form(mx.zeros((1, 4, 3 * 64)), 1) == "plain"
    assert gelu_module.form(mx.zeros((7,))) == "compiled"
    assert selfcheck.verdicts() == []
