"""The roofline: published peaks, counted work, floors and shares."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from fastvlm_mlx.benchmarks import roofline_measure
from fastvlm_mlx.benchmarks.chips import CHIPS, Peaks, measure_peaks, peaks_of, published_chip
from fastvlm_mlx.benchmarks.counting import count_launches
from fastvlm_mlx.benchmarks.record import OURS, Machine, read_record
from fastvlm_mlx.benchmarks.roofline import (
    LIMIT,
    Floor,
    Work,
    encoder_work,
    floors_of,
    language_work,
)
from fastvlm_mlx.benchmarks.roofline_measure import measure_roofline
from fastvlm_mlx.benchmarks.session import Keeper, new_record
from fastvlm_mlx.benchmarks.subjects import Choice
from fastvlm_mlx.config import Config, TextConfig, VisionConfig
from fastvlm_mlx.model import Network

HALF_BILLION = TextConfig(896, 4864, 24, 14, 2, 151936)
SEVEN_BILLION = TextConfig(3584, 18944, 28, 28, 4, 152064, tie_word_embeddings=False)


def _machine(gpu: str, cores: int | None) -> Machine:
    return Machine(gpu, 10, gpu, cores, 32 << 30, "macOS 15, arm64", "Metal")


@pytest.mark.parametrize(
    ("name", "cores", "tflops", "bandwidth"),
    [
        ("Apple M1 Max", 32, 10.6, 400),
        ("Apple M1 Max", 24, 7.95, 400),
        ("Apple M1 Max", None, 10.6, 400),
        ("Apple M3 Max", 30, 12.15, 300),
        ("Apple M4", 10, 4.6, 120),
        ("Apple M2 Ultra", 76, 27.2, 800),
    ],
)
def test_published_peaks(name: str, cores: int | None, tflops: float, bandwidth: float) -> None:
    peaks = peaks_of(_machine(name, cores), mx.float16)
    assert peaks.flops == pytest.approx(1e12 * tflops)
    assert peaks.bandwidth == 1e9 * bandwidth
    assert peaks.source and not peaks.source.startswith("measured")


def test_matrix_units_are_for_16_bits() -> None:
    machine = _machine("Apple M5 Max", 40)
    assert peaks_of(machine, mx.bfloat16).flops == 70e12
    assert peaks_of(machine, mx.float32).flops == 18e12


@pytest.mark.parametrize("name", ["AMD EPYC", "Apple M9 Max", "Apple A18 Pro", "SGI M1 Max", ""])
def test_unknown_chips_have_no_published_peaks(name: str) -> None:
    assert published_chip(name) is None


def test_every_chip_has_a_source_and_its_own_name() -> None:
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        assert published_chip(f"Apple {chip.name}") is chip and chip.source


def test_a_measured_peak_is_that_of_evaluated_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock around a lazy graph would show more than any machine can do."""
    peaks = measure_peaks(mx.float32, repeat=1)
    assert 1e8 < peaks.flops < 5e15 and 1e7 < peaks.bandwidth < 5e13
    assert peaks.source.startswith("measured")
    monkeypatch.setattr("fastvlm_mlx.benchmarks.chips.measure_peaks", lambda dtype: "measured")
    machine = Machine("Apple M1", 8, None, None, None, "macOS 15, arm64", "CPU")
    assert peaks_of(machine, mx.float32) == "measured", "the CPU of an M1 is not its GPU"


def test_work_and_floor_of_fastvithd_at_1024() -> None:
    """487 GFLOP: 46 ms at the peak of an M1 Max, 26 ms at that of an M4 Max."""
    work = encoder_work(VisionConfig(), 1024, mx.float16)
    assert list(work) == ["stem", *(f"stage{n}" for n in range(1, 6)), "head", "encoder"]
    assert work["encoder"].flops == pytest.approx(487e9, rel=0.01)
    assert sum(w.flops for w in work.values()) == 2 * work["encoder"].flops
    for chip, milliseconds in (("Apple M1 Max", 46), ("Apple M4 Max", 26)):
        peaks = peaks_of(_machine(chip, None), mx.float16)
        compute = floors_of(work, peaks)["encoder"].compute
        assert 1000 * compute == pytest.approx(milliseconds, abs=0.6)


def test_a_floor_is_the_larger_of_its_limits() -> None:
    peaks = Peaks(1e12, 1e11, "")
    floors = floors_of({"a": Work(2 * 10**9, 10**6), "b": Work(10**6, 5 * 10**8)}, peaks)
    assert floors == {"a": Floor(2e-3, 1e-5), "b": Floor(1e-6, 5e-3)}
    assert (floors["a"].seconds, floors["a"].bound) == (2e-3, "compute")
    assert (floors["b"].seconds, floors["b"].bound) == (5e-3, "memory")


def test_work_of_the_language_model() -> None:
    config = Config(HALF_BILLION)
    parameters = 24 * (896 * (2 * 896 + 2 * 128 + 3 * 4864)) + 896 * 151936
    work = language_work(config, 1024, 2, 2 * parameters)
    assert work["prefill"].flops == pytest.approx(2 * 256 * 0.358e9, rel=0.06)
    attention = 4 * 24 * 256 * 896  # one query's scores and their product with the values
    assert work["decode"].flops == 2 * parameters + attention
    # 0.988 GB of weights in 16 bits with the tied head, and 12,288 bytes of cache per token.
    assert work["decode"].bytes == 2 * parameters + 256 * 12288
    assert 2 * parameters == pytest.approx(0.988e9, rel=1e-3)


def test_an_untied_embedding_table_is_not_read() -> None:
    stack, head = int(6.525e9), 3584 * 152064
    work = language_work(Config(SEVEN_BILLION), 1024, 2, 2 * (stack + 2 * head))
    assert work["decode"].bytes == pytest.approx(2 * (stack + head) + 256 * 57344, rel=1e-3)


def test_prefill_is_what_the_graph_of_the_network_does() -> None:
    """But for the upper half of the attention scores, which a causal kernel leaves out."""
    text = TextConfig(64, 128, 3, 4, 2, 320)
    tower = VisionConfig(layers=(1, 1, 1, 1, 1), dims=(16, 32, 64, 128, 256), image_size=256)
    config = Config(text, tower)
    network = Network(config)
    mx.eval(network.parameters())
    n = tower.tokens(256, 256)
    counted = count_launches(
        lambda x: network.prefill(x, network.new_cache()), mx.zeros((1, n, 64)), compiled=False
    )
    work = language_work(config, 256, 4, 0)
    assert counted.flops - work["prefill"].flops == 2 * 2 * 64 * n * (n - 1)


def test_the_table_and_its_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peaks = Peaks(1e11, 1e10, "measured: by hand")
    monkeypatch.setattr(roofline_measure, "peaks_of", lambda machine, dtype: peaks)
    told: list[str] = []
    file = tmp_path / "roofline.json"
    with Keeper(new_record([], None), file) as keeper:
        lines = measure_roofline(Choice(random="nano"), 128, 2, keeper, told.append)
    parts = ["stem", *(f"stage{n}" for n in range(1, 6)), "head", "encoder", "projector"]
    parts += ["prefill", "decode"]
    assert told[-len(parts) :] == parts
    measured, limit = read_record(file).measurements
    assert (measured.implementation, limit.implementation) == (OURS, LIMIT)
    assert list(measured.seconds) == parts == list(limit.seconds)
    assert all(len(times) == 2 for times in measured.seconds.values())
    assert "100 GFLOP/s and 10 GB/s at most; measured: by hand" in limit.notes[0]
    row = next(line for line in lines if line.startswith("encoder"))
    share = limit.seconds["encoder"][0] / measured.summaries["encoder"].median
    assert row.endswith(f"{share:.0%}")
    assert json.loads(file.read_text())["subject"]["model"] == "nano"


def test_a_decoded_token_always_sees_the_same_prompt() -> None:
    """The cache is cut back before each run; else every repeat would be longer than the last."""
    text = TextConfig(64, 128, 2, 4, 2, 320)
    tower = VisionConfig(layers=(1, 1, 1, 1, 1), dims=(16, 32, 64, 128, 256), image_size=256)
    network = Network(Config(text, tower))
    runs = {part.name: part.run for part in roofline_measure._parts(network, 128)}
    first, second = runs["decode"](), runs["decode"]()
    assert mx.array_equal(first, second)
