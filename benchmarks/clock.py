"""A clock for a lazy framework: it stops when the result exists, not when its graph does."""

import io
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import mlx.core as mx

from fastvlm_mlx.errors import BenchmarkError

__all__ = ["check_split", "is_pending", "timed"]

T = TypeVar("T")
_now = time.perf_counter

_UNCLOSED = 4
"""A part that shows less than this fraction of the work it contains was not waited for."""


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds that `function` and the evaluation of what it returns take, and its result.

    The result is an array, a host number or text that was made from one, or a list, tuple or dict
    of those. Anything else cannot be waited for: BenchmarkError. Work that was queued before is
    waited for before the clock starts.
    """
    mx.synchronize()
    started = _now()
    result = function()
    mx.eval(result)
    seconds = _now() - started
    leaves = list(_leaves(result))
    if not leaves:
        raise BenchmarkError(
            f"{_name(function)} returned nothing that can be waited for ({result!r:.40}): a clock "
            "around an unevaluated graph measures nothing. Let it return its arrays."
        )
    if any(is_pending(leaf) for leaf in leaves):
        raise BenchmarkError(f"{_name(function)} returned an array that was not evaluated in time.")
    return seconds, result


def is_pending(value: object) -> bool:
    """Whether `value` is an array with operations still to be run."""
    if not isinstance(value, mx.array):
        return False
    drawing = io.StringIO()
    mx.export_to_dot(drawing, value)  # operations are boxes, evaluated arrays have none
    return "shape=rectangle" in drawing.getvalue()


def check_split(part: str, seconds: float, least: float) -> None:
    """Raise BenchmarkError if `part` took far less than the work in it does by itself (`least`)."""
    if seconds < least / _UNCLOSED:
        raise BenchmarkError(
            f"The clock of {part!r} shows {1000 * seconds:.2f} ms for work that takes "
            f"{1000 * least:.2f} ms by itself: it was stopped before its result was evaluated."
        )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    elif isinstance(value, (mx.array, int, float, str)):
        yield value
    elif value is not None:
        raise BenchmarkError(
            f"A {type(value).__name__} cannot be waited for; expected arrays, numbers or text."
        )


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "The measured function")
