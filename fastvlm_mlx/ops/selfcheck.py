"""A special form is compared with the plain one before its first use, and given up if they differ.

The comparison runs eagerly on small arrays of its own, so it may happen while MLX traces a graph.
"""

import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .device import is_assumed

# Largest error allowed, relative to the largest output: a few roundings of each type.
TOLERANCE = {mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Verdict:
    """What the first use of a special form found; `error` is None where the form did not run."""

    op: str
    configuration: str
    passed: bool
    error: float | None
    reason: str


_verdicts: dict[tuple[str, str], Verdict] = {}
_lock = threading.Lock()


def passes(
    op: str,
    configuration: str,
    dtype: mx.Dtype,
    check: Callable[[], tuple[mx.array, mx.array]],
) -> bool:
    """Whether a special form may be used; `check` returns its result and the plain float32 one.

    Checked once per process and configuration; the first failure of an operation warns.
    """
    if is_assumed():
        return True
    key = (op, configuration)
    with _lock:
        if key in _verdicts:
            return _verdicts[key].passed
        failed_before = any(v.op == op and not v.passed for v in _verdicts.values())
        verdict = _verdicts[key] = _judge(op, configuration, dtype, check)
    if not verdict.passed and not failed_before:
        warnings.warn(
            f"The fast form of {op} ({configuration}) is off, the plain form is used instead: "
            f"{verdict.reason}. Other configurations of it may follow silently; "
            "`fastvlm doctor` lists them.",
            RuntimeWarning,
            stacklevel=2,
        )
    return verdict.passed


def expected(plain: Callable[..., mx.array], *arguments: Any, **options: Any) -> mx.array:
    """What the plain form makes of these arguments, its arrays widened to float32, on the CPU.

    A GPU's own float32 is no measure: with matrix units (M5) MLX's products default to TF32.
    """

    def wide(value: Any) -> Any:
        return value.astype(mx.float32) if isinstance(value, mx.array) else value

    with mx.stream(mx.cpu):
        return plain(*map(wide, arguments), **{name: wide(v) for name, v in options.items()})


def verdicts() -> list[Verdict]:
    """What has been checked so far in this process."""
    return list(_verdicts.values())


def relative_error(got: mx.array, expected: mx.array) -> float:
    """Largest difference over the largest expected magnitude; infinite if that is not a number."""
    got, expected = got.astype(mx.float32), expected.astype(mx.float32)
    error: float = (mx.abs(got - expected).max() / mx.abs(expected).max()).item()  # type: ignore[assignment]
    return math.inf if math.isnan(error) else error


def _judge(
    op: str,
    configuration: str,
    dtype: mx.Dtype,
    check: Callable[[], tuple[mx.array, mx.array]],
) -> Verdict:
    try:
        error = relative_error(*check())
    except Exception as failure:  # whatever keeps a kernel from being built or launched
        return Verdict(op, configuration, False, None, _first_error(failure))
    reason = f"error {error:.1e}, allowed {TOLERANCE[dtype]:.1e}"
    return Verdict(op, configuration, error <= TOLERANCE[dtype], error, reason)


def _first_error(failure: Exception) -> str:
    """One line. MLX's own says that a kernel was not built; why is in a line of the compiler's."""
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    errors = [line.strip() for line in lines[1:] if "error:" in line]
    return ": ".join([lines[0].rstrip(":"), *errors[:1]])[:300]
