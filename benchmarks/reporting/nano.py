"""Measured accuracy against measured latency: what `training.nano.evaluate --json` wrote."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import BenchmarkError

from .document import Section, Table
from .plots import Curve, Curves, Dot, Guide

__all__ = ["Evaluation", "nano_section", "read_evaluation", "read_evaluations"]

_TTFT = "TTFT, ms (median)"
_MEASURES = {
    "object statements": "objects",
    "whole captions": "captions without a mistake",
    "questions": "questions",
    "text": "text read",
}
"""The evaluation's headline figures, and what the figure calls them."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy by input size on scenes that the model was never trained on."""

    model: str
    scenes: tuple[int, ...]
    """How many of them, in each of the files that make up the evaluation."""
    where: str
    """Machine, versions and date in words; empty if the file does not say."""
    sizes: Mapping[int, Mapping[str, float]]
    """Input side -> measure -> share of right answers, and the median TTFT in ms."""


def read_evaluations(paths: Sequence[Path]) -> Evaluation | None:
    """Several files as one evaluation of one model, each with sizes of its own; None of none.

    Raises BenchmarkError naming the file and what is wrong with it.
    """
    found: Evaluation | None = None
    for path in paths:
        more = read_evaluation(path)
        if found is None:
            found = more
            continue
        twice = sorted(found.sizes.keys() & more.sizes.keys())
        if more.model != found.model or twice:
            why = f"size {twice[0]} is in another file too" if twice else f"of {more.model!r}"
            raise BenchmarkError(
                f"{path} does not go with the evaluation of {found.model!r}: {why}."
            )
        found = Evaluation(
            found.model,
            (*found.scenes, *more.scenes),
            "; ".join(dict.fromkeys(text for text in (found.where, more.where) if text)),
            dict(sorted({**found.sizes, **more.sizes}.items())),
        )
    return found


def read_evaluation(path: Path) -> Evaluation:
    """One file. Raises BenchmarkError naming it and what is wrong with it."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BenchmarkError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise BenchmarkError(f"{path} is not JSON ({error}).") from error
    wanted = f"{path} is not a result of `python -m training.nano.evaluate --json`"
    if not isinstance(document, dict):
        raise BenchmarkError(f"{wanted}: it holds a {type(document).__name__}, not an object.")
    for key, kind in (("model", str), ("scenes", int), ("sizes", dict)):
        if type(document.get(key)) is not kind:
            raise BenchmarkError(f"{wanted}: {key!r} is {document.get(key)!r:.60}.")
    sizes = {_side(key, wanted): _column(v, key, wanted) for key, v in document["sizes"].items()}
    if not sizes:
        raise BenchmarkError(f"{wanted}: it has no sizes.")
    where = document.get("where", "")
    return Evaluation(
        document["model"],
        (document["scenes"],),
        where if isinstance(where, str) else "",
        dict(sorted(sizes.items())),
    )


def _side(key: str, wanted: str) -> int:
    if not (key.isdecimal() and 0 < int(key) < 100_000):
        raise BenchmarkError(f"{wanted}: {key!r:.60} is not a size in pixels.")
    return int(key)


def _column(value: Any, key: str, wanted: str) -> dict[str, float]:
    if not isinstance(value, dict):
        raise BenchmarkError(f"{wanted}: size {key} is {value!r:.60}.")
    for name, number in value.items():
        timed = name == _TTFT
        good = isinstance(number, int | float) and not isinstance(number, bool)
        if not (good and (0 < number < float("inf") if timed else 0 <= number <= 1)):
            expected = "milliseconds" if timed else "a share from 0 to 1"
            raise BenchmarkError(
                f"{wanted}: {name!r:.60} at {key} is {number!r:.60}, not {expected}."
            )
    return value


def nano_section(evaluation: Evaluation) -> Section | None:
    """None if the evaluation was not timed."""
    timed = {side: column for side, column in evaluation.sizes.items() if _TTFT in column}
    if not timed:
        return None
    curves = []
    for measure, name in _MEASURES.items():
        dots = tuple(
            Dot(column[_TTFT], 100 * column[measure])
            for column in timed.values()
            if measure in column
        )
        if dots:
            curves.append(Curve(name, dots, "here"))
    if not curves:
        return None
    names = list(dict.fromkeys(name for column in timed.values() for name in column))
    names.sort(key=lambda name: name != _TTFT)
    counts = " or ".join(map(str, sorted(set(evaluation.scenes))))
    scenes = f"{counts} scenes never trained on"
    where = evaluation.where or "the file does not name its machine"
    return Section(
        "nano",
        f"{evaluation.model}: accuracy against time to first token",
        "The trade-off that the paper is about, in a model that anyone can measure: more pixels "
        "are more visual tokens and a later first token.",
        Curves(
            f"{evaluation.model}: accuracy against time to first token, by input size",
            f"{where} · {scenes}",
            "felt time to first token, median",
            "right answers, %",
            tuple(curves),
            "Both measured here, by python -m training.nano.evaluate: answers through the public "
            "interface, first tokens of 20 pictures. Vertical lines: input sizes.",
            tuple(Guide(column[_TTFT], f"{side} px") for side, column in timed.items()),
        ),
        (
            Table(
                f"Share of right answers on {scenes}, and TTFT",
                ("", *(f"{side} px" for side in timed)),
                tuple(
                    (name, *(_cell(name, column.get(name)) for column in timed.values()))
                    for name in names
                ),
            ),
        ),
    )


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if name == _TTFT else f"{100 * value:.1f}%"
