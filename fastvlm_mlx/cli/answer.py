"""`fastvlm caption` and `fastvlm ask`: one answer per picture, or one about all of them."""

import os
import re
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from ..listing import find_pictures
from .many import ManyOptions, caption_each
from .options import AnswerOptions, ModelOptions, PrintOptions, prepare_mlx, spread
from .output import SEEING, print_answer, print_json, print_record, print_stats, say, waiting

if TYPE_CHECKING:
    from ..vlm import FastVLM

__all__ = ["ask", "caption"]


@spread
def caption(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Files, folders, 'patterns*' or URLs; - is stdin."),
    ],
    *,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", show_default="Describe the image.")
    ] = None,
    style: Annotated[
        str | None, typer.Option("--style", help="A prompt: short, detailed, alt, tags or ocr.")
    ] = None,
    many: ManyOptions,
    model: ModelOptions,
    answering: AnswerOptions,
    printing: PrintOptions,
) -> None:
    """Describe each picture. One that fails does not stop the rest.

    A single picture is described as the words come. Of several, each answer is printed behind
    its picture's name, or --out and --sidecar write files; whatever ends such a run, --resume
    continues it.
    """
    question = _question(prompt, style)
    check_question(question, 1)
    options = answering.checked()
    pictures = find_pictures(images, recursive=many.recursive, notice=say)
    many.check(pictures, printing.as_json)
    if pictures == images and len(images) == 1 and not many.keeps:
        _check_formats(images)
        _answer(model.load(), images, question, options, printing)
        return
    summary = many.keeps or pictures != images
    caption_each(pictures, question, many, model, options, printing, summary=summary)


@spread
def ask(
    items: Annotated[
        list[str], typer.Argument(metavar="IMAGE... QUESTION", help="Pictures, then the question.")
    ],
    *,
    choices: Annotated[
        str | None,
        typer.Option(
            "--choices",
            metavar="A,B,...",
            help="Pick the likeliest of these answers; --json tells all probabilities.",
        ),
    ] = None,
    model: ModelOptions,
    answering: AnswerOptions,
    printing: PrintOptions,
) -> None:
    """Ask one question about all the pictures, in the order given.

    <image> in the question marks where each picture stands; without it they stand in front.
    """
    *images, question = items
    # os.path answers False where pathlib would raise: a question may be too long for a path.
    if os.path.isfile(question) or re.fullmatch(r"https?://\S+", question):  # noqa: PTH113
        raise OptionError(f"{question} is a picture; put the question behind the pictures.")
    if not images:
        raise OptionError("Give at least one picture before the question.")
    check_question(question, len(images))
    _check_formats(images)
    if choices is not None:
        _choose(images, question, choices, model, answering, printing)
        return
    options = answering.checked()
    _answer(model.load(), images, question, options, printing)


def check_question(question: str, pictures: int) -> None:
    """Before any weights are loaded. Raises PromptError."""
    prepare_mlx()
    from ..prompt import place

    place(question, pictures)


def _question(prompt: str | None, style: str | None) -> str:
    prepare_mlx()
    from ..prompt import STYLES
    from ..vlm import DEFAULT_PROMPT

    if style is None:
        return DEFAULT_PROMPT if prompt is None else prompt
    if prompt is not None:
        raise OptionError("--style is a prompt; give --style or --prompt.")
    if style not in STYLES:
        raise OptionError(f"style is {style!r}; expected one of {', '.join(STYLES)}.")
    return STYLES[style]


def _answer(
    vlm: "FastVLM",
    images: list[str],
    question: str,
    options: dict[str, Any],
    printing: PrintOptions,
) -> None:
    """Run one request; print the answer as it comes, or as one JSON document."""
    from ..generation import check_whole

    with waiting(SEEING):
        stream = vlm.stream(_sources(images), question, **options)
    if printing.as_json:
        print_json(images, stream.finish())
    else:
        print_answer(stream, options)
    if printing.stats:
        print_stats(stream.answer)
    check_whole(stream.answer, options)


def _choose(
    images: list[str],
    question: str,
    choices: str,
    model: ModelOptions,
    answering: AnswerOptions,
    printing: PrintOptions,
) -> None:
    """Print the likeliest of the given answers, or all with their probabilities."""
    unfit = [f.name for f in fields(answering) if getattr(answering, f.name) != f.default]
    unfit += ["stats"] * printing.stats
    if unfit:
        raise OptionError(
            f"--{unfit[0].replace('_', '-')} does not go with --choices, which weighs answers "
            "instead of making one; leave one of them out."
        )
    prepare_mlx()
    from ..scoring import check_choices

    texts = check_choices([choice.strip() for choice in choices.split(",")])
    vlm = model.load()
    with waiting(SEEING):
        found = vlm.choose(_sources(images), question, texts)
    if printing.as_json:
        print_record(images, {"choice": found.best, "probabilities": found.probabilities})
    else:
        print(found.best, flush=True)


def _check_formats(images: list[str]) -> None:
    prepare_mlx()
    from ..images import check_formats

    check_formats(images)


def _sources(images: list[str]) -> list[Any]:
    return [sys.stdin.buffer.read() if image == "-" else image for image in images]
