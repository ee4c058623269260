"""Options that the commands of `fastvlm bench` share."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fastvlm_mlx.errors import OptionError

__all__ = [
    "Context",
    "EffortOptions",
    "JsonFile",
    "Sizes",
    "SubjectOptions",
    "integers",
    "seconds_of",
    "typed_command",
]

Sizes = Annotated[
    str | None,
    typer.Option("--sizes", metavar="N,N,...", show_default="256,512,768,1024,1536"),
]
Context = Annotated[
    int | None,
    typer.Option("--context", min=1, help="Positions before the first token that decode times."),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the record, also if interrupted; in a folder: MACHINE/NAME.json.",
    ),
]


@dataclass(frozen=True)
class SubjectOptions:
    """What is measured; a random 0.5B by default."""

    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A checkpoint, as for `fastvlm caption`."),
    ] = None
    random: Annotated[
        str | None,
        typer.Option(
            "--random",
            show_default="0.5b",
            help="Random weights of a published shape: 0.5b, 1.5b or 7b; or the built-in nano.",
        ),
    ] = None
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16.")] = (
        None
    )
    bits: Annotated[
        int | None, typer.Option("--bits", help="Quantize the language model: 2 to 6, or 8.")
    ] = None

    def choice(self) -> Any:
        """A `subjects.Choice`. Raises OptionError."""
        from .subjects import Choice

        return Choice(self.model, self.random, self.dtype, self.bits)


@dataclass(frozen=True)
class EffortOptions:
    """How much is measured, and where the record goes."""

    repeat: Annotated[
        int | None,
        typer.Option("--repeat", min=1, show_default="12", help="Runs, after two to warm up."),
    ] = None
    quick: Annotated[
        bool, typer.Option("--quick", help="Sizes 256 and 512, six runs: under a minute on nano.")
    ] = False
    json: JsonFile = None

    def chosen_sizes(self, sizes: str | None) -> tuple[int, ...]:
        """What --sizes says, else the usual ones, in ascending order. Raises OptionError."""
        from .running import SIZES, check_sizes

        if sizes is None:
            return SIZES[:2] if self.quick else SIZES
        return check_sizes(integers(sizes, "--sizes"))

    def effort(self) -> Any:
        """A `measuring.Effort`."""
        from .measuring import Effort

        if self.quick:
            return Effort(self.repeat or 6, warmup=1, answer_tokens=16, cold_starts=3)
        return Effort(self.repeat or 12)


def typed_command() -> list[str]:
    """The command as it was given, from "bench" on."""
    words = sys.argv[1:]
    return words[words.index("bench") :] if "bench" in words else words


def integers(text: str, option: str) -> list[int]:
    """The numbers in "256,512". Raises OptionError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"{option} is {text!r}; expected numbers, as in 256,512.") from None


def seconds_of(text: str, option: str) -> float:
    """Seconds in "200ms", "0.2 s" or "1.5s". Raises OptionError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s)\s*", text)
    seconds = float(found.group(1)) / (1000 if found.group(2) == "ms" else 1) if found else 0.0
    if seconds <= 0:
        raise OptionError(f"{option} is {text!r}; expected a time, as in 200ms or 1.5s.")
    return seconds
