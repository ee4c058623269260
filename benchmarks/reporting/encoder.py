"""Sections of the encoder over input sizes, and of what keeps it from being faster."""

from collections.abc import Sequence

from ..paper import ENCODERS
from ..record import OURS, Measurement, Record
from .document import Section, Table
from .latency import disturbances, sizes_of
from .plots import Curve, Curves, Dot
from .words import (
    all_circumstances,
    circumstances,
    duration,
    has_fastvithd,
    interval,
    milliseconds,
    of_run,
    run_names,
)

__all__ = ["encoder_section", "roofline_section"]

_LIMIT = "limit"
"""The implementation under which a roofline record has its floors."""


def encoder_section(records: Sequence[Record], rooflines: Sequence[Record]) -> Section | None:
    """Latency over input sizes, what the machine could do at most, and the paper's latency."""
    runs = [record for record in records if record.find("encoder")]
    if not runs:
        return None
    curves: list[Curve] = []
    rows: list[tuple[str, ...]] = []
    sources: dict[str, None] = {}
    for record, name in zip(runs, run_names(runs), strict=True):
        limits: dict[int, float] = {}
        for other in rooflines:
            if _same(record, other):
                limits |= _limits(other, sources)
        dots = []
        for size in sizes_of(record, "encoder"):
            measured = record.find("encoder", size)
            if measured is None or "tower" not in measured.seconds:
                continue
            s = measured.summaries["tower"]
            share = f"{limits[size] / s.median:.0%}" if size in limits else ""
            dots.append(
                Dot(
                    float(size),
                    1000 * s.median,
                    duration(1000 * s.median) + (f" ({share})" if share else ""),
                    y_interval=(1000 * s.low, 1000 * s.high),
                )
            )
            limit = milliseconds(limits[size]) if size in limits else "–"
            rows.append((name, f"{size} px", interval(s), limit, share or "–"))
        if dots:
            curves.append(Curve(name, tuple(dots), "here"))
        if limits:
            floor = tuple(Dot(float(size), 1000 * s) for size, s in sorted(limits.items()))
            curves.append(Curve(of_run("limit", name), floor, "limit"))
    if not curves:
        return None
    footnote = ["Medians with their 95% confidence intervals."]
    if sources:
        footnote.append("In brackets: the share of the limit that is reached.")
    footnote += [f"Limit: {source}." for source in sources]
    if any(map(has_fastvithd, runs)):
        theirs = [r for r in ENCODERS if r.encoder == "FastViTHD" and r.tiles == 1 and r.side > 224]
        dots = [Dot(float(r.side), r.milliseconds) for r in theirs]
        curves.append(Curve("FastViTHD, paper (M1 Max)", tuple(dots), "paper"))
        rows += [("paper, M1 Max", f"{r.side} px", f"{r.milliseconds:g}", "–", "–") for r in theirs]
        footnote.append(
            "The paper's points (Table 10) are from its own machine, an M1 Max, by Core ML on the "
            "Neural Engine."
        )
    header = ("where", "input", "latency, ms", "limit, ms", "of the limit")
    columns = len(header) if sources else 3
    return Section(
        "encoder",
        "Encoder latency by input size",
        "One picture, from pixels on the device to features.",
        Curves(
            "Encoder latency by input size",
            all_circumstances(runs),
            "input side, pixels",
            "latency, logarithmic",
            tuple(curves),
            " ".join(footnote),
            y_milliseconds=True,
        ),
        (
            Table(
                "Encoder latency" + (" and its lower limit" if sources else ""),
                header[:columns],
                tuple(row[:columns] for row in rows),
                words=2,
            ),
        ),
    )


def roofline_section(record: Record, name: str) -> Section | None:
    """Each part of the model against the least time that it could take."""
    tables = []
    for measured in record.measurements:
        if measured.kind != "roofline" or measured.implementation != OURS:
            continue
        floor = record.find("roofline", measured.image_size, _LIMIT)
        if floor is not None:
            tables.append(_parts(measured, floor))
    if not tables:
        return None
    sources: dict[str, None] = {}
    _limits(record, sources)
    return Section(
        "roofline",
        of_run("How near the limit each part comes", name),
        f"{circumstances(record)}. The limit is the larger of the arithmetic at the machine's peak "
        "and the bytes at its peak; caches can beat the second.",
        tables=tuple(tables),
        notes=(*(f"Limit: {source}." for source in sources), *disturbances(record, notes=False)),
    )


def _parts(measured: Measurement, floor: Measurement) -> Table:
    rows = []
    for part, summary in measured.summaries.items():
        if part in floor.seconds:
            least = floor.summaries[part].median
            share = f"{least / summary.median:.0%}"
            rows.append((part, milliseconds(least), interval(summary), share))
    return Table(
        f"{measured.image_size} px: limit and measured time, in milliseconds",
        ("part", "limit, ms", "measured, ms", "of the limit"),
        tuple(rows),
    )


def _limits(record: Record, sources: dict[str, None]) -> dict[int, float]:
    """Input side -> least seconds of the encoder; where the peaks are from goes to `sources`."""
    limits = {}
    for measured in record.measurements:
        if (measured.kind, measured.implementation) != ("roofline", _LIMIT):
            continue
        if measured.image_size is not None and "encoder" in measured.seconds:
            limits[measured.image_size] = measured.summaries["encoder"].median
            sources |= dict.fromkeys(note.rstrip(".") for note in measured.notes)
    return limits


def _same(record: Record, roofline: Record) -> bool:
    """Whether the limit is that of the run's machine and encoder."""
    ours, theirs = record.subject, roofline.subject
    return (
        record.machine == roofline.machine
        and ours.vision_dtype == theirs.vision_dtype
        and ours.parameters.get("vision") == theirs.parameters.get("vision")
    )
