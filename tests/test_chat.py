"""A conversation equals a cold run of all that was said."""

import dataclasses
import inspect
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.prompt import turn_ids
from fastvlm_mlx.saved import read_saved, write_saved


@pytest.fixture
def prefills(vlm: fv.FastVLM, monkeypatch: pytest.MonkeyPatch) -> list[mx.array]:
    """The first token's logits of every answer, as they come."""
    logits: list[mx.array] = []
    original = type(vlm.network).prefill

    def watched(self: Any, embeddings: mx.array, cache: Any) -> mx.array:
        logits.append(original(self, embeddings, cache))
        return logits[-1]

    monkeypatch.setattr(type(vlm.network), "prefill", watched)
    return logits


def _narrow(vlm: fv.FastVLM, positions: int) -> fv.FastVLM:
    """The same model with a smaller context window."""
    narrow = fv.FastVLM.__new__(fv.FastVLM)
    narrow.__dict__.update(vlm.__dict__)
    narrow.config = dataclasses.replace(vlm.config, context_length=positions)
    return narrow


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
    vlm: fv.FastVLM, picture: np.ndarray, ending: str, prefills: list[mx.array]
) -> None:
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
    assert mx.allclose(prefills[-1][0], first, atol=1e-4)
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
    with pytest.raises(fv.PromptError, match="context window"):
        chat.ask("Three? " * fresh.config.context_length)
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
    chat = _narrow(vlm, 160).chat(picture)
    with pytest.raises(fv.PromptError, match=r"context window is 160.*--sliding"):
        for _ in range(9):
            chat.ask("What is this, then?", max_tokens=4)
    assert chat.turns, "the turns before were answered"


def test_pictures_count_as_what_they_are_in_every_turn(
    vlm: fv.FastVLM, picture: np.ndarray, prefills: list[mx.array]
) -> None:
    """Two pictures, text, a third at its place, text: each turn is the cold run of it all."""
    a, b, c = (vlm.encode(p) for p in (picture, picture[::-1], picture[:, ::-1]))
    chat = vlm.chat(a, b)
    ids, shown = [], []
    turns: list[tuple[str, list[fv.EncodedImage]]] = [
        ("Compare.", [a, b]),
        ("Why?", []),
        ("Is <image> like them?", [c]),
        ("Sure?", []),
    ]
    for question, new in turns:
        if shown:
            chat.add(*new)
            ids += turn_ids(vlm.tokenizer, question, len(new))
        else:
            ids += vlm.prompt_ids(question, len(new))
        shown += new
        answer = chat.ask(question, max_tokens=3)
        said, first = _cold_answer(vlm, ids, shown, 3)
        assert answer.tokens == said
        assert mx.allclose(prefills[-1][0], first, atol=1e-4)
        assert answer.prompt_tokens == len(ids) + sum(i.tokens.shape[0] - 1 for i in shown)
        ids += answer.tokens


# ---------------------------------------------------------------------------------------- sliding


def _shortened(
    vlm: fv.FastVLM, turns: list[tuple[str, int, tuple[int, ...]]], question: str, forgotten: int
) -> list[int]:
    """The prompt of a conversation that began after `forgotten` turns, all pictures in front."""
    before = sum(shown for _, shown, _ in turns[:forgotten])
    ids: list[int] = []
    for asked, shown, said in [*turns[forgotten:], (question, 0, ())]:
        if ids:
            ids += turn_ids(vlm.tokenizer, asked, shown)
        else:
            ids += vlm.prompt_ids("<image>\n" * (before + shown) + asked, before + shown)
        ids += said
    return ids


@pytest.mark.parametrize("window", [220, 330])
def test_a_sliding_conversation_is_a_cold_run_of_what_it_keeps(
    vlm: fv.FastVLM, picture: np.ndarray, prefills: list[mx.array], window: int
) -> None:
    narrow = _narrow(vlm, window)
    pictures = [vlm.encode(picture), vlm.encode(picture[::-1])]
    chat = narrow.chat(pictures[0], sliding=True)
    turns: list[tuple[str, int, tuple[int, ...]]] = []
    forgotten = 0
    for n in range(14):
        if n == 3:
            chat.add(pictures[1])
        question = f"What is this, number {n}?"
        stream = chat.stream(question, max_tokens=5)
        answer = stream.finish()
        assert stream.dropped == tuple(q for q, _, _ in turns[forgotten : chat.dropped])
        # As few turns as make room, and no fewer.
        forgotten = chat.dropped
        if n > 3 and forgotten:
            ids = _shortened(vlm, turns, question, forgotten)
            _, first = _cold_answer(vlm, ids, pictures, 1)
            assert mx.allclose(prefills[-1][0], first, atol=1e-4)
            assert answer.prompt_tokens == len(ids) + 2 * 15
            assert answer.prompt_tokens + 5 <= window
            if stream.dropped:
                longer = _shortened(vlm, turns, question, forgotten - 1)
                assert len(longer) + 2 * 15 + 5 > window
        turns.append((question, 1 if n in (0, 3) else 0, answer.tokens))
        assert len(answer.tokens) == 5, "there was room for the whole answer"
    assert 3 < forgotten < 14
    assert [q for q, _ in chat.turns] == [q for q, _, _ in turns]
    assert chat.pictures == pictures


def test_a_long_answer_reserves_a_quarter_of_the_window(
    vlm: fv.FastVLM, picture: np.ndarray
) -> None:
    window = 400
    chat = _narrow(vlm, window).chat(picture, sliding=True)
    turn = 0
    for _ in range(20):
        before = chat.positions
        chat.ask("What?", max_tokens=3)
        turn = max(turn, chat.positions - before)
    room = window - chat.stream("What?", max_tokens=10_000).prompt_tokens
    assert window // 4 <= room < window // 4 + turn < window // 2


def test_a_picture_added_while_an_answer_is_due_waits(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    chat = vlm.chat(picture)
    stream = chat.stream("What?", max_tokens=2)
    chat.add(picture[::-1])
    stream.finish()
    alone = len(vlm.prompt_ids("What?")) + 15
    assert stream.answer.prompt_tokens == alone and len(chat.pictures) == 2
    before = chat.positions
    assert chat.ask("And <image>?", max_tokens=1).prompt_tokens > before + 16


def test_an_answer_that_broke_off_lets_go_of_its_cache(
    vlm: fv.FastVLM, picture: np.ndarray
) -> None:
    chat = vlm.chat(picture)
    first = chat.stream("What?", max_tokens=9)
    next(first)
    chat.stream("And now?")
    assert inspect.getgeneratorstate(first.chunks) == inspect.GEN_CLOSED  # type: ignore[arg-type]


def test_a_cache_that_grew_by_half_is_cut_back(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    """An interruption may strike when a layer's keys have got new room and its values not yet."""
    image = vlm.encode(picture)
    chats = [vlm.chat(image), vlm.chat(image)]
    for chat in chats:
        chat.ask("What?", max_tokens=3)
    layer: Any = chats[1]._state.cache[-1]
    layer.keys = mx.pad(layer.keys, [(0, 0), (0, 0), (0, 256), (0, 0)])
    undisturbed, disturbed = (chat.ask("And? " * 60, max_tokens=4) for chat in chats)
    assert disturbed.tokens == undisturbed.tokens


def test_what_cannot_fit_even_alone_is_told(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    chat = _narrow(vlm, 160).chat(picture, sliding=True)
    for _ in range(4):
        chat.ask("What is this, then?", max_tokens=4)
    before = chat.turns, chat.dropped, chat.positions
    with pytest.raises(fv.PromptError, match=r"context window is 160.*Ask a shorter question"):
        chat.ask("What? " * 80)
    assert (chat.turns, chat.dropped, chat.positions) == before
    assert chat.ask("Fine?", max_tokens=2).tokens


# ------------------------------------------------------------------------------- breaking off


def test_a_stream_left_behind_cannot_be_read_on(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    chat = vlm.chat(picture)
    first = chat.stream("One?", max_tokens=9)
    next(first), next(first)
    chat.ask("Two?", max_tokens=2)
    with pytest.raises(fv.PromptError, match="broke off"):
        next(first)
    assert [len(answer.tokens) for _, answer in chat.turns] == [2, 2]
    assert chat.turns[0][1].finish_reason == "interrupted"


class _InterruptAtLine:
    """Raises KeyboardInterrupt before the n-th line of the library or of mlx-lm that runs."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        if "fastvlm_mlx" not in name and "mlx_lm" not in name:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def _interrupted(act: Callable[[], object], at: int) -> bool:
    before = sys.gettrace()
    sys.settrace(_InterruptAtLine(at))
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("when", ["first turn", "second turn", "sliding"])
def test_ctrl_c_at_any_line_leaves_a_conversation_that_goes_on(
    vlm: fv.FastVLM, picture: np.ndarray, when: str
) -> None:
    image = vlm.encode(picture)
    window = 200 if when == "sliding" else vlm.config.context_length
    narrow = _narrow(vlm, window)
    at, step, tried, seen = 1, 1, 0, set()
    while True:
        chat = narrow.chat(image, sliding=when == "sliding")
        asked = {"first turn": [], "second turn": ["One?"], "sliding": ["One, two?"] * 4}[when]
        for question in asked:
            chat.ask(question, max_tokens=3)
        if not _interrupted(lambda c=chat: c.ask("Broken?", max_tokens=4), at):  # type: ignore[misc]
            break
        tried += 1
        told = [(q, 0, answer.tokens) for q, answer in chat.turns]
        seen.add(len(told[-1][2]) if len(told) > len(asked) else -1)
        after = chat.ask("And now?", max_tokens=3)
        if told:
            told[0] = (told[0][0], 1, told[0][2])
        ids = _shortened(vlm, told, "And now?", chat.dropped)
        if not told:
            ids = vlm.prompt_ids("And now?", 1)
        assert after.prompt_tokens == len(ids) + 15
        assert after.tokens == _cold_answer(vlm, ids, [image], 3)[0], f"interrupted at line {at}"
        at, step = at + step, max(step, at // 28)
    assert tried > 25
    assert -1 in seen and len(seen) > 2, "before the answer, and after some of its tokens"


# ----------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("state", ["fresh", "asked", "broken off", "picture waiting", "slid"])
def test_a_restored_conversation_goes_on_identically(
    vlm: fv.FastVLM, picture: np.ndarray, tmp_path: Path, state: str
) -> None:
    model = _narrow(vlm, 200) if state == "slid" else vlm
    chat = model.chat(picture, sliding=state == "slid")
    if state != "fresh":
        chat.ask("What is this?", max_tokens=6)
    if state == "slid":
        for n in range(5):
            chat.ask(f"And {n}?", max_tokens=6)
        assert chat.dropped
    if state == "broken off":
        stream = chat.stream("And this?", max_tokens=9)
        next(stream), next(stream), next(stream)
    if state == "picture waiting":
        chat.add(picture[::-1])
    file = tmp_path / "mit Leerzeichen – 会話"
    chat.save(file)
    again = fv.load_chat(file, model)
    assert again.turns == chat.turns
    assert (again.dropped, again.sliding, again.positions) == (
        chat.dropped,
        chat.sliding,
        chat.positions,
    )
    assert len(again.pictures) == len(chat.pictures)
    again.save(tmp_path / "again")
    assert (
        read_saved(tmp_path / "again", "conversation")[1] == (read_saved(file, "conversation")[1])
    )
    for question in ("Why?", "And then?", "What was the first?"):
        a, b = (c.ask(question, max_tokens=8) for c in (chat, again))
        assert a.tokens == b.tokens
        assert a.prompt_tokens == b.prompt_tokens
    assert again.dropped == chat.dropped


def test_a_restored_conversation_runs_no_encoder_and_no_old_turn(
    vlm: fv.FastVLM, picture: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = vlm.chat(picture)
    chat.ask("What is this?", max_tokens=6)
    chat.save(tmp_path / "chat")
    lengths: list[int] = []
    original = type(vlm.network).prefill

    def watched(self: Any, embeddings: mx.array, cache: Any) -> mx.array:
        lengths.append(embeddings.shape[1])
        return original(self, embeddings, cache)

    monkeypatch.setattr(type(vlm.network), "prefill", watched)
    monkeypatch.setattr(vlm, "_encode_pixels", lambda _: pytest.fail("the encoder ran"))
    fv.load_chat(tmp_path / "chat", vlm).ask("Why?", max_tokens=2)
    assert lengths == [1 + len(turn_ids(vlm.tokenizer, "Why?"))]


def test_a_saved_cache_is_cut_to_what_is_used(
    vlm: fv.FastVLM, picture: np.ndarray, tmp_path: Path
) -> None:
    chat = vlm.chat(picture)
    chat.ask("What is this?", max_tokens=6)
    chat.save(tmp_path / "chat")
    tensors, facts = read_saved(tmp_path / "chat", "conversation")
    text = vlm.config.text
    kept = {tensor.shape for name, tensor in tensors.items() if name.startswith("layers.")}
    assert kept == {(1, text.num_key_value_heads, chat.positions, text.head_dim)}
    assert chat.positions == facts["prompt_end"] + 5
    assert facts["model"] == vlm.fingerprint


def test_conversations_that_cannot_be_resumed(
    tiny: Path, vlm: fv.FastVLM, picture: np.ndarray, tmp_path: Path
) -> None:
    chat = vlm.chat(picture)
    chat.ask("What?", max_tokens=3)
    file = tmp_path / "chat"
    chat.save(file)
    other = fv.load(tiny, quantize=4)
    with pytest.raises(fv.SavedFileError, match=r"with another model \(2 layers of width 64 in"):
        fv.load_chat(file, other)
    vlm.encode(picture).save(tmp_path / "picture")
    with pytest.raises(fv.SavedFileError, match="is no conversation"):
        fv.load_chat(tmp_path / "picture", vlm)
    with pytest.raises(fv.SavedFileError, match=r"no conversation.*not replaced"):
        chat.save(tmp_path / "picture")
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 4
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(fv.SavedFileError, match="damaged"):
        fv.load_chat(tmp_path / "damaged", vlm)
    # Well-formed files with contents that contradict each other, as no release writes them.
    tensors, facts = read_saved(file, "conversation")
    shorter = {n: t[..., :-1, :] if n == "layers.1.keys" else t for n, t in tensors.items()}
    wrong: list[tuple[dict[str, mx.array], dict[str, Any]]] = [
        (shorter, facts),
        (tensors, {**facts, "prompt_end": 3}),
        (tensors, {**facts, "turns": [{}]}),
        (tensors, {**facts, "pixels": [None, None]}),
        (tensors, {"model": facts["model"]}),
        ({n: t for n, t in tensors.items() if "1.values" not in n}, facts),
    ]
    for (values, told), n in zip(wrong, itertools.count()):
        write_saved(tmp_path / str(n), "conversation", values, told)
        with pytest.raises(fv.SavedFileError, match="not a complete conversation"):
            fv.load_chat(tmp_path / str(n), vlm)


def test_sampled_answers_continue_identically_with_a_seed(
    vlm: fv.FastVLM, picture: np.ndarray, tmp_path: Path
) -> None:
    chat = vlm.chat(picture)
    chat.ask("What?", max_tokens=4, temperature=1.0, seed=3)
    chat.save(tmp_path / "chat")
    again = fv.load_chat(tmp_path / "chat", vlm)
    a, b = (c.ask("Why?", max_tokens=12, temperature=1.0, seed=5).tokens for c in (chat, again))
    assert a == b
