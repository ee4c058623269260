"""`fastvlm bench report`."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    records: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RECORD.json]...",
            help="What `fastvlm bench ... --json` wrote; a folder stands for the files in it.",
            show_default=False,
        ),
    ] = None,
    nano: Annotated[
        list[Path] | None,
        typer.Option(help="Also what `python -m training.nano.evaluate --json` wrote; repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.md, index.html and the figures (needs matplotlib)."),
    ] = None,
) -> None:
    """Tables of records, with --out also figures and one page.

    Tables are Markdown on stdout; the page is HTML.
    """
    from fastvlm_mlx.errors import OptionError

    from ..record import read_record
    from .contents import compose
    from .markdown import to_markdown
    from .nano import read_evaluations
    from .writing import write_report

    paths = [path for given in records or [] for path in _files(given)]
    if not paths and not nano:
        raise OptionError(
            "Nothing to report: name a record (`fastvlm bench all --json FILE` makes one), "
            "a folder of them, or --nano FILE."
        )
    document = compose([read_record(path) for path in paths], read_evaluations(nano or []))
    if out is None:
        print(to_markdown(document, {}), end="")
        return
    for path in write_report(document, out):
        print(path)


def _files(given: Path) -> list[Path]:
    """A file, or the JSON files of a folder by name; a folder without any is an error."""
    from fastvlm_mlx.errors import OptionError

    if not given.is_dir():
        return [given]
    from fastvlm_mlx.checkpoint.reading import visible_files

    found = visible_files(given, "*.json")
    if not found:
        raise OptionError(f"{given} has no .json file: expected records of `fastvlm bench`.")
    return found
