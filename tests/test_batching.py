"""A batch answers what each of its rows would answer alone."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.batching import Prompt, encode_pictures, left_padded
from fastvlm_mlx.prompt import expand


@pytest.fixture(scope="module")
def requests(picture: np.ndarray) -> list[tuple[list[Any], str]]:
    """Mixed prompts and lengths: text only, one picture, two, and one inside the text."""
    other = np.ascontiguousarray(picture[::-1, :70])
    return [
        ([picture], "What is this?"),
        ([], "Say something, at some length, about nothing in particular, please."),
        ([other, picture], "Which is bigger?"),
        ([picture], "Here <image> it is: what colour has it, and why?"),
        ([], "Hm"),
        ([other], "What is this?"),
    ]


@pytest.fixture(scope="module")
def encoded(vlm: fv.FastVLM, requests: list[tuple[list[Any], str]]) -> list[Prompt]:
    rows = []
    for images, question in requests:
        tokens = [vlm.encode(image).tokens for image in images]
        ids = expand(vlm.prompt_ids(question, len(images)), [t.shape[0] for t in tokens])
        rows.append(Prompt(ids, tokens, room=100))
    return rows


def _following(vlm: fv.FastVLM, prompt: Prompt, said: list[int]) -> mx.array:
    """Logits (vocab,) after the prompt and some answer tokens, without any cache."""
    embeddings = vlm.network.embed([*prompt.ids, *said], prompt.images)
    return vlm.network.logits(embeddings)[0, -1]


def test_logits_of_a_padded_batch_equal_each_row_alone(
    vlm: fv.FastVLM, encoded: list[Prompt]
) -> None:
    assert len({len(prompt.ids) for prompt in encoded}) == 5, "rows of different length"
    embeddings, cache = left_padded(vlm.network, encoded)
    logits = vlm.network.prefill(embeddings, cache)
    said: list[list[int]] = [[] for _ in encoded]
    for _ in range(3):
        alone = mx.stack([_following(vlm, p, s) for p, s in zip(encoded, said, strict=True)])
        assert mx.abs(logits - alone).max().item() < 1e-4
        tokens = alone.argmax(axis=-1)
        for row, token in zip(said, tokens.tolist(), strict=True):
            row.append(token)
        logits = vlm.network.decode(tokens, cache)


def test_no_position_is_without_anything_to_see(
    vlm: fv.FastVLM, encoded: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax over nothing is not a number on some devices, and 0 times that would spread."""
    masks: list[mx.array] = []
    block = type(vlm.network.language_model.model.layers[0])
    original = block.__call__

    def watched(self: Any, x: mx.array, mask: mx.array, cache: Any) -> mx.array:
        masks.append(mask)
        return original(self, x, mask, cache)

    monkeypatch.setattr(block, "__call__", watched)
    vlm.network.prefill(*left_padded(vlm.network, encoded))
    assert masks
    for mask in masks:
        assert mask.any(axis=-1).all().item()


def _padding_in_sight(cache: Any) -> None:
    cache.left_padding = mx.zeros_like(cache.left_padding)


def _padding_counted_when_decoding(cache: Any) -> None:
    cache.offset = mx.full(cache.offset.shape, cache._idx, dtype=cache.offset.dtype)


@pytest.mark.parametrize(
    ("before", "after"), [(_padding_in_sight, None), (None, _padding_counted_when_decoding)]
)
def test_a_planted_mistake_shows_in_the_logits(
    vlm: fv.FastVLM,
    encoded: list[Prompt],
    before: Callable[[Any], None] | None,
    after: Callable[[Any], None] | None,
) -> None:
    """Only the longest row, which has no padding, would not notice."""
    embeddings, cache = left_padded(vlm.network, encoded)
    for layer in cache if before else ():
        before(layer)
    tokens = vlm.network.prefill(embeddings, cache).argmax(axis=-1)
    for layer in cache if after else ():
        after(layer)
    logits = vlm.network.decode(tokens, cache)
    said = [[token] for token in tokens.tolist()]
    alone = mx.stack([_following(vlm, p, s) for p, s in zip(encoded, said, strict=True)])
    wrong = mx.abs(logits - alone).max(axis=-1).tolist()
    longest = max(range(len(encoded)), key=lambda n: len(encoded[n].ids))
    assert wrong.pop(longest) < 1e-4
    assert min(wrong) > 1e-3


@pytest.mark.parametrize("order", [1, -1])
def test_answers_equal_those_one_by_one(
    vlm: fv.FastVLM, requests: list[tuple[list[Any], str]], order: int
) -> None:
    asked = requests[::order]
    together = vlm.ask_batch(asked, max_tokens=24)
    for (images, question), answer in zip(asked, together, strict=True):
        alone = vlm.ask(images, question, max_tokens=24)
        assert answer.tokens == alone.tokens
        assert answer.text == alone.text
        assert answer.finish_reason == alone.finish_reason
        assert answer.prompt_tokens == alone.prompt_tokens


@pytest.mark.parametrize("order", [(0, 2), (2, 0)])
def test_the_order_of_two_pictures_survives_the_batch(
    vlm: fv.FastVLM, picture: np.ndarray, order: tuple[int, int]
) -> None:
    pictures = [picture, picture[::-1], 255 - picture]
    two = [pictures[n] for n in order]
    answer = vlm.ask_batch([(two, "Which?"), (pictures[1], "What?")], max_tokens=8)[0]
    assert answer.tokens == vlm.ask(two, "Which?", max_tokens=8).tokens
    assert answer.tokens != vlm.ask(two[::-1], "Which?", max_tokens=8).tokens


def test_rows_end_on_their_own(vlm: fv.FastVLM, requests: list[tuple[list[Any], str]]) -> None:
    """A stop string that only some rows say, so that the batch shrinks while it runs."""
    free = vlm.ask_batch(requests, max_tokens=16)
    stop = vlm.tokenizer.decode(free[0].tokens[3:4])
    assert stop.strip()
    together = vlm.ask_batch(requests, max_tokens=16, stop=(stop,))
    alone = [vlm.ask(*request, max_tokens=16, stop=(stop,)) for request in requests]
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [a.finish_reason for a in together] == [a.finish_reason for a in alone]
    assert len({len(a.tokens) for a in alone}) > 1, "some end before others"


def test_the_end_token_ends_a_row_and_is_no_part_of_it(
    vlm: fv.FastVLM, requests: list[tuple[list[Any], str]]
) -> None:
    free = vlm.ask_batch(requests, max_tokens=8)
    patched = fv.FastVLM.__new__(fv.FastVLM)
    patched.__dict__.update(vlm.__dict__)
    ends = frozenset({free[1].tokens[4]})
    patched.config = dataclasses.replace(vlm.config, eos_token_ids=ends)
    together = patched.ask_batch(requests, max_tokens=8)
    alone = [patched.ask(*request, max_tokens=8) for request in requests]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [a.finish_reason for a in together] == [a.finish_reason for a in alone]
    assert together[1].finish_reason == "stop" and len(together[1].tokens) <= 4


def test_a_repetition_penalty_counts_each_row_s_own_answer(
    vlm: fv.FastVLM, requests: list[tuple[list[Any], str]]
) -> None:
    options = {"max_tokens": 10, "repetition_penalty": 5.0}
    together = vlm.ask_batch(requests, **options)
    alone = [vlm.ask(*request, **options) for request in requests]
    assert [a.tokens for a in together] == [a.tokens for a in alone]


def test_the_context_window_limits_each_row(
    vlm: fv.FastVLM, requests: list[tuple[list[Any], str]]
) -> None:
    longest = max(a.prompt_tokens for a in vlm.ask_batch(requests, max_tokens=1))
    narrow = fv.FastVLM.__new__(fv.FastVLM)
    narrow.__dict__.update(vlm.__dict__)
    narrow.config = dataclasses.replace(vlm.config, context_length=longest + 3)
    # With the penalty each row goes on from its own answer, also after another has ended.
    for options in ({}, {"repetition_penalty": 5.0}):
        answers = narrow.ask_batch(requests, max_tokens=10, **options)
        assert [a.tokens for a in answers] == [
            narrow.ask(*request, max_tokens=10, **options).tokens for request in requests
        ]
        assert min(len(a.tokens) for a in answers) == 3
    narrow.config = dataclasses.replace(vlm.config, context_length=longest)
    with pytest.raises(fv.PromptError, match="context window"):
        narrow.ask_batch(requests)


def test_pictures_are_encoded_together_by_size_and_stay_in_order(
    vlm: fv.FastVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    sides = [128, 192, 128, 128, 192]
    pictures = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in sides]
    runs: list[tuple[int, ...]] = []

    def encode(pixels: mx.array) -> mx.array:
        runs.append(pixels.shape)
        return vlm.network.encode(pixels)

    monkeypatch.setattr("fastvlm_mlx.batching._PIXELS_AT_ONCE", 2 * 128 * 128)
    tokens = encode_pictures(encode, [[picture] for picture in pictures])
    assert [shape[:2] for shape in runs] == [(2, 128), (1, 128), (1, 192), (1, 192)]
    for picture, found in zip(pictures, tokens, strict=True):
        alone = vlm.encode(fv.PreprocessedImage((picture,))).tokens
        assert found.shape == alone.shape
        assert mx.abs(found - alone).max().item() < 1e-4


def test_tiled_pictures_in_a_batch(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    tiled = vlm.preprocess(picture, image_size=64, tiles=(1, 2))
    whole = vlm.preprocess(picture[::-1], image_size=64)
    requests = [(tiled, "What?"), (whole, "And this?"), ([whole, tiled], "Both?")]
    answers = vlm.ask_batch(requests, max_tokens=5)
    alone = [vlm.ask(*request, max_tokens=5) for request in requests]
    assert [a.tokens for a in answers] == [a.tokens for a in alone]
    assert [a.prompt_tokens for a in answers] == [a.prompt_tokens for a in alone]


def test_a_batch_takes_every_form_of_a_picture(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    forms = [picture, vlm.preprocess(picture), vlm.encode(picture), mx.array(picture)]
    answers = vlm.ask_batch([(form, "What is this?") for form in forms], max_tokens=6)
    assert len({answer.tokens for answer in answers}) == 1
    assert answers[1].timings.load_image > 0 and answers[2].timings.load_image == 0


def test_misspelt_options_and_slots_are_told_before_anything_runs(vlm: fv.FastVLM) -> None:
    with pytest.raises(fv.OptionError, match="max_token"):
        vlm.ask_batch([((), "a"), ((), "b")], max_token=3)
    with pytest.raises(fv.PromptError, match="1 <image> but 0"):
        vlm.ask_batch([((), "a"), ((), "<image>?")])
    assert vlm.ask_batch([]) == []


def test_the_feature_cache_serves_batches(tiny: Path, picture: np.ndarray) -> None:
    vlm = fv.load(tiny)
    runs: list[int] = []
    encode = vlm._encode_pixels

    def counted(pixels: mx.array) -> mx.array:
        runs.append(pixels.shape[0])
        return encode(pixels)

    vlm._encode_pixels = counted
    requests = [(picture, "What?"), (picture[::-1], "What?"), ((), "Hm")]
    first = vlm.ask_batch(requests, max_tokens=3)
    again = vlm.ask_batch([*requests, (picture[:, ::-1], "What?")], max_tokens=3)
    assert runs == [2, 1]
    assert [a.tokens for a in again[:3]] == [a.tokens for a in first]
