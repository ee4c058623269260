"""The operations on this machine's default device, against NumPy in float64."""

import importlib
import itertools
import math
import shutil
import threading
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx import ops
from fastvlm_mlx.ops import device, host, selfcheck

# Their functions cover the modules' names in the package.
attention_module = importlib.import_module("fastvlm_mlx.ops.attention")
depthwise_module = importlib.import_module("fastvlm_mlx.ops.depthwise")
gelu_module = importlib.import_module("fastvlm_mlx.ops.gelu")
linear_module = importlib.import_module("fastvlm_mlx.ops.linear")
stem_module = importlib.import_module("fastvlm_mlx.ops.stem")


@pytest.fixture(scope="module", autouse=True)
def no_picture_is_too_small() -> Iterator[None]:
    """The fast forms of the CPU are tested on small arrays, which they are not meant for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastvlm_mlx.ops.host.SMALL", 0)
        yield


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def error(got: mx.array, expected: np.ndarray) -> float:
    difference = np.abs(np.array(got.astype(mx.float32), np.float64) - expected)
    return float(difference.max() / np.abs(expected).max())


def numpy_gelu(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x * np.vectorize(lambda v: math.erfc(-v / math.sqrt(2)))(x) / 2


def numpy_depthwise(x, w, bias=None, *, stride=1, pre_bias=None, gelu=False) -> np.ndarray:
    """Output pixel by output pixel, as the docstring says it."""
    x = x.astype(np.float64) + (0 if pre_bias is None else pre_bias)
    batch, height, width, channels = x.shape
    k, outputs = w.shape[0], w.shape[2]
    padded = np.zeros((batch, height + 2 * (k // 2), width + 2 * (k // 2), channels))
    padded[:, k // 2 : k // 2 + height, k // 2 : k // 2 + width] = x
    spread = padded[..., np.arange(outputs) // (outputs // channels)]
    y = np.zeros((batch, -(-height // stride), -(-width // stride), outputs))
    for i, j in itertools.product(range(y.shape[1]), range(y.shape[2])):
        window = spread[:, i * stride : i * stride + k, j * stride : j * stride + k]
        y[:, i, j] = (window * w).sum((1, 2))
    y = y + (0 if bias is None else bias)
    return numpy_gelu(y) if gelu else y


def numpy_attention(qkv: np.ndarray, heads: int) -> np.ndarray:
    batch, length, width = qkv.shape
    q, k, v = qkv.astype(np.float64).reshape(batch, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    o = weights / weights.sum(-1, keepdims=True) @ v
    return o.transpose(0, 2, 1, 3).reshape(batch, length, width // 3)


@pytest.fixture(params=["fast", "reference"])
def forms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test of a result runs on the special form of this machine and on the plain one."""
    if request.param == "reference":
        monkeypatch.setenv("FASTVLM_OPS", "reference")
    yield request.param


@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise(forms: str, k: int, stride: int, multiplier: int) -> None:
    x, w = normal(0, 2, 9, 12, 8), normal(1, k, k, 8 * multiplier)
    b, p = normal(2, 8 * multiplier), normal(3, 8)
    for bias, pre, gelu in itertools.product((None, b), (None, p), (False, True)):
        expected = numpy_depthwise(x, w, bias, stride=stride, pre_bias=pre, gelu=gelu)

        def run(x: mx.array, w: mx.array, bias=bias, pre=pre, gelu=gelu) -> mx.array:
            return ops.depthwise_conv(
                x,
                w,
                None if bias is None else mx.array(bias),
                stride=stride,
                pre_bias=None if pre is None else mx.array(pre),
                gelu=gelu,
            )

        for call in (run, mx.compile(run)):
            got = call(mx.array(x), mx.array(w))
            assert got.shape == expected.shape and got.dtype == mx.float32
            assert error(got, expected) < 1e-6


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 40),
    width=st.integers(1, 20),
    channels=st.sampled_from([1, 3, 8, 20]),
    k=st.sampled_from([3, 7]),
    stride=st.sampled_from([1, 2]),
    multiplier=st.sampled_from([1, 2]),
    strip=st.sampled_from([1, 300, host.STRIP]),
)
def test_depthwise_of_any_shape(batch, height, width, channels, k, stride, multiplier, strip):
    x, w = normal(0, batch, height, width, channels), normal(1, k, k, channels * multiplier)
    depthwise_module.taps._compiled.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "STRIP", strip)
        got = ops.depthwise_conv(mx.array(x), mx.array(w), stride=stride)
        assert error(got, numpy_depthwise(x, w, stride=stride)) < 1e-6
    depthwise_module.taps._compiled.cache_clear()


@settings(max_examples=100, derandomize=True)
@given(
    rows=st.integers(1, 500),
    row_size=st.integers(1, 10_000),
    size=st.integers(1, 100_000),
    at_least=st.integers(1, 8),
)
def test_strips_cover_the_rows(rows: int, row_size: int, size: int, at_least: int) -> None:
    strips = host.strips(rows, row_size, size=size, at_least=at_least)
    assert [r for a, b in strips for r in range(a, b)] == list(range(rows))
    assert all(a < b for a, b in strips) and len(strips) >= min(rows, at_least)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 3), (1, 256, 4), (1, 33, 2), (1, 1100, 2)])
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_attention(forms: str, shape: tuple[int, int, int], spread: float) -> None:
    batch, length, heads = shape
    qkv = normal(length, batch, length, 96 * heads) * np.float32(spread)
    expected = numpy_attention(qkv, heads)
    # Scores in the hundreds have a rounding error of their own, which the softmax keeps.
    allowed = 2e-6 if spread == 1 else 2e-5
    for call in (ops.self_attention, mx.compile(lambda a, h: ops.self_attention(a, h))):
        assert error(call(mx.array(qkv), heads), expected) < allowed


@pytest.mark.parametrize("head_dim", [8, 32, 64])
def test_attention_of_other_widths(forms: str, head_dim: int) -> None:
    qkv = normal(1, 1, 20, 3 * 2 * head_dim)
    assert error(ops.self_attention(mx.array(qkv), 2), numpy_attention(qkv, 2)) < 4e-6


@pytest.mark.parametrize("heads", [2, 4, 24])
def test_pairs_of_heads(heads: int) -> None:
    qkv = normal(1, 2, 17, 96 * heads)
    got = attention_module.pairs(mx.array(qkv), heads)
    assert error(got, numpy_attention(qkv, heads)) < 4e-6  # a GPU's exponentials


GRID = np.concatenate(
    [
        np.linspace(-9, 9, 400_001),
        np.geomspace(1e-30, 1e30, 2_000),
        -np.geomspace(1e-30, 1e30, 2_000),
    ]
).astype(np.float32)


def test_gelu_is_exact_to_float_rounding(forms: str) -> None:
    expected = numpy_gelu(GRID)
    scale = np.maximum(1, np.abs(GRID))
    for call in (ops.exact_gelu, mx.compile(lambda x: ops.exact_gelu(x))):
        got = np.array(call(mx.array(GRID)), np.float64)
        assert (np.abs(got - expected) / scale).max() < 2.2e-7
        # The normal distribution in it stays between 0 and 1 and rises, up to its rounding.
        inside = np.abs(GRID[:400_001]) > 1e-3
        phi = got[:400_001][inside] / GRID[:400_001][inside]
        assert phi.min() > -2e-7 and phi.max() < 1 + 2e-7
        assert np.diff(phi).min() > -4e-7


def test_gelu_near_zero_is_relatively_exact(forms: str) -> None:
    x = np.concatenate([np.geomspace(1e-30, 0.5, 4001), -np.geomspace(1e-30, 0.5, 4001)])
    x = x.astype(np.float32)
    got, expected = np.array(ops.exact_gelu(mx.array(x)), np.float64), numpy_gelu(x)
    assert (np.abs(got - expected) / np.abs(expected)).max() < 5e-7


def test_gelu_of_what_is_not_a_number(forms: str) -> None:
    y = np.array(ops.exact_gelu(mx.array([math.inf, math.nan, 3e38, 0.0, -3e38])))
    assert y[0] == math.inf and math.isnan(y[1]) and y[2] == np.float32(3e38)
    assert y[3] == 0 and abs(y[4]) < 4e-7


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_types_are_rounded_once(dtype: mx.Dtype) -> None:
    x = mx.array(normal(0, 1, 6, 7, 8)).astype(dtype)
    got = ops.exact_gelu(x)
    expected = numpy_gelu(np.array(x.astype(mx.float32))).astype(np.float32)
    other = got != mx.array(expected).astype(dtype)  # but for values near a tie
    assert got.dtype == dtype and other.astype(mx.float32).mean().item() < 0.01
    w = mx.array(normal(1, 3, 3, 8)).astype(dtype)
    assert ops.depthwise_conv(x, w, gelu=True).dtype == dtype
    assert ops.self_attention(mx.zeros((1, 4, 96), dtype), 1).dtype == dtype


@pytest.mark.parametrize("shape", [(5, 8), (2, 9, 11, 8), (1, 300, 8)])
def test_ffn(forms: str, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(linear_module, "HIDDEN", 1000)
    x, residual = normal(0, *shape), normal(1, *shape)
    w1, b1, w2 = normal(2, 32, 8), normal(3, 32), normal(4, 8, 32)
    expected = residual + numpy_gelu(x.astype(np.float64) @ w1.T + b1) @ w2.T
    arrays = [mx.array(a) for a in (x, residual, w1, b1, w2)]
    for call in (ops.ffn, mx.compile(lambda *a: ops.ffn(*a))):
        got = call(*arrays)
        assert got.shape == shape and error(got, expected) < 1e-6


@pytest.mark.parametrize("shape", [(5, 8), (2, 9, 11, 8), (0, 8)])
def test_linear_gelu(forms: str, shape: tuple[int, ...]) -> None:
    x, w, b = normal(0, *shape), normal(1, 12, 8), normal(2, 12)
    expected = numpy_gelu(x.astype(np.float64) @ w.T + b) if x.size else np.zeros((0, 12))
    for call in (ops.linear_gelu, mx.compile(lambda *a: ops.linear_gelu(*a))):
        got = call(mx.array(x), mx.array(w), mx.array(b))
        assert got.shape == (*shape[:-1], 12)
        assert x.size == 0 or error(got, expected) < 1e-6


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (2, 7, 5, 3), (1, 1, 2, 3)])
def test_stem_conv(forms: str, shape: tuple[int, int, int, int]) -> None:
    x, w, b = normal(0, *shape), normal(1, 12, 3, 3, 3), normal(2, 12)
    batch, height, width, _ = shape
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((batch, -(-height // 2), -(-width // 2), 12))
    for i, j in itertools.product(range(y.shape[1]), range(y.shape[2])):
        window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        y[:, i, j] = (window[:, None] * w).sum((2, 3, 4))
    expected = numpy_gelu(y + b)
    for call in (ops.stem_conv, mx.compile(lambda *a: ops.stem_conv(*a))):
        got = call(mx.array(x), mx.array(w), mx.array(b))
        assert got.shape == y.shape and error(got, expected) < 1e-6


def test_forms_of_linear_gelu_and_stem_conv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused on an assumed GPU, unless its matrix units serve the library's product only."""
    layer = [mx.zeros(shape, mx.float16) for shape in ((32, 32), (64, 32), (64,))]
    conv = [mx.zeros(shape, mx.float16) for shape in ((1, 8, 8, 3), (8, 3, 3, 3), (8,))]
    with ops.assume("cpu"):
        assert (linear_module.linear_gelu_form(*layer), stem_module.form(*conv)) == (
            "added",
            "library",
        )
    with ops.assume("metal"):
        assert linear_module.linear_gelu_form(*layer) == stem_module.form(*conv) == "kernel"
        few = [layer[0][:31], *layer[1:]]
        assert linear_module.linear_gelu_form(*few) == "added"
        odd = [layer[0][:, :8], layer[1][:, :8], layer[2]]
        assert linear_module.linear_gelu_form(*odd) == "added"
        monkeypatch.setattr(device, "device_info", lambda: {"architecture": "applegpu_g17g"})
        assert linear_module.linear_gelu_form(*layer) == "added"
        wide = [a.astype(mx.float32) for a in layer]
        assert linear_module.linear_gelu_form(*wide) == "kernel"
        monkeypatch.setenv("FASTVLM_OPS", "reference")
        assert linear_module.linear_gelu_form(*layer) == stem_module.form(*conv) == "plain"


def test_without_a_compiler_the_results_are_right() -> None:
    x, w, qkv = normal(0, 1, 8, 8, 8), normal(1, 7, 7, 8), normal(2, 1, 40, 96)
    mx.disable_compile()
    try:
        assert error(ops.depthwise_conv(mx.array(x), mx.array(w)), numpy_depthwise(x, w)) < 1e-6
        assert error(ops.self_attention(mx.array(qkv), 1), numpy_attention(qkv, 1)) < 2e-6
        assert error(ops.exact_gelu(mx.array(x)), numpy_gelu(x)) < 1e-6
    finally:
        mx.enable_compile()


def test_other_threads_may_use_the_operations() -> None:
    x, w = normal(0, 1, 12, 12, 8), normal(1, 3, 3, 8)
    expected, got = numpy_depthwise(x, w), []

    def work() -> None:
        got.append(error(ops.depthwise_conv(mx.array(x), mx.array(w)), expected))

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(got) == 2 and max(got) < 1e-6


def test_nothing_is_evaluated_while_a_graph_is_built() -> None:
    """All operations accept arrays that have no values: shapes alone decide."""

    def network(x: mx.array, w: mx.array, w1: mx.array) -> mx.array:
        x = ops.depthwise_conv(x, w, gelu=True)
        x = ops.ffn(x, x, w1, mx.zeros((32,)), w1.T)
        y = ops.self_attention(mx.concatenate([x] * 12, -1).reshape(1, -1, 96), 1)
        return ops.exact_gelu(y)

    x, w, w1 = mx.array(normal(0, 1, 6, 6, 8)), mx.array(normal(1, 3, 3, 8)), mx.zeros((32, 8))
    assert mx.compile(network)(x, w, w1).shape == (1, 36, 32)


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="the CPU's forms")
def test_forms_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, qkv = mx.zeros((1, 4, 4, 8)), mx.zeros((3, 3, 8)), mx.zeros((1, 4, 96))
    assert depthwise_module.form(x, w) == "taps"
    assert (gelu_module.form(x), linear_module.form(x)) == ("rational", "strips")
    assert attention_module.form(qkv, 1) == "strips"
    assert depthwise_module.form(x.astype(mx.float16), w) == "plain"
    monkeypatch.setenv("FASTVLM_OPS", "reference")
    assert depthwise_module.form(x, w) == gelu_module.form(x) == "plain"
    assert attention_module.form(qkv, 1) == linear_module.form(x) == "plain"


def test_report() -> None:
    statuses = ops.statuses()
    assert {s.op.split()[0] for s in statuses} >= {"depthwise_conv", "attention", "gelu", "ffn"}
    assert all(s.error <= selfcheck.TOLERANCE[mx.float16] and s.reason for s in statuses)


def test_graphs_for_another_device_can_be_built() -> None:
    """Counting launches on Linux: forms of an assumed device, chosen without running anything."""
    x, w = mx.zeros((1, 8, 8, 8)), mx.zeros((3, 3, 8))
    with ops.assume("metal"):
        assert depthwise_module.form(x, w) == gelu_module.form(x) == "kernel"
        assert linear_module.form(x) == "added"
    with ops.assume("cuda"):
        assert (depthwise_module.form(x, w), gelu_module.form(x)) == ("plain", "compiled")
    assert selfcheck.verdicts() == [] or mx.metal.is_available()


@pytest.mark.skipif(shutil.which("g++") is None, reason="mx.compile needs g++ here")
@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="the CPU's forms")
def test_fused_loops_on_the_cpu(tmp_path) -> None:
    """GELU is one fused loop; five taps are one, and end where their sum begins."""
    x, w = mx.array(normal(0, 1, 4, 4, 8)), mx.array(normal(1, 3, 3, 8))

    def fused(out: mx.array) -> list[str]:
        mx.export_to_dot(str(tmp_path / "graph.dot"), out)
        text = (tmp_path / "graph.dot").read_text()
        return [line for line in text.splitlines() if "Compiled" in line]

    assert len(fused(ops.exact_gelu(x))) == 1
    parts = len(host.strips(4, 32, at_least=host.parallel()))
    assert len(fused(ops.depthwise_conv(x, w))) == 2 * parts
