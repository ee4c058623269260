"""The section of the paper's headline claims: its ratio beside this machine's."""

import re
from dataclasses import replace

from ..claims import CLAIMS, Claim
from ..claims_table import ESTIMATE, Figure, figure_of
from ..paper import MACHINE
from ..record import Record
from .document import Section, Table
from .latency import disturbances
from .plots import Ratio, Ratios
from .words import circumstances, of_run

__all__ = ["claims_section"]


def claims_section(record: Record, name: str) -> Section | None:
    """Ratios of times as a figure, all claims as a table; None if the record has none of them."""
    known = [claim for claim in CLAIMS if figure_of(claim, record)]
    timed = [claim for claim in known if claim.of == "time"]
    if not timed:
        return None
    ratios = tuple(_ratio(claim, figure_of(claim, record)) for claim in CLAIMS if _divides(claim))
    rows = [_row(claim, record) for claim in CLAIMS]
    notes = [f"{c.name}: {remark}." for c in CLAIMS for remark in (c.off, c.note) if remark]
    for measured in record.measurements:
        for note in measured.notes:
            if note.startswith(ESTIMATE):
                at = measured.image_size or measured.image_tokens
                what = f"{measured.implementation}, {measured.kind} at {at}"
                notes.append(f"~ is an estimate. {what}: {note.removeprefix(ESTIMATE)}.")
    return Section(
        "claims",
        of_run("The paper's claims", name),
        "Networks of the paper's shapes with random weights, timed on this machine. A claim "
        "compares two pipelines; both sides run on the same device with the same operations.",
        Ratios(
            "The paper's claims, measured again",
            circumstances(record),
            "how many times longer the other takes",
            ratios,
            f"Medians; {'hollow diamonds are estimates from a part; ' if _guessed(ratios) else ''}"
            f"a missing diamond was not measured. The paper's points: {MACHINE}.",
        ),
        (
            Table(
                "A over B: milliseconds, or millions of parameters where B is smaller",
                (
                    "claim",
                    "A / B",
                    "A, paper",
                    "B, paper",
                    "A / B, paper",
                    "A, here",
                    "B, here",
                    "A / B, here",
                ),
                tuple(rows),
                words=2,
            ),
        ),
        (*notes, *disturbances(record, notes=False)),
    )


def _divides(claim: Claim) -> bool:
    return claim.of == "time" and claim.fast is not None


def _ratio(claim: Claim, here: Figure | None) -> Ratio:
    words = re.sub(r" \(.*\)$", "", claim.text)
    return Ratio(
        f"{claim.name}\n{words}",
        claim.published,
        here.value if here else None,
        estimated=bool(here and here.estimated),
    )


def _guessed(ratios: tuple[Ratio, ...]) -> bool:
    return any(ratio.estimated for ratio in ratios)


def _row(claim: Claim, record: Record) -> tuple[str, ...]:
    sides = [side for side in (claim.slow, claim.fast) if side]
    paper, here = [], []
    for side in sides:
        alone = replace(claim, slow=side, fast=None)
        paper.append(f"{alone.published:,.1f}")
        here.append(_shown(figure_of(alone, record), 1))
    what = " / ".join(side.name for side in sides)
    if claim.fast is None:
        return (claim.name, what, *paper, "–", "–", *here, "–", "–")
    ratio = _shown(figure_of(claim, record), 2)
    return (claim.name, what, *paper, f"{claim.published:.2f}", *here, ratio)


def _shown(figure: Figure | None, decimals: int) -> str:
    if figure is None:
        return "–"
    return f"{'~' if figure.estimated else ''}{figure.value:,.{decimals}f}"
