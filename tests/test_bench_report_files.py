"""The report's files: nothing in a record is markup, no file needs another, each run the same."""

import dataclasses
import html.parser
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.benchmarks.record import Record, Skipped, write_record
from fastvlm_mlx.benchmarks.reporting.contents import compose
from fastvlm_mlx.benchmarks.reporting.markdown import to_markdown
from fastvlm_mlx.benchmarks.reporting.nano import read_evaluation, read_evaluations
from fastvlm_mlx.benchmarks.reporting.page import to_html
from fastvlm_mlx.benchmarks.reporting.writing import write_report
from fastvlm_mlx.cli import main
from fastvlm_mlx.errors import BenchmarkError
from tests.records import SIZES, a_record, encoder, full_record, measured

NASTY = "<script>alert(1)</script>\"'&|`*_[x](http://x.y)\n-->$x_1$]]>\ud800\u202e"


@pytest.fixture
def full() -> Record:
    return full_record()


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
    plain = dataclasses.replace(bad, software=dataclasses.replace(bad.software, peers={}))
    document = compose([bad, plain])
    page = _Page(to_html(document, {}))
    assert "script" not in page.tags
    assert set(page.tags) <= set(_Page(to_html(compose([full]), {})).tags) | {"ul", "li"}
    assert (
        "<script>alert(1)</script>\"'&|`*_[x](http://x.y) -->$x_1$]]>\ufffd\ufffd"
        in (page.texts["h1"])
    )
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    text = to_markdown(document, {})
    prose, _, code = text.partition("\n```")
    assert "<" not in prose and code.endswith("```\n") and code.count("```") == 1
    for block in text.split("\n\n"):
        if block.startswith("| "):
            columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(columns) == 1, block
    assert not re.search(r"(?<!\\)\[x", prose), "no link"
    text.encode()


def test_the_pages_figures_are_well_formed_and_names_stay_names(
    full: Record, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    bad = nasty_record(full)
    plain = dataclasses.replace(bad, software=dataclasses.replace(bad.software, peers={}))
    again = dataclasses.replace(plain, measurements=full.measurements)
    paths = write_report(compose([plain, again], read_evaluation(SIZES)), tmp_path)
    pictures = [path for path in paths if path.suffix == ".svg"]
    assert len(pictures) == len({path.name for path in pictures}) == 6
    for path in pictures:
        text = path.read_text()
        ET.fromstring(text)  # well formed
        assert "script" not in text and "<!--" not in text and "alert" not in text
    page = _Page((tmp_path / "index.html").read_text())
    assert "script" not in page.tags and page.tags.count("svg") == 6
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


def test_an_evaluation_may_lie_in_several_files(tmp_path: Path) -> None:
    whole = json.loads(SIZES.read_text())
    paths = []
    for name, scenes, sizes in (("a", 400, ("128", "512")), ("b", 1000, ("256",))):
        paths.append(tmp_path / f"{name}.json")
        part = {size: whole["sizes"][size] for size in sizes}
        paths[-1].write_text(json.dumps({**whole, "scenes": scenes, "sizes": part}))
    found = read_evaluations(paths)
    assert found is not None and list(found.sizes) == [128, 256, 512]
    assert found.sizes[256]["text"] == whole["sizes"]["256"]["text"]
    table = compose([], found).sections[0].tables[0]
    assert table.caption.startswith("Share of right answers on 400 or 1000 scenes")
    with pytest.raises(BenchmarkError, match="size 128 is in another file too"):
        read_evaluations([paths[0], SIZES])
    assert read_evaluations([]) is None
