"""A conversation: the KV cache is kept from turn to turn, and a picture is encoded once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .generation import Answer, Chunk, Stream, make_options
from .prompt import turn_ids

if TYPE_CHECKING:
    from .vlm import FastVLM, Image

__all__ = ["Chat"]


class Chat:
    """Questions and answers that build on each other. Get one from `FastVLM.chat`."""

    def __init__(self, vlm: "FastVLM", images: "Sequence[Image]" = ()) -> None:
        self._vlm = vlm
        self._waiting: list[Image] = list(images)
        self._cache = vlm.network.new_cache()
        self._unfed: list[int] = []
        self._said: list[int] = []
        self._expected = 0
        self.turns: list[tuple[str, Answer]] = []
        """Every question with its answer."""

    def add(self, *images: "Image") -> None:
        """Show further pictures, in front of the next question."""
        self._waiting += images

    def ask(self, question: str, **options: Any) -> Answer:
        """The answer to a question about everything so far; `options` as for `FastVLM.ask`."""
        return self.stream(question, **options).finish()

    def stream(self, question: str, **options: Any) -> Stream:
        """Like `ask`, chunk by chunk. Raises OptionError, ImageError, or PromptError when full.

        A stream that is not read to its end counts as an answer that broke off there.
        """
        vlm, images = self._vlm, self._waiting
        chosen = make_options(options)
        self._settle()
        if self._cache[0].offset:
            prompt = self._unfed + turn_ids(vlm.tokenizer, question, len(images))
        else:
            prompt = vlm.prompt_ids(question, len(images))
        ids, encoded, timings = vlm.prepare(prompt, images)
        # Nothing changes before the prefill, so a question that fails can be asked again.
        stream = vlm.answer(ids, encoded, self._cache, chosen, timings, self._begin_turn)
        return _Recorded(stream, self, question)

    @property
    def positions(self) -> int:
        """Positions of the context window that the conversation takes so far."""
        return int(self._cache[0].offset)

    def _begin_turn(self) -> None:
        self._waiting = []
        self._said = []
        self._expected = self._cache[0].offset

    def _settle(self) -> None:
        """Find the answer tokens that the last turn left out of the cache (the last, or none)."""
        fed = max(self._cache[0].offset - self._expected, 0)
        eos = self._vlm.config.eos_token_ids
        # The next turn begins with the end of this one, so an end token is not repeated.
        self._unfed = [token for token in self._said[fed:] if token not in eos]

    def record(self, chunk: Chunk) -> None:
        """Take note of one token that was said."""
        self._said.append(chunk.token)


class _Recorded(Stream):
    """A stream that tells its chat what is said."""

    def __init__(self, stream: Stream, chat: Chat, question: str) -> None:
        super().__init__(stream.chunks, stream.prompt_tokens, stream.eos)
        self._chat, self._question = chat, question

    def __next__(self) -> Chunk:
        chunk = super().__next__()
        self._chat.record(chunk)
        if chunk.finish_reason is not None:
            self._chat.turns.append((self._question, self.answer))
        return chunk
