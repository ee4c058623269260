"""The template, and pictures in their slots."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastvlm_mlx as fv
from fastvlm_mlx.prompt import IMAGE, expand, prompt_ids
from fastvlm_mlx.tokenizer import Tokenizer


def test_genuine_prompt_has_280_positions(qwen2_tokenizer: Path) -> None:
    ids = prompt_ids(Tokenizer.from_directory(qwen2_tokenizer), "What are these?", images=1)
    assert ids.index(IMAGE) == 14
    assert len(expand(ids, [256])) == 280
    assert ids == [
        151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198,
        IMAGE, 198, 3838, 525, 1493, 30, 151645, 198, 151644, 77091, 198,
    ]  # fmt: skip


def test_images_stand_in_front_or_where_the_question_says(vlm: fv.FastVLM) -> None:
    encode = vlm.tokenizer.encode
    front = vlm.prompt_ids("Same?", images=2)
    placed = vlm.prompt_ids("<image>\n<image>\nSame?", images=2)
    assert front == placed
    between = vlm.prompt_ids("Is <image> like <image>?", images=2)
    first = between.index(IMAGE)
    assert between[first + 1 : first + 1 + len(encode(" like "))] == encode(" like ")


@pytest.mark.parametrize(("question", "images"), [("<image> a", 2), ("<image><image>", 1)])
def test_slots_and_pictures_must_agree(vlm: fv.FastVLM, question: str, images: int) -> None:
    with pytest.raises(fv.PromptError, match=rf"{question.count('<image>')} <image> but {images}"):
        vlm.prompt_ids(question, images)


@given(st.lists(st.one_of(st.integers(0, 9), st.just(IMAGE)), max_size=30), st.data())
def test_expand_repeats_each_slot_by_its_own_count(ids: list[int], data: st.DataObject) -> None:
    slots = ids.count(IMAGE)
    counts = data.draw(st.lists(st.integers(1, 5), min_size=slots, max_size=slots))
    expanded = expand(ids, counts)
    assert len(expanded) == len(ids) - slots + sum(counts)
    assert [i for i in expanded if i != IMAGE] == [i for i in ids if i != IMAGE]
    with pytest.raises(fv.PromptError):
        expand(ids, [*counts, 1])


def test_half_a_character_is_told(vlm: fv.FastVLM) -> None:
    broken = "caf\xe9 \udc80?"
    with pytest.raises(fv.PromptError, match=r"holds '\\udc80', which is no character"):
        vlm.prompt_ids(broken)
