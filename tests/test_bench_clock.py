"""The clock stops when a result exists; planted mistakes with unevaluated graphs fail loudly."""

from dataclasses import dataclass

import mlx.core as mx
import pytest

from fastvlm_mlx.benchmarks import clock
from fastvlm_mlx.benchmarks.clock import check_split, is_pending, timed
from fastvlm_mlx.errors import BenchmarkError

X = mx.ones((8, 8))


def test_a_graph_is_pending_until_it_is_evaluated() -> None:
    y = X @ X + 1
    assert is_pending(y)
    mx.eval(y)
    assert not is_pending(y) and not is_pending(3)


def test_the_clock_stops_after_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[mx.array] = []
    pending: list[bool] = []
    ticks = iter((1.0, 3.5))

    def now() -> float:
        pending.append(any(map(is_pending, made)))
        return next(ticks)

    def lazy() -> dict[str, list[mx.array]]:
        made.append(X @ X)
        return {"y": made}

    monkeypatch.setattr(clock, "_now", now)
    seconds, result = timed(lazy)
    assert seconds == 2.5
    assert result["y"][0] is made[0]
    assert pending == [False, False], "nothing was left to do when the clock was read"


def test_a_clock_that_forgets_to_evaluate_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.mx, "eval", lambda *_: None)
    with pytest.raises(BenchmarkError, match="lazy returned an array that was not evaluated"):
        timed(lazy)


def lazy() -> mx.array:
    return X @ X


@dataclass
class Box:
    tokens: mx.array


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (lambda: (lazy(), None)[1], "a clock around an unevaluated graph"),
        (lambda: [], "a clock around an unevaluated graph"),
        (lambda: Box(lazy()), "A Box cannot be waited for"),
        (lambda: (lazy() for _ in range(2)), "A generator cannot be waited for"),
        (lambda: [lazy(), Box(lazy())], "A Box cannot be waited for"),
    ],
)
def test_results_that_hide_their_graph_are_refused(mistake: object, named: str) -> None:
    with pytest.raises(BenchmarkError, match=named):
        timed(mistake)  # type: ignore[arg-type]


def test_a_part_stopped_too_early_is_caught() -> None:
    check_split("encode", seconds=0.04, least=0.05)
    with pytest.raises(BenchmarkError, match=r"'encode' shows 0.20 ms for work that takes 50.00"):
        check_split("encode", seconds=0.0002, least=0.05)


def test_what_was_queued_before_is_not_counted() -> None:
    def heavy() -> mx.array:
        a = mx.full((640, 640), 1e-3)
        for _ in range(16):
            a = a @ a
        return a

    small = mx.array(1.0)
    mx.eval(small)
    timed(heavy)
    alone = timed(heavy)[0]
    queued = heavy()
    mx.async_eval(queued)
    assert timed(lambda: small + 1)[0] < alone / 2
