"""`fastvlm chat`: a conversation in the terminal, or line by line through a pipe."""

import contextlib
import io
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FastVLMError, OptionError
from .options import AnswerOptions, ModelOptions, Stats, spread
from .output import SEEING, print_answer, print_stats, say, waiting

if TYPE_CHECKING:
    from ..chat import Chat
    from ..vlm import FastVLM

__all__ = ["converse"]

_HELP = """\
/image PATH  show another picture with the next question
/clear       forget what was said; the pictures stay
/save PATH   write the conversation to a file, for fastvlm chat --load PATH
/stats       how full the context window is, and the last answer's timings
/help        this list
/quit        leave, as Ctrl-D does; Ctrl-C breaks off an answer"""


@spread
def converse(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE", help="Files or URLs.")
    ] = None,
    *,
    load: Annotated[
        str | None, typer.Option("--load", metavar="PATH", help="Resume what /save wrote.")
    ] = None,
    sliding: Annotated[
        bool, typer.Option("--sliding", help="When the context is full, forget the oldest turns.")
    ] = False,
    model: ModelOptions,
    answering: AnswerOptions,
    stats: Stats = False,
) -> None:
    """Talk about pictures, one question per line.

    Each picture is encoded once. In the conversation: /image PATH, /clear, /save PATH, /stats,
    /help, /quit. Ctrl-C breaks off an answer; at the prompt Ctrl-C or Ctrl-D leaves. Questions may
    also come through a pipe.
    """
    if images and "-" in images:
        raise OptionError("stdin is where the questions come from; give pictures as files or URLs.")
    options = answering.checked()
    from ..images import check_formats

    check_formats(images or [])
    vlm = model.load()
    from ..chat import load_chat

    chat = load_chat(load, vlm) if load else vlm.chat()
    chat.sliding = chat.sliding or sliding
    # Now rather than with the first question: the encoder runs while that is typed.
    with waiting(SEEING):
        chat.add(*(vlm.encode(image) for image in images or ()))
    session = _Session(vlm, chat, options, stats)
    session.run()
    if session.failed and not session.interactive:
        raise typer.Exit(1)


class _Session:
    """Reads lines until there are no more; a mistake is one line, and the next one follows."""

    def __init__(self, vlm: "FastVLM", chat: "Chat", options: dict[str, Any], stats: bool) -> None:
        self.vlm, self.chat, self.options, self.stats = vlm, chat, options, stats
        self.interactive = sys.stdin.isatty()
        self.failed = False

    def run(self) -> None:
        for line in map(str.strip, _typed_lines() if self.interactive else _piped_lines()):
            try:
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self.obey(*line.partition(" ")[::2])
                elif line:
                    self.answer(line)
            except FastVLMError as error:
                self.failed = True
                say(f"fastvlm: {error}")
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                say("(interrupted)")

    def answer(self, question: str) -> None:
        from ..generation import check_whole

        stream = self.chat.stream(question, **self.options)
        for forgotten in stream.dropped:
            say(f"(forgotten, to make room: {forgotten})")
        print_answer(stream, self.options)
        if self.stats:
            print_stats(stream.answer)
        check_whole(stream.answer, self.options)

    def obey(self, command: str, argument: str) -> None:
        """Carry out one of the commands in `_HELP`. Raises FastVLMError."""
        if command in ("/image", "/save") and not argument:
            raise OptionError(f"{command} needs a path: {command} PATH.")
        if command == "/image":
            with waiting(SEEING):
                image = self.vlm.encode(_path(argument))
            self.chat.add(image)
            say(f"({image.tokens.shape[0]} image tokens, shown with the next question)")
        elif command == "/clear":
            self.chat = self.vlm.chat(*self.chat.pictures, sliding=self.chat.sliding)
        elif command == "/save":
            self.chat.save(_path(argument))
            say(f"(saved to {_path(argument)})")
        elif command == "/stats":
            self.tell_stats()
        elif command == "/help":
            say(_HELP)
        else:
            raise OptionError(f"There is no command {command}; /help lists them.")

    def tell_stats(self) -> None:
        chat, turns = self.chat, self.chat.turns
        forgotten = f" ({chat.dropped} forgotten)" if chat.dropped else ""
        say(
            f"turns: {len(turns)}{forgotten}, pictures: {len(chat.pictures)}, "
            f"positions: {chat.positions} of {self.vlm.config.context_length}"
        )
        if turns:
            print_stats(turns[-1][1])


def _typed_lines() -> Iterator[str]:
    """Lines from a terminal, with editing and history, until Ctrl-C or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline

        native = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if native else "tab: complete")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # What is no UTF-8 is told by the library, in one line.
        sys.stdin.reconfigure(errors="surrogateescape")
    say("Ask about the pictures. /help lists commands, Ctrl-D leaves.")
    while True:
        try:
            line = _prompted()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        yield line


def _prompted() -> str:
    if sys.stdout.isatty():
        return input("> ")
    # The answers go to a file: the prompt must not.
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _piped_lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "surrogateescape")


def _path(text: str) -> str:
    """A path as typed, or as a terminal pastes a dropped file: quoted or with backslashes."""
    text = text.strip()
    if Path(text).expanduser().exists():
        return str(Path(text).expanduser())
    with contextlib.suppress(ValueError):
        parts = shlex.split(text)
        if len(parts) == 1:
            text = parts[0]
    return str(Path(text).expanduser()) if text.startswith("~") else text
