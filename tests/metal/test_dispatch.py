"""Choice and self-check of the Metal forms, on an emulated device."""

import contextlib
import warnings

import mlx.core as mx
import pytest

from fastvlm_mlx import ops
from fastvlm_mlx.ops import device, linear_gelu, selfcheck, status, stem_conv
from fastvlm_mlx.ops.linear import plain_linear_gelu
from tests.metal.emulator import Emulator
from tests.metal.modules import MODULES, attention_module, depthwise_module, gelu_module


def example(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


X, W, QKV = example(0, 1, 9, 11, 16), example(1, 3, 3, 16), example(2, 1, 20, 192)


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


COMPILER = """[metal::Device] Unable to build metal library from source
program_source:7:3: warning: unused variable 'a'
program_source:9:5: error: no matching function for call to 'fma'
note: candidate function not viable"""


def test_the_reason_is_the_compilers(metal: Emulator) -> None:
    def refuse(source: str) -> str:
        raise RuntimeError(COMPILER)

    metal.edit = refuse
    with pytest.warns(RuntimeWarning, match="from source: program_source:9:5: error: no match"):
        ops.depthwise_conv(X, W)
    assert "\n" not in selfcheck.verdicts()[0].reason


def test_checks_compare_with_float32_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the GPU: with matrix units its float32 products are TF32."""
    places = []

    def stream(device: mx.Device) -> contextlib.AbstractContextManager[None]:
        places.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(mx, "stream", stream)
    depthwise_module.form(X.astype(mx.float16), W.astype(mx.float16), pre_bias=mx.ones(16))
    gelu_module.form(X)
    attention_module.form(QKV, 2)
    linear_gelu(X, mx.zeros((20, 16)), mx.zeros(20))
    stem_conv(X[..., :3], mx.zeros((8, 3, 3, 3)), mx.zeros(8))
    assert len({v.op for v in selfcheck.verdicts()}) == 5
    assert places and set(places) == {mx.cpu}

    half = mx.ones(3, mx.float16)
    seen = selfcheck.expected(lambda a, n, b: a * n + b, half, 2, b=half)
    assert seen.dtype == mx.float32


def test_products_of_either_shape_are_checked(metal: Emulator) -> None:
    """Groups are dealt down or across: a kernel that gets only one of them right is not used."""
    metal.edit = lambda source: source.replace("wide = M < N", "wide = true")
    x, w, b = (example(n, *s) for n, s in enumerate(((130, 16), (20, 16), (20,))))
    with pytest.warns(RuntimeWarning, match="linear_gelu"):
        got = linear_gelu(x, w, b)
    assert selfcheck.relative_error(got, plain_linear_gelu(x, w, b)) < 1e-5


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


def test_what_doctor_shows() -> None:
    """Every operation on its kernel, as near to the plain form as the self-checks ask."""
    found = ops.statuses(mx.float16)
    assert {s.op: s.form for s in found if s.form != "kernel"} == {"ffn": "added"}
    assert all(s.error <= selfcheck.TOLERANCE[mx.float16] for s in found)
    assert {s.reason for s in found if s.form == "kernel"} == {"Metal kernel, self-check passed"}
