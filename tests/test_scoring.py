"""Likelihoods of given answers equal those of one cold run over prompt and answer."""

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.scoring import Choices, Score
from training.nano.drawing import render
from training.nano.language import NUMBERS
from training.nano.scenes import HELD_OUT, make_scene

ANSWERS = ["Yes", "No, there is none.", "I cannot see that in this picture", "?"]


def _cold(vlm: fv.FastVLM, image: fv.EncodedImage, question: str, answer: str) -> list[float]:
    """Log-likelihood of each token of `answer` and the end, without any cache."""
    ids = vlm.prompt_ids(question)
    tokens = [*vlm.tokenizer.encode(answer), vlm.tokenizer.end_of_turn]
    logits = vlm.logits(ids + tokens, [image])[0]
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    first = logits.shape[0] - len(tokens) - 1  # predicts the first token of the answer
    return [float(logs[first + n, token].item()) for n, token in enumerate(tokens)]


def test_scores_equal_a_cold_run(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    image = vlm.encode(picture)
    for answer in ANSWERS:
        score = vlm.score(image, "What?", answer)
        expected = _cold(vlm, image, "What?", answer)
        assert score.log_likelihoods == pytest.approx(expected, abs=1e-4)
        assert score.total == pytest.approx(sum(expected), abs=1e-4)
        assert vlm.tokenizer.decode(score.tokens) == answer
        assert score.tokens[-1] == vlm.tokenizer.end_of_turn


def test_an_empty_answer_is_the_end_of_the_turn(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    image = vlm.encode(picture)
    assert vlm.score(image, "What?", "").log_likelihoods == pytest.approx(
        _cold(vlm, image, "What?", ""), abs=1e-4
    )


def test_choices_are_weighed_by_their_whole_text(
    vlm: fv.FastVLM, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together, also in more than one batch, as each would be alone; in any order."""
    image = vlm.encode(picture)
    alone = {answer: vlm.score(image, "What?", answer).total for answer in ANSWERS}
    for rows in (16, 3):
        monkeypatch.setattr("fastvlm_mlx.scoring._ROWS", rows)
        for order in (ANSWERS, ANSWERS[::-1]):
            choices = vlm.choose(image, "What?", order)
            assert [score.text for score in choices.scores] == order
            for score in choices.scores:
                assert score.total == pytest.approx(alone[score.text], abs=1e-4)
            probabilities = choices.probabilities
            assert math.fsum(probabilities.values()) == pytest.approx(1, abs=1e-12)
            ratio = math.log(probabilities[ANSWERS[0]] / probabilities[ANSWERS[3]])
            assert ratio == pytest.approx(alone[ANSWERS[0]] - alone[ANSWERS[3]], abs=1e-3)
            assert choices.best == max(alone, key=lambda answer: alone[answer])


def test_the_prompt_is_run_once(
    vlm: fv.FastVLM, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    prefill = type(vlm.network).prefill

    def counted(*args: object) -> mx.array:
        runs.append(1)
        return prefill(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(type(vlm.network), "prefill", counted)
    vlm.choose([picture, picture], "Same?", [f"answer {n}" for n in range(20)])
    assert runs == [1]


def test_probabilities_of_unlikely_texts_do_not_vanish() -> None:
    choices = Choices((Score("a", (1,), (-2000.0,)), Score("b", (2,), (-2001.0,))))
    assert choices.probabilities["a"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert choices.best == "a"


def test_a_tie_is_told_and_not_guessed() -> None:
    tie = Choices((Score("a", (1,), (-1.0,)), Score("b", (2,), (-1.0,))))
    assert tie.probabilities == {"a": 0.5, "b": 0.5}
    with pytest.raises(fv.PromptError, match="'a' and 'b' are exactly equally likely"):
        tie.best  # noqa: B018


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([], "0 choice"),
        (["yes"], "1 choice"),
        (["yes", " "], "Choice 2 is empty"),
        (["yes", "no", "yes "], "'yes' was given twice"),
        ("yes,no", "expected a list"),
        ([1, 2], "expected a list"),
        (None, "expected a list"),
    ],
)
def test_wrong_choices(vlm: fv.FastVLM, choices: list[str], said: str) -> None:
    with pytest.raises(fv.OptionError, match=said):
        vlm.choose((), "What?", choices)


def test_choices_are_read_once(vlm: fv.FastVLM) -> None:
    found = vlm.choose((), "What?", (text for text in ("yes", "no")))  # type: ignore[arg-type]
    assert list(found.probabilities) == ["yes", "no"]


def test_the_context_window_counts_the_answer(tiny: Path) -> None:
    vlm = fv.load(tiny)
    length = len(vlm.prompt_ids("What?", 0))
    object.__setattr__(vlm.config, "context_length", length + 4)
    assert vlm.score((), "What?", "abc").total < 0
    with pytest.raises(fv.PromptError, match=f"window is {length + 4}"):
        vlm.score((), "What?", "abcd")


def test_nano_counts_by_choosing() -> None:
    """It answers this question right 99.5% of the time (training/nano/README.md)."""
    vlm = fv.load("nano")
    choices = [f"{number}." for number in NUMBERS[1:]]
    right = sure = 0
    scenes = [make_scene(HELD_OUT + i) for i in range(20)]
    for scene in scenes:
        found = vlm.choose(render(scene), "How many objects are there?", choices)
        right += found.best == f"{NUMBERS[len(scene.things)]}."
        sure += max(found.probabilities.values()) > 0.9
    assert right >= 19 and sure >= 15, (right, sure)
