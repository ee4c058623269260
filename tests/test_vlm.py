"""The object users hold: encoding, several pictures, and input that does not fit."""

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.prompt import IMAGE


def _close(a: mx.array, b: mx.array, tolerance: float = 1e-5) -> None:
    scale = mx.abs(b).max()
    assert float(mx.abs(a - b).max() / scale) <= tolerance


def test_encoded_image_is_accepted_wherever_an_image_is(
    vlm: fv.FastVLM, picture: np.ndarray
) -> None:
    image = vlm.encode(picture)
    assert image.tokens.shape == (16, 64)
    direct, reused = (vlm.ask(i, "What?", max_tokens=6) for i in (picture, image))
    assert direct.tokens == reused.tokens
    assert direct.prompt_tokens == reused.prompt_tokens == len(vlm.prompt_ids("What?")) - 1 + 16


def test_pictures_are_spliced_in_order_at_their_places(
    vlm: fv.FastVLM, picture: np.ndarray
) -> None:
    """The first splice test uses two pictures: one alone cannot show a wrong order."""
    a, b = vlm.encode(picture), vlm.encode(picture[::-1])
    ids = [5, 6, IMAGE, 7, IMAGE, 8, 9]
    table = vlm.network.language_model.model.embed_tokens
    by_hand = mx.concatenate(
        [table(mx.array([5, 6])), a.tokens, table(mx.array([7])), b.tokens, table(mx.array([8, 9]))]
    )
    expanded = [5, 6, *[IMAGE] * 16, 7, *[IMAGE] * 16, 8, 9]
    assert mx.array_equal(vlm.network.embed(expanded, [a.tokens, b.tokens])[0], by_hand)
    ab, ba = vlm.logits(ids, [a, b]), vlm.logits(ids, [b, a])
    assert ab.shape == (1, 37, vlm.config.text.vocab_size)
    assert float(mx.abs(ab - ba)[0, -1].max()) > 1e-3


def test_other_input_sizes(vlm: fv.FastVLM, tiny: object, picture: np.ndarray) -> None:
    pixels = mx.random.uniform(shape=(2, 128, 192, 3), key=mx.random.key(0))
    features = vlm.vision(pixels)
    assert features.shape == (2, 6, 512)
    _close(features[1:], vlm.vision(pixels[1:]))
    small = fv.load(str(tiny), image_size=128)
    assert small.encode(picture).tokens.shape == (4, 64)
    assert (
        small.ask(picture, "What?", max_tokens=1).prompt_tokens
        == len(vlm.prompt_ids("What?")) - 1 + 4
    )


def test_feature_maps_end_in_the_features(vlm: fv.FastVLM) -> None:
    pixels = mx.random.uniform(shape=(1, 128, 64, 3), key=mx.random.key(1))
    maps = vlm.vision.feature_maps(pixels)
    assert list(maps) == ["stem", "stage1", "stage2", "stage3", "stage4", "stage5", "head"]
    assert maps["stage3"].shape[1:3] == (8, 4)
    assert mx.array_equal(maps["head"].reshape(1, 2, -1), vlm.vision(pixels))


@pytest.mark.parametrize("shape", [(1, 100, 64, 3), (64, 64, 3), (1, 64, 64, 4), (1, 0, 64, 3)])
def test_wrong_pixels(vlm: fv.FastVLM, shape: tuple[int, ...]) -> None:
    with pytest.raises(fv.ImageError, match="multiples of 64"):
        vlm.vision(mx.zeros(shape))


def test_quantize_on_load_changes_the_answer_by_little(tiny: object, picture: np.ndarray) -> None:
    ids, errors = None, []
    exact = fv.load(str(tiny), dtype="float32")
    image = fv.EncodedImage(exact.encode(picture).tokens)  # of no model in particular
    for bits in (8, 4, 2):
        vlm = fv.load(str(tiny), dtype="float32", quantize=bits)
        ids = vlm.prompt_ids("What?")
        difference = mx.abs(vlm.logits(ids, [image]) - exact.logits(ids, [image])).max()
        errors.append(float(difference / mx.abs(exact.logits(ids, [image])).max()))
    assert 0 < errors[0] < 0.05 < errors[2]
    assert errors == sorted(errors)


def test_prompt_beyond_the_context_window_is_an_error(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    image = vlm.encode(picture)
    narrow = fv.FastVLM.__new__(fv.FastVLM)
    narrow.__dict__.update(vlm.__dict__)
    length = len(vlm.prompt_ids("What?")) - 1 + 16
    narrow.config = dataclasses.replace(vlm.config, context_length=length)
    with pytest.raises(fv.PromptError, match=rf"takes {length} positions.*window is {length}"):
        narrow.stream(image, "What?")
    narrow.config = dataclasses.replace(vlm.config, context_length=length + 2)
    answer = narrow.ask(image, "What?", max_tokens=50)
    assert (len(answer.tokens), answer.finish_reason) == (2, "length")


def test_images_of_another_model_are_refused(vlm: fv.FastVLM) -> None:
    with pytest.raises(fv.PromptError, match=r"\(16, 32\).*\(N, 64\)"):
        vlm.ask(fv.EncodedImage(mx.zeros((16, 32))), "What?")


def test_misspelt_option_lists_the_right_ones(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    with pytest.raises(fv.OptionError, match=r"'max_token'; expected one of max_tokens"):
        vlm.caption(picture, max_token=3)


@pytest.mark.parametrize(
    "option",
    [
        {"dtype": "int8"},
        {"quantize": 7},
        {"quantize": 4.0},
        {"image_size": 100},
        {"image_size": 0},
        {"fit": "squash"},
    ],
)
def test_wrong_load_options_are_told_before_anything_is_read(option: dict[str, object]) -> None:
    with pytest.raises(fv.OptionError, match=next(iter(option))):
        fv.load("does/not/exist", **option)  # type: ignore[arg-type]


def test_a_model_is_named_and_a_revision_belongs_to_the_hub(tiny: object) -> None:
    with pytest.raises(fv.CheckpointError, match="No checkpoint at '': expected"):
        fv.load("")
    with pytest.raises(fv.OptionError, match="revision is 'main'"):
        fv.load(str(tiny), revision="main")


@pytest.mark.parametrize("question", ["", " \n", None, b"What?", ["What?"]])
def test_a_question_is_a_text(vlm: fv.FastVLM, picture: np.ndarray, question: Any) -> None:
    for ask in (lambda: vlm.ask(picture, question), lambda: vlm.chat(picture).ask(question)):
        with pytest.raises(fv.PromptError, match="The question is"):
            ask()


@pytest.mark.parametrize(
    ("requests", "options"),
    [(("a.jpg", "What?"), {}), ([("a.jpg", "What?", 1)], {}), ([("a.jpg",)], {})],
)
def test_a_batch_is_a_list_of_pairs(vlm: fv.FastVLM, requests: Any, options: Any) -> None:
    with pytest.raises(fv.OptionError, match="pairs"):
        vlm.ask_batch(requests, **options)


@pytest.mark.parametrize("ids", [[], [5, 320], [-1], [10**9]])
def test_token_ids_outside_the_vocabulary(vlm: fv.FastVLM, ids: list[int]) -> None:
    with pytest.raises(fv.PromptError, match="from 0 to 319" if ids else "nothing"):
        vlm.logits(ids)


def test_what_is_scored_is_a_text(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    with pytest.raises(fv.OptionError, match="text is None"):
        vlm.score(picture, "What?", None)  # type: ignore[arg-type]
