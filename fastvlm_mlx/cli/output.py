"""What is printed: answers as they come, JSON, timings, facts, a bar while weights load."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..generation import Answer, Stream

__all__ = [
    "SEEING",
    "loading_progress",
    "print_answer",
    "print_facts",
    "print_json",
    "print_record",
    "print_stats",
    "say",
    "waiting",
]


SEEING = "Looking at the picture"
_PATIENCE = 1.0
"""Seconds that a person waits without a word."""


def say(line: str) -> None:
    """One line on stderr."""
    print(line, file=sys.stderr, flush=True)


def _print_stream(stream: "Stream") -> None:
    """The answer while it is produced, on a line of its own."""
    try:
        with waiting("Reading the prompt"):
            chunk = next(stream, None)
        while chunk is not None:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            chunk = next(stream, None)
    finally:
        # Also after Ctrl-C: what was said so far stands on a line of its own.
        sys.stdout.write("\n")
        sys.stdout.flush()


def print_answer(stream: "Stream", options: Mapping[str, Any]) -> None:
    """The answer as it comes; JSON when it is whole, so that no reader takes half for all of it."""
    if options["json_schema"] is None:
        _print_stream(stream)
    elif stream.finish().finish_reason == "stop":
        print(stream.answer.text, flush=True)


def print_json(images: list[str], answer: "Answer") -> None:
    """One finished answer as a JSON document on one line."""
    from ..records import answer_fields

    print_record(images, answer_fields(answer))


def print_record(images: list[str], facts: dict[str, Any]) -> None:
    """What was found out about pictures, as a JSON document on one line."""
    from ..records import json_line

    print(json_line({"image": images[0] if len(images) == 1 else images, **facts}), flush=True)


def print_stats(answer: "Answer") -> None:
    """Where the time went, on stderr."""
    parts = ", ".join(
        f"{name.replace('_', ' ')} {1000 * seconds:.0f} ms"
        for name, seconds in asdict(answer.timings).items()
    )
    later = len(answer.tokens) - 1
    rate = f"{later / answer.timings.decode:.1f} tokens/s" if answer.timings.decode else "-"
    say(f"first token after {1000 * answer.ttft:.0f} ms ({parts}); decoding at {rate}")
    say(f"{answer.prompt_tokens} prompt tokens, {len(answer.tokens)} answer tokens")


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """A table of names and values, or the same as JSON."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        first, *rest = value if isinstance(value, list) else [value]
        print(f"{name:<{width}}  {first}")
        for line in rest:
            print(f"{'':<{width}}  {line}")


@contextmanager
def loading_progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr while weights load, if a person is looking and it takes long."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("Loading weights"), BarColumn(), MofNCompleteColumn())
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=False) as bar:
        task = bar.add_task("load", total=None, visible=False)

        def update(done: int, total: int) -> None:
            late = time.monotonic() - started > _PATIENCE
            bar.update(task, completed=done, total=total, visible=late)

        yield update


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on stderr what takes so long, after a second and if a person is looking."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    status = Console(stderr=True).status(what)
    late = threading.Timer(_PATIENCE, status.start)
    late.start()
    try:
        yield
    finally:
        late.cancel()
        late.join()
        status.stop()
