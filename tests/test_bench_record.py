"""The record: written whole, read strictly; summaries and drift against values known by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx.benchmarks.record import (
    Conditions,
    Machine,
    Measurement,
    Operation,
    Record,
    Skipped,
    Software,
    Subject,
    read_record,
    write_record,
)
from fastvlm_mlx.benchmarks.summary import drift_of, summarize
from fastvlm_mlx.benchmarks.tables import rows
from fastvlm_mlx.errors import BenchmarkError

ROOT = Path(__file__).resolve().parents[1]


def a_measurement(kind: str = "encoder", size: int | None = 256, **more: Any) -> Measurement:
    empty = {f.name: None for f in dataclasses.fields(Measurement) if f.name != "notes"}
    seconds = {"tower": (0.1, 0.11, 0.12)}
    return Measurement(**{**empty, "implementation": "fastvlm-mlx", "seconds": seconds} | more | {
        "kind": kind, "image_size": size,
    })  # fmt: skip


def a_record(*measurements: Measurement, **more: Any) -> Record:
    plain: dict[str, Any] = {
        "date": "2026-11-20T12:00:00+00:00",
        "command": ("bench", "encoder"),
        "machine": Machine("A chip", 8, "A GPU", 10, 1 << 34, "macOS 26.0, arm64", "Metal"),
        "conditions": Conditions("mains", False, 0.4),
        "software": Software("0.1.0", None, "3.12.0", "0.32.4", "0.32.2", "Accelerate", None),
        "subject": Subject(
            "random 0.5b", {"vision": 5}, "bfloat16", "float16", 4, (Operation("gelu", "plain"),)
        ),
        "measurements": measurements or (a_measurement(),),
        "skipped": (Skipped("encoder", 1536, "does not fit"),),
    }
    return Record(**plain | more)


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    record = a_record(finished=False)
    path = tmp_path / "new folder" / "a.json"
    write_record(record, path)
    assert read_record(path) == record
    assert [p.name for p in path.parent.iterdir()] == ["a.json"], "nothing half-written remains"
    written = json.loads(path.read_text())["measurements"][0]
    assert written["summary"]["tower"]["median"] == 0.11
    assert written["drift"] is None


def damaged(document: dict[str, Any], what: str) -> object:
    first = document["measurements"][0]
    match what:
        case "not ours":
            del document["schema"]
        case "version":
            document["version"] = 99
        case "missing":
            del document["machine"]["chip"]
        case "unknown":
            first["surprise"] = 1
        case "type":
            first["image_size"] = "256"
        case "zero":
            first["seconds"]["tower"][1] = 0.0
        case "empty":
            first["seconds"]["tower"] = []
        case "list":
            return [document]
    return document


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("not ours", "not a result of `fastvlm bench`"),
        ("list", "not a result of `fastvlm bench`"),
        ("version", "has version 99"),
        ("missing", r"machine lacks 'chip'"),
        ("unknown", r"measurements\[0\] has the unknown 'surprise'"),
        ("type", r"image_size is '256'; expected int"),
        ("zero", "'tower' are not positive"),
        ("empty", "'tower' are not positive"),
    ],
)
def test_damaged_files_are_refused_in_one_line(what: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_record(a_record(), path)
    path.write_text(json.dumps(damaged(json.loads(path.read_text()), what)))
    with pytest.raises(BenchmarkError, match=named) as caught:
        read_record(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"Cannot read .*missing\.json: No such file"):
        read_record(tmp_path / "missing.json")
    (tmp_path / "half.json").write_text('{"schema": ')
    with pytest.raises(BenchmarkError, match=r"half\.json is not JSON"):
        read_record(tmp_path / "half.json")
    (tmp_path / "file").touch()
    with pytest.raises(BenchmarkError, match="Cannot write"):
        write_record(a_record(), tmp_path / "file" / "a.json")


def test_every_committed_record_can_be_read() -> None:
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
    assert paths
    for path in paths:
        assert read_record(path).measurements


def test_the_median_of_few_and_of_many() -> None:
    few = summarize([3.0, 1.0, 2.0])
    assert (few.median, few.low, few.high) == (2.0, 1.0, 3.0)
    assert few.coverage == pytest.approx(0.75), "three repeats cannot give 95%, and say so"
    ten = summarize([float(n) for n in range(1, 11)])
    # Binomial(10, 1/2): P(2 <= heads <= 8) = 1 - 2 * 11 / 1024.
    assert (ten.median, ten.low, ten.high) == (5.5, 2.0, 9.0)
    assert ten.coverage == pytest.approx(1 - 22 / 1024)
    assert (ten.p10, ten.p90) == (pytest.approx(1.9), pytest.approx(9.1))
    # The third of eleven would do for 93% only.
    eleven = summarize([float(n) for n in range(1, 12)])
    assert (eleven.low, eleven.high) == (2.0, 10.0)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(2000):
        one = summarize(np.exp(generator.standard_normal(15)).tolist())
        held += one.low <= 1.0 <= one.high
    assert held / 2000 == pytest.approx(one.coverage, abs=0.015)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_a_summary_is_in_order(seconds: list[float]) -> None:
    s = summarize(seconds)
    assert min(seconds) <= s.low <= s.median * (1 + 1e-12) and s.median <= s.high * (1 + 1e-12)
    assert s.p10 <= s.median * (1 + 1e-12) and s.median <= s.p90 * (1 + 1e-12)


def noisy(seed: int, count: int = 20) -> np.ndarray:
    generator = np.random.default_rng(seed)
    times: np.ndarray = 0.1 * (1 + generator.gamma(2, 0.01, count))
    return times


def test_a_machine_that_heats_up_is_noticed_and_noise_is_not() -> None:
    warming = noisy(0) * np.linspace(1, 1.15, 20)
    drift = drift_of(warming.tolist())
    assert drift is not None and drift.flagged
    assert 0.05 < drift.change < 0.15
    flagged = [d.flagged for seed in range(300) if (d := drift_of(noisy(seed).tolist()))]
    assert len(flagged) == 300 and sum(flagged) <= 6, "one in a hundred, or fewer"
    assert drift_of([0.1] * 5) is None, "too few to tell"
    little = drift_of(np.linspace(1, 1.015, 20).tolist())
    assert little is not None and little.change > 0 and not little.flagged, "below 2%"
    shown = [rows(a_measurement(seconds={"tower": tuple(t)})) for t in (warming, noisy(1))]
    assert ["drift" in str(table) for table in shown] == [True, False]


def test_drift_is_of_the_headline() -> None:
    rising = tuple((noisy(1, 12) * np.linspace(1, 1.3, 12)).tolist())
    level = tuple(noisy(2, 12).tolist())
    one = a_measurement("ttft", seconds={"load_image": rising, "felt": level})
    assert one.headline == "felt" and one.drift is not None and not one.drift.flagged
    assert a_measurement("memory", seconds={}).drift is None
