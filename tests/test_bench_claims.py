"""Claims: the published rows give the published ratios, and a run keeps, skips and estimates."""

import dataclasses
import itertools
import weakref
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx.benchmarks import baselines, claims_measure, claims_plan, language, paper
from fastvlm_mlx.benchmarks.claims import CLAIMS, Claim, Encode, Piece, Prefill, pieces_of
from fastvlm_mlx.benchmarks.claims_plan import Budget, encoder_flops, plan_piece
from fastvlm_mlx.benchmarks.claims_run import Effort, begin, chosen, run
from fastvlm_mlx.benchmarks.claims_table import claim_lines, figure_of, measurement_of
from fastvlm_mlx.benchmarks.counting import count_encoder, count_launches, total
from fastvlm_mlx.benchmarks.record import OURS, Measurement, Record, Skipped, read_record
from fastvlm_mlx.benchmarks.session import Keeper
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.vision import FastViTHD

BY_NAME = {claim.name: claim for claim in CLAIMS}
GB = 10**9


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_published_rows_give_the_printed_figure(claim: Claim) -> None:
    """Or the claim says why they do not; an excuse that is not needed is a mistake too."""
    assert claim.agrees != bool(claim.off), (claim.printed, claim.published)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("85x", 84.7), ("3.2x", 3.21), ("7.9x", 7.94), ("2.3x", 2.31), ("2x", 2.00), ("6.9x", 6.94),
     ("5.6x", 5.60), ("3.3x", 3.41), ("encoders 3.2x", 3.16), ("3.4x smaller", 3.44)],
)  # fmt: skip
def test_ratios(name: str, ratio: float) -> None:
    assert BY_NAME[name].published == pytest.approx(ratio, abs=0.03 if ratio > 10 else 0.006)


def test_pipelines_are_the_rows_of_table_6() -> None:
    """Sums of Table 10's parts are Table 6's TTFT, of the very rows that the claim names."""
    for name, slow, fast in (
        ("85x", "R2", "R4"),
        ("3.2x", "R1", "R3"),
        ("7.9x", "R44", "R40"),
        ("2x", "R26", "R28"),
        ("22%", "R18", "R20"),
    ):
        claim = BY_NAME[name]
        assert claim.fast is not None and f"{slow}, {fast}" in claim.source
        for pipeline, row in ((claim.slow, slow), (claim.fast, fast)):
            assert pipeline.published == pytest.approx(paper.model_row(row).ttft_ms, abs=1), row


def test_a_mistyped_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tuple(
        dataclasses.replace(r, milliseconds=2271.4) if r.milliseconds == 2721.4 else r
        for r in paper.ENCODERS
    )
    monkeypatch.setattr(paper, "ENCODERS", wrong)
    assert not BY_NAME["85x"].agrees and BY_NAME["3.2x"].agrees


def test_each_piece_is_measured_once_and_sizes_need_no_clock() -> None:
    pieces = pieces_of(CLAIMS)
    assert len(pieces) == len(set(pieces))
    assert pieces_of([BY_NAME["3.4x smaller"]]) == ()
    assert Encode("SigLIP-SO400M", 1152).tiles == 10 and Encode("ViT-L/14", 336).tiles == 1
    assert Encode("SigLIP-SO400M", 1152).tiles_across == 3


# What fits, and what does not.

AMPLE = Budget(memory=400 * GB, flops_per_second=1e15, item_bytes=2)
SLOW = Budget(memory=400 * GB, flops_per_second=1e11, item_bytes=2, quick=True, run_seconds=20)


def test_everything_is_measured_where_there_is_room() -> None:
    for piece in pieces_of(CLAIMS):
        plan = plan_piece(piece, AMPLE)
        if piece == Encode("ViTamin-L", 224):
            assert plan.skip == "no ViTamin-L in MLX here"
        else:
            assert (plan.skip, plan.scale, plan.repeat) == ("", 1, 5)


def test_a_model_that_does_not_fit_is_left_out_or_estimated() -> None:
    small = dataclasses.replace(AMPLE, memory=8 * GB)
    plan = plan_piece(Prefill("Vicuna-7B", 256), small)
    assert plan.skip.startswith("needs about 19.4 GB of memory, 8.0 GB are free")
    assert "--quick" in plan.skip
    quick = plan_piece(Prefill("Vicuna-7B", 256), dataclasses.replace(small, quick=True))
    assert not quick.skip and quick.layers == 4 and quick.scale == 8
    assert quick.estimate.startswith("4 of its 32 equal layers, scaled up: needs about 19.4 GB")
    tight = dataclasses.replace(small, memory=GB // 10, quick=True)
    assert plan_piece(Prefill("Vicuna-7B", 256), tight).skip.startswith("needs about 1.2 GB")
    assert plan_piece(Encode("ConvNeXt-XXL", 512), tight).skip.startswith("needs about 2.4 GB")


def test_quick_cuts_down_what_would_take_too_long() -> None:
    tiles = plan_piece(Encode("SigLIP-SO400M", 1152), SLOW)
    assert tiles.scale == 10 and tiles.estimate.startswith("10 times the time of one tile")
    layers = plan_piece(Prefill("Qwen2-0.5B", 7290), SLOW)
    assert layers.layers is not None and layers.scale == 24 / layers.layers > 1
    xxl = plan_piece(Encode("ConvNeXt-XXL", 1024), SLOW)
    assert xxl.skip == "one run would take 62 s or more, the limit is 20 s"
    unhurried = dataclasses.replace(SLOW, quick=False)
    assert plan_piece(Encode("ConvNeXt-XXL", 1024), unhurried).scale == 1


# Small networks in the place of the large ones.

TINY_TOWER = VisionConfig(layers=(1, 1, 1, 1, 1), dims=(16, 32, 64, 128, 256), image_size=256)
TINY_SHAPE = language.Shape("qwen2", 32, 64, 4, 4, 2, 100, 1e6)


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = baselines.Baseline(baselines.ViTConfig(128, 6, 2, 512), "", 0)
    convnext = baselines.Baseline(baselines.ConvNeXtConfig((1, 1, 8, 1), (8, 16, 32, 64)), "", 0)
    networks = MappingProxyType(
        {n: convnext if n.startswith("Conv") else vit for n in baselines.BASELINES}
    )
    shapes = MappingProxyType(
        {
            name: dataclasses.replace(TINY_SHAPE, family=shape.family)
            for name, shape in language.SHAPES.items()
        }
    )
    for module in (baselines, claims_plan):
        monkeypatch.setattr(module, "BASELINES", networks)
    for module in (language, claims_plan):
        monkeypatch.setattr(module, "SHAPES", shapes)
    monkeypatch.setattr(claims_measure, "VisionConfig", lambda: TINY_TOWER)


def test_predicted_work_is_that_of_the_graph(small_networks: None) -> None:
    """Against the counter, which knows nothing of the formulas."""
    for name, side in (("ViT-L/14", 84), ("SigLIP-SO400M", 112), ("ConvNeXt-L", 128)):
        network = baselines.build(name, side)
        mx.eval(network.parameters())
        pixels = mx.zeros((1, side, side, 3))
        counted = count_launches(network, pixels, compiled=True).flops
        assert encoder_flops(name, side) == pytest.approx(counted, rel=0.12), name


def test_predicted_work_of_fastvithd() -> None:
    counted = total(count_encoder(FastViTHD(VisionConfig()), 256).values()).flops
    assert encoder_flops("FastViTHD", 256) == pytest.approx(counted, rel=0.06)


@pytest.mark.parametrize(
    ("name", "linear"), [("Qwen2-0.5B", 0.358e9), ("Qwen2-1.5B", 1.310e9), ("Qwen2-7B", 6.525e9)]
)
def test_shapes_of_language_models(name: str, linear: float) -> None:
    shape = language.SHAPES[name]
    assert shape.layers * shape.layer_parameters == pytest.approx(linear, rel=2e-3)
    assert shape.flops(1) == pytest.approx(2 * linear, rel=2e-3)


def test_prefill_in_chunks_fills_the_same_cache(
    small_networks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = language.LayerStack("LLaMA-3-8B", mx.float32, layers=3)
    embeddings = stack.embeddings(21)
    at_once = [np.array(a) for a in stack.prefill(embeddings)]
    monkeypatch.setattr(language, "CHUNK", 8)
    in_chunks = [np.array(a) for a in stack.prefill(embeddings)]
    assert len(at_once) == 1 + 2 * 3, "the output, then keys and values of three layers"
    for one, other in zip(at_once[1:], in_chunks[1:], strict=True):
        assert one.shape[:2] == (1, 2) and one.shape[3] == 8
        assert np.abs(one[:, :, :21]).max() > 0.01
        np.testing.assert_allclose(one[:, :, :21], other[:, :, :21], atol=1e-5)
    np.testing.assert_allclose(at_once[0][:, -5:], in_chunks[0], atol=1e-4)


def _run(claims: Any, file: Path | None, resume: Path | None = None, tick: Any = None) -> Record:
    keeper = Keeper(begin(claims, "float32", resume), file)
    with keeper:
        for result in run(keeper.record, claims, Effort(repeat=2), tick or (lambda *_: None)):
            keeper.add(result)
    return keeper.record


def test_a_run_measures_every_piece_and_its_table_has_the_ratio(
    small_networks: None, tmp_path: Path
) -> None:
    claims, file = chosen(["3.2x", "166 ms", "3.4x smaller"]), tmp_path / "claims.json"
    record = _run(claims, file)
    assert record == read_record(file) and record.finished and not record.skipped
    kinds = [(m.kind, m.implementation, m.image_size, m.image_tokens) for m in record.measurements]
    assert sorted(kinds, key=str) == [
        ("encoder", "SigLIP-SO400M", 384, None),
        ("encoder", OURS, 1024, None),
        ("prefill", "Qwen1.5-0.5B", None, 729),
        ("prefill", "Qwen2-0.5B", None, 256),
    ]
    median = {
        (m.implementation, m.image_size or m.image_tokens): m.summaries[m.headline or ""].median
        for m in record.measurements
    }
    slow = median["SigLIP-SO400M", 384] + median["Qwen1.5-0.5B", 729]
    fast = median[OURS, 1024] + median["Qwen2-0.5B", 256]
    figure = figure_of(claims[0], record)
    assert figure is not None and figure.value == pytest.approx(slow / fast)
    assert f"{slow / fast:.2f}" in "\n".join(claim_lines(claims, record))
    size = figure_of(BY_NAME["3.4x smaller"], record)
    assert size is not None and size.value == pytest.approx(
        record.subject.parameters["SigLIP-SO400M"] / record.subject.parameters["FastViTHD"]
    )


def test_a_stopped_run_keeps_what_it_has_and_goes_on(small_networks: None, tmp_path: Path) -> None:
    claims, file = chosen(["6.9x", "5.6x", "3.3x"]), tmp_path / "claims.json"
    count = itertools.count()

    def stop(piece: Piece, plan: object) -> None:
        if next(count) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(claims, file, tick=stop)
    partial = read_record(file)
    assert len(partial.measurements) == 2 and not partial.finished
    told: list[Piece] = []
    whole = _run(claims, file, file, tick=lambda piece, plan: told.append(piece))
    assert whole.measurements[:2] == partial.measurements, "measured times are kept"
    assert len(whole.measurements) == 4 and len(told) == 2 and whole.finished
    assert [s.reason for s in whole.skipped] == ["ViTamin-L at 224: no ViTamin-L in MLX here"]
    text = "\n".join(claim_lines(claims, whole))
    assert "not measured: ViTamin-L at 224: no ViTamin-L in MLX here" in text
    assert "interrupted" not in text
    assert "interrupted" in "\n".join(claim_lines(claims, partial))


def test_a_record_of_another_machine_is_not_continued(small_networks: None, tmp_path: Path) -> None:
    claims, file = chosen(["6.9x"]), tmp_path / "claims.json"
    _run(claims, file)
    text = file.read_text()
    with pytest.raises(OptionError, match=r"another dtype \(float32; now float16\)"):
        begin(claims, "float16", file)
    cores = begin(claims, "float32", None).machine.cores
    file.write_text(text.replace(f'"cores": {cores}', f'"cores": {(cores or 0) + 1}'))
    with pytest.raises(OptionError, match="measured with another machine"):
        begin(claims, "float32", file)


def test_estimates_are_scaled_and_marked(
    small_networks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With so little time that tiles and layers are cut down."""
    piece = Encode("SigLIP-SO400M", 1152)
    one = encoder_flops("SigLIP-SO400M", 384)
    budget = Budget(None, one / 2.0, 4, quick=True, run_seconds=3)
    plans = [
        (piece, plan_piece(piece, budget)),
        (Prefill("Qwen2-0.5B", 256), claims_plan.Plan(1, 1, 4.0, 2, "2 of its 8")),
    ]
    results = list(claims_measure.measure_pieces(plans, mx.float32, lambda piece, plan: None))
    measured = [r for r in results if isinstance(r, Measurement)]
    assert len(measured) == 2
    for m, factor in zip(measured, (10, 4), strict=True):
        whole = m.seconds[m.headline or ""]
        np.testing.assert_allclose(whole, [factor * t for t in m.seconds["measured_part"]])
        assert m.notes[0].startswith("estimate: ")
    claims = chosen(["85x"])
    record = begin(claims, "float32", None)
    parts = [dataclasses.replace(m, notes=()) for m in measured]
    rest = [
        dataclasses.replace(parts[0], implementation=OURS, image_size=1024),
        dataclasses.replace(parts[1], image_tokens=7290),
    ]
    honest = dataclasses.replace(record, measurements=(*measured, *rest))
    figure = figure_of(claims[0], honest)
    assert figure is not None and figure.estimated
    assert f"~{figure.value:.2f}" in "\n".join(claim_lines(claims, honest))
    exact = figure_of(claims[0], dataclasses.replace(record, measurements=(*parts, *rest)))
    assert exact is not None and not exact.estimated


def test_out_of_memory_skips_one_piece_only(
    small_networks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("[malloc] Unable to allocate 123 bytes.")

    monkeypatch.setattr(claims_measure, "LayerStack", fails)
    claims = chosen(["166 ms"])
    record = _run(claims, None)
    assert measurement_of(Encode("FastViTHD", 1024), record) is not None
    assert record.skipped == (Skipped("prefill", None, "Qwen2-0.5B, 256 tokens: out of memory"),)
    assert figure_of(claims[0], record) is None
    assert "not measured" in "\n".join(claim_lines(claims, record))
    monkeypatch.setattr(claims_measure, "LayerStack", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _run(claims, None)


def test_one_network_at_a_time(small_networks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    make = language.LayerStack

    def count(*arguments: Any) -> language.LayerStack:
        assert not alive, "the network before this one is still in memory"
        stack = make(*arguments)
        alive.add(stack)
        return stack

    monkeypatch.setattr(claims_measure, "LayerStack", count)
    plans: list[tuple[Piece, claims_plan.Plan]] = [
        (Prefill(name, 16), claims_plan.Plan(0.1, 1)) for name in ("Qwen2-0.5B", "LLaMA-3-8B")
    ]
    results = claims_measure.measure_pieces(plans, mx.float32, lambda piece, plan: None)
    assert len(list(results)) == 2


def test_bad_options_are_option_errors() -> None:
    with pytest.raises(OptionError, match="--claim is '86x'; expected one of 85x"):
        chosen(["86x"])
    with pytest.raises(OptionError, match="--dtype is 'int8'"):
        begin(chosen(["6.9x"]), "int8", None)
    with pytest.raises(OptionError, match="Unknown language model 'GPT'"):
        language.LayerStack("GPT", mx.float32)


def test_slow_pieces_are_repeated_less() -> None:
    budget = Budget(memory=None, flops_per_second=1e12, item_bytes=4, total_seconds=30, repeat=5)
    assert [claims_plan._repeats(seconds, budget) for seconds in (0.0, 1, 6, 10, 31)] == [
        5,
        5,
        5,
        3,
        1,
    ]
