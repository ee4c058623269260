"""The table of `fastvlm bench claims`: the paper's rows beside this machine's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import paper
from .claims import Claim, Encode, Piece, Pipeline, pieces_of
from .record import OURS, Measurement, Record

__all__ = ["ESTIMATE", "Figure", "claim_lines", "figure_of", "measurement_of"]

ESTIMATE = "estimate: "
"""How the note of a figure begins that was scaled up from a measured part."""


@dataclass(frozen=True)
class Figure:
    """A number of this machine."""

    value: float
    """Milliseconds, millions of parameters, or a ratio."""
    estimated: bool = False

    def __str__(self) -> str:
        return f"{'~' if self.estimated else ''}{self.value:.1f}"


def measurement_of(piece: Piece, record: Record) -> Measurement | None:
    """What the record has of a piece."""
    for measured in record.measurements:
        if isinstance(piece, Encode):
            who = OURS if piece.encoder == "FastViTHD" else piece.encoder
            key = ("encoder", who, piece.side)
            found = (measured.kind, measured.implementation, measured.image_size)
        else:
            key = ("prefill", piece.language_model, piece.tokens)
            found = (measured.kind, measured.implementation, measured.image_tokens)
        if found == key:
            return measured
    return None


def figure_of(claim: Claim, record: Record) -> Figure | None:
    """The claim's figure on this machine; None if a piece of it is missing."""
    figures = [_pipeline(claim, p, record) for p in (claim.slow, claim.fast) if p]
    if any(figure is None for figure in figures):
        return None
    known = [figure for figure in figures if figure]
    ratio = known[0].value / (known[1].value if claim.fast else 1)
    return Figure(ratio, any(figure.estimated for figure in known))


def _pipeline(claim: Claim, pipeline: Pipeline, record: Record) -> Figure | None:
    if claim.of == "parameters":
        return _parameters(pipeline, record)
    total, estimated = 0.0, False
    for piece in pipeline.pieces:
        measured = measurement_of(piece, record)
        if measured is None or measured.headline is None:
            return None
        total += 1000 * measured.summaries[measured.headline].median
        estimated |= any(note.startswith(ESTIMATE) for note in measured.notes)
    return Figure(total, estimated)


def _parameters(pipeline: Pipeline, record: Record) -> Figure | None:
    names = [piece.encoder for piece in pipeline.pieces if isinstance(piece, Encode)]
    counts = record.subject.parameters
    if any(name not in counts for name in names):
        return None
    return Figure(sum(counts[name] for name in names) / 1e6)


def claim_lines(claims: Sequence[Claim], record: Record) -> Iterator[str]:
    """The table, then what the figures stand on."""
    yield f"{'':<16}{'':<34}{'the paper':>26}   {'this machine':>30}"
    yield f"{'claim':<16}{'':<34}{'':>17}{'ratio':>9}   {'':>20}{'ratio':>10}"
    unit = ""
    for claim in claims:
        if claim.of != unit:
            unit = claim.of
            yield "-- milliseconds" if unit == "time" else "-- millions of parameters"
        yield from _claim(claim, record)
    yield ""
    yield from _footnotes(claims, record)
    yield ""
    yield from _conditions(record)


def _claim(claim: Claim, record: Record) -> Iterator[str]:
    yield f"{claim.name:<16}{claim.text}"
    for pipeline in (claim.slow, claim.fast):
        if pipeline is None:
            continue
        printed = pipeline.published if claim.of == "time" else pipeline.published_parameters
        line = f"{'':<16}{pipeline.name:<34}{printed:>17.1f}{{:>9}}   "
        line += f"{_or_missing(_pipeline(claim, pipeline, record)):>20}{{:>10}}"
        ratio = figure_of(claim, record)
        if pipeline is not claim.fast:
            yield line.format("", "").rstrip()
        elif ratio is None:
            yield line.format(f"{claim.published:.2f}", "-")
        else:
            shown = f"{'~' if ratio.estimated else ''}{ratio.value:.2f}"
            yield line.format(f"{claim.published:.2f}", shown)
    for remark in (claim.off, claim.note):
        if remark:
            yield f"{'':<16}({remark})"


def _or_missing(figure: Figure | None) -> str:
    return "not measured" if figure is None else str(figure)


def _footnotes(claims: Sequence[Claim], record: Record) -> Iterator[str]:
    for piece in pieces_of(claims):
        measured = measurement_of(piece, record)
        for note in measured.notes if measured else ():
            if note.startswith(ESTIMATE):
                yield f"~ {piece}: {note.removeprefix(ESTIMATE)}"
    for skipped in record.skipped:
        yield f"not measured: {skipped.reason}"
    if not record.finished:
        yield "The run was interrupted; --resume FILE goes on with its record."


def _conditions(record: Record) -> Iterator[str]:
    machine, software, subject = record.machine, record.software, record.subject
    memory = f", {machine.memory / 2**30:.0f} GiB" if machine.memory else ""
    cores = f", {machine.cores} cores" if machine.cores else ""
    gpu = f", {machine.gpu_cores}-core GPU" if machine.gpu_cores else ""
    blas = f" ({software.blas})" if software.blas and machine.device == "CPU" else ""
    yield f"The paper:    {paper.MACHINE}."
    yield (
        f"This machine: {machine.gpu or machine.chip}{cores}{gpu}{memory}, {machine.system}; "
        f"MLX {software.mlx} on {machine.device}{blas}, {subject.dtype}."
    )
    yield from _SAMENESS


_SAMENESS = (
    "The same:     shapes of all networks, input sides, tiles, visual tokens; TTFT is the",
    "              encoders' latency plus the prefill of the visual tokens. Medians.",
    "Not the same: weights are random (latency does not depend on them). Encoders end at their",
    "              last block and run by MLX on the device of the language model, not on the",
    "              Neural Engine; all of them use this library's operations.",
)
