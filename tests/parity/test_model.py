"""The whole model against transformers' FastVlmForConditionalGeneration, with random weights.

Both sides get Apple's padded pictures (transformers' own processor would crop them), from two
implementations that test_images.py holds equal to the byte.
"""

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import fastvlm_mlx as fv
import reference
from checkpoints import Reference
from conftest import Figure

LIMIT = 1e-4
NEW_TOKENS = 32
QUESTION = "What are these?"

# Width and height of the pictures of each case.
CASES = {
    "text-only": [],
    "square": [(300, 300)],
    "wide": [(401, 133)],
    "tall": [(97, 256)],
    "two": [(320, 200), (180, 256)],
    "two-squares": [(256, 256), (512, 512)],
}
# With seeds under which the reference neither hesitates nor repeats itself (`expect` says so).
LANGUAGES = {"tied": (checkpoints.TINY, 7), "untied": (checkpoints.UNTIED, 0)}
WRITERS = {
    "native": checkpoints.write_native,
    "apple": checkpoints.write_apple,
    "mlx-vlm": checkpoints.write_mlx_vlm,
}


@dataclass(frozen=True)
class Expected:
    """What transformers says."""

    ids: list[int]
    slots: list[int]
    """The image tokens that one picture stands for."""
    logits: np.ndarray
    tokens: list[int]


def prompt_text(question: str, images: int) -> str:
    """The qwen_2 conversation template, pictures in front."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n" + "<image>\n" * images + question + "<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def expect(made: Reference, pictures: list[Path]) -> Expected:
    """Run the reference: one pass over the whole prompt, then greedy decoding."""
    opened = [Image.open(picture) for picture in pictures] or None
    text = prompt_text(QUESTION, len(pictures))
    inputs = {"input_ids": made.processor(text=text, images=opened, return_tensors="pt").input_ids}
    if pictures:
        padded = [reference.to_unit(reference.padded(p, made.image_size)) for p in pictures]
        inputs["pixel_values"] = reference.nchw(np.concatenate(padded))
    logits = made.model(**inputs).logits.numpy()
    answer = made.model.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    length = inputs["input_ids"].shape[1]
    steps = torch.stack(answer.logits).squeeze(1)
    best = steps.topk(2, dim=-1).values
    # The smallest lead of a chosen token over the next best, relative to the largest logit.
    lead = float((best[:, 0] - best[:, 1]).min() / steps.abs().max())
    tokens = answer.sequences[0, length:].tolist()
    # A reference that repeats itself, or hesitates, would not tell a right answer from a wrong one.
    assert len(set(tokens)) >= NEW_TOKENS // 4, tokens
    assert lead > 3 * LIMIT
    slots = [made.model.config.image_token_id] * made.image_tokens
    return Expected(inputs["input_ids"][0].tolist(), slots, logits, tokens)


def compare(vlm: Any, expected: Expected, pictures: list[Path], figure: Figure, name: str) -> None:
    """Hold ids, logits and greedy tokens of `vlm` against `expected`."""
    ids = vlm.prompt_ids(QUESTION, images=len(pictures))
    assert ids.count(fv.IMAGE) == len(pictures)
    assert [i for t in ids for i in (expected.slots if t == fv.IMAGE else [t])] == expected.ids
    error = reference.relative_error(np.array(vlm.logits(ids, pictures)), expected.logits)
    figure(f"LOGITS vs. transformers, {name}", error, LIMIT)
    answer = vlm.ask(pictures, QUESTION, max_tokens=NEW_TOKENS)
    assert answer.prompt_tokens == len(expected.ids)
    assert list(answer.tokens) == expected.tokens
    assert answer.text.strip() == vlm.tokenizer.decode(expected.tokens).strip()


@pytest.fixture(scope="session")
def references(workspace: Path, small_tokenizer: Path) -> Callable[[str], Reference]:
    """Reference models by name, each made once."""

    @cache
    def build(name: str) -> Reference:
        language, seed = LANGUAGES[name]
        return checkpoints.build(language, small_tokenizer, language_seed=seed)

    return build


@pytest.fixture(scope="session")
def pictures(workspace: Path) -> Callable[[str], list[Path]]:
    """The picture files of a case."""
    folder = workspace / "pictures"
    folder.mkdir()

    @cache
    def draw(case: str) -> list[Path]:
        return [reference.picture(folder, w, h, seed=w + h) for w, h in CASES[case]]

    return draw


@pytest.fixture(scope="session")
def expectations(
    references: Callable[[str], Reference], pictures: Callable[[str], list[Path]]
) -> Callable[[str, str], Expected]:
    """What transformers says, by language model and case."""
    return cache(lambda language, case: expect(references(language), pictures(case)))


@pytest.fixture(scope="session")
def models(workspace: Path, references: Callable[[str], Reference]) -> Callable[[str, str], Any]:
    """Our model by language model and dialect, read from a directory."""

    @cache
    def load(language: str, dialect: str) -> Any:
        folder = WRITERS[dialect](references(language), workspace / f"{language}-{dialect}")
        return fv.load(folder, dtype="float32", image_size=256)

    return load


# All cases in the layout that transformers itself writes, two in the others.
COMBINATIONS = [("native", case) for case in CASES] + [
    (dialect, case) for dialect in ("apple", "mlx-vlm") for case in ("wide", "two")
]


@pytest.mark.parametrize(("dialect", "case"), COMBINATIONS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_model(
    language: str,
    dialect: str,
    case: str,
    models: Callable[[str, str], Any],
    expectations: Callable[[str, str], Expected],
    pictures: Callable[[str], list[Path]],
    figure: Figure,
) -> None:
    expected = expectations(language, case)
    vlm = models(language, dialect)
    compare(vlm, expected, pictures(case), figure, f"{language}, {dialect} dialect, {case}")


def test_order_of_two_pictures_matters(
    models: Callable[[str, str], Any], pictures: Callable[[str], list[Path]]
) -> None:
    vlm, (first, second) = models("tied", "native"), pictures("two")
    ids = vlm.prompt_ids(QUESTION, images=2)
    there, back = (np.array(vlm.logits(ids, p)) for p in ([first, second], [second, first]))
    assert reference.relative_error(there, back) > 1e-2


@pytest.mark.slow
def test_full_size_05b(qwen2_tokenizer: Path, workspace: Path, figure: Figure) -> None:
    """FastVLM-0.5B as it is: 24 layers, 1024 x 1024, 256 image tokens, 280 positions."""
    picture = [reference.picture(workspace, 640, 480, seed=3)]
    made = checkpoints.build(checkpoints.FULL_05B, qwen2_tokenizer, image_size=1024)
    expected = expect(made, picture)
    assert len(expected.ids) == 280
    folder = checkpoints.write_native(made, workspace / "full")
    del made
    gc.collect()
    started = time.perf_counter()
    vlm = fv.load(folder, dtype="float32", image_size=1024)
    figure("fv.load of a 0.5B written in float32, seconds", time.perf_counter() - started, 60)
    compare(vlm, expected, picture, figure, "0.5B full size, native dialect, 640x480 at 1024")
    shutil.rmtree(folder)
