"""The report: its numbers are the record's, its words are harmless, its files reproducible."""

import dataclasses
import html.parser
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.benchmarks.paper import FIGURE_1A
from fastvlm_mlx.benchmarks.record import (
    Conditions,
    Machine,
    Measurement,
    Operation,
    Record,
    Skipped,
    Software,
    Subject,
    write_record,
)
from fastvlm_mlx.benchmarks.reporting.contents import compose
from fastvlm_mlx.benchmarks.reporting.document import Document, Section
from fastvlm_mlx.benchmarks.reporting.markdown import to_markdown
from fastvlm_mlx.benchmarks.reporting.nano import read_evaluation
from fastvlm_mlx.benchmarks.reporting.page import to_html
from fastvlm_mlx.benchmarks.reporting.words import duration, milliseconds
from fastvlm_mlx.benchmarks.reporting.writing import write_report
from fastvlm_mlx.cli import main
from fastvlm_mlx.errors import BenchmarkError

PARTS = ("load_image", "preprocess", "encode", "prefill", "first_token")
NASTY = "<script>alert(1)</script>\"'&|`*_[x](http://x.y)\n-->$x_1$]]>\ud800\u202e"
SIZES = Path(__file__).resolve().parents[1] / "training/nano/results/sizes-200-scenes.json"


def measured(kind: str, size: int | None, seconds: dict[str, Any], **more: Any) -> Measurement:
    empty = {f.name: None for f in dataclasses.fields(Measurement) if f.name != "notes"}
    known = {"kind": kind, "implementation": "fastvlm-mlx", "image_size": size, "seconds": seconds}
    return Measurement(**empty | known | more)


def encoder(size: int, median: float) -> Measurement:
    return measured("encoder", size, {"tower": (median, 0.9 * median, 1.2 * median)})


def ttft(size: int, *parts: float, felt: float, paper: float) -> Measurement:
    seconds = {name: (part,) * 3 for name, part in zip(PARTS, parts, strict=True)}
    seconds |= {"felt": (felt, felt, 1.5 * felt), "paper": (0.5 * paper, paper, paper)}
    return measured(
        "ttft", size, seconds, image_tokens=(size // 64) ** 2, peak_memory=1_500_000_000
    )


def a_record(*measurements: Measurement, **more: Any) -> Record:
    plain: dict[str, Any] = {
        "date": "2026-11-20T12:00:00+00:00",
        "command": ("bench", "all", "--json", "a file.json"),
        "machine": Machine("A chip", 8, "A GPU", 10, 1 << 34, "macOS 26.0, arm64", "Metal"),
        "conditions": Conditions("mains", False, 0.4),
        "software": Software("0.1.0", None, "3.12.0", "0.32.4", "0.32.2", "Accelerate", None),
        "subject": Subject(
            "random 0.5b",
            {"vision": 122_710_000, "language_model": 494_000_000},
            "bfloat16",
            "float16",
            None,
            (Operation("gelu", "plain"),),
        ),
        "measurements": measurements,
    }
    return Record(**plain | more)


@pytest.fixture
def full() -> Record:
    return a_record(
        encoder(512, 0.0301),
        ttft(512, 0.004, 0.0151, 0.031, 0.05, 0.001, felt=0.1013, paper=0.08125),
        encoder(1024, 0.1162),
        ttft(1024, 0.004, 0.02, 0.12, 0.06, 0.001, felt=1.2345, paper=0.1668),
        encoder(1536, 0.25),
        ttft(1536, 0.004, 0.02, 0.26, 0.13, 0.001, felt=0.43, paper=0.39),
        measured("decode", None, {"token": (0.004, 0.004, 0.005)}),
    )


def section(document: Document, name: str) -> Section:
    return next(s for s in document.sections if s.name == name)


def rows(found: Section) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in found.tables[0].rows}


def test_table_has_the_records_numbers(full: Record) -> None:
    document = compose([full])
    rest = ("–", "1.50")
    assert rows(section(document, "latency")) == {
        "512 px": ("64", "30.1 (27.1 to 36.1)", "81.2 (40.6 to 81.2)", "101 (101 to 152)", *rest),
        "1024 px": (
            "256", "116 (105 to 139)", "167 (83.4 to 167)", "1,234 (1,234 to 1,852)", *rest,
        ),
        "1536 px": ("576", "250 (225 to 300)", "390 (195 to 390)", "430 (430 to 645)", *rest),
    }  # fmt: skip
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
    ("value", "text"), [(999.4, "999 ms"), (999.6, "1 s"), (166.8, "167 ms"), (14124, "14.1 s")]
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


class _Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        tag = self.tags[-1] if self.tags else ""
        self.texts[tag] = self.texts.get(tag, "") + data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def nasty_record(full: Record) -> Record:
    return dataclasses.replace(
        full,
        machine=dataclasses.replace(full.machine, chip=NASTY, gpu=NASTY, system=NASTY),
        subject=dataclasses.replace(full.subject, model=NASTY, parameters={NASTY: 1}),
        software=dataclasses.replace(full.software, mlx=NASTY, peers={NASTY: NASTY}),
        command=("bench", NASTY),
        date=NASTY,
        skipped=(Skipped(NASTY, 256, NASTY),),
        measurements=(
            *full.measurements,
            measured("encoder", 512, {"tower": (1.0,), NASTY: (1.0,)}, implementation=NASTY),
            measured(NASTY, None, {NASTY: (1.0,)}, notes=(NASTY,)),
        ),
    )


def test_a_record_cannot_write_markup(full: Record) -> None:
    bad = nasty_record(full)
    page = _Page(to_html(compose([bad]), {}))
    assert "script" not in page.tags
    assert set(page.tags) <= set(_Page(to_html(compose([full]), {})).tags) | {"ul", "li"}
    assert (
        "<script>alert(1)</script>\"'&|`*_[x](http://x.y) -->$x_1$]]>\ufffd\ufffd"
        in (page.texts["h1"])
    )
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    text = to_markdown(compose([bad]), {})
    prose, _, code = text.partition("\n```")
    assert "<" not in prose and code.endswith("```\n") and code.count("```") == 1
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    good = [line for line in to_markdown(compose([full]), {}).splitlines() if line.startswith("| ")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert columns == {len(re.findall(r"(?<!\\)\|", line)) for line in good} | {7}
    assert not re.search(r"(?<!\\)\[x", prose), "no link"
    text.encode()


def test_the_pages_figures_are_well_formed_and_names_stay_names(
    full: Record, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    bad = nasty_record(full)
    again = dataclasses.replace(bad, measurements=full.measurements)
    paths = write_report(compose([bad, again], read_evaluation(SIZES)), tmp_path)
    pictures = [path for path in paths if path.suffix == ".svg"]
    assert len(pictures) == len({path.name for path in pictures}) == 5
    for path in pictures:
        text = path.read_text()
        ET.fromstring(text)  # well formed
        assert "script" not in text and "<!--" not in text and "alert" not in text
    page = _Page((tmp_path / "index.html").read_text())
    assert "script" not in page.tags and page.tags.count("svg") == 5
    ids = page.values("id")
    assert len(ids) == len(set(ids)), "several figures share the page"
    links = [*page.values("href"), *page.values("xlink:href")]
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)


def test_the_page_needs_nothing_else(full: Record, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_report(compose([full]), tmp_path)
    text = (tmp_path / "index.html").read_text()
    page = _Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert not page.values("src") and "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))
    assert "default-src 'none'" in page.values("content")[0]
    assert page.tags.count("figure") == page.tags.count("figcaption") == 3
    labels = [value for value in page.values("aria-label") if "table that follows" in value]
    assert len(labels) == 3
    assert page.tags.count("table") == page.tags.count("caption")
    assert set(page.values("scope")) == {"col", "row"}
    for path in (tmp_path / "figures").glob("*.png"):
        assert path.stat().st_size < 150_000


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastvlm", "bench", "report", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_same_records_give_the_same_files(full: Record, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    document = compose([dataclasses.replace(full, measurements=(encoder(512, 0.1),))])
    first = {p.name: p.read_bytes() for p in write_report(document, tmp_path / "1")}
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "figure.dpi": 300}):
        second = {p.name: p.read_bytes() for p in write_report(document, tmp_path / "2")}
        assert matplotlib.rcParams["font.size"] == 30, "the user's settings are left alone"
    assert first == second


def test_without_matplotlib_the_tables_are_written(
    full: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    for name in ("canvas", "figures", "labels"):
        monkeypatch.delitem(sys.modules, f"fastvlm_mlx.benchmarks.reporting.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_record(full, tmp_path / "a.json")
    assert run(monkeypatch, str(tmp_path / "a.json"), "--out", str(tmp_path / "out")) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert 'pip install "fastvlm-mlx[bench]"' in told.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["index.html", "report.md"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "30.1 (27.1 to 36.1)" in text and "![" not in text
    assert run(monkeypatch, str(tmp_path / "a.json")) == 0, "tables alone need no matplotlib"
    assert capsys.readouterr().out == text


def test_one_size_and_one_kind_make_a_report_that_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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
    header = section(document, "machine").tables[0].header
    assert len(set(header)) == 4
    assert len(lines("encoder", document)) == 4
    two = compose([full, other])
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
    assert section(document, "peers").tables[0].rows == (
        ("mlx-vlm 0.7.10", "encoder", "512 px", "250 (250 to 250)", "100 (90.0 to 120)", "2.50x"),
    )


def test_unusable_files_are_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(a_record(encoder(256, 0.1)), tmp_path / "good.json")
    document = json.loads((tmp_path / "good.json").read_text())
    folder = tmp_path / "several"
    write_record(a_record(encoder(256, 0.1)), folder / "a.json")
    (folder / "b.json").write_text(json.dumps({**document, "version": 99}))
    (tmp_path / "empty").mkdir()
    for arguments, code, words in (
        ((str(folder),), 1, "has version 99"),
        ((str(tmp_path / "none.json"),), 1, "Cannot read"),
        ((str(tmp_path / "empty"),), 2, "has no .json file"),
        ((), 2, "Nothing to report"),
        (("--nano", str(tmp_path / "good.json")), 1, "training.nano.evaluate"),
    ):
        assert run(monkeypatch, *arguments, "--out", str(tmp_path / "out")) == code
        told = capsys.readouterr()
        assert told.err.count("\n") == 1 and words in told.err and told.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": {}}, "no sizes"),
        ({"sizes": {"big": {}}}, "'big' is not a size"),
        ({"sizes": {"256": {"text": 1.5}}}, "not a share"),
        ({"sizes": {"256": {"TTFT, ms (median)": float("nan")}}}, "not milliseconds"),
        ({"sizes": {"256": {"text": True}}}, "not a share"),
        ({"sizes": [1]}, "'sizes' is [1]"),
        ({"model": 3}, "'model' is 3"),
    ],
)
def test_an_odd_evaluation_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps({**json.loads(SIZES.read_text()), **change}))
    with pytest.raises(BenchmarkError, match=re.escape(words)):
        read_evaluation(path)
