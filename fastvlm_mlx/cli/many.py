"""`fastvlm caption` for more than one picture: records in a file, sidecars, a bar, a summary."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, OutputError
from .options import ModelOptions, PrintOptions
from .output import print_stats, say

if TYPE_CHECKING:
    from ..many import Record
    from ..records import RecordFile
    from ..sidecars import Sidecars

__all__ = ["ManyOptions", "caption_each"]


@dataclass(frozen=True)
class ManyOptions:
    """Which pictures, how many at a time, and where the captions go."""

    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Look in the folders of folders too.")
    ] = False
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="A record per picture: .jsonl or .csv."),
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out what an earlier run did (by path).")
    ] = False
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing --out, and existing sidecars.")
    ] = False
    sidecar: Annotated[
        str | None,
        typer.Option("--sidecar", metavar="txt|xmp", help="Write photo.txt or photo.jpg.xmp."),
    ] = None
    batch: Annotated[int, typer.Option("--batch", help="Pictures answered together.")] = 4
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Threads that decode.", show_default="up to 4"),
    ] = None
    dedupe: Annotated[
        bool, typer.Option("--dedupe", help="Caption files with the same bytes once.")
    ] = False

    @property
    def keeps(self) -> bool:
        """Whether captions go to files instead of stdout."""
        return self.out is not None or self.sidecar is not None

    def check(self, pictures: list[str], as_json: bool) -> None:
        """Raises OptionError for what does not go together."""
        if self.resume and self.force:
            raise OptionError("--resume continues and --force replaces; give one of them.")
        if self.resume and not self.keeps:
            raise OptionError("--resume needs --out or --sidecar: there is nothing to continue.")
        if self.force and not self.keeps:
            raise OptionError("--force needs --out or --sidecar: there is nothing to replace.")
        if self.keeps and as_json:
            raise OptionError("--json is for stdout; --out and --sidecar write files instead.")
        if self.sidecar and any(name == "-" or "://" in name for name in pictures):
            raise OptionError("--sidecar writes beside files; stdin and URLs have no such place.")
        if pictures.count("-") > 1:
            raise OptionError("stdin can be read once; give - once.")


def caption_each(
    pictures: list[str],
    question: str,
    many: ManyOptions,
    model: ModelOptions,
    options: dict[str, Any],
    printing: PrintOptions,
    *,
    summary: bool,
) -> None:
    """Caption all pictures, to --out, --sidecar or stdout. Exits with 1 if one failed."""
    from ..images import check_formats
    from ..opening import default_model
    from ..records import RecordFile
    from ..sidecars import Sidecars

    sidecars = Sidecars(many.sidecar, force=many.force) if many.sidecar else None
    tally = _Tally()
    # Left in reverse order: the threads end first, the record file is closed last.
    with ExitStack() as stack:
        out = None
        if many.out:
            made_with = {"model": model.model or default_model(), "prompt": question}
            out = RecordFile(many.out, made_with, resume=many.resume, force=many.force)
            stack.enter_context(out)
        left, tally.before = _still_to_do(pictures, many, out, sidecars)
        tally.failed_before = sum(not well for well in out.done.values()) if out else 0
        if left:
            # Else each would become a record of a failure, which --resume takes for done.
            check_formats(left)
            vlm = model.load()
            if model.feature_cache is None:
                vlm.feature_cache = None  # each picture is seen once: remembering is no use
            tally.start()
            if summary:
                stack.push(tally.on_exit)
            on_screen = not many.keeps and sys.stdout.isatty()
            bar = stack.enter_context(_bar(len(left), shown=not on_screen))
            sources = (sys.stdin.buffer.read() if name == "-" else name for name in left)
            records = vlm.caption_many(
                sources,
                question,
                batch=many.batch,
                workers=many.workers,
                dedupe=many.dedupe,
                known=out.known if out else None,
                **options,
            )
            stack.enter_context(closing(records))
            for name, record in zip(left, records, strict=True):
                kept = _keep(name, record, out, sidecars)
                tally.count(kept)
                bar.advance(tally.failed)
                if kept.error is not None:
                    named = kept.error.startswith(name)
                    bar.say(kept.error if named else f"{name}: {kept.error}")
                if not many.keeps and (printing.as_json or kept.error is None):
                    _print(name, kept, printing.as_json)
                if printing.stats and kept.answer:
                    print_stats(kept.answer)
        elif summary:
            say(tally.summary())
    if tally.failed or tally.failed_before:
        raise typer.Exit(1)


def _still_to_do(
    pictures: list[str], many: ManyOptions, out: "RecordFile | None", sidecars: "Sidecars | None"
) -> tuple[list[str], int]:
    """The pictures that are left, and how many were done before."""
    if not many.keeps:
        return pictures, 0
    from ..records import picture_key

    # One record and one sidecar for each picture, however often it was named.
    unique = {picture_key(name): name for name in reversed(pictures)}
    names = list(reversed(unique.values()))
    if out:
        left = [
            name for key, name in zip(reversed(unique), names, strict=True) if key not in out.done
        ]
    elif many.resume and sidecars:
        left = [name for name in names if not sidecars.path(name).exists()]
    else:
        left = names
    return left, len(names) - len(left)


def _keep(
    name: str, record: "Record", out: "RecordFile | None", sidecars: "Sidecars | None"
) -> "Record":
    """The record as it went to the files; a sidecar that cannot be written is its error."""
    if sidecars and record.text is not None:
        try:
            sidecars.write(name, record.text)
        except OutputError as error:
            record = replace(record, error=str(error))
    if out:
        from ..records import record_fields

        out.write(record_fields(name, record))
    return record


def _print(name: str, record: "Record", as_json: bool) -> None:
    from ..records import json_line, record_fields

    if as_json:
        print(json_line(record_fields(name, record)), flush=True)
    else:
        print(f"{name}: {record.text}", flush=True)


class _Tally:
    """Counts for the summary."""

    def __init__(self) -> None:
        self.captioned = self.failed = self.duplicates = 0
        self.before = self.failed_before = 0
        self.start()

    def start(self) -> None:
        """Start the clock anew: loading a model says nothing about the rate."""
        self._started = time.monotonic()

    def count(self, record: "Record") -> None:
        self.failed += record.error is not None
        self.captioned += record.error is None
        self.duplicates += record.error is None and record.duplicate_of is not None

    def on_exit(self, kind: type[BaseException] | None, *_: object) -> None:
        """Say what was done, also if that is not all."""
        if self.captioned + self.failed:
            broken = "; broken off, --resume continues" if kind is KeyboardInterrupt else ""
            say(self.summary() + broken)

    def summary(self) -> str:
        seconds = time.monotonic() - self._started
        same = f" ({self.duplicates} as duplicates)" if self.duplicates else ""
        parts = [f"{self.captioned} captioned{same}", f"{self.failed} failed"]
        if self.before:
            failed = f", {self.failed_before} of them failed" if self.failed_before else ""
            parts.append(f"{self.before} done before{failed}")
        if now := self.captioned + self.failed:
            parts.append(f"{seconds:.1f} s, {now / seconds:.3g} pictures/s")
        return ", ".join(parts)


@dataclass(frozen=True)
class _Bar:
    """What the loop tells a bar, if there is one."""

    say: Callable[[str], None]
    advance: Callable[[int], None]
    """Takes the number of failures so far."""


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[_Bar]:
    """Progress on stderr with rate, time left and failures, if a person is looking."""
    if not (shown and sys.stderr.isatty()):
        yield _Bar(say=say, advance=lambda failed: None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("Captioning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}", style="red"),
    )
    console = Console(stderr=True)
    # The answers may be piped while a person watches the bar: stdout stays what it is.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("caption", total=total, rate="", failed="")

        def advance(failed: int) -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed:.3g} pictures/s" if speed else ""
            bar.update(task, advance=1, rate=rate, failed=f"{failed} failed" if failed else "")

        def above(line: str) -> None:
            bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield _Bar(say=above, advance=advance)
