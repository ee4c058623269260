"""The report's numbers are the record's, in tables and in figures."""

import dataclasses
import json
from typing import Any

import pytest

from fastvlm_mlx.benchmarks.paper import FIGURE_1A
from fastvlm_mlx.benchmarks.record import Conditions, Record, Skipped, Subject
from fastvlm_mlx.benchmarks.reporting.contents import compose
from fastvlm_mlx.benchmarks.reporting.document import Document
from fastvlm_mlx.benchmarks.reporting.latency import sizes_of
from fastvlm_mlx.benchmarks.reporting.markdown import to_markdown
from fastvlm_mlx.benchmarks.reporting.nano import read_evaluation
from fastvlm_mlx.benchmarks.reporting.plots import Bars, Ratios
from fastvlm_mlx.benchmarks.reporting.words import duration, milliseconds
from tests.records import PARTS, SIZES, a_record, encoder, full_record, measured, rows, section


@pytest.fixture
def full() -> Record:
    return full_record()


def test_table_has_the_records_numbers(full: Record) -> None:
    document = compose([full])
    assert rows(section(document, "latency")) == {
        "512 px": ("64", "30.1 (27.1 to 36.1)", "81.2 (40.6 to 81.2)", "101 (101 to 152)", "1.50"),
        "1024 px": (
            "256", "116 (105 to 139)", "167 (83.4 to 167)", "1,234 (1,234 to 1,852)",
            "1.50",
        ),
        "1536 px": ("576", "250 (225 to 300)", "390 (195 to 390)", "430 (430 to 645)", "1.50"),
    }  # fmt: skip
    decoding = "Decoding: 250 tokens/s (200 to 250) after a prompt of 280 positions."
    assert decoding in section(document, "latency").notes
    assert [fact.value for fact in document.facts] == ["116 ms", "167 ms", "1.23 s", "250 tokens/s"]
    assert rows(section(document, "ttft-parts"))["512 px"] == (
        "4.00", "15.1", "31.0", "50.0", "1.00", "101 (101 to 152)", "3",
    )  # fmt: skip
    text = to_markdown(document, {})
    assert "| 512 px | 64 | 30.1 (27.1 to 36.1) | 81.2 (40.6 to 81.2) | 101 (101 to 152) |" in text
    assert "fastvlm bench all --json 'a file.json'" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00004, "0.04"), (0.00999, "9.99"), (0.009996, "10.0"), (0.09996, "100"), (12.3, "12,300")],
)
def test_milliseconds_keep_three_digits(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(999.4, "999 ms"), (999.6, "1.00 s"), (4.2, "4.20 ms"), (166.8, "167 ms"), (14124, "14.1 s")],
)
def test_durations_change_their_unit_at_a_second(value: float, text: str) -> None:
    assert duration(value) == text


def lines(name: str, document: Document) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> x and y of every line that was drawn in a section's figure."""
    figures = pytest.importorskip("fastvlm_mlx.benchmarks.reporting.figures")
    plot = section(document, name).plot
    assert plot is not None
    (axes,) = figures.draw(plot).axes
    return {
        str(line.get_label()): ([*map(float, line.get_xdata())], [*map(float, line.get_ydata())])
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def test_encoder_figure_draws_the_records_medians(full: Record) -> None:
    drawn = lines("encoder", compose([full]))
    assert drawn["this machine"] == ([512, 1024, 1536], pytest.approx([30.1, 116.2, 250]))
    assert drawn["FastViTHD, paper (M1 Max)"] == ([256, 768, 1024], [6.8, 54.8, 116.3])


def test_the_papers_encoder_is_not_drawn_beside_another_one() -> None:
    small = a_record(encoder(256, 0.05), subject=Subject("nano", {"vision": 1}, "f", "f", None, ()))
    assert list(lines("encoder", compose([small]))) == ["this machine"]


def test_accuracy_figure_joins_measured_time_and_published_accuracy(full: Record) -> None:
    document = compose([full])
    drawn = lines("accuracy-latency", document)
    published = {p.side: p for p in FIGURE_1A if p.encoder == "FastViTHD"}
    assert drawn["FastVLM 0.5B, this machine"] == (
        pytest.approx([81.25, 166.8]),
        [published[512].avg5, published[1024].avg5],
    ), "1536 px has no published accuracy"
    assert drawn["FastVLM, paper (M1 Max)"] == (
        [p.ttft_ms for p in published.values()],
        [p.avg5 for p in published.values()],
    )
    assert drawn["SigLIP-SO400M, 384"] == ([535.4], [55.5])
    assert "times here are measured" in section(document, "accuracy-latency").lead


def test_language_models_are_told_apart_by_their_size(full: Record) -> None:
    counts = {"vision": 122_710_000, "language_model": 1_543_714_304}
    larger = dataclasses.replace(
        full, subject=dataclasses.replace(full.subject, model="x", parameters=counts)
    )
    document = compose([larger])
    assert "FastVLM 0.5B, this machine" not in lines("accuracy-latency", document)
    xs, ys = lines("models", document)["FastVLM 1.5B, this machine"]
    # R11: GQA 64.2, TextVQA 66.0, POPE 88.0, DocVQA 67.7, SeedBench 71.4
    assert (xs, ys) == (pytest.approx([166.8]), pytest.approx([71.46]))


def test_bars_are_the_parts(full: Record) -> None:
    figures = pytest.importorskip("fastvlm_mlx.benchmarks.reporting.figures")
    plot = section(compose([full]), "ttft-parts").plot
    (axes,) = figures.draw(plot).axes
    widths = [[patch.get_width() for patch in bars] for bars in axes.containers]
    starts = [[patch.get_x() for patch in bars] for bars in axes.containers]
    assert [w[0] for w in widths] == pytest.approx([4, 15.1, 31, 50, 1])
    assert [s[0] for s in starts] == pytest.approx([0, 4, 19.1, 50.1, 100.1])
    assert [w[1] for w in widths] == pytest.approx([4, 20, 120, 60, 1])
    assert [text.get_text() for text in axes.texts if "s" in text.get_text()][-3:] == [
        "101 ms", "1.23 s", "430 ms",
    ]  # fmt: skip
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [
        p.replace("_", " ") for p in PARTS
    ]


def test_nano_figure_draws_the_evaluation() -> None:
    evaluation = json.loads(SIZES.read_text())
    drawn = lines("nano", compose([], read_evaluation(SIZES)))
    columns = list(evaluation["sizes"].values())
    assert drawn["objects"] == (
        [column["TTFT, ms (median)"] for column in columns],
        pytest.approx([100 * column["object statements"] for column in columns]),
    )
    assert len(drawn) == 4


def test_published_labels_do_not_cover_one_another() -> None:
    figures = pytest.importorskip("fastvlm_mlx.benchmarks.reporting.figures")
    plot = section(compose([a_record(encoder(256, 0.1))]), "accuracy-latency").plot
    figure = figures.draw(plot)
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 4 + 1 + 4 + 1 + 3, "sizes and names of two curves, three lone points"
    for number, box in enumerate(boxes):
        assert box.x0 > 0 and box.x1 < figure.bbox.x1
        for other in boxes[:number]:
            assert not box.overlaps(other)


def test_one_size_and_one_kind_make_a_report_that_says_what_is_missing() -> None:
    record = a_record(
        encoder(256, 0.1),
        skipped=(Skipped("ttft", 1024, "does not fit: needs 9 GB, has 8 GB"),),
        conditions=Conditions("battery", True, 3.0),
        finished=False,
    )
    document = compose([record])
    assert [s.name for s in document.sections] == [
        "latency", "accuracy-latency", "encoder", "machine", "everything",
    ]  # fmt: skip
    missing = "\n".join(document.missing)
    assert "ttft at 1024 px was skipped: does not fit: needs 9 GB, has 8 GB" in missing
    assert "decode: no record has it; `fastvlm bench decode --json` does" in missing
    assert "encoder: no record" not in missing and "ttft: no record" not in missing
    notes = "\n".join(section(document, "latency").notes)
    for said in ("interrupted", "load average 3", "Low-power", "battery"):
        assert said in notes
    assert lines("encoder", document)["this machine"] == ([256], pytest.approx([100]))


def test_a_record_without_measurements_still_names_the_machine() -> None:
    document = compose([a_record()])
    assert [s.name for s in document.sections] == ["accuracy-latency", "machine"]
    assert document.facts == ()


def test_several_machines_are_told_apart(full: Record) -> None:
    other = dataclasses.replace(
        full, machine=dataclasses.replace(full.machine, chip="B chip", gpu="B GPU")
    )
    document = compose([full, other, other])
    names = [s.name for s in document.sections]
    assert len(names) == len(set(names))
    assert names[:3] == ["latency", "latency-2", "latency-3"]
    shared, different = section(document, "machine").tables
    assert len(set(different.header)) == 4
    assert different.rows == (
        ("chip", "A chip", "B chip", "B chip"),
        ("GPU", "A GPU, 10 cores", "B GPU, 10 cores", "B GPU, 10 cores"),
    )
    assert ("MLX computes on", "Metal") in shared.rows
    assert len(lines("encoder", document)) == 4
    two = compose([full, other])
    assert "A chip" in two.subtitle and "B chip" in two.subtitle
    assert compose([full, full]).subtitle == compose([full]).subtitle, "said once"
    assert {"A GPU", "B GPU"} < set(lines("encoder", two))


def test_drift_is_told() -> None:
    drifting = tuple(0.1 + 0.005 * n for n in range(12))
    notes = section(compose([a_record(measured("encoder", 512, {"tower": drifting}))]), "latency")
    assert any("the last third of the repeats took +" in note for note in notes.notes)


def test_peers_are_set_beside_this_library() -> None:
    document = compose(
        [
            a_record(
                encoder(512, 0.1),
                measured("encoder", 512, {"tower": (0.25,)}, implementation="mlx-vlm 0.7.10"),
                measured("encoder", 336, {"tower": (0.25,)}, implementation="ViT-L/14"),
            )
        ]
    )
    ratio = section(document, "peers").tables[0].rows[0][-1]
    assert ratio.startswith("2.50x (")
    assert section(document, "peers").tables[0].rows == (
        ("mlx-vlm 0.7.10", "encoder", "512 px", "250 (250 to 250)", "100 (90.0 to 120)", ratio),
    )


def test_peers_are_grouped_by_what_was_measured() -> None:
    names = ("fastvlm-mlx", "mlx-vlm 0.7.10", "transformers 5.23.0")
    document = compose(
        [
            a_record(
                *(
                    measured(kind, 512, {part: (seconds,) * 3}, implementation=name)
                    for seconds, name in enumerate(names, start=1)
                    for kind, part in (("encoder", "tower"), ("ttft", "felt"))
                )
            )
        ]
    )
    peers = section(document, "peers")
    assert isinstance(peers.plot, Bars)
    assert [bar.label.split(",")[0] for bar in peers.plot.bars] == ["encoder"] * 3 + [
        "TTFT as felt"
    ] * 3
    assert [row[1] for row in peers.tables[0].rows] == ["TTFT as felt"] * 2 + ["encoder"] * 2
    assert peers.plot.x_label == "median and all that was seen", "three repeats give no interval"


def claims_record() -> Record:
    """85x with both sides, 6.9x with one missing, 7.9x with a side that is an estimate."""
    pieces = {
        ("encoder", "fastvlm-mlx", 1024): 0.2,
        ("prefill", "Qwen2-0.5B", 256): 0.05,
        ("encoder", "SigLIP-SO400M", 1152): 4.0,
        ("prefill", "Qwen2-0.5B", 7290): 6.0,
        ("encoder", "ViT-L/14", 224): 0.1,
    }
    found = []
    for (kind, who, size), seconds in pieces.items():
        note = ("estimate: 2 of 24 layers",) if size == 7290 else ()
        where = (size, None) if kind == "encoder" else (None, size)
        part = "tower" if kind == "encoder" else "prefill"
        one = measured(kind, where[0], {part: (seconds,)}, implementation=who, notes=note)
        found.append(dataclasses.replace(one, image_tokens=where[1]))
    counts = {"FastViTHD": 122_710_000, "SigLIP-SO400M": 412_000_000}
    subject = Subject("random weights, shapes of the paper", counts, "float32", "float32", None, ())
    return a_record(*found, subject=subject)


def test_claims_are_the_papers_ratio_beside_the_records() -> None:
    document = compose([claims_record()])
    assert "latency" not in {s.name for s in document.sections}, "one table of a claims record"
    claims = section(document, "claims")
    table = rows(claims)
    assert table["85x"] == (
        "LLaVA-OneVision-0.5B / FastVLM 0.5B", "14,123.8", "166.8", "84.68", "~10,000.0", "250.0",
        "~40.00",
    )  # fmt: skip
    assert table["166 ms"] == ("FastVLM 0.5B", "166.8", "–", "–", "250.0", "–", "–")
    assert table["3.4x smaller"][-3:] == ("412.0", "122.7", "3.36")
    assert table["6.9x"][-3:] == ("100.0", "–", "–"), "FastViTHD was not measured at 256"
    assert any("2 of 24 layers" in note for note in claims.notes)
    assert isinstance(claims.plot, Ratios)
    drawn = {ratio.claim.partition("\n")[0]: ratio for ratio in claims.plot.ratios}
    assert drawn["85x"].paper == pytest.approx(84.68, abs=0.01)
    assert drawn["85x"].here == pytest.approx(40) and drawn["85x"].estimated
    assert drawn["6.9x"].here is None
    assert "166 ms" not in drawn and "3.4x smaller" not in drawn, "ratios of times alone"


def test_claims_figure_draws_both_ratios() -> None:
    figures = pytest.importorskip("fastvlm_mlx.benchmarks.reporting.figures")
    plot = section(compose([claims_record()]), "claims").plot
    (axes,) = figures.draw(plot).axes
    points = {}
    for line in axes.get_lines():
        if line.get_marker() in "oD":
            row = int(line.get_ydata()[0])
            points[plot.ratios[row].claim.partition("\n")[0], line.get_marker()] = line
    assert points["85x", "o"].get_xdata()[0] == pytest.approx(84.68, abs=0.01)
    assert points["85x", "D"].get_xdata()[0] == pytest.approx(40)
    assert points["85x", "D"].get_markerfacecolor() == "white", "an estimate is hollow"
    assert ("6.9x", "D") not in points


def roofline(size: int, encoder_floor: float, **more: Any) -> Record:
    floors = {"stage1": (0.001,), "encoder": (encoder_floor,)}
    times = {"stage1": (0.004, 0.004, 0.004), "encoder": (0.08, 0.09, 0.085)}
    return a_record(
        measured("roofline", size, times),
        measured(
            "roofline", size, floors, implementation="limit",
            notes=("100 GFLOP/s and 20 GB/s at most; measured here",),
        ),
        **more,
    )  # fmt: skip


def test_the_limit_is_drawn_under_the_encoder_it_belongs_to(full: Record) -> None:
    elsewhere = dataclasses.replace(full.machine, chip="other")
    document = compose(
        [full, roofline(1024, 0.0581), roofline(512, 0.02), roofline(1536, 0.1, machine=elsewhere)]
    )
    drawn = lines("encoder", document)
    assert drawn["limit"] == ([512, 1024], pytest.approx([20, 58.1])), "the other machine's is not"
    table = {row[1]: row[2:] for row in section(document, "encoder").tables[0].rows[:3]}
    assert table["1024 px"] == ("116 (105 to 139)", "58.1", "50%")
    assert table["1536 px"] == ("250 (225 to 300)", "–", "–")
    assert "100 GFLOP/s" in section(document, "encoder").plot.footnote  # type: ignore[union-attr]
    parts = section(document, "roofline").tables[0].rows
    assert parts == (
        ("stage1", "1.00", "4.00 (4.00 to 4.00)", "25%"),
        ("encoder", "58.1", "85.0 (80.0 to 90.0)", "68%"),
    )
    names = {s.name for s in document.sections}
    assert "latency-2" not in names, "a roofline record is no run of its own"
    assert len(section(document, "roofline").tables) == 2, "sizes of one machine stand together"


def test_sizes_are_those_of_this_library() -> None:
    record = a_record(
        measured("encoder", 512, {"tower": (0.25,)}),
        measured("encoder", 2048, {"tower": (0.25,)}, implementation="ViT-L/14"),
    )
    assert sizes_of(record, "encoder") == [512]
