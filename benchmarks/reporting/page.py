"""A report as one HTML file: no network, no script, nothing from a record is markup."""

import re
from collections.abc import Mapping
from html import escape

from .document import Document, Section, Table
from .words import visible

__all__ = ["to_html"]

# Nothing may be fetched or run, whatever a record holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_LONG = 28
"""Letters from which a cell's text may break into lines."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #57606a; --line: #d0d7de;
  --ground: #ffffff; --card: #f6f8fa; --accent: #0a5d94; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d;
  --ground: #0d1117; --card: #161b22; --accent: #79c0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 54rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0 .9rem; overflow-wrap: anywhere; }
.soft, figcaption, caption, footer { color: var(--soft); font-size: .9rem; }
ul.facts { list-style: none; margin: 1.2rem 0; padding: 0; display: grid; gap: .7rem;
  grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); }
ul.facts li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem .9rem; font-size: .85rem; color: var(--soft); }
ul.facts strong { display: block; color: var(--ink); font-size: 1.5rem; line-height: 1.25; }
nav ul { margin: .8rem 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap;
  gap: .2rem 1.1rem; font-size: .9rem; }
a { color: var(--accent); }
figure { margin: 1rem 0; }
figcaption { margin-top: .5rem; }
.picture { background: #ffffff; border: 1px solid var(--line); border-radius: .5rem;
  padding: .4rem; overflow-x: auto; }
.picture svg { display: block; width: 100%; min-width: 30rem; height: auto; margin: 0 auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th { font-weight: 600; }
.t { text-align: left; }
tbody td, tbody th { white-space: nowrap; }
tbody .long { white-space: normal; min-width: 12rem; overflow-wrap: anywhere; }
thead th { border-bottom-width: 2px; }
ul.notes { padding-left: 1.1rem; font-size: .9rem; color: var(--soft); overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .8rem; overflow-x: auto; font-size: .875rem; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 30rem) { h1 { font-size: 1.4rem; } th, td { padding: .3rem .4rem; } }
@media print { details > * { display: block; } }
"""


def to_html(document: Document, figures: Mapping[str, str]) -> str:
    """The page; `figures` has the <svg> element of each section that has a picture."""
    title = _text(document.title)
    body = [f"<header>\n<h1>{title}</h1>", f'<p class="soft">{_text(document.subtitle)}</p>']
    if document.facts:
        items = (
            f"<li><strong>{_text(f.value)}</strong> {_text(f.meaning)}</li>" for f in document.facts
        )
        body.append('<ul class="facts">\n' + "\n".join(items) + "\n</ul>")
    body.append("</header>")
    links = (f'<li><a href="#{_text(s.name)}">{_text(s.title)}</a></li>' for s in document.sections)
    body.append(
        '<nav aria-label="Sections">\n<ul>\n' + "\n".join(links) + "\n</ul>\n</nav>\n<main>"
    )
    body += [_section(section, figures.get(section.name)) for section in document.sections]
    if document.missing:
        body.append('<section aria-labelledby="missing">\n<h2 id="missing">Not in this report</h2>')
        body.append(_notes(document.missing) + "\n</section>")
    if document.commands:
        body.append('<section aria-labelledby="again">\n<h2 id="again">Measure it again</h2>')
        body.append(
            "<pre><code>" + "\n".join(map(_text, document.commands)) + "</code></pre>\n</section>"
        )
    body.append("</main>\n<footer><p>Made by <code>fastvlm bench report</code>.</p></footer>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _section(section: Section, figure: str | None) -> str:
    name, title = _text(section.name), _text(section.title)
    parts = [
        f'<section aria-labelledby="{name}">',
        f'<h2 id="{name}">{title}</h2>',
        f"<p>{_text(section.lead)}</p>",
    ]
    if figure:
        label = _text(f"{section.title}. The numbers are in the table that follows.")
        picture = re.sub(r' (width|height)="[^"]*"', "", figure[: figure.index(">")])
        picture += figure[figure.index(">") :]
        picture = picture.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
        caption = _text(section.plot.footnote) if section.plot else ""
        parts.append(f'<figure>\n<div class="picture" tabindex="0">{picture}</div>')
        parts.append(f"<figcaption>{caption}</figcaption>\n</figure>")
    tables = "\n".join(map(_table, section.tables))
    if section.detail:
        tables = f"<details>\n<summary>Show the numbers</summary>\n{tables}\n</details>"
    parts.append(tables)
    if section.notes:
        parts.append(_notes(section.notes))
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    def cell(tag: str, number: int, text: str) -> str:
        kinds = ["t"] * (number < table.words) + ["long"] * (len(text) > _LONG)
        return f'<{tag} class="{" ".join(kinds)}">{_text(text)}</{tag[:2]}>'

    head = "".join(cell('th scope="col"', n, text) for n, text in enumerate(table.header))
    rows = [
        "<tr>"
        + cell('th scope="row"', 0, row[0])
        + "".join(cell("td", n, text) for n, text in enumerate(row[1:], 1))
        + "</tr>"
        for row in table.rows
    ]
    return (
        f'<div class="wide" tabindex="0"><table>\n<caption>{_text(table.caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _notes(lines: tuple[str, ...]) -> str:
    return '<ul class="notes">\n' + "\n".join(f"<li>{_text(n)}</li>" for n in lines) + "\n</ul>"


def _text(text: str) -> str:
    """Text as it is, in an element or a quoted attribute."""
    return escape(visible(text))
