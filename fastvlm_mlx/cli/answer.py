"""`fastvlm caption` and `fastvlm ask`: one answer per picture, or one about all of them."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FastVLMError, OptionError
from .options import AnswerOptions, ModelOptions, PrintOptions, spread
from .output import print_json, print_stats, print_stream, say

if TYPE_CHECKING:
    from ..vlm import FastVLM

__all__ = ["ask", "caption"]


@spread
def caption(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files or URLs; - reads stdin.")
    ],
    *,
    prompt: Annotated[str, typer.Option("--prompt", "-p")] = "Describe the image.",
    model: ModelOptions,
    answering: AnswerOptions,
    printing: PrintOptions,
) -> None:
    """Describe each picture. One that fails does not stop the rest."""
    options = answering.checked()
    vlm = model.load()
    failed = False
    for image in images:
        try:
            label = f"{image}: " if len(images) > 1 else ""
            _answer(vlm, [image], prompt, options, printing, label)
        except FastVLMError as error:
            if len(images) == 1:
                raise
            failed = True
            say(f"{image}: {error}")
    if failed:
        raise typer.Exit(1)


@spread
def ask(
    items: Annotated[
        list[str], typer.Argument(metavar="IMAGE... QUESTION", help="Pictures, then the question.")
    ],
    model: ModelOptions,
    answering: AnswerOptions,
    printing: PrintOptions,
) -> None:
    """Ask one question about all the pictures, in the order given.

    <image> in the question marks where each picture stands; without it they stand in front.
    """
    *images, question = items
    if not images:
        raise OptionError("Give at least one picture before the question.")
    options = answering.checked()
    _answer(model.load(), images, question, options, printing)


def _answer(
    vlm: "FastVLM",
    images: list[str],
    question: str,
    options: dict[str, Any],
    printing: PrintOptions,
    label: str = "",
) -> None:
    """Run one request; print the answer as it comes, or as one JSON document."""
    sources: list[Any] = [sys.stdin.buffer.read() if image == "-" else image for image in images]
    stream = vlm.stream(sources, question, **options)
    if printing.as_json:
        print_json(images, stream.finish())
    else:
        print_stream(stream, label)
    if printing.stats:
        print_stats(stream.answer)
