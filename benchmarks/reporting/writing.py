"""The report's files: Markdown, one page, figures as SVG and PNG."""

import os
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.errors import BenchmarkError, OptionError

from .document import Document
from .markdown import to_markdown
from .page import to_html

__all__ = ["write_report"]

FIGURES = "figures"


def write_report(document: Document, folder: Path) -> list[Path]:
    """Write report.md, index.html and figures/ into `folder`; the paths, in that order.

    Without matplotlib, Markdown and page are written without figures before the OptionError that
    says how to get them. Raises BenchmarkError if a file cannot be written.
    """
    try:
        pictures = _draw(document)
    except ImportError as error:
        # matplotlib has parts in C: "missing" may also mean "broken", and its own words say which.
        written = _write(document, folder, {})
        names = ", ".join(str(path) for path in written)
        raise OptionError(
            f'Figures need matplotlib ({error}): pip install "fastvlm-mlx[bench]". '
            f"Written without them: {names}."
        ) from error
    return _write(document, folder, pictures)


@dataclass(frozen=True)
class _Picture:
    inline: str
    """SVG for the page, which has the footnote as text."""
    svg: str
    png: bytes


def _draw(document: Document) -> dict[str, _Picture]:
    """Section's name -> its figure. Raises ImportError without matplotlib."""
    from .canvas import png, svg
    from .figures import draw

    pictures = {}
    for section in document.sections:
        if section.plot:
            figure = draw(section.plot)
            pictures[section.name] = _Picture(
                svg(draw(section.plot, footnote=False), section.name),
                svg(figure, section.name),
                png(figure),
            )
    return pictures


def _write(document: Document, folder: Path, pictures: dict[str, _Picture]) -> list[Path]:
    links = {name: f"{FIGURES}/{name}.svg" for name in pictures}
    inline = {name: picture.inline for name, picture in pictures.items()}
    files = {
        folder / "report.md": to_markdown(document, links).encode(),
        folder / "index.html": to_html(document, inline).encode(),
    }
    for name, picture in pictures.items():
        files[folder / FIGURES / f"{name}.svg"] = picture.svg.encode()
        files[folder / FIGURES / f"{name}.png"] = picture.png
    for path, content in files.items():
        _replace(path, content)
    return list(files)


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BenchmarkError(f"Cannot write {path}: {error.strerror or error}.") from error
