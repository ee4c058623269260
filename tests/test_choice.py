"""Timing once, remembering, and never failing over it."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm_mlx.ops import choice
from fastvlm_mlx.ops.device import assume

FORMS = ("kernel", "library")


class Stopwatch:
    """Forms that take as long as they are told, and a count of how often they are timed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = {"kernel": 2.0, "library": 1.0}
        self.timed = 0
        monkeypatch.setattr(choice, "measure", self.measure)

    def measure(self, runs: Mapping[str, choice.Run]) -> dict[str, float]:
        self.timed += len(runs)
        return {form: run() for form, run in runs.items()}  # type: ignore[misc]

    def prepare(self) -> dict[str, choice.Run]:
        return {form: lambda form=form: self.seconds[form] for form in self.seconds}  # type: ignore

    def fastest(self, case: str = "8x8", forms: tuple[str, ...] = FORMS) -> str:
        return choice.fastest("product", case, forms, self.prepare)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(choice, "_can_time", lambda: True)
    new_process(monkeypatch)
    return tmp_path


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_winners", {})
    monkeypatch.setattr(choice, "_spent", 0.0)
    choice._remembered.cache_clear()


@pytest.fixture
def watch(home: Path, monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    return Stopwatch(monkeypatch)


def test_each_case_is_timed_once(watch: Stopwatch) -> None:
    assert [watch.fastest() for _ in range(3)] == ["library"] * 3
    assert watch.timed == 2
    watch.seconds = {"kernel": 1.0, "library": 2.0}
    assert watch.fastest("16x16") == "kernel" and watch.fastest() == "library"
    assert choice.winners() == {"product 8x8": "library", "product 16x16": "kernel"}


def test_the_winner_is_remembered(watch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    watch.fastest()
    new_process(monkeypatch)
    assert watch.fastest() == "library" and watch.timed == 2


def test_another_process_writes_the_file_and_this_one_reads_it(
    watch: Stopwatch, home: Path
) -> None:
    code = """
import mlx.core as mx
from fastvlm_mlx.ops import choice
choice._can_time = lambda: True
one = mx.ones((4,))
mx.eval(one)
print(choice.fastest("product", "8x8", ("kernel", "absent"), lambda: {"kernel": lambda: one + one}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "kernel", "the library would have won here"
    assert watch.fastest() == "kernel" and watch.timed == 0
    assert [p.name for p in (home / "fastvlm-mlx").iterdir()] == ["fastest-forms.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "null",
        '{"x": 3}',
        "[" * 100_000,
        '{"HERE": {"product 8x8": "gone"}}',
        '{"HERE": {"product 8x8": 5}}',
        '{"HERE": []}',
    ],
)
def test_what_is_not_a_list_of_winners_is_rewritten(watch: Stopwatch, text: str) -> None:
    path = choice.cache_file()
    path.parent.mkdir()
    path.write_text(text.replace("HERE", choice._environment()))
    assert watch.fastest() == "library" and watch.timed == 2
    assert json.loads(path.read_text())[choice._environment()] == {"product 8x8": "library"}


def test_bytes_that_are_no_text(watch: Stopwatch) -> None:
    path = choice.cache_file()
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00")
    assert watch.fastest() == "library"
    assert json.loads(path.read_text())


def test_a_place_that_cannot_be_written(watch: Stopwatch, home: Path) -> None:
    (home / "fastvlm-mlx").write_text("a file where the folder should be")
    assert watch.fastest() == "library" and watch.fastest() == "library"
    assert watch.timed == 2, "still timed once per process"


def test_a_file_that_cannot_be_replaced(watch: Stopwatch, home: Path) -> None:
    choice.cache_file().mkdir(parents=True)
    assert watch.fastest() == "library"
    assert [p.name for p in (home / "fastvlm-mlx").iterdir()] == ["fastest-forms.json"]


def test_no_home(watch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert watch.fastest() == "library"


@pytest.mark.parametrize("what", ["chip", "system", "mlx", "fastvlm-mlx"])
def test_other_environments_are_timed_anew(
    watch: Stopwatch, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    watch.fastest()
    before = choice._environment()
    if what == "chip":
        monkeypatch.setattr(choice, "device_info", lambda: {"device_name": "Apple M9"})
    elif what == "system":
        monkeypatch.setattr("platform.mac_ver", lambda: ("99.1", ("", "", ""), "arm64"))
    else:
        versions = {"mlx": "0.32.4", "fastvlm-mlx": "0.1.0", what: "9.9.9"}
        monkeypatch.setattr(choice, "version", versions.__getitem__)
    assert choice._environment() != before
    new_process(monkeypatch)
    watch.seconds = {"kernel": 1.0, "library": 2.0}
    assert watch.fastest() == "kernel"
    found = json.loads(choice.cache_file().read_text())
    assert [list(cases.values()) for cases in found.values()].count(["library"]) == 1
    assert len(found) == 2, "what holds for the other environment is kept"


def test_the_first_form_wins_a_tie(watch: Stopwatch) -> None:
    watch.seconds = {"kernel": 1.0, "library": 1.0}
    assert watch.fastest("a") == "kernel"
    watch.seconds["kernel"] = 1.02
    assert watch.fastest("b") == "kernel", "within the noise"
    assert watch.fastest("c", ("library", "kernel")) == "library"
    watch.seconds["kernel"] = 1.04
    assert watch.fastest("d") == "library"


def test_a_form_that_fails_does_not_win(watch: Stopwatch) -> None:
    del watch.seconds["library"]
    assert watch.fastest() == "kernel"


def test_nothing_that_can_be_timed(watch: Stopwatch) -> None:
    def prepare() -> dict[str, choice.Run]:
        raise MemoryError

    assert choice.fastest("product", "8x8", FORMS, prepare) == "kernel"
    watch.seconds = {}
    assert watch.fastest("9x9") == "kernel"
    assert not choice.cache_file().exists(), "the next process tries again"


def test_the_file_is_read_once(watch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in "abc":
        watch.fastest(case)
    new_process(monkeypatch)
    read, times = choice._read, []
    monkeypatch.setattr(choice, "_read", lambda: times.append(1) or read())
    assert [watch.fastest(case) for case in "abcabc"] == ["library"] * 6
    assert len(times) == 1


def test_a_process_spends_so_much_and_leaves_the_rest_to_the_next(
    watch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watch.fastest("a") == "library"
    monkeypatch.setattr(choice, "_spent", choice.BUDGET + 0.1)
    assert watch.fastest("b") == "kernel" and watch.fastest("b") == "kernel"
    assert watch.fastest("a") == "library" and watch.timed == 2
    new_process(monkeypatch)
    assert watch.fastest("b") == "library" and watch.timed == 4
    assert 0 < choice._spent < choice.BUDGET


class Clock:
    """Evaluations that take as long as they are told; counts the calls of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.evaluations: list[tuple[str, int]] = []
        monkeypatch.setattr(choice, "_seconds", self.evaluate)
        monkeypatch.setattr(choice.time, "perf_counter", lambda: self.now)
        self.now = 0.0

    def evaluate(self, run: choice.Run, calls: int) -> float:
        form = str(run())
        self.evaluations.append((form, calls))
        self.now += calls * self.seconds[form]
        return calls * self.seconds[form]

    def measure(self) -> dict[str, float]:
        return choice.measure({form: lambda form=form: form for form in "ab"})  # type: ignore


def test_forms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, {"a": 1e-3, "b": 5e-4})
    assert clock.measure() == pytest.approx({"a": 1e-3, "b": 5e-4})
    once = [("a", 1), ("a", 1), ("b", 1), ("b", 1)]
    assert clock.evaluations == once + [("a", 3), ("b", 3)] * 5


def test_long_calls_are_timed_one_by_one_and_not_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, {"a": 4e-3, "b": 5e-3})
    clock.measure()
    assert {calls for _, calls in clock.evaluations} == {1}
    clock = Clock(monkeypatch, {"a": 2.0, "b": 1.0})
    assert clock.measure() == {"a": 2.0, "b": 1.0} and len(clock.evaluations) == 6


def test_a_form_that_cannot_be_built_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, {"b": 1e-3})
    assert list(clock.measure()) == ["b"]


@given(st.integers(1, 2**31), st.integers(0, 2**31))
def test_typical_sizes(size: int, most: int) -> None:
    typical = choice.typical(size, most)
    assert typical.bit_count() == 1 and typical.bit_length() % 2 == 1, "a power of four"
    assert typical <= max(1, most) and typical < 2 * size + 2
    assert typical * 2 >= size or typical * 4 > most


def test_sizes_of_square_maps_are_typical() -> None:
    assert [choice.typical(4**n, 2**40) for n in range(12)] == [4**n for n in range(12)]


def test_one_form_needs_no_timing(watch: Stopwatch) -> None:
    assert watch.fastest(forms=("library",)) == "library" and watch.timed == 0


def test_nothing_is_timed_for_an_assumed_device(watch: Stopwatch, home: Path) -> None:
    with assume("metal"):
        assert watch.fastest() == "kernel"
    assert watch.timed == 0 and list(home.iterdir()) == []


def test_timing_evaluates_what_it_is_given_while_a_graph_is_traced(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(x: mx.array) -> mx.array:
        a = mx.ones((8, 8))
        form = choice.fastest(
            "sum", "8x8", FORMS, lambda: {"kernel": lambda: a + a, "library": lambda: a * 2}
        )
        return x + a if form in FORMS else x

    assert mx.array_equal(mx.compile(run)(mx.zeros((8, 8))), mx.ones((8, 8)))
    assert list(choice.winners()) == ["sum 8x8"]


def test_where_the_file_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert choice.cache_file() == Path("/somewhere/.cache/fastvlm-mlx/fastest-forms.json")
    monkeypatch.setattr(sys, "platform", "darwin")
    expected = "/somewhere/Library/Caches/fastvlm-mlx/fastest-forms.json"
    assert choice.cache_file() == Path(expected)
