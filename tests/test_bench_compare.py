"""Comparing records: planted slow-downs are found, noise is not, other machines are named."""

import dataclasses

import numpy as np
import pytest

from fastvlm_mlx.benchmarks.comparison import (
    _holm,
    compare_pairs,
    compare_records,
    compare_times,
)
from fastvlm_mlx.benchmarks.record import Measurement, Operation, Record
from tests.test_bench_record import a_measurement, a_record

SIZES = (256, 512, 768, 1024, 1536)


def run(seed: int, slower: float = 1.0, count: int = 12) -> Record:
    """A run as they are: most times near the fastest, some a good deal later, 3% in all."""
    generator = np.random.default_rng(seed)
    measured = []
    for size in SIZES:
        times = size**2 * 1e-7 * slower * (1 + generator.gamma(1.5, 0.025, count))
        measured.append(a_measurement(size=size, seconds={"tower": tuple(times.tolist())}))
        measured.append(
            a_measurement("ttft", size, seconds={
                "felt": tuple((times * 1.1).tolist()), "paper": tuple((times[::-1]).tolist()),
            })
        )  # fmt: skip
    return a_record(*measured)


def test_a_run_does_not_differ_from_itself() -> None:
    same = compare_records(run(0), run(0))
    assert len(same.changes) == 15, "encoder, felt and the paper's, at five sizes"
    for change in same.changes:
        assert (change.ratio, change.p, change.verdict) == (1.0, 1.0, "no difference")
        assert change.low <= 1 <= change.high
    assert not same.differences and not same.unmatched and not same.too_few


@pytest.mark.parametrize(("factor", "verdict"), [(1.1, "slower"), (1 / 1.1, "faster")])
def test_ten_percent_is_found(factor: float, verdict: str) -> None:
    changes = [
        change
        for seed in range(0, 40, 2)
        for change in compare_records(run(seed), run(seed + 1, factor)).changes
    ]
    assert np.mean([c.verdict == verdict for c in changes]) > 0.9
    assert np.mean([c.low < factor < c.high for c in changes]) > 0.85


def test_two_runs_of_the_same_are_rarely_told_apart() -> None:
    wrong = [
        any(c.verdict != "no difference" for c in compare_records(run(s), run(s + 1000)).changes)
        for s in range(40)
    ]
    assert sum(wrong) <= 4, "any of fifteen, at the 5% level"


def start(seed: int, slower: float = 1.0) -> Record:
    """A run in a process of its own, whose luck (5%) is shared by all its repeats."""
    luck = np.random.default_rng(seed).normal(0, 0.05)
    return run(seed, slower * float(np.exp(luck)))


def told(*pairs: tuple[Record, Record]) -> set[str]:
    return {c.verdict for c in compare_pairs(pairs).changes} - {"no difference"}


def test_further_starts_tell_luck_from_change() -> None:
    alone = [told((start(s), start(s + 1000))) for s in range(40)]
    assert sum(map(bool, alone)) > 15, "one pair takes luck for a change"
    three = [
        told(*((start(s + n), start(s + n + 1000)) for n in (0, 2000, 4000))) for s in range(40)
    ]
    assert sum(map(bool, three)) <= 8
    slower = [
        told(*((start(s + n), start(s + n + 1000, 1.25)) for n in (0, 2000, 4000)))
        for s in range(20)
    ]
    assert sum("slower" in found for found in slower) >= 15


def test_pairs_are_one_comparison() -> None:
    pairs = [(run(0), run(1, 1.2)), (run(2), run(3, 1.3))]
    both, alone = compare_pairs(pairs), [compare_records(*pair).changes[0] for pair in pairs]
    assert both.pairs == 2 and len(both.changes) == 15
    change = both.changes[0]
    assert change.ratio == pytest.approx((alone[0].ratio * alone[1].ratio) ** 0.5)
    assert (change.low, change.high) == (
        min(c.low for c in alone), max(c.high for c in alone)
    )  # fmt: skip
    assert change.p == max(c.p for c in alone) < 0.05 and change.verdict == "slower"
    against = compare_pairs([pairs[0], pairs[1][::-1]])
    assert {c.verdict for c in against.changes} == {"no difference"}
    assert compare_pairs(pairs[:1]).changes == compare_records(*pairs[0]).changes
    only = dataclasses.replace(run(2), measurements=run(2).measurements[:1])
    assert len(compare_pairs([pairs[0], (only, only)]).changes) == 1


def test_the_interval_holds_the_true_ratio() -> None:
    generator = np.random.default_rng(3)
    held = 0
    for _ in range(100):
        a, b = generator.lognormal(0, 0.05, 15), 1.2 * generator.lognormal(0, 0.05, 15)
        _, low, high, _ = compare_times(a.tolist(), b.tolist())
        held += low <= 1.2 <= high
    assert held >= 88


def test_too_few_repeats_are_said() -> None:
    comparison = compare_records(run(0, count=3), run(1, 2.0, count=3))
    assert comparison.too_few
    assert {c.verdict for c in comparison.changes} == {"no difference"}
    # Five would do for a single measurement, and not for fifteen.
    one = a_record(*run(0, count=5).measurements[:1])
    assert not compare_records(one, one).too_few
    assert compare_records(run(0, count=5), run(1, count=5)).too_few


def test_the_correction_never_puts_a_larger_p_below_a_smaller_one() -> None:
    assert _holm([0.021, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert _holm([0.9, 0.5]) == [1.0, 1.0]


def test_equal_times_share_their_rank() -> None:
    ticks = [0.1] * 6 + [0.2] * 6
    assert compare_times(ticks, ticks[::-1])[3] == 1.0
    assert compare_times(ticks, [t + 0.1 for t in ticks])[3] < 0.05


def test_other_machines_types_and_missing_sizes_are_said() -> None:
    one, other = run(0), run(1)
    other = dataclasses.replace(
        other,
        machine=dataclasses.replace(other.machine, chip="B chip"),
        subject=dataclasses.replace(
            other.subject,
            dtype="float32",
            parameters={"vision": 2_000_000},
            operations=(Operation("gelu", "kernel"),),
        ),
        conditions=dataclasses.replace(other.conditions, load_average=3.0, power_source="battery"),
        measurements=other.measurements[2:],
    )
    comparison = compare_records(one, other)
    assert set(comparison.differences) == {
        "machine chip: A chip | B chip",
        "subject dtype: bfloat16 | float32",
        "subject parameters: 0.0 M | 2.0 M",
        "subject operations: gelu plain | gelu kernel",
        "conditions power source: mains | battery",
    }
    assert comparison.unmatched == (
        "encoder at 256 (fastvlm-mlx) only in the first",
        "ttft at 256 (fastvlm-mlx) only in the first",
    )
    assert len(comparison.changes) == 12


def test_memory_without_times_is_left_out() -> None:
    memory: Measurement = a_measurement("memory", 256, seconds={}, peak_memory=5)
    assert compare_records(a_record(memory), a_record(memory)).changes == ()
