"""Both file forms, streaming, and tokenizers that do not belong."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastvlm_mlx as fv
from fastvlm_mlx.tokenizer import Tokenizer


def test_decode_undoes_encode(vlm: fv.FastVLM) -> None:
    # decode leaves special tokens out; hypothesis finds their names in the sources and tries them.
    @given(st.text().filter(lambda text: "<|" not in text))
    def check(text: str) -> None:
        import unicodedata

        tokenizer = vlm.tokenizer
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)

    check()


def test_streaming_equals_decoding_and_never_splits_a_character(vlm: fv.FastVLM) -> None:
    @given(st.lists(st.integers(0, len(vlm.tokenizer) - 1), max_size=40))
    def check(ids: list[int]) -> None:
        stream = vlm.tokenizer.stream()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == vlm.tokenizer.decode(ids)

    check()
    stream = vlm.tokenizer.stream()
    ids = vlm.tokenizer.encode("é🙂")
    pieces = [stream.push(i) for i in ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) == "é🙂"


def test_added_tokens_that_are_text_are_streamed(tiny: Path, tmp_path: Path) -> None:
    """Qwen2.5's <tool_call> is one: added, but not special."""
    backend = Tokenizer.from_directory(tiny)._backend
    backend.add_tokens(["<tool_call>"])
    backend.add_special_tokens(["<|box|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = tokenizer.encode("a<tool_call><|box|>b")
    assert len(ids) == 4
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["a", "<tool_call>", "", "b"]


def test_genuine_qwen2_ids(qwen2_tokenizer: Path) -> None:
    tokenizer = Tokenizer.from_directory(qwen2_tokenizer)
    assert len(tokenizer) == 151646
    assert tokenizer.encode("<|im_start|>system\nYou are a helpful assistant.") == [
        151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13,
    ]  # fmt: skip
    assert tokenizer.encode("1234") == [16, 17, 18, 19]
    assert tokenizer.eos_token_ids == {151645, 151643}


def test_tokenizer_json_form_is_equivalent(qwen2_tokenizer: Path, tmp_path: Path) -> None:
    plain = Tokenizer.from_directory(qwen2_tokenizer)
    plain._backend.save(str(tmp_path / "tokenizer.json"))
    other = Tokenizer.from_directory(tmp_path)
    text = "Zwölf 12 <|im_start|>  tabs\t\n\n don't ÄÖ 漢字"
    assert other.encode(text) == plain.encode(text)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(fv.CheckpointError, match=r"No tokenizer in .*vocab\.json"):
        Tokenizer.from_directory(tmp_path)


def test_other_models_tokenizer_is_refused(tiny: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny / name, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({}))
    vocabulary = json.loads((tiny / "vocab.json").read_text())
    if "<|im_start|>" in vocabulary:
        pytest.skip("the tiny vocabulary holds the special tokens itself")
    with pytest.raises(fv.CheckpointError, match="another model"):
        Tokenizer.from_directory(tmp_path)


def test_damaged_files_are_named(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "merges.txt", tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(fv.CheckpointError, match="cannot be read"):
        Tokenizer.from_directory(tmp_path)
