"""Sections of what was measured here: by input size, part by part, beside others, all of it."""

from ..comparison import compare_times
from ..record import OURS, Measurement, Record
from .document import Fact, Section, Table
from .plots import Bar, Bars
from .words import circumstances, duration, gigabytes, interval, milliseconds, of_run

__all__ = [
    "PARTS",
    "by_size",
    "everything",
    "facts",
    "parts_section",
    "peers_section",
    "sizes_of",
]

PARTS = ("load_image", "preprocess", "encode", "prefill", "first_token")
"""Of the felt TTFT, in the order in which they happen."""

_DASH = "–"
_FELT = (
    "Felt TTFT runs from the bytes of an image file to the first token; TTFT as in the paper is "
    "the encoder and the prefill of the visual tokens alone."
)


def sizes_of(record: Record, *kinds: str) -> list[int]:
    """Input sizes at which this library was measured, in order."""
    return sorted(
        {
            m.image_size
            for m in record.measurements
            if m.implementation == OURS and m.kind in kinds and m.image_size is not None
        }
    )


def median(measurement: Measurement | None, part: str) -> float | None:
    """Seconds, None if it was not measured."""
    if measurement is None or part not in measurement.seconds:
        return None
    return measurement.summaries[part].median


def facts(record: Record, name: str = "") -> tuple[Fact, ...]:
    """What to see first: the figures at 1024 pixels or, without that, at the largest size.

    `name` says whose they are where the report has several runs.
    """
    whose = f"{name}: " if name else ""
    found = []
    for kind, part, meaning in (
        ("encoder", "tower", "encoder"),
        ("ttft", "paper", "TTFT as in the paper"),
        ("ttft", "felt", "TTFT as felt, image file to first token"),
    ):
        sizes = sizes_of(record, kind)
        size = 1024 if 1024 in sizes else max(sizes, default=None)
        seconds = median(record.find(kind, size), part)
        if seconds is not None:
            found.append(Fact(duration(1000 * seconds), f"{whose}{meaning}, {size} px"))
    if (seconds := median(record.find("decode"), "token")) is not None:
        found.append(Fact(f"{1 / seconds:.3g} tokens/s", f"{whose}decoding"))
    return tuple(found)


def by_size(record: Record, name: str) -> Section | None:
    """One row per input size: the table to quote."""
    rows = []
    for size in sizes_of(record, "encoder", "ttft", "memory"):
        encoder, ttft = record.find("encoder", size), record.find("ttft", size)
        memory = record.find("memory", size) or ttft
        tokens = next((m.image_tokens for m in (encoder, ttft) if m and m.image_tokens), None)
        peak = memory.peak_memory if memory else None
        rows.append(
            (
                f"{size} px",
                str(tokens or _DASH),
                *(
                    interval(m.summaries[part]) if m and part in m.seconds else _DASH
                    for m, part in ((encoder, "tower"), (ttft, "paper"), (ttft, "felt"))
                ),
                gigabytes(peak) if peak else _DASH,
            )
        )
    if not rows:
        return None
    notes = [_FELT]
    decode, cold = record.find("decode"), record.find("cold_start")
    if decode and "token" in decode.seconds:
        s = decode.summaries["token"]
        notes.append(
            f"Decoding: {1 / s.median:.3g} tokens/s ({1 / s.high:.3g} to {1 / s.low:.3g}) after a "
            f"prompt of {decode.prompt_tokens} positions."
        )
    if cold and "first_text" in cold.seconds:
        first = interval(cold.summaries["first_text"])
        notes.append(f"Cold start, from starting the process to the first text: {first} ms.")
    notes += disturbances(record)
    return Section(
        "latency",
        of_run("Latency by input size", name),
        f"{circumstances(record)}. Median and its 95% confidence interval, in milliseconds.",
        tables=(
            Table(
                "Latency by input size",
                (
                    "input",
                    "visual tokens",
                    "encoder, ms",
                    "TTFT as in the paper, ms",
                    "TTFT as felt, ms",
                    "peak memory, GB",
                ),
                tuple(rows),
            ),
        ),
        notes=tuple(notes),
    )


def disturbances(record: Record, notes: bool = True) -> list[str]:
    """What a reader must know before quoting the run; `notes`: also each measurement's own."""
    lines = []
    if not record.finished:
        lines.append("The run was interrupted or failed in part; what it had measured is shown.")
    load = record.conditions.load_average
    if load is not None and load > 0.5:
        lines.append(
            f"Other programs were at work when it began (load average {load:g}, "
            f"{record.machine.cores or 'unknown'} cores): the times may be too long."
        )
    if record.conditions.low_power_mode:
        lines.append("Low-power mode was on.")
    if record.conditions.power_source == "battery":
        lines.append("The machine ran on battery.")
    for m in record.measurements:
        if m.drift and m.drift.flagged:
            at = f" at {m.image_size} px" if m.image_size else ""
            lines.append(
                f"{m.kind}{at}, {m.implementation}: the last third of the repeats took "
                f"{100 * m.drift.change:+.0f}% against the first."
            )
        if notes:
            at = f" at {m.image_size} px" if m.image_size else ""
            lines += [f"{m.kind}{at}, {m.implementation}: {note}" for note in m.notes]
    return lines


def parts_section(record: Record, name: str) -> Section | None:
    """Felt TTFT, stacked by part, over input sizes."""
    found = [
        (size, m)
        for size in sizes_of(record, "ttft")
        if (m := record.find("ttft", size)) and {"felt", *PARTS} <= m.seconds.keys()
    ]
    if not found:
        return None
    bars, rows = [], []
    for size, m in found:
        summaries = m.summaries
        felt = summaries["felt"]
        parts = [summaries[part].median for part in PARTS]
        bars.append(
            Bar(
                f"{size} px",
                tuple(1000 * part for part in parts),
                1000 * felt.median,
                (1000 * felt.low, 1000 * felt.high),
            )
        )
        rows.append((f"{size} px", *map(milliseconds, parts), interval(felt), str(felt.count)))
    labels = tuple(part.replace("_", " ") for part in PARTS)
    return Section(
        "ttft-parts",
        of_run("Time to first token, part by part", name),
        "From the bytes of an image file to the first token of the answer.",
        Bars(
            "Time to first token, part by part",
            circumstances(record),
            "since the image file's bytes were handed over",
            labels,
            tuple(bars),
            "Medians of repeated, warmed-up runs in one process. In bold: the whole, by its own "
            "clock; the short line is its 95% confidence interval.",
        ),
        (
            Table(
                "Medians of the parts, and the whole with its interval, in milliseconds",
                ("input", *labels, "felt TTFT", "repeats"),
                tuple(rows),
            ),
        ),
    )


def peers_section(record: Record, name: str) -> Section | None:
    """Other implementations of the same model, measured in the same run."""
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    bars: dict[tuple[str, int | None, str], Bar] = {}
    for m in record.measurements:
        ours, part = record.find(m.kind, m.image_size), m.headline
        if m.implementation == OURS or ours is None or part is None or part not in ours.seconds:
            continue
        mine, theirs = ours.summaries[part], m.summaries[part]
        ratio, low, high, _ = compare_times(ours.seconds[part], m.seconds[part])
        what = "TTFT as felt" if m.kind == "ttft" else m.kind
        at = f"{m.image_size} px" if m.image_size else _DASH
        times = f"{ratio:.2f}x ({low:.2f} to {high:.2f})"
        rows.append((m.implementation, what, at, interval(theirs), interval(mine), times))
        notes += [f"{m.implementation}, {what}: {note}" for note in m.notes]
        for who, s in ((OURS, mine), (m.implementation, theirs)):
            whole, spread = 1000 * s.median, (1000 * s.low, 1000 * s.high)
            label = f"{what}, {at}\n{who}"
            bars[m.kind, m.image_size, who] = Bar(label, (whole,), whole, spread)
    if not rows:
        return None
    lead = "Same weights, picture and prompt, in turn on the same machine; outputs compared first."
    sure = all(m.summaries[m.headline].coverage >= 0.95 for m in record.measurements if m.headline)
    side_by_side = sorted(bars, key=lambda key: (key[0], key[1] or 0))
    return Section(
        "peers",
        of_run("Beside other implementations", name),
        lead,
        Bars(
            "FastVLM here and in other implementations",
            circumstances(record),
            "median and its 95% confidence interval" if sure else "median and all that was seen",
            ("time",),
            tuple(bars[key] for key in side_by_side),
            lead,
        ),
        (
            Table(
                "Medians and their intervals, in milliseconds",
                ("implementation", "what", "input", "its time", "this library's", "ratio"),
                tuple(sorted(rows, key=lambda row: row[1:3])),
                words=3,
            ),
        ),
        tuple(dict.fromkeys(notes)),
    )


def everything(record: Record, name: str) -> Section | None:
    """Every part of every measurement."""
    rows = []
    for m in record.measurements:
        where = (m.kind, m.implementation, f"{m.image_size} px" if m.image_size else _DASH)
        rows += [
            (
                *where,
                part.replace("_", " "),
                milliseconds(s.median),
                f"{milliseconds(s.low)} to {milliseconds(s.high)}",
                f"{milliseconds(s.p10)} to {milliseconds(s.p90)}",
                str(s.count),
            )
            for part, s in m.summaries.items()
        ]
    if not rows:
        return None
    return Section(
        "everything",
        of_run("Everything measured", name),
        f"{circumstances(record)}. Milliseconds.",
        tables=(
            Table(
                "Every part of every measurement",
                ("what", "by", "input", "part", "median", "interval", "p10 to p90", "repeats"),
                tuple(rows),
                words=4,
            ),
        ),
        detail=True,
    )
