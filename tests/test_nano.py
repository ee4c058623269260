"""The model in the box, judged by what it says about scenes it was never trained on."""

from pathlib import Path

import pytest

import fastvlm_mlx as fv
from training.nano.drawing import render
from training.nano.scenes import HELD_OUT, Scene, make_scene
from training.nano.scoring import Score, judge_all

ROOT = Path(__file__).resolve().parents[1]
SCENES = [make_scene(HELD_OUT + i) for i in range(50)]


def _judge(vlm: fv.FastVLM, scenes: list[Scene]) -> dict[str, float]:
    def ask(scene: Scene, questions: list[str]) -> list[str]:
        image = vlm.encode(render(scene))
        return [vlm.ask(image, question, max_tokens=80).text for question in questions]

    score: Score = judge_all(scenes, ask)
    return score.shares()


@pytest.mark.parametrize(
    ("bits", "floors"),
    [
        (None, {"object statements": 0.96, "text": 0.80, "questions": 0.94}),
        (8, {"object statements": 0.96, "text": 0.80, "questions": 0.94}),
        (4, {"object statements": 0.95, "text": 0.78, "questions": 0.93}),
    ],
)
def test_accuracy_on_held_out_scenes(bits: int | None, floors: dict[str, float]) -> None:
    measured = _judge(fv.load("nano", quantize=bits), SCENES)
    for name, floor in floors.items():
        assert measured[name] >= floor, f"{name}: {measured[name]:.1%}, expected {floor:.0%}"


def test_an_unrelated_picture_is_answered_differently() -> None:
    """Accuracy that did not depend on the picture would be a mistake in the test."""
    vlm = fv.load("nano")
    scenes = SCENES[:10]
    shuffled = _judge_other(vlm, scenes)
    assert shuffled < 0.3


def _judge_other(vlm: fv.FastVLM, scenes: list[Scene]) -> float:
    pictures = {scene.seed: scenes[i - 1] for i, scene in enumerate(scenes)}

    def ask(scene: Scene, questions: list[str]) -> list[str]:
        image = vlm.encode(render(pictures[scene.seed]))
        return [vlm.ask(image, question, max_tokens=80).text for question in questions]

    return judge_all(scenes, ask).shares()["object statements"]


def test_nano_is_an_ordinary_checkpoint_of_this_library() -> None:
    vlm = fv.load("nano")
    assert vlm.source.metadata["format"] == "fastvlm-mlx"
    assert vlm.config.image_tokens == 16
    size = sum(f.stat().st_size for f in vlm.source.folder.iterdir())
    assert size < 6_000_000, "what the wheel may carry"


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "examples").glob("*.jpg")))
def test_examples_are_described(name: str) -> None:
    answer = fv.load("nano").caption(ROOT / "examples" / name)
    assert answer.finish_reason == "stop"
    assert answer.text.startswith(("A large", "A small"))
