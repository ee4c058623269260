"""What a report consists of; Markdown and HTML are made from the same."""

from dataclasses import dataclass, field

from .plots import Plot

__all__ = ["Document", "Fact", "Section", "Table"]


@dataclass(frozen=True)
class Table:
    """Cells as text: the first column names the row, the others are aligned as numbers."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    """Columns from the left that hold words, not numbers."""


@dataclass(frozen=True)
class Section:
    """A heading, a figure, the figure's numbers, and what a reader must know to use them."""

    name: str
    """Of the figure's file and the heading's anchor: a-z and hyphens."""
    title: str
    lead: str
    plot: Plot | None = None
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    detail: bool = False
    """Folded away at first where the format can."""


@dataclass(frozen=True)
class Fact:
    """One figure to be seen first."""

    value: str
    meaning: str


@dataclass(frozen=True)
class Document:
    """The whole report."""

    title: str
    subtitle: str
    facts: tuple[Fact, ...]
    sections: tuple[Section, ...]
    missing: tuple[str, ...]
    """What a full report has and this one lacks, and how to get it."""
    commands: tuple[str, ...] = field(default=())
    """Which measure it all again."""
