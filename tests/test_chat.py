"""A conversation equals a cold run of all that was said."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.prompt import turn_ids


def _cold_answer(
    vlm: fv.FastVLM, ids: list[int], images: list[Any], count: int
) -> tuple[tuple[int, ...], mx.array]:
    """Greedy tokens and first logits without any cache."""
    ids, first = list(ids), vlm.logits(ids, images)[0, -1]
    said = []
    for _ in range(count):
        said.append(int(vlm.logits(ids, images)[0, -1].argmax().item()))
        ids.append(said[-1])
    return tuple(said), first


@pytest.mark.parametrize("ending", ["length", "stop string"])
def test_the_second_turn_equals_a_cold_run(
    vlm: fv.FastVLM, picture: np.ndarray, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits: list[mx.array] = []
    original = type(vlm.network).prefill

    def watched(self: Any, embeddings: mx.array, cache: Any) -> mx.array:
        logits.append(original(self, embeddings, cache))
        return logits[-1]

    monkeypatch.setattr(type(vlm.network), "prefill", watched)
    image = vlm.encode(picture)
    chat = vlm.chat(image)
    whole = chat.ask("What is this?", max_tokens=5)
    if ending == "stop string":
        # Ends in the middle: the next token was queued, and is in the cache already.
        stop = vlm.tokenizer.decode(whole.tokens[2:3])
        if not stop:
            pytest.skip("the third token has no text to stop at")
        chat = vlm.chat(image)
        whole = chat.ask("What is this?", max_tokens=5, stop=(stop,))
    second = chat.ask("And now?", max_tokens=4)
    ids = vlm.prompt_ids("What is this?") + list(whole.tokens)
    ids += turn_ids(vlm.tokenizer, "And now?")
    said, first = _cold_answer(vlm, ids, [image], 4)
    assert second.tokens == said
    assert mx.allclose(logits[-1][0], first, atol=1e-4)
    assert second.prompt_tokens == len(ids) - 1 + image.tokens.shape[0]


def test_a_picture_is_encoded_once_and_more_can_be_shown(
    vlm: fv.FastVLM, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    original = type(vlm.network).encode

    def counted(self: Any, pixels: mx.array) -> mx.array:
        runs.append(pixels.shape[0])
        return original(self, pixels)

    monkeypatch.setattr(type(vlm.network), "encode", counted)
    fresh = fv.FastVLM.__new__(fv.FastVLM)
    fresh.__dict__.update(vlm.__dict__)
    fresh._encode_pixels = vlm.network.encode
    chat = fresh.chat(picture)
    chat.ask("One?", max_tokens=2)
    chat.ask("Two?", max_tokens=2)
    assert runs == [1]
    before = chat.positions
    chat.add(picture[::-1])
    chat.ask("Three?", max_tokens=2)
    assert runs == [1, 1]
    assert chat.positions > before + 16
    assert [question for question, _ in chat.turns] == ["One?", "Two?", "Three?"]


def test_a_question_that_fails_changes_nothing(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    chat = vlm.chat(picture)
    with pytest.raises(fv.PromptError, match="2 <image> but 1"):
        chat.ask("<image> or <image>?")
    with pytest.raises(fv.OptionError):
        chat.ask("What?", temperature=-1)
    chat.stream("Never read.")
    direct = vlm.ask(picture, "What?", max_tokens=4)
    assert chat.ask("What?", max_tokens=4).tokens == direct.tokens


def test_a_full_context_window_is_told(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    import dataclasses

    narrow = fv.FastVLM.__new__(fv.FastVLM)
    narrow.__dict__.update(vlm.__dict__)
    narrow.config = dataclasses.replace(vlm.config, context_length=160)
    chat = narrow.chat(picture)
    with pytest.raises(fv.PromptError, match="context window is 160"):
        for _ in range(9):
            chat.ask("What is this, then?", max_tokens=4)
    assert chat.turns, "the turns before were answered"
