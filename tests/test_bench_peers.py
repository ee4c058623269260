"""Peers, with a stand-in for mlx-vlm that answers through this library; and the advisor."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.benchmarks import advisor
from fastvlm_mlx.benchmarks.advisor import Candidate, choose
from fastvlm_mlx.benchmarks.measuring import Effort
from fastvlm_mlx.benchmarks.options import seconds_of
from fastvlm_mlx.benchmarks.peer_session import ratios, run_peers
from fastvlm_mlx.benchmarks.peers import Peer, beside, parse_peer
from fastvlm_mlx.benchmarks.record import Measurement, Skipped, read_record
from fastvlm_mlx.benchmarks.subjects import Choice
from fastvlm_mlx.benchmarks.summary import summarize
from fastvlm_mlx.benchmarks.tables import advice_lines
from fastvlm_mlx.errors import BenchmarkError, OptionError
from tests.test_bench_record import a_measurement, a_record

STAND_IN = """
import os, types
import fastvlm_mlx as fv

class Model:
    def __init__(self, vlm):
        self.vlm = vlm
    def set_dtype(self, dtype):
        pass
    def parameters(self):
        return self.vlm.network.parameters()
    def vision_tower(self, pixels):
        log("E")
        features = self.vlm.vision(pixels) * float(os.environ.get("FACTOR", 1))
        side = int(features.shape[1] ** 0.5)
        return None, features.reshape(1, side, side, -1), None

def load(checkpoint):
    return Model(fv.load(checkpoint, dtype="float32", feature_cache=None)), None

def log(what):
    with open(os.environ["LOG"], "a") as file:
        file.write(what)

def stream_generate(model, processor, prompt, image, max_tokens, temperature):
    print("libraries print what they like")
    log("A")
    with open(os.environ["LOG"]) as file:
        if file.read().count("A") == int(os.environ.get("DIE", -1)):
            os._exit(3)
    question = prompt.split("<image>\\n")[1].split("<|im_end|>")[0]
    for chunk in model.vlm.stream(image[0], question, max_tokens=max_tokens):
        yield types.SimpleNamespace(token=chunk.token + int(os.environ.get("SHIFT", 0)))
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python whose environment seems to have mlx-vlm 9.9."""
    site = tmp_path / "site"
    (site / "mlx_vlm" / "models" / "fastvlm").mkdir(parents=True)
    (site / "mlx_vlm" / "__init__.py").write_text(STAND_IN)
    (site / "mlx_vlm" / "models" / "fastvlm" / "config.py").write_text("class VisionConfig: ...\n")
    (site / "mlx_vlm-9.9.dist-info").mkdir()
    (site / "mlx_vlm-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mlx-vlm\nVersion: 9.9\n"
    )
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return script


@pytest.fixture
def peer(python: Path, tiny: Path) -> Iterator[Peer]:
    running = Peer("mlx-vlm", python, tiny, "float32")
    yield running
    running.close()


def measure(vlm: fv.FastVLM, peer: Peer) -> list[Measurement]:
    return list(beside(vlm, [peer], Effort(2, warmup=1), lambda *_: None))


def test_peers_are_measured_in_turn_after_their_outputs(
    vlm: fv.FastVLM, peer: Peer, tmp_path: Path
) -> None:
    ours, our_ttft, theirs, their_ttft = measure(vlm, peer)
    assert (ours.implementation, theirs.implementation) == ("fastvlm-mlx", "mlx-vlm 9.9")
    assert theirs.notes[0] == "on cpu, float32"
    assert theirs.notes[1].startswith("features agree: relative error")
    assert theirs.notes[2] == "first 8 greedy tokens identical"
    assert [len(m.seconds[m.headline or ""]) for m in (ours, theirs, our_ttft, their_ttft)] == [
        2
    ] * 4
    assert (tmp_path / "log").read_text() == "EA" + "EA" * 3, "compared once, then run by run"
    lines = ratios(a_record(ours, our_ttft, theirs, their_ttft))
    assert [line.split(" takes")[0] for line in lines] == [
        "encoder: mlx-vlm 9.9", "TTFT: mlx-vlm 9.9",
    ]  # fmt: skip


def test_other_outputs_are_said(
    vlm: fv.FastVLM, python: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTOR", "1.01")
    monkeypatch.setenv("SHIFT", "1")
    other = Peer("mlx-vlm", python, tiny, "float32")
    try:
        notes = measure(vlm, other)[2].notes
    finally:
        other.close()
    assert notes[1] == "FEATURES DIFFER: relative error 9.9e-03"
    assert notes[2] == "TOKENS DIFFER from token 1 on"


def test_a_peer_that_dies_is_one_line(
    vlm: fv.FastVLM, python: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIE", "1")
    other = Peer("mlx-vlm", python, tiny, "float32")
    try:
        with pytest.raises(BenchmarkError, match=r"^mlx-vlm: .+$"):
            measure(vlm, other)
    finally:
        other.close()


def test_a_peer_that_dies_later_leaves_what_was_measured(
    python: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIE", "4")  # compared, warmed up, measured once
    path = tmp_path / "peers.json"
    choice, effort = Choice(model=str(tiny)), Effort(2, warmup=1)
    with pytest.raises(BenchmarkError, match="mlx-vlm"):
        run_peers(choice, [("mlx-vlm", python)], None, effort, path, ("bench", "peers"))
    record = read_record(path)
    assert not record.finished and record.software.peers == {"mlx-vlm": "9.9"}
    counts = {(m.implementation, m.kind): [len(t) for t in m.seconds.values()]
              for m in record.measurements}  # fmt: skip
    assert counts == {
        ("fastvlm-mlx", "encoder"): [2], ("fastvlm-mlx", "ttft"): [2],
        ("mlx-vlm 9.9", "encoder"): [1], ("mlx-vlm 9.9", "ttft"): [1],
    }  # fmt: skip


def test_an_environment_without_the_peer_is_recorded(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    wanted = [("transformers", Path(sys.executable))]
    choice = Choice(model=str(tiny))
    assert not run_peers(choice, wanted, None, Effort(1, warmup=0), path, ("bench", "peers"))
    record = read_record(path)
    assert not record.finished
    (skipped,) = record.skipped
    assert skipped.kind == "peer transformers" and "ModuleNotFoundError" in skipped.reason
    assert [m.implementation for m in record.measurements] == ["fastvlm-mlx"] * 2


def test_what_a_peer_says_of_its_failure_is_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mlx_vlm"
    package.mkdir()
    (package / "__init__.py").write_text('raise ImportError("\\nNo such part.\\nInstall it.")\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(
        BenchmarkError, match=r"^mlx-vlm: ImportError: No such part\. Install it\.$"
    ):
        Peer("mlx-vlm", Path(sys.executable), tiny, "float32")


def test_peer_options() -> None:
    assert parse_peer(f"mlx-vlm={sys.executable}") == ("mlx-vlm", Path(sys.executable))
    for wrong in ("mlx-vlm", "mlx-vlm=", "llama.cpp=/bin/sh", "mlx-vlm=/no/such/python"):
        with pytest.raises(OptionError):
            parse_peer(wrong)
    with pytest.raises(BenchmarkError, match="cannot be run"):
        Peer("mlx-vlm", Path(os.devnull), Path(), "float32")


# ------------------------------------------------------------------------------------- advisor


def test_times_have_units() -> None:
    assert [seconds_of(t, "--ttft") for t in ("200ms", "0.2s", " 1.5 s ", ".5s")] == [
        0.2, 0.2, 1.5, 0.5,
    ]  # fmt: skip
    for wrong in ("200", "0ms", "-1s", "fast", "1 min", ""):
        with pytest.raises(OptionError, match="as in 200ms"):
            seconds_of(wrong, "--ttft")


def advised(
    monkeypatch: pytest.MonkeyPatch, vlm: fv.FastVLM, budget: float, bits: tuple[int | None, ...]
) -> list[Candidate | Skipped]:
    made: list[int | None] = []

    def ttft(vlm: object, size: int, *_: object) -> Measurement:
        seconds = size * 1e-4 * (made[-1] or 16) / 16
        return a_measurement("ttft", size, seconds={"felt": (seconds,) * 10}, image_tokens=4)

    def make(choice: Choice) -> fv.FastVLM:
        made.append(choice.bits)
        return vlm

    monkeypatch.setattr("fastvlm_mlx.benchmarks.running.measure_ttft", ttft)
    monkeypatch.setattr(advisor, "forms", lambda choice: bits)
    sizes = (256, 512, 1024)
    choice = Choice(random="nano")
    return list(advisor.candidates(choice, sizes, budget, Effort(), lambda *_: None, make))


def test_the_largest_size_in_time_then_the_most_exact_form(
    monkeypatch: pytest.MonkeyPatch, vlm: fv.FastVLM
) -> None:
    found = [c for c in advised(monkeypatch, vlm, 0.06, (None, 8, 4)) if isinstance(c, Candidate)]
    assert [(c.bits, c.image_size, c.holds) for c in found] == [
        (None, 256, True), (None, 512, True), (None, 1024, False),
        (8, 256, True), (8, 512, True), (8, 1024, True),
        (4, 256, True), (4, 512, True), (4, 1024, True),
    ]  # fmt: skip
    best = choose(found)
    assert best is not None and (best.image_size, best.bits) == (1024, 8)
    lines = advice_lines(found, best, 0.06)
    assert [line for line in lines if "take this" in line] == [lines[6]]
    assert lines[-1] == "fastvlm caption --image-size 1024 --quantize 8"


def test_nothing_in_time_is_said(monkeypatch: pytest.MonkeyPatch, vlm: fv.FastVLM) -> None:
    found = [c for c in advised(monkeypatch, vlm, 0.001, (None,)) if isinstance(c, Candidate)]
    assert [c.image_size for c in found] == [256], "larger ones only take longer"
    assert choose(found) is None
    assert (
        advice_lines(found, None, 0.001)[-1] == "Nothing measured keeps TTFT within 1.00 ms here."
    )


def test_one_slow_answer_in_five_is_too_many() -> None:
    times = summarize([0.1] * 8 + [0.5] * 2)
    assert times.median == 0.1 and times.p90 > 0.2
    measured = a_measurement("ttft", 256, seconds={"felt": (0.1,) * 8 + (0.5,) * 2}, image_tokens=4)
    assert not advisor._candidate(measured, None, 0.2).holds
    assert advisor._candidate(measured, None, 0.6).holds


def test_of_equal_sizes_the_most_exact_form_is_taken() -> None:
    times = summarize([0.1] * 10)
    forms = [Candidate(512, 64, bits, times, holds=True) for bits in (4, None, 8)]
    best = choose(forms)
    assert best is not None and best.bits is None
