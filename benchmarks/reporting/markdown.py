"""A report as Markdown."""

import re
from collections.abc import Mapping

from .document import Document, Section, Table
from .words import visible

__all__ = ["to_markdown"]


def to_markdown(document: Document, figures: Mapping[str, str]) -> str:
    """The document; `figures` says where a section's picture lies, if it has one."""
    blocks = [f"# {_plain(document.title)}", _plain(document.subtitle)]
    if document.facts:
        blocks.append(
            "\n".join(f"- **{_plain(f.value)}** {_plain(f.meaning)}" for f in document.facts)
        )
    for section in document.sections:
        blocks += _section(section, figures.get(section.name))
    if document.missing:
        blocks.append("## Not in this report")
        blocks.append("\n".join(f"- {_plain(line)}" for line in document.missing))
    if document.commands:
        blocks.append("## Measure it again")
        blocks.append(_code("\n".join(map(visible, document.commands))))
    return "\n\n".join(blocks) + "\n"


def _section(section: Section, figure: str | None) -> list[str]:
    blocks = [f"## {_plain(section.title)}", _plain(section.lead)]
    if figure:
        blocks.append(f"![{_plain(section.title)}: the numbers are in the table below]({figure})")
    for table in section.tables:
        blocks += [f"**{_plain(table.caption)}**", _table(table)]
    if section.notes:
        blocks.append("\n".join(f"- {_plain(note)}" for note in section.notes))
    return blocks


def _table(table: Table) -> str:
    rules = [":--" if n < table.words else "--:" for n in range(len(table.header))]
    rows = [table.header, *table.rows]
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join(rules) + " |", *lines[1:]])


def _plain(text: str) -> str:
    """`text` on one line, showing as it is: nothing in it is markup."""
    line = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", line)


def _code(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"
