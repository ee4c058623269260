"""nano's questions have right answers: how many a checkpoint gives.

`held_out.zip` holds scenes that nano was never trained on, with questions and answers, as
`training/nano/held_out.py` wrote them.
"""

import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

import fastvlm_mlx as fv

__all__ = ["Scene", "accuracy_of", "compare_accuracy", "held_out_scenes", "is_nano"]

_MOST_TOKENS = 80


@dataclass(frozen=True)
class Scene:
    """A picture, and (kind, question, right answer) of everything asked about it."""

    picture: Image.Image
    asked: tuple[tuple[str, str, str], ...]


def is_nano(folder: Path) -> bool:
    """Whether a checkpoint speaks nano's vocabulary, which no other model has."""
    own, other = files("fastvlm_mlx") / "nano/vocab.json", folder / "vocab.json"
    return own.is_file() and other.is_file() and own.read_bytes() == other.read_bytes()


def held_out_scenes() -> list[Scene]:
    """The scenes in the package."""
    data = (files(__package__) / "held_out.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [
            Scene(
                Image.open(io.BytesIO(archive.read(entry["picture"]))).convert("RGB"),
                tuple((a["kind"], a["question"], a["answer"]) for a in entry["asked"]),
            )
            for entry in json.loads(archive.read("questions.json"))
        ]


def compare_accuracy(
    source: Path, result: Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Shares of right answers of both checkpoints, by kind of question and in all."""
    scenes = held_out_scenes()
    found: dict[str, Any] = {"questions": sum(len(scene.asked) for scene in scenes)}
    for turn, (name, folder) in enumerate((("source", source), ("result", result))):

        def tell(done: int, before: int = turn * len(scenes)) -> None:
            if progress:
                progress(before + done, 2 * len(scenes))

        found[name] = accuracy_of(fv.load(folder), scenes, tell)
    return found


def accuracy_of(
    vlm: fv.FastVLM, scenes: list[Scene], progress: Callable[[int], None] | None = None
) -> dict[str, float]:
    """Share of answers that are right to the letter: "all", then by kind of question."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for done, scene in enumerate(scenes):
        image = vlm.encode(scene.picture)
        for kind, question, answer in scene.asked:
            said = vlm.ask(image, question, max_tokens=_MOST_TOKENS).text.strip()
            for name in ("all", kind):
                right[name] += said == answer
                total[name] += 1
        if progress:
            progress(done + 1)
    return {name: right[name] / total[name] for name in total}
