"""Measuring: what runs how often, what is recorded, what is refused; nothing depends on speed."""

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.benchmarks import measuring, running
from fastvlm_mlx.benchmarks.measuring import (
    Effort,
    measure_decode,
    measure_encoder,
    measure_memory,
    measure_ttft,
)
from fastvlm_mlx.benchmarks.record import Measurement
from fastvlm_mlx.benchmarks.running import check_sizes, needed_memory, perform, plan
from fastvlm_mlx.benchmarks.session import machine_folder, public_command
from fastvlm_mlx.benchmarks.subjects import (
    Choice,
    build,
    describe,
    random_model,
    stand_in_tokenizer,
)
from fastvlm_mlx.benchmarks.tables import milliseconds, plain_line, rows
from fastvlm_mlx.errors import BenchmarkError, CheckpointError, OptionError
from fastvlm_mlx.generation import Chunk, Timings
from fastvlm_mlx.prompt import prompt_ids
from fastvlm_mlx.tokenizer import Tokenizer
from fastvlm_mlx.vision import FastViTHD
from fastvlm_mlx.vlm import DEFAULT_PROMPT
from tests.test_bench_record import a_measurement, a_record

EFFORT = Effort(repeat=3, warmup=2, answer_tokens=4, cold_starts=1)


def quiet(done: int, runs: int) -> None:
    pass


@pytest.fixture(scope="module")
def nano() -> fv.FastVLM:
    return build(Choice(random="nano", dtype="float32"))


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The side of every picture that any tower encodes from here on."""
    sides: list[int] = []
    encode = FastViTHD.__call__

    def counted(self: FastViTHD, pixels: mx.array) -> mx.array:
        sides.append(pixels.shape[1])
        return encode(self, pixels)

    monkeypatch.setattr(FastViTHD, "__call__", counted)
    return sides


def test_every_repeat_encodes_its_picture(nano: fv.FastVLM, encodes: list[int]) -> None:
    ticks: list[tuple[int, int]] = []
    one = measure_ttft(nano, 128, EFFORT, lambda *t: ticks.append(t))
    assert encodes == [128] * 2 * 5, "felt and tower, warm-up included: no cache answers"
    assert ticks == [(n, 5) for n in range(1, 6)]
    assert {len(times) for times in one.seconds.values()} == {3}
    assert (one.image_tokens, one.prompt_tokens, one.answer_tokens) == (4, 28, 1)
    encodes.clear()
    measure_encoder(nano, 192, EFFORT, quiet)
    assert encodes == [192] * 5
    encodes.clear()
    measure_memory(nano, 128, EFFORT, quiet)
    assert encodes == [128]


def test_the_parts_of_ttft_make_up_the_whole(nano: fv.FastVLM) -> None:
    seconds = measure_ttft(nano, 128, EFFORT, quiet).seconds
    parts = ("load_image", "preprocess", "encode", "prefill", "first_token")
    assert set(seconds) == {*parts, "felt", "tower", "visual_prefill", "paper"}
    for n in range(3):
        assert sum(seconds[part][n] for part in parts) < seconds["felt"][n]
        assert seconds["paper"][n] == seconds["tower"][n] + seconds["visual_prefill"][n]


def test_a_split_with_an_unclosed_clock_is_refused(
    nano: fv.FastVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "timed", lambda f: (1e6, f()))  # the tower takes for ever
    with pytest.raises(BenchmarkError, match="stopped before its result was evaluated"):
        measure_ttft(nano, 128, Effort(repeat=1, warmup=0), quiet)


def test_decode_counts_its_tokens(nano: fv.FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    decode = type(nano.network).decode
    monkeypatch.setattr(type(nano.network), "decode", lambda *a: (steps.append(1), decode(*a))[1])
    one = measure_decode(nano, 40, EFFORT, quiet)
    assert (one.prompt_tokens, one.answer_tokens) == (40, 4)
    assert len(steps) == 5 * 3, "the first of four tokens comes from the prefill"
    assert len(one.seconds["token"]) == 3
    with pytest.raises(BenchmarkError, match="give --context 2044 or less"):
        measure_decode(nano, 2045, EFFORT, quiet)


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="the estimate was fitted on a CPU")
@pytest.mark.parametrize("size", [128, 256])
def test_memory_is_estimated_from_above_but_not_absurdly(nano: fv.FastVLM, size: int) -> None:
    mx.clear_cache()
    pixels = mx.zeros((1, size, size, 3))
    mx.eval(pixels)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(nano.vision(pixels))
    used = mx.get_peak_memory() - before
    assert used < needed_memory(nano, size) < 8 * used


def test_what_does_not_fit_is_skipped_with_the_reason(
    nano: fv.FastVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvlm_mlx.benchmarks.running.available_memory", lambda: 10_000_000)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)
    steps = plan(Choice(random="nano"), nano, ("encoder", "ttft"), (128, 512, 3072), EFFORT)
    small, large = steps[0], steps[2]
    assert small.obstacle is None
    assert large.obstacle == "needs about 0.1 GB beside the weights; 0.0 GB are free"
    assert [s.kind for s in steps] == ["encoder", "ttft"] * 3
    skipped = list(perform(steps[2:], lambda *_: None))
    assert [(s.kind, s.image_size) for s in skipped] == [
        ("encoder", 512), ("ttft", 512), ("encoder", 3072), ("ttft", 3072),
    ]  # fmt: skip


def test_a_prompt_beyond_the_context_is_skipped(nano: fv.FastVLM) -> None:
    (step,) = plan(Choice(random="nano"), nano, ("ttft",), (3072,), EFFORT)
    assert step.obstacle == "2330 tokens; the context window is 2048"


def test_one_failure_does_not_lose_the_others(nano: fv.FastVLM) -> None:
    good, bad, memory, worse = (
        plan(Choice(random="nano"), nano, ("memory",), (64,), EFFORT)[0] for _ in range(4)
    )

    def fail(error: Exception) -> object:
        def measure(tick: object) -> object:
            raise error

        return measure

    object.__setattr__(bad, "measure", fail(CheckpointError("no such thing")))
    object.__setattr__(memory, "measure", fail(RuntimeError("[malloc] Unable to allocate")))
    object.__setattr__(worse, "measure", fail(RuntimeError("a bug")))
    results = perform([bad, memory, good, worse], lambda *_: None)
    assert next(results).reason == "failed: no such thing"  # type: ignore[union-attr]
    assert next(results).reason == "failed: out of memory"  # type: ignore[union-attr]
    assert next(results).peak_memory > 0  # type: ignore[union-attr,operator]
    with pytest.raises(RuntimeError, match="a bug"):
        next(results)


def test_company_is_noted(nano: fv.FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (step,) = plan(Choice(random="nano"), nano, ("memory",), (64,), EFFORT)
    for others, notes in ((8.0, ("other programs kept 0.8 cores busy meanwhile",)), (0.5, ())):
        seconds, clock = iter((100.0, 100.0 + others)), iter((0.0, 10.0))
        monkeypatch.setattr(running, "others_busy", lambda seconds=seconds: next(seconds))
        monkeypatch.setattr(running.time, "monotonic", lambda clock=clock: next(clock))
        (result,) = perform([step], lambda *_: None)
        assert isinstance(result, Measurement) and result.notes == notes


def test_a_random_model_runs_in_every_form() -> None:
    vlm = random_model("tiny", bits=4)
    answer = vlm.caption(measuring.picture_bytes(90, 70), max_tokens=2)
    assert len(answer.tokens) == 2
    subject = describe(Choice(random="0.5b", bits=4), vlm)
    assert (subject.model, subject.dtype, subject.bits) == ("random 0.5b", "float32", 4)
    half = random_model("tiny", dtype="float16")
    assert half.network.vision.stem.conv.weight.dtype == mx.float16
    features = half.vision(mx.ones((1, 128, 128, 3), mx.float16))
    assert mx.isfinite(features).all().item() and features.std().item() > 1e-3


def test_a_random_model_that_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_mlx.benchmarks.subjects.available_memory", lambda: 10**10)
    with pytest.raises(BenchmarkError, match=r"random 7b take 31\.\d GB here; 10\.0 GB are free"):
        random_model("7b")
    monkeypatch.setattr("fastvlm_mlx.benchmarks.subjects.available_memory", lambda: 10**6)
    with pytest.raises(BenchmarkError, match=r"The weights of nano take 0\.0 GB here"):
        build(Choice(random="nano"))


def test_the_stand_in_prompt_is_as_long_as_the_genuine_one(qwen2_tokenizer: object) -> None:
    genuine = Tokenizer.from_directory(qwen2_tokenizer)  # type: ignore[arg-type]
    ids = prompt_ids(stand_in_tokenizer(), DEFAULT_PROMPT, 1)
    assert len(ids) == len(prompt_ids(genuine, DEFAULT_PROMPT, 1))


def test_the_stand_in_prompt_has_25_positions() -> None:
    assert len(prompt_ids(stand_in_tokenizer(), DEFAULT_PROMPT, 1)) == 25


@pytest.mark.parametrize(
    "wrong", [{"model": "a", "random": "nano"}, {"random": "2b"}, {"bits": 7}, {"dtype": "int8"}]
)
def test_impossible_choices(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        Choice(**wrong)  # type: ignore[arg-type]


def test_sizes() -> None:
    assert check_sizes([512, 256, 512]) == (256, 512)
    for wrong in ([100], [0], [-64]):
        with pytest.raises(OptionError, match=f"size is {wrong[0]}; .* multiple of 64"):
            check_sizes(wrong)
    with pytest.raises(OptionError, match="nothing"):
        check_sizes([])


def test_records_name_no_folder_of_this_computer() -> None:
    words = ["bench", "--model", "/home/me/my models/x", "--peer", "mlx-vlm=~/env/bin/python"]
    assert public_command(words) == ("bench", "--model", "x", "--peer", "mlx-vlm=python")
    assert public_command(["--model", "apple/FastVLM-0.5B"]) == ("--model", "apple/FastVLM-0.5B")
    assert public_command(["--json", "results/a.json"]) == ("--json", "results/a.json")


def test_result_folders_are_named_after_the_machine() -> None:
    assert machine_folder(a_record().machine) == "a-gpu-10-core-gpu-16gb"


def test_the_table() -> None:
    assert [milliseconds(s) for s in (0.0001234, 0.00123, 0.0123, 0.123, 1.234)] == [
        "0.123 ms", "1.23 ms", "12.3 ms", "123.0 ms", "1234 ms",
    ]  # fmt: skip
    part = (0.01, 0.02, 0.03)
    names = ("felt", "encode", "tower", "visual_prefill", "paper")
    one = a_measurement("ttft", 256, seconds=dict.fromkeys(names, part), image_tokens=16)
    lines = [plain_line(row) for row in rows(one)]
    assert [line[:26].strip() for line in lines] == [
        "TTFT, felt", "encode", "TTFT, paper's", "encoder", "prefill of image tokens",
    ]  # fmt: skip
    assert lines[0].split()[2:5] == ["256", "16", "20.0"]
    assert "(10.0 to 30.0)" in lines[0], "in brackets: three repeats are not 95%"
    rate = rows(a_measurement("decode", None, seconds={"token": part}))[1]
    assert plain_line(rate).split() == ["throughput", "50.0", "tokens/s"]


def test_decoding_is_the_time_between_tokens(
    nano: fv.FastVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_: object) -> Iterator[Chunk]:
        yield from (Chunk("", 5, None, Timings(decode=0.1 * n)) for n in range(4))

    monkeypatch.setattr(measuring, "generate", generate)
    measured = measure_decode(nano, 10, EFFORT, quiet)
    assert measured.seconds["token"] == pytest.approx((0.1,) * 3)


def test_the_first_start_is_not_counted(nano: fv.FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = iter([(9.0, 10.0), (1.0, 2.0), (3.0, 4.0)])
    monkeypatch.setattr(measuring, "_start", lambda command: next(starts))
    measured = measuring.measure_cold_start(nano, "nano", [], Effort(cold_starts=2), quiet)
    assert measured.seconds == {"first_text": (1.0, 3.0), "exit": (2.0, 4.0)}


@pytest.mark.parametrize("part", ["encode", "prefill"])
def test_parts_that_are_told_too_short_are_no_measurement(
    nano: fv.FastVLM, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    told = replace(Timings(encode=60.0, prefill=60.0), **{part: 1e-9})
    chunk = Chunk("", 5, "length", told)
    monkeypatch.setattr(type(nano), "stream", lambda *_, **__: iter([chunk]))
    with pytest.raises(BenchmarkError, match=f"clock of '{part}'"):
        measure_ttft(nano, 128, EFFORT, quiet)
