"""Tokenizer and prompt against transformers' Qwen2Tokenizer, with the real vocabulary."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer

from fastvlm_mlx.prompt import IMAGE, expand, prompt_ids
from fastvlm_mlx.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Describe the image.",
    "What's written here? It's 12,345.678 % -- isn't it?",
    "  leading, trailing  \n\n\t tabs\r\nand\rreturns \n ",
    "a" * 300 + " " * 50 + "b",
    "1234567890 0001 3.14 １２３ ٣٤٥ ④",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # done\n\n\n\tif x:\n\t\tpass",
    '{"key": [1, 2.5e-3, null], "\\u00e9": "\\n"}',
    "<p class='x'>&nbsp;</p> https://example.org/a?b=c&d=%20#e",
    "Grüße, naïve café — “quotes” … ‘single’ ·",
    "cafe\u0301 vs. caf\u00e9; A\u030a vs. \u00c5",  # combining marks: the normaliser composes them
    "请描述这张图片。日本語の文章です。한국어 문장입니다.",
    "Привет, мир! Ελληνικά. עברית. العربية. हिन्दी. ไทย",
    "🙂👍🏽👩‍👩‍👧‍👦🏳️‍🌈🇫🇷 ☺️",
    "zero\u200bwidth\u00a0nbsp\u3000ideographic\ufeffbom\u2028line",
    "\x00\x01\x7f control",
    "'S 'RE don'T I'LL WE'VE 's",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|endoftext|>",
    "not special: <|im_start> <|im_end|  |> <image> <im_patch>",
    "\U0001f600\U00010348\U0010ffff",
]


@pytest.fixture(scope="module")
def theirs(qwen2_tokenizer: Path) -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(str(qwen2_tokenizer))


@pytest.fixture(scope="module")
def ours(qwen2_tokenizer: Path) -> Tokenizer:
    return Tokenizer.from_directory(qwen2_tokenizer)


def agree(ours: Tokenizer, theirs: Qwen2Tokenizer, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    stream = ours.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_ids(ours: Tokenizer, theirs: Qwen2Tokenizer, text: str) -> None:
    agree(ours, theirs, text)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8"), max_size=20)
        | st.text(" \t\n\r'sdtmlvreSDTL.,0123456789aZé", max_size=20)
        | st.sampled_from(TEXTS),
        max_size=4,
    ).map("".join)
)
def test_ids_of_any_text(ours: Tokenizer, theirs: Qwen2Tokenizer, text: str) -> None:
    agree(ours, theirs, text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 151645), max_size=12))
def test_any_ids_decode(ours: Tokenizer, theirs: Qwen2Tokenizer, ids: list[int]) -> None:
    """Also halves of characters, which a model may well produce."""
    decoded = theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids) == decoded
    stream = ours.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == decoded


def test_vocabulary(ours: Tokenizer, theirs: Qwen2Tokenizer) -> None:
    assert len(ours) == len(theirs) == 151646
    assert ours.eos_token_ids == {151645, 151643}


def test_tokenizer_json(ours: Tokenizer, theirs: Qwen2Tokenizer, tmp_path: Path) -> None:
    """The other file form, as transformers writes it for the native layout."""
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    other = Tokenizer.from_directory(tmp_path)
    for text in TEXTS:
        assert other.encode(text) == ours.encode(text)


def test_280_positions(ours: Tokenizer, theirs: Qwen2Tokenizer) -> None:
    ids = prompt_ids(ours, "What are these?", images=1)
    assert ids.index(IMAGE) == 14
    assert ids[:14] == [
        *(151644, 8948, 198),
        *(2610, 525, 264, 10950, 17847, 13),
        *(151645, 198),
        *(151644, 872, 198),
    ]
    assert len(ids) == 14 + 1 + 10
    assert len(expand(ids, [256])) == 280
    template = theirs.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat are these?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    before, after = template.split("<image>")
    assert ids == [*theirs.encode(before), IMAGE, *theirs.encode(after)]
