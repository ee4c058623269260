"""The command line: the only place that prints or exits.

stdout carries the answer, stderr everything else. Exit codes: 0 all done, 1 something failed,
2 bad usage, 130 interrupted. Nothing heavy is imported before a command needs it.
"""

import codecs
import io
import os
import sys
from importlib.metadata import entry_points, version
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import FastVLMError, OptionError
from .answer import ask, caption
from .chat import converse
from .machine import doctor, info
from .output import say

__all__ = ["app", "main"]

_PLUGINS = "fastvlm_mlx.commands"
_PLUGIN_HELP = {
    "convert": "Convert a checkpoint to folded, quantized safetensors.",
    "bench": "Measure encoder latency and time to first token on this machine.",
}


class _Commands(TyperGroup):
    """Own commands, and those of the entry-point group, imported only when called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(e.name for e in entry_points(group=_PLUGINS))]

    def get_command(self, ctx: Any, name: str) -> Any:
        return super().get_command(ctx, name) or (
            TyperCommand(name, help=_PLUGIN_HELP.get(name, ""))
            if entry_points(group=_PLUGINS, name=name)
            else None
        )

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        for entry in entry_points(group=_PLUGINS, name=args[0]) if args else ():
            return args[0], typer.main.get_command(entry.load()), args[1:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        print(f"fastvlm-mlx {version('fastvlm-mlx')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show version.")
    ] = False,
) -> None:
    """FastVLM in pure MLX: describe pictures and answer questions about them."""


for command in (caption, ask):
    app.command()(command)
app.command("chat")(converse)
for command in (info, doctor):
    app.command()(command)


def _printable(error: UnicodeError) -> tuple[str | bytes, int]:
    """File names with the bytes they have; letters that the encoding lacks as question marks."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("replace")(error)


def main() -> NoReturn:
    """Entry point of the `fastvlm` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("fastvlm", _printable)
        sys.stdout.reconfigure(errors="fastvlm")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when it is imported
    try:
        app()
        sys.exit(0)
    except FastVLMError as error:
        say(f"fastvlm: {error}")
        sys.exit(2 if isinstance(error, OptionError) else 1)
    except KeyboardInterrupt:
        say("")
        sys.exit(130)
    except BrokenPipeError:
        # The reader has gone (`| head`); point stdout elsewhere so that exiting does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
