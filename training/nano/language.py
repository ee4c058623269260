"""What can be said about a scene: the caption, and questions with their answers.

Every answer has one canonical form (objects in reading order), so that greedy decoding
can be scored exactly.  Questions come in several wordings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .scenes import COLOURS, POSITIONS, SHAPES, SIZES, WORDS, Scene, Thing

PLACES = {
    p: "in the center"
    if p == "center"
    else f"on the {p}"
    if p in ("left", "right")
    else f"at the {p}"
    for p in POSITIONS
}
NUMBERS = ("None", "One", "Two", "Three", "Four")

CAPTION = "Describe the image."
WORDINGS: dict[str, tuple[str, ...]] = {
    "caption": (
        CAPTION,
        "Describe this picture.",
        "What is in the image?",
        "What do you see?",
        "Describe the picture in detail.",
        "Write a caption for this image.",
        "What are these?",
    ),
    "count": (
        "How many objects are there?",
        "How many shapes are in the image?",
        "Count the objects.",
    ),
    "count_colour": ("How many {} objects are there?", "How many {} shapes are in the image?"),
    "colour": (
        "What color is the {}?",
        "What colour is the {}?",
        "Which color does the {} have?",
        "Tell me the color of the {}.",
    ),
    "where": ("Where is the {}?", "Where in the image is the {}?", "At which position is the {}?"),
    "what": ("What is {}?", "Which object is {}?", "What do you see {}?"),
    "size": ("Is the {} large or small?", "How big is the {}?", "What size is the {}?"),
    "exists": ("Is there {}?", "Is there {} in the image?", "Do you see {}?", "Can you see {}?"),
    "read": (
        "What does the sign say?",
        "What is written on the sign?",
        "What is written here?",
        "Read the sign.",
        "What text is in the image?",
    ),
}
T = TypeVar("T")

KINDS = tuple(WORDINGS)
PAIR_WORDINGS = {
    "pair": (
        "What is in the {} picture?",
        "Describe the {} picture.",
        "Describe the {} image.",
        "What do you see in the {} image?",
    ),
    "pair_read": ("What does the sign in the {} picture say?", "What is written in the {} image?"),
}
NO_SIGN = "There is no sign."


@dataclass(frozen=True)
class Exchange:
    kind: str
    question: str
    answer: str
    about: tuple[Thing, ...] | None = None
    """The things that the answer is read from; empty if none is there, None if not by things."""


def describe(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def caption(scene: Scene) -> str:
    """The canonical caption; `scoring.statements` parses it back."""
    parts = [f"{describe(t)} {PLACES[t.position]}" for t in scene.things]
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    sign = f" The sign says {scene.sign.text}." if scene.sign else ""
    return _sentence(listed) + sign


def reading(scene: Scene) -> str:
    return f"It says {scene.sign.text}." if scene.sign else NO_SIGN


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _references(scene: Scene) -> Iterator[tuple[Thing, list[str]]]:
    """Each thing with the names that mean it and nothing else in the scene."""
    for thing in scene.things:
        names = [thing.shape, f"{thing.colour} {thing.shape}", f"{thing.size} {thing.shape}"]
        words = [{t.shape, t.colour, t.size} for t in scene.things]
        unique = [n for n in names if sum(set(n.split()) <= w for w in words) == 1]
        yield thing, unique


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[rng.integers(len(options))]


def exchange(scene: Scene, kind: str, rng: np.random.Generator) -> Exchange | None:
    """A question of this kind about the scene, or None where the scene allows none."""
    wording = _pick(rng, WORDINGS[kind])
    if kind == "caption":
        return Exchange(kind, wording, caption(scene))
    if kind == "read":
        return Exchange(kind, wording, reading(scene))
    if kind == "count":
        return Exchange(kind, wording, f"{NUMBERS[len(scene.things)]}.")
    if kind == "count_colour":
        present = tuple(t.colour for t in scene.things)
        colour = _pick(rng, present) if rng.random() < 0.75 else _pick(rng, tuple(COLOURS))
        about = tuple(t for t in scene.things if t.colour == colour)
        return Exchange(kind, wording.format(colour), f"{NUMBERS[len(about)]}.", about)
    if kind == "what":
        thing = _pick(rng, scene.things)
        answer = _sentence(describe(thing))
        return Exchange(kind, wording.format(PLACES[thing.position]), answer, (thing,))
    if kind == "exists":
        return _exists(scene, wording, rng)
    # colour, where and size: the name must not give the answer away.
    hidden = {"colour": "colour", "size": "size"}.get(kind, "position")
    named = [
        (thing, [n for n in names if getattr(thing, hidden) not in n.split()])
        for thing, names in _references(scene)
    ]
    named = [(thing, names) for thing, names in named if names]
    if kind == "colour" and (rng.random() < 0.4 or not named):
        thing = _pick(rng, scene.things)
        return Exchange(
            kind,
            wording.format(f"object {PLACES[thing.position]}"),
            f"{thing.colour.capitalize()}.",
            (thing,),
        )
    if not named:
        return None
    thing, names = _pick(rng, named)
    answer = PLACES[thing.position] if kind == "where" else getattr(thing, kind)
    return Exchange(kind, wording.format(_pick(rng, names)), _sentence(answer), (thing,))


def _exists(scene: Scene, wording: str, rng: np.random.Generator) -> Exchange:
    """Yes and no equally often; half of the no-questions change one word of something present."""
    if rng.random() < 0.1:
        return Exchange("exists", wording.format("a sign"), "Yes." if scene.sign else "No.")
    thing = _pick(rng, scene.things)
    if rng.random() < 0.5:
        noun = thing.shape if rng.random() < 0.25 else f"{thing.colour} {thing.shape}"
        about = tuple(t for t in scene.things if set(noun.split()) <= {t.shape, t.colour})
        return Exchange("exists", wording.format(_article(noun)), "Yes.", about)
    absent = [s for s in SHAPES if s not in {t.shape for t in scene.things}]
    if rng.random() < 0.25:
        return Exchange("exists", wording.format(_article(_pick(rng, absent))), "No.", ())
    present = {(t.colour, t.shape) for t in scene.things}
    pairs = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
    if rng.random() < 0.7:
        pairs = [(c, s) for c, s in pairs if (c == thing.colour) != (s == thing.shape)]
    noun = " ".join(_pick(rng, pairs))
    return Exchange("exists", wording.format(_article(noun)), "No.", ())


def exchanges(scene: Scene, rng: np.random.Generator) -> list[Exchange]:
    """One exchange of every kind the scene allows."""
    found = (exchange(scene, kind, rng) for kind in KINDS)
    return [e for e in found if e]


def pair_exchange(first: Scene, second: Scene, rng: np.random.Generator) -> Exchange:
    """A question about one of two pictures, by its order."""
    index = int(rng.integers(2))
    kind = "pair_read" if rng.random() < 0.3 else "pair"
    wordings = PAIR_WORDINGS[kind]
    scene = (first, second)[index]
    question = wordings[rng.integers(len(wordings))].format(("first", "second")[index])
    return Exchange(kind, question, reading(scene) if kind == "pair_read" else caption(scene))


def vocabulary_text() -> list[str]:
    """Words that must become tokens of their own whatever the sample of captions holds."""
    return [f" {w}" for w in (*WORDS, *COLOURS, *SHAPES, *SIZES)]
