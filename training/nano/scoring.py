"""Scores of answers against a scene's ground truth; knows nothing of any model."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from .language import CAPTION, KINDS, PLACES, Exchange, exchange, pair_exchange
from .scenes import COLOURS, SHAPES, SIZES, Scene

Statement = tuple[str, str, str, str]  # size, colour, shape, position


def _any_of(words: Iterable[str]) -> str:
    # Longest first: "at the top" must not win over "at the top left".
    return "(" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_STATEMENT = re.compile(
    f"an? {_any_of(SIZES)} {_any_of(COLOURS)} {_any_of(SHAPES)} {_any_of(PLACES.values())}"
)
_SIGN = re.compile(r"The sign says ([^.]*)\.")
_POSITION = {place: position for position, place in PLACES.items()}


def statements(caption: str) -> Counter[Statement]:
    """What a caption claims about objects, read back from its grammar."""
    found = _STATEMENT.findall(caption.lower())
    return Counter((size, colour, shape, _POSITION[place]) for size, colour, shape, place in found)


def sign_text(caption: str) -> str | None:
    """What a caption claims that the sign says."""
    found = _SIGN.search(caption)
    return found[1] if found else None


def truth(scene: Scene) -> Counter[Statement]:
    return Counter((t.size, t.colour, t.shape, t.position) for t in scene.things)


def same(answer: str, expected: str) -> bool:
    return answer.strip() == expected


def questions(scene: Scene) -> list[Exchange]:
    """The evaluation's questions about a scene: fixed by its seed, each kind once."""
    rng = np.random.Generator(np.random.PCG64([scene.seed, 2]))
    asked = (exchange(scene, kind, rng) for kind in KINDS)
    return [
        Exchange("caption", CAPTION, e.answer) if e.kind == "caption" else e for e in asked if e
    ]


def pair_question(first: Scene, second: Scene) -> Exchange:
    """The evaluation's question about two pictures: fixed by their seeds."""
    return pair_exchange(
        first, second, np.random.Generator(np.random.PCG64([first.seed, second.seed, 3]))
    )


class Score:
    """Right and possible points by name; `questions` sums all kinds but the caption."""

    def __init__(self) -> None:
        self.right: dict[str, int] = defaultdict(int)
        self.total: dict[str, int] = defaultdict(int)

    def add(self, name: str, right: int, total: int = 1) -> None:
        self.right[name] += right
        self.total[name] += total

    def judge(self, scene: Scene, asked: Exchange, answer: str) -> None:
        if asked.kind == "caption":
            self._judge_caption(scene, answer)
            return
        right = same(answer, asked.answer)
        self.add(asked.kind, right)
        self.add("questions", right)
        if asked.kind == "read" and scene.sign:
            self.add("text", right)
            self.add(f"text, {scene.sign.print_size} print", right)
            self.add("text, numbers" if scene.sign.text.isdigit() else "text, words", right)

    def _judge_caption(self, scene: Scene, answer: str) -> None:
        claimed, true = statements(answer), truth(scene)
        # An object too many costs as much as one too few.
        self.add("object statements", (claimed & true).total(), max(claimed.total(), true.total()))
        expected = scene.sign.text if scene.sign else None
        self.add("caption text", sign_text(answer) == expected)
        self.add("whole captions", claimed == true and sign_text(answer) == expected)

    def judge_pair(self, scenes: tuple[Scene, Scene], asked: Exchange, answer: str) -> None:
        """Judge an answer to `pair_question`; also whether it tells of the other picture."""
        meant = "second" in asked.question
        scene, other = scenes[meant], scenes[not meant]
        right = same(answer, asked.answer)
        self.add("two pictures", right)
        self.add(f"two pictures, {asked.kind}", right)
        if asked.kind == "pair":
            claimed, true = statements(answer), truth(scene)
            shared = (claimed & true).total()
            self.add("two pictures, statements", shared, max(claimed.total(), true.total()))
            self.add("two pictures, the other one", (claimed & truth(other)).total() > shared)

    def shares(self) -> dict[str, float]:
        return {name: self.right[name] / self.total[name] for name in self.total}


def judge_all(scenes: Iterable[Scene], ask: Callable[[Scene, list[str]], list[str]]) -> Score:
    """Put every question about every scene to `ask(scene, questions)`."""
    score = Score()
    for scene in scenes:
        asked = questions(scene)
        for item, answer in zip(asked, ask(scene, [e.question for e in asked]), strict=True):
            score.judge(scene, item, answer)
    return score


def judge_pairs(
    pairs: Iterable[tuple[Scene, Scene]], ask: Callable[[tuple[Scene, Scene], str], str]
) -> Score:
    """Put one question about one of two pictures to `ask(scenes, question)`, for every pair."""
    score = Score()
    for scenes in pairs:
        asked = pair_question(*scenes)
        score.judge_pair(scenes, asked, ask(scenes, asked.question))
    return score
