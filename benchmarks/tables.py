"""Results for a person to read: rows of text, live on a terminal, plain lines in a pipe."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .advisor import Candidate
from .comparison import Change, Comparison
from .record import OURS, Machine, Measurement, Skipped, Software, Subject
from .running import Step
from .summary import Summary

__all__ = [
    "COLUMNS",
    "Report",
    "Row",
    "advice_lines",
    "comparison_lines",
    "heading",
    "milliseconds",
    "plain_line",
    "rows",
    "skipped_row",
]

Row = tuple[str, ...]
COLUMNS: Row = (
    "measured",
    "input",
    "tokens",
    "median",
    "95% interval",
    "p10 to p90",
    "peak memory",
)

_PARTS = {
    "load_image": "  load image",
    "preprocess": "  preprocess",
    "encode": "  encode",
    "prefill": "  prefill",
    "first_token": "  first token",
    "tower": "  encoder",
    "visual_prefill": "  prefill of image tokens",
    "exit": "  until the process ends",
}
_TITLES = {
    "encoder": "encoder",
    "ttft": "TTFT, felt",
    "decode": "decode, per token",
    "memory": "memory",
    "cold_start": "cold start to first text",
}


def milliseconds(seconds: float) -> str:
    """Three or four digits: "0.123 ms", "12.3 ms", "1234 ms"."""
    value = 1000 * seconds
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 1000 else 0
    return f"{value:.{digits}f} ms"


def heading(machine: Machine, software: Software, subject: Subject) -> list[str]:
    """Two lines: what is measured, and on what."""
    cores = f"{machine.gpu_cores}-core GPU" if machine.gpu_cores else f"{machine.cores} cores"
    memory = f"{machine.memory / 2**30:.0f} GiB" if machine.memory else "memory unknown"
    blas = f", {software.blas}" if software.blas else ""
    bits = f", {subject.bits} bits" if subject.bits else ""
    dtype = subject.dtype if subject.dtype == subject.vision_dtype else (
        f"{subject.vision_dtype} encoder, {subject.dtype} language model"
    )  # fmt: skip
    millions = sum(subject.parameters.values()) / 1e6
    return [
        f"{subject.model}, {millions:.1f} M parameters, {dtype}{bits}",
        f"{machine.gpu or machine.chip or 'unknown chip'}, {cores}, {memory}, {machine.system}; "
        f"MLX {software.mlx} on {machine.device}{blas}",
    ]


def rows(measurement: Measurement) -> list[Row]:
    """One row per part, the headline first; a note for what has to be said."""
    m = measurement
    found: list[Row] = []
    size = f"{m.image_size}" if m.image_size else ""
    tokens = str(m.prompt_tokens or m.image_tokens or "")
    peak = f"{m.peak_memory / 1e9:.2f} GB" if m.peak_memory else ""
    title = _TITLES.get(m.kind, m.kind)
    if m.implementation != OURS:
        title = f"{title}, {m.implementation}"
    summaries = m.summaries
    if m.headline is None:
        return [(title, size, tokens, "", "", "", peak)]
    found.append((title, size, tokens, *_figures(summaries[m.headline]), peak))
    order = [part for part in _PARTS if part in summaries and part != m.headline]
    if "paper" in summaries:
        felt = [part for part in order if part not in ("tower", "visual_prefill")]
        found += [(_PARTS[p], "", "", *_figures(summaries[p]), "") for p in felt]
        images = str(m.image_tokens or "")
        found.append(("TTFT, paper's", size, images, *_figures(summaries["paper"]), ""))
        order = [part for part in order if part not in felt]
    found += [(_PARTS[p], "", "", *_figures(summaries[p]), "") for p in order]
    if m.kind == "decode":
        rate = f"{1 / summaries['token'].median:.1f} tokens/s"
        found.append(("  throughput", "", "", rate, "", "", ""))
    drift = m.drift
    if drift is not None and drift.flagged:
        change = f"{100 * drift.change:+.0f}%"
        found.append((f"  drift: last third {change} against the first", "", "", "", "", "", ""))
    found += [(f"  {note}", "", "", "", "", "", "") for note in m.notes]
    return found


def _figures(s: Summary) -> tuple[str, str, str]:
    unit = milliseconds(s.median)
    low, high = milliseconds(s.low)[:-3], milliseconds(s.high)[:-3]
    interval = f"{low} to {high}" if s.coverage >= 0.95 else f"({low} to {high})"
    return unit, interval, f"{milliseconds(s.p10)[:-3]} to {milliseconds(s.p90)[:-3]}"


def skipped_row(skipped: Skipped) -> Row:
    """A row that says why there is none."""
    size = f"{skipped.image_size}" if skipped.image_size else ""
    title = _TITLES.get(skipped.kind, skipped.kind)
    return (f"{title}: {skipped.reason}", size, "", "", "", "", "")


_WIDTHS = (26, 5, 6, 11, 18, 18, 11)


def plain_line(row: Row) -> str:
    """A row as a line of text; a long first cell (a reason) takes the whole line."""
    name, *cells = row
    if not any(cells[2:]):
        return f"{name}{f' (input {cells[0]})' if cells[0] else ''}" if not cells[-1] else name
    padded = [f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS[1:], strict=True)]
    return f"{name:<{_WIDTHS[0]}} {' '.join(padded)}".rstrip()


def comparison_lines(comparison: Comparison) -> list[str]:
    """Differences of the setting first, then a table, then what could not be compared."""
    lines = [f"different {difference}" for difference in comparison.differences]
    width = max((len(_change_name(c)) for c in comparison.changes), default=0)
    for change in comparison.changes:
        interval = f"{change.low:.3f} to {change.high:.3f}"
        lines.append(
            f"{_change_name(change):<{width}}  {milliseconds(change.before):>11} "
            f"{milliseconds(change.after):>11}  x {change.ratio:.3f} ({interval})  "
            f"{change.verdict}{f', p {change.p:.2g}' if change.verdict != 'no difference' else ''}"
        )
    lines += comparison.unmatched
    if comparison.too_few:
        lines.append("Some have too few repeats to show any difference; six or more are needed.")
    if not comparison.changes:
        lines.append("Nothing was measured in both records.")
    elif all(c.verdict == "no difference" for c in comparison.changes):
        lines.append("No difference.")
    elif comparison.pairs == 1:
        lines.append(
            "Starts of one program can differ as well: another pair, compare A B A2 B2, tells."
        )
    return lines


def advice_lines(found: Sequence[Candidate], chosen: Candidate | None, budget: float) -> list[str]:
    """One table: what was measured, what is in time, what to take."""
    lines = [f"{'input':>5} {'tokens':>6} {'weights':>8} {'median':>11} {'p90':>11}"]
    for one in found:
        weights = f"{one.bits} bits" if one.bits else "as is"
        verdict = "in time" if one.holds else "too slow"
        lines.append(
            f"{one.image_size:>5} {one.image_tokens:>6} {weights:>8} "
            f"{milliseconds(one.felt.median):>11} {milliseconds(one.felt.p90):>11}  {verdict}"
            + ("  <- take this" if one is chosen else "")
        )
    if chosen is None:
        lines.append(f"Nothing measured keeps TTFT within {milliseconds(budget)} here.")
    else:
        bits = f" --quantize {chosen.bits}" if chosen.bits else ""
        lines.append(f"fastvlm caption --image-size {chosen.image_size}{bits}")
    return lines


def _change_name(change: Change) -> str:
    title = "TTFT, paper's" if change.part == "paper" else _TITLES.get(change.kind, change.kind)
    other = f", {change.implementation}" if change.implementation != OURS else ""
    at = f" {change.image_size}" if change.image_size else ""
    return f"{title}{other}{at}"


@contextmanager
def status_line() -> Iterator[Callable[[Step, int, int], None]]:
    """What is being measured, on stderr, if a person is looking."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console

    with Console(stderr=True).status("loading", refresh_per_second=2) as shown:
        yield lambda step, done, runs: shown.update(_status(step, done, runs))


def _status(step: Step, done: int, runs: int) -> str:
    size = f" at {step.image_size}" if step.image_size else ""
    count = f": run {done} of {runs}" if runs > 1 else ""
    return f"measuring {_TITLES.get(step.kind, step.kind)}{size}{count}"


class Report:
    """Shows rows as they are measured; on a terminal also, in the last line, what is under way.

    Rows are printed once and stay: a table that is drawn again is torn when it outgrows the screen.
    """

    def __init__(self, lines: list[str]) -> None:
        self._heading = lines
        self._status: Any = None

    def __enter__(self) -> "Report":
        from rich.console import Console

        self._console = Console(soft_wrap=True, highlight=False, markup=False)
        if self._console.is_terminal:
            # Seldom redrawn: what is measured must not share its core.
            self._status = self._console.status("", refresh_per_second=2)
            self._status.start()
        self._print(*self._heading, "")
        self._print(plain_line(COLUMNS), style="bold")
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def watch(self, step: Step, done: int, runs: int) -> None:
        """Show what is being measured."""
        if self._status is not None:
            self._status.update(_status(step, done, runs))

    def add(self, result: Measurement | Skipped) -> None:
        """Show a result."""
        for row in rows(result) if isinstance(result, Measurement) else [skipped_row(result)]:
            self._print(plain_line(row), style="dim" if row[0].startswith("  ") else None)

    def _print(self, *lines: str, style: str | None = None) -> None:
        self._console.print(*lines, sep="\n", style=style)
        sys.stdout.flush()
