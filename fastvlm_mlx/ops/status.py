"""What is in use on this machine, and how far it is from the plain forms: for `fastvlm doctor`."""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from . import selfcheck
from .attention import form as attention_form
from .attention import plain as plain_attention
from .attention import self_attention
from .depthwise import depthwise_conv
from .depthwise import form as depthwise_form
from .depthwise import plain as plain_depthwise
from .device import backend
from .gelu import exact_gelu
from .gelu import form as gelu_form
from .gelu import plain as plain_gelu
from .linear import ffn, linear_gelu, linear_gelu_form, plain_linear_gelu
from .linear import form as ffn_form
from .linear import plain as plain_ffn
from .stem import form as stem_form
from .stem import plain as plain_stem
from .stem import stem_conv

# The network's kinds of depthwise convolution: k, stride, multiplier and trimmings.
_DEPTHWISE = (
    (3, 1, 1, {"bias"}),
    (7, 1, 1, {"pre_bias"}),
    (7, 1, 1, {"bias"}),
    (3, 2, 1, {"bias", "gelu"}),
    (7, 2, 2, {"bias", "gelu"}),
    (3, 1, 2, {"bias"}),
)


@dataclass(frozen=True)
class OpStatus:
    """One operation as it runs here; the error is relative to its largest float32 output."""

    op: str
    form: str
    error: float
    reason: str


def statuses(dtype: mx.Dtype | None = None) -> list[OpStatus]:
    """Run every operation once on small arrays, in float32 on a CPU, else in float16 or `dtype`."""
    default = mx.float32 if mx.default_device() == mx.cpu else mx.float16
    return list(_statuses(dtype or default))


def _statuses(dtype: mx.Dtype) -> Iterator[OpStatus]:
    x = _example(0, 1, 64, 160, 32).astype(dtype)  # above what a CPU leaves to the plain forms
    for k, stride, multiplier, has in _DEPTHWISE:
        w = _example(1, k, k, 32 * multiplier).astype(dtype)
        bias = _example(2, 32 * multiplier).astype(dtype) if "bias" in has else None
        before = _example(3, 32).astype(dtype) if "pre_bias" in has else None
        act = "gelu" in has
        got = depthwise_conv(x, w, bias, stride=stride, pre_bias=before, gelu=act)
        options = {"stride": stride, "pre_bias": before, "gelu": act}
        expected = selfcheck.expected(plain_depthwise, x, w, bias, **options)
        name = f"depthwise_conv {k}x{k} stride {stride} x{multiplier}"
        form = depthwise_form(x, w, bias, stride=stride, pre_bias=before, gelu=act)
        yield _status(name, form, got, expected)

    qkv = _example(4, 1, 320, 3 * 32 * 4).astype(dtype)
    expected = selfcheck.expected(plain_attention, qkv, 4)
    yield _status("attention", attention_form(qkv, 4), self_attention(qkv, 4), expected)
    expected = selfcheck.expected(plain_gelu, x)
    yield _status("gelu", gelu_form(x), exact_gelu(x), expected)

    shapes = (128, 32), (128,), (32, 128)
    w1, b1, w2 = (_example(5 + n, *shape).astype(dtype) for n, shape in enumerate(shapes))
    expected = selfcheck.expected(plain_linear_gelu, x, w1, b1)
    yield _status("linear_gelu", linear_gelu_form(x, w1, b1), linear_gelu(x, w1, b1), expected)
    expected = selfcheck.expected(plain_ffn, x, x, w1, b1, w2)
    yield _status("ffn", ffn_form(x), ffn(x, x, w1, b1, w2), expected)

    shapes4 = (1, 40, 80, 3), (32, 3, 3, 3), (32,)
    arrays = [_example(8 + n, *shape).astype(dtype) for n, shape in enumerate(shapes4)]
    expected = selfcheck.expected(plain_stem, *arrays)
    yield _status("stem_conv", stem_form(*arrays), stem_conv(*arrays), expected)


def _example(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def _status(op: str, form: str, got: mx.array, expected: mx.array) -> OpStatus:
    return OpStatus(op, form, selfcheck.relative_error(got, expected), _reason(op, form))


def _reason(op: str, form: str) -> str:
    failures = [v for v in selfcheck.verdicts() if not v.passed and v.op == op.split()[0]]
    if failures and form != "kernel":
        return f"self-check failed: {failures[-1].configuration}: {failures[-1].reason}"
    if backend() == "reference":
        return "FASTVLM_OPS=reference"
    return {
        "plain": f"the library's own is used on {backend()}",
        "compiled": "the library's own, fused",
        "kernel": "Metal kernel, self-check passed",
        "pairs": "two heads at a time through the library's fused 64-wide attention",
        "taps": "strips of rows as sums of shifted slices",
        "rational": "vectorised rational approximation",
        "added": "bias and residual as addends of the products",
        "library": "the library's own, with our gelu",
        "strips": "rows in strips that stay in the cache",
    }[form]
