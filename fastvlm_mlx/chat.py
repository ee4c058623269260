"""A conversation: the KV cache is kept from turn to turn, and a picture is encoded once.

What the model sees is always the system text, the turns that are kept, and every picture. Nothing
of that changes before an answer's first token, and whatever breaks an answer off, Ctrl-C at any
point included, the conversation goes on from the tokens that were said.
"""

import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .errors import PromptError, SavedFileError
from .features import EncodedImage
from .generation import Answer, Chunk, Clock, Stream, Timings, make_options
from .prompt import IMAGE_TEXT, expand, place, prompt_ids, turn_ids
from .saved import check_replaceable, read_saved, write_saved

if TYPE_CHECKING:
    from mlx_lm.models.cache import KVCache

    from .vlm import FastVLM, Image

__all__ = ["Chat", "ChatStream", "load_chat"]

_KIND = "conversation"


@dataclass(frozen=True)
class _Turn:
    question: str
    pictures: tuple[EncodedImage, ...]
    answer: Callable[[], Answer]
    """What has been said so far."""


@dataclass(frozen=True)
class _State:
    """Replaced as a whole, so that no interruption leaves half of a change."""

    cache: "list[KVCache]"
    waiting: "tuple[Image, ...]" = ()
    """Pictures for the next question."""
    turns: tuple[_Turn, ...] = ()
    dropped: int = 0
    """How many of the turns the cache no longer holds."""
    prompt_end: int = 0
    """Positions in the cache before the last turn's answer."""

    @property
    def kept(self) -> tuple[_Turn, ...]:
        return self.turns[self.dropped :]


class Chat:
    """Questions and answers that build on each other. Get one from `FastVLM.chat`.

    When a question does not fit into the context window any more, a PromptError says so; a
    conversation with `sliding` forgets its oldest turns instead, as few as make room for the
    question and the longest answer asked for (at most a quarter of the window). Pictures are never
    forgotten: those of forgotten turns stand in front of the oldest question that is kept, each on
    a line of its own, just as if the conversation had begun there.
    """

    def __init__(
        self, vlm: "FastVLM", images: "Sequence[Image]" = (), *, sliding: bool = False
    ) -> None:
        self._vlm = vlm
        self.sliding = sliding
        self._state = _State(vlm.network.new_cache(), tuple(images))
        self._latest: ChatStream | None = None

    def add(self, *images: "Image") -> None:
        """Show further pictures, in front of the next question."""
        self._state = replace(self._state, waiting=(*self._state.waiting, *images))

    def ask(self, question: str, **options: Any) -> Answer:
        """The answer to a question about everything so far; `options` as for `FastVLM.ask`."""
        return self.stream(question, **options).finish()

    def stream(self, question: str, **options: Any) -> "ChatStream":
        """Like `ask`, chunk by chunk. Raises OptionError, ImageError, or PromptError when full.

        A stream that is not read to its end counts as an answer that broke off there; one that
        is not read at all, as a question never asked.
        """
        vlm, state, chosen = self._vlm, self._state, make_options(options)
        place(question, len(state.waiting))
        clock = Clock()
        pictures = tuple(vlm.encode_each(state.waiting, clock))
        # Kept also if the question turns out too long: nothing is encoded twice.
        state = self._state = replace(state, waiting=pictures)
        counts = [picture.tokens.shape[0] for picture in pictures]
        dropped, cache, unfed = state.dropped, state.cache, self._settle()
        ids = expand(unfed + turn_ids(vlm.tokenizer, question, len(pictures)), counts)
        asked = _Turn(question, pictures, lambda: stream.answer)
        turns = (*state.turns, asked)
        limit = vlm.config.context_length
        if self.sliding:
            room = min(chosen.max_tokens, limit // 4)
            while dropped < len(state.turns) and cache[0].offset + len(ids) + room > limit:
                dropped += 1
                ids, cache = self._expanded(turns, dropped), vlm.network.new_cache()
        if cache[0].offset == 0:
            ids, pictures = self._expanded(turns, dropped), _pictures(turns)
            cache, done = vlm.prefix.start(vlm.network, ids)
        else:
            done = 0
        length = cache[0].offset + len(ids) - done
        if length >= limit:
            advice = (
                "Ask a shorter question or show fewer pictures."
                if self.sliding
                else "Begin a new conversation, or let it forget its oldest turns (sliding=True, "
                "--sliding)."
            )
            raise PromptError(
                f"With this question the conversation takes {length} positions, image tokens "
                f"included; the context window is {limit}. {advice}"
            )
        clock.lap("preprocess")
        answer = vlm.answer(
            ids[done:],
            [picture.tokens for picture in pictures],
            cache,
            chosen,
            clock.timings(),
            lambda: vlm.prefix.learn(ids, cache),
        )
        after = _State(cache, (), turns, dropped, answer.prompt_tokens)
        stream = ChatStream(
            answer,
            dropped=tuple(turn.question for turn in turns[state.dropped : dropped]),
            is_latest=lambda: self._latest is stream,
            begin=lambda: self._begin(after, len(state.waiting)),
        )
        if self._latest is not None:
            self._latest.close()
        self._latest = stream
        return stream

    @property
    def turns(self) -> list[tuple[str, Answer]]:
        """Every question with its answer, those that the model has forgotten included."""
        return [(turn.question, turn.answer()) for turn in self._state.turns]

    @property
    def dropped(self) -> int:
        """How many turns, from the first on, the model has forgotten (see `sliding`)."""
        return self._state.dropped

    @property
    def pictures(self) -> "list[Image]":
        """Every picture, in the order shown: encoded, if a question was asked about it."""
        return [*_pictures(self._state.turns), *self._state.waiting]

    @property
    def positions(self) -> int:
        """Positions of the context window that the conversation takes so far."""
        return self._state.prompt_end + self._fed() if self._state.kept else 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to a safetensors file, all or nothing; `load_chat` reads it.

        The file holds the KV cache, cut to what is used, and the pictures' image tokens, but not
        the pictures; it replaces nothing but an earlier conversation. Raises SavedFileError, and
        ImageError for a picture still to be shown.
        """
        check_replaceable(path, _KIND)
        waiting = tuple(self._vlm.encode_each(self._state.waiting, Clock()))
        state = self._state = replace(self._state, waiting=waiting)
        self._settle()
        pictures = [*_pictures(state.turns), *waiting]
        tensors = {f"pictures.{n}": picture.tokens for n, picture in enumerate(pictures)}
        if state.kept:
            caches: list[Any] = list(state.cache)
            for n, layer in enumerate(caches):
                tensors[f"layers.{n}.keys"] = layer.keys[..., : self.positions, :]
                tensors[f"layers.{n}.values"] = layer.values[..., : self.positions, :]
        turns = [
            {
                "question": turn.question,
                "pictures": len(turn.pictures),
                "answer": asdict(turn.answer()),
            }
            for turn in state.turns
        ]
        facts = {
            "model": self._vlm.fingerprint,
            "model_in_words": _in_words(self._vlm),
            "sliding": self.sliding,
            "dropped": state.dropped,
            "prompt_end": state.prompt_end,
            "turns": turns,
            "pixels": [picture.pixels for picture in pictures],
        }
        write_saved(path, _KIND, tensors, facts)

    def _begin(self, after: _State, shown: int) -> None:
        """Take over what a stream's first token brings about; `shown` pictures wait no more."""
        self._state = replace(after, waiting=self._state.waiting[shown:])

    def _fed(self) -> int:
        """Tokens of the last answer that the cache holds: all, or all but the last."""
        state = self._state
        reached = min(layer.offset for layer in state.cache) - state.prompt_end
        return max(0, min(reached, len(state.turns[-1].answer().tokens)))

    def _settle(self) -> list[int]:
        """Make the cache end within the last answer; the answer's tokens that it does not hold."""
        state = self._state
        if not state.kept:
            return []
        fed = self._fed()
        length = state.prompt_end + fed
        caches: list[Any] = list(state.cache)
        for layer in caches:
            # An interruption may have left layers at different lengths.
            if layer.offset != length or layer.keys.shape != layer.values.shape:
                layer.keys = layer.keys[..., :length, :]
                layer.values = layer.values[..., :length, :]
                layer.offset = length
        return list(state.turns[-1].answer().tokens[fed:])

    def _expanded(self, turns: Sequence[_Turn], first: int) -> list[int]:
        """Expanded ids of the turns from `first` on, the pictures of those before in front."""
        tokenizer = self._vlm.tokenizer
        before = len(_pictures(turns[:first]))
        ids: list[int] = []
        for turn in turns[first:]:
            own = len(turn.pictures)
            if ids:
                ids += turn_ids(tokenizer, turn.question, own)
            else:
                text = f"{IMAGE_TEXT}\n" * before + place(turn.question, own)
                ids = prompt_ids(tokenizer, text, before + own)
            if turn is not turns[-1]:
                ids += turn.answer().tokens
        return expand(ids, [picture.tokens.shape[0] for picture in _pictures(turns)])


class ChatStream(Stream):
    """An answer of a conversation while it is being produced."""

    def __init__(
        self,
        stream: Stream,
        *,
        dropped: tuple[str, ...],
        is_latest: Callable[[], bool],
        begin: Callable[[], None],
    ) -> None:
        super().__init__(stream.chunks, stream.prompt_tokens, stream.eos)
        self.dropped = dropped
        """Questions of the turns that the conversation forgets for this one."""
        self._is_latest, self._begin = is_latest, begin
        self._begun = False

    def close(self) -> None:
        """Break the answer off here, and let go of what producing it needs."""
        if isinstance(self.chunks, Generator):
            self.chunks.close()

    def __next__(self) -> Chunk:
        if not self._is_latest():
            raise PromptError(
                "This answer broke off when the conversation went on; ask its question again."
            )
        chunk = super().__next__()
        if not self._begun:
            self._begin()
            self._begun = True
        return chunk


def load_chat(path: str | os.PathLike[str], vlm: "FastVLM") -> Chat:
    """Go on with a conversation that `Chat.save` wrote, as if it had never been interrupted.

    `vlm` has to be the same model in the same dtype and quantization; nothing is computed anew.
    Raises SavedFileError for another model, and for files that are damaged or something else.
    """
    tensors, facts = read_saved(path, _KIND)
    if facts.get("model") != vlm.fingerprint:
        raise SavedFileError(
            f"{path} is a conversation with another model ({facts.get('model_in_words')}); this "
            f"one is {_in_words(vlm)}. Load the very model, with the same dtype and quantization."
        )
    try:
        chat = Chat(vlm, sliding=bool(facts["sliding"]))
        chat._state = _restored(vlm, tensors, facts)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise SavedFileError(f"{path} is not a complete conversation ({error!r}).") from error
    return chat


def _restored(vlm: "FastVLM", tensors: dict[str, mx.array], facts: dict[str, Any]) -> _State:
    pictures = [
        EncodedImage(tensors[f"pictures.{n}"], vlm.fingerprint, pixels)
        for n, pixels in enumerate(facts["pixels"])
    ]
    turns: list[_Turn] = []
    for turn in facts["turns"]:
        shown, pictures = tuple(pictures[: turn["pictures"]]), pictures[turn["pictures"] :]
        given = turn["answer"]
        told = {"tokens": tuple(given["tokens"]), "timings": Timings(**given["timings"])}
        turns.append(_Turn(turn["question"], shown, _always(Answer(**{**given, **told}))))
    cache = vlm.network.new_cache()
    state = _State(cache, tuple(pictures), tuple(turns), facts["dropped"], facts["prompt_end"])
    if not state.kept:
        return state
    text = vlm.config.text
    length = tensors["layers.0.keys"].shape[2]
    shape = (1, text.num_key_value_heads, length, text.head_dim)
    caches: list[Any] = list(cache)
    for n, layer in enumerate(caches):
        layer.keys, layer.values = tensors[f"layers.{n}.keys"], tensors[f"layers.{n}.values"]
        layer.offset = length
        if not layer.keys.shape == layer.values.shape == shape:
            raise ValueError(f"layer {n} has keys of shape {layer.keys.shape}, expected {shape}")
    if not 0 <= length - state.prompt_end <= len(turns[-1].answer().tokens):
        raise ValueError(f"the cache is {length} long")
    return state


def _always(answer: Answer) -> Callable[[], Answer]:
    return lambda: answer


def _pictures(turns: Sequence[_Turn]) -> tuple[EncodedImage, ...]:
    return tuple(picture for turn in turns for picture in turn.pictures)


def _in_words(vlm: "FastVLM") -> str:
    text = vlm.config.text
    dtype = str(vlm.network.language_model.model.norm.weight.dtype).removeprefix("mlx.core.")
    return f"{text.num_hidden_layers} layers of width {text.hidden_size} in {dtype}"
