"""Options, sampling, stop strings and the records of a stream."""

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.loading import LoadedCheckpoint
from fastvlm_mlx.generation import TextStream, token_sampler
from fastvlm_mlx.prompt import SYSTEM, USER


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("stop", ("",)),
        # A fraction of a token would never be reached, and the answer never end.
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("temperature", None),
        ("temperature", "0"),
        ("top_k", 2.5),
        ("seed", 1.5),
        ("stop", None),
        ("stop", b"ab"),
    ],
)
def test_options_out_of_range(option: str, value: Any) -> None:
    with pytest.raises(fv.OptionError, match=option):
        fv.Options(**{option: value})


def test_numbers_of_numpy_become_pythons() -> None:
    options = fv.Options(max_tokens=np.int64(3), temperature=np.float32(0.5), seed=np.uint32(7))
    assert (options.max_tokens, options.temperature, options.seed) == (3, 0.5, 7)
    assert (type(options.max_tokens), type(options.temperature)) == (int, float)


def test_a_single_stop_string_is_not_taken_apart() -> None:
    assert fv.Options(stop="ab").stop == ("ab",)


def test_greedy_is_the_argmax() -> None:
    logits = mx.array([[0.0, 3.0, 2.9]])
    assert token_sampler(fv.Options(), 3)(logits, [], None).item() == 1


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {1}),
        ({"min_p": 0.5}, {1, 2}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_sampling_draws_only_from_what_is_allowed(
    options: dict[str, Any], possible: set[int]
) -> None:
    # Probabilities 0.09, 0.53, 0.32, 0.06.
    logits = mx.log(mx.array([[0.09, 0.53, 0.32, 0.06]]))
    choose = token_sampler(fv.Options(temperature=1.0, **options), 4)
    mx.random.seed(0)
    assert {int(choose(logits, [], None).item()) for _ in range(200)} == possible


def test_repetition_penalty_acts_on_the_answer() -> None:
    choose = token_sampler(fv.Options(repetition_penalty=2.0), 3)
    logits = mx.array([[-1.0, 3.0, 2.0]])
    assert choose(mx.array(logits), [], None).item() == 1
    assert choose(mx.array(logits), [1], None).item() == 2
    # However long ago the token was said.
    assert choose(mx.array(logits), [1, *[0] * 40], None).item() == 2


class _Bytes:
    """A tokenizer whose tokens are bytes."""

    def stream(self) -> Any:
        import codecs

        class Decoder:
            def __init__(self) -> None:
                self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

            def push(self, token: int) -> str:
                return self.utf8.decode(bytes([token]))

            def flush(self) -> str:
                return self.utf8.decode(b"", final=True)

        return Decoder()


@given(
    st.text(alphabet="abcß🙂", max_size=30),
    st.lists(st.text(alphabet="abcß🙂", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_exactly_and_nothing_is_said_too_early(text: str, stop: list[str]) -> None:
    stream = TextStream(_Bytes(), tuple(stop))  # type: ignore[arg-type]
    said = ""
    for byte in text.encode():
        said += stream.push(byte)
        assert text.startswith(said)
        if stream.stopped:
            break
    if not stream.stopped:
        said += stream.finish()
    # The stream sees the text grow: the first stop string to be complete decides.
    ends = (
        (n, min(at for s in stop if (at := text[:n].find(s)) >= 0))
        for n in range(len(text) + 1)
        if any(s in text[:n] for s in stop)
    )
    _, expected = next(ends, (0, len(text)))
    assert said == text[:expected]
    if stream.stopped:
        stream.push("🙂".encode()[0])
        assert stream.finish() == "", "half a character behind the stop string"


def test_stream_and_answer_agree(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    stream = vlm.stream(picture, "What?", max_tokens=12)
    chunks = list(stream)
    answer = vlm.ask(picture, "What?", max_tokens=12)
    assert answer.text == "".join(c.text for c in chunks).strip()
    assert stream.answer == answer or stream.answer.tokens == answer.tokens
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == answer.finish_reason == "length"
    assert len(answer.tokens) == 12


def test_greedy_tokens_equal_those_without_a_cache(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    image = vlm.encode(picture)
    answer = vlm.ask(image, "What is this?", max_tokens=8, stop=())
    ids = vlm.prompt_ids("What is this?")
    for token in answer.tokens:
        assert int(vlm.logits(ids, [image])[0, -1].argmax().item()) == token
        ids.append(token)


def test_end_of_text_ends_the_answer(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    whole = vlm.ask(picture, "What?", max_tokens=6)
    ending = frozenset({whole.tokens[3]})
    first = whole.tokens.index(whole.tokens[3])
    import dataclasses

    other = fv.FastVLM.__new__(fv.FastVLM)
    other.__dict__.update(vlm.__dict__)
    other.config = dataclasses.replace(vlm.config, eos_token_ids=ending)
    answer = other.ask(picture, "What?", max_tokens=6)
    assert answer.finish_reason == "stop"
    assert answer.tokens == whole.tokens[:first]


def test_an_interrupted_stream_keeps_what_was_said(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    stream = vlm.stream(picture, "What?", max_tokens=10)
    head = list(itertools.islice(stream, 4))
    assert stream.answer.finish_reason == "interrupted"
    assert stream.answer.tokens == tuple(c.token for c in head)


def test_seed_repeats_sampling(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    image = vlm.encode(picture)

    def draw(seed: int) -> tuple[int, ...]:
        return vlm.ask(image, "What?", temperature=5.0, seed=seed, max_tokens=12).tokens

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_timings_add_up_to_ttft_and_cover_the_work(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    answer = vlm.ask(picture, "What?", max_tokens=4)
    t = answer.timings
    parts = (t.load_image, t.preprocess, t.encode, t.prefill, t.first_token)
    assert answer.ttft == pytest.approx(sum(parts))
    assert all(p > 0 for p in (*parts, t.decode))
    assert vlm.ask(picture, "What?", max_tokens=1).timings.decode == 0


def test_the_prefill_clock_is_closed_by_evaluation(
    vlm: fv.FastVLM, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock around an unevaluated graph would see nothing of an added second of work."""
    original = type(vlm.network).prefill

    def slower(self: Any, embeddings: mx.array, cache: Any) -> mx.array:
        logits = original(self, embeddings, cache)
        a = mx.full((1024, 1024), 1e-3)
        for _ in range(40):
            a = a @ a
        return logits + a[0, 0]

    quick = vlm.ask(picture, "What?", max_tokens=1).timings
    monkeypatch.setattr(type(vlm.network), "prefill", slower)
    slow = vlm.ask(picture, "What?", max_tokens=1).timings
    assert slow.prefill > 5 * quick.prefill
    assert slow.first_token < slow.prefill / 5


def test_one_pass_prefill_equals_the_plain_forward(vlm: fv.FastVLM) -> None:
    embeddings = mx.random.normal((1, 11, 64), key=mx.random.key(0))
    plain = vlm.network.logits(embeddings)
    whole = vlm.network.new_cache()
    assert mx.allclose(vlm.network.prefill(embeddings, whole), plain[:, -1], atol=1e-5)
    in_two = vlm.network.new_cache()
    vlm.network.prefill(embeddings[:, :4], in_two)
    assert mx.allclose(vlm.network.prefill(embeddings[:, 4:], in_two), plain[:, -1], atol=1e-5)
    for a, b in zip(whole, in_two, strict=True):
        assert a.offset == b.offset == 11
        assert mx.allclose(a.keys[..., :11, :], b.keys[..., :11, :], atol=1e-5)


def test_the_constant_beginning_is_run_once_and_never_written_to(
    vlm: fv.FastVLM, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    original = type(vlm.network).prefill

    def counted(self: Any, embeddings: mx.array, cache: Any) -> mx.array:
        lengths.append(embeddings.shape[1])
        return original(self, embeddings, cache)

    monkeypatch.setattr(type(vlm.network), "prefill", counted)
    fresh = fv.FastVLM(LoadedCheckpoint(vlm.network, vlm.config, vlm.source))
    image = vlm.encode(picture)
    answers = [fresh.ask(image, q, max_tokens=6) for q in ("One?", "Two?", "One?")]
    constant = len(vlm.tokenizer.encode(SYSTEM + USER))
    assert lengths == [
        a.prompt_tokens - n for a, n in zip(answers, (0, constant, constant), strict=True)
    ]
    assert answers[0].tokens == answers[2].tokens
    ids = vlm.prompt_ids("Two?")
    for token in answers[1].tokens:
        assert int(vlm.logits(ids, [image])[0, -1].argmax().item()) == token
        ids.append(token)
