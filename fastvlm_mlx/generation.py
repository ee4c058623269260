"""Prefill and decode: embeddings in, a stream of small frozen records out. Never prints.

Prefill is one pass with logits at the last position only; decoding keeps one step in flight, so
that the device works while Python handles the token before.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx

from .constraint import Constraint, check_schema
from .errors import FastVLMError, OptionError
from .model import Network, mlx_lm_module
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlx_lm.models.cache import KVCache

__all__ = [
    "Answer",
    "Chunk",
    "Clock",
    "Options",
    "Prefix",
    "Stream",
    "TextStream",
    "Timings",
    "check_whole",
    "generate",
    "make_options",
    "token_sampler",
]


@dataclass(frozen=True)
class Options:
    """How to generate; checked when made. Raises OptionError."""

    max_tokens: int = 256
    temperature: float = 0.0
    """0 is greedy; else logits are divided by it before sampling."""
    top_p: float = 1.0
    """Sample from the most likely tokens that hold this much probability; 1 is all."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 is all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this times the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens already in the answer (multiplies negative ones); 1 is none."""
    seed: int | None = None
    """Seeds MLX's global generator before sampling; None leaves it as it is."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    json_schema: Mapping[str, Any] | None = None
    """The answer is JSON that this schema allows (extra `json`). It is whole if finish_reason is
    "stop"; "length" means that `max_tokens` cut it."""

    def __post_init__(self) -> None:
        self._check("max_tokens", int, lambda n: n >= 1, "a whole number, at least 1")
        self._check("temperature", float, lambda n: 0 <= n <= 100, "a number from 0 to 100")
        self._check("top_p", float, lambda n: 0 < n <= 1, "a number above 0, at most 1")
        self._check("top_k", int, lambda n: n >= 0, "a whole number, 0 or more")
        self._check("min_p", float, lambda n: 0 <= n <= 1, "a number from 0 to 1")
        self._check(
            "repetition_penalty", float, lambda n: 0 < n <= 10, "a number above 0, at most 10"
        )
        if self.seed is not None:
            self._check("seed", int, lambda n: 0 <= n < 2**64, "a whole number from 0 to 2**64-1")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or any(not isinstance(s, str) or not s for s in stop):
            raise OptionError(f"stop is {self.stop!r}; expected strings that are not empty.")
        object.__setattr__(self, "stop", tuple(stop))
        if self.json_schema is not None:
            if self.stop:
                raise OptionError("stop would cut what json_schema promises; give one of them.")
            check_schema(self.json_schema)

    def _check(
        self, name: str, kind: type[int] | type[float], fine: Callable[[Any], bool], expected: str
    ) -> None:
        """Make a field a Python number (from NumPy's, say), if it is one that is `fine`."""
        value = getattr(self, name)
        number = isinstance(value, Integral if kind is int else Real)
        if not number or isinstance(value, bool) or not fine(value):
            raise OptionError(f"{name} is {value!r}; expected {expected}.")
        object.__setattr__(self, name, kind(value))


def make_options(given: dict[str, Any]) -> Options:
    """`Options`, with a misspelt name reported as an OptionError that lists the right ones."""
    known = [f.name for f in fields(Options)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise OptionError(f"Unknown option {unknown[0]!r}; expected one of {', '.join(known)}.")
    return Options(**given)


@dataclass(frozen=True)
class Timings:
    """Seconds spent in each part of one answer; each clock is closed by `mx.eval`."""

    load_image: float = 0.0
    """Bytes to an upright RGB picture."""
    preprocess: float = 0.0
    """Padding or cropping, resizing, tokenizing."""
    encode: float = 0.0
    """Encoder and projector."""
    prefill: float = 0.0
    """The language model over the whole prompt."""
    first_token: float = 0.0
    """Choosing the first token from its logits and fetching it."""
    decode: float = 0.0
    """All later tokens."""

    @property
    def ttft(self) -> float:
        """Time to first token: everything but `decode`."""
        return float(sum(asdict(self).values())) - self.decode


class Clock:
    """Adds up the seconds between laps, by name."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def took(self, **seconds: float) -> None:
        """Add what was measured elsewhere, and start the next lap."""
        for name, value in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value
        self._last = time.perf_counter()

    def timings(self) -> Timings:
        return Timings(**self._seconds)


@dataclass(frozen=True)
class Chunk:
    """One step of a streamed answer."""

    text: str
    """Text that became certain; empty while a character or a stop string is incomplete."""
    token: int
    finish_reason: str | None = None
    """On the last chunk: "stop" (end of text or stop string) or "length"."""
    timings: Timings = field(default_factory=Timings)
    """So far."""


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str
    tokens: tuple[int, ...]
    """Generated ids, without the one that ended the text."""
    prompt_tokens: int
    """Positions of the prompt, image tokens included."""
    finish_reason: str
    timings: Timings

    @property
    def ttft(self) -> float:
        """Time to first token in seconds, from the picture's bytes on."""
        return self.timings.ttft

    def __str__(self) -> str:
        return self.text


def check_whole(answer: Answer, options: Mapping[str, Any]) -> None:
    """Raise FastVLMError if `options` asked for JSON and the answer ends before it does."""
    if options.get("json_schema") is not None and answer.finish_reason != "stop":
        raise FastVLMError(
            f"{len(answer.tokens)} tokens were not enough for the whole JSON; raise max_tokens, "
            "or bound the schema's strings and arrays."
        )


class Stream:
    """An answer while it is being produced: iterate over its chunks."""

    def __init__(self, chunks: Iterator[Chunk], prompt_tokens: int, eos: frozenset[int]) -> None:
        self.chunks, self.eos = chunks, eos
        self._text = ""
        self._tokens: list[int] = []
        self._last: Chunk | None = None
        self.prompt_tokens = prompt_tokens

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Chunk:
        chunk = next(self.chunks)
        self._text += chunk.text
        if chunk.token not in self.eos:
            self._tokens.append(chunk.token)
        self._last = chunk
        return chunk

    @property
    def answer(self) -> Answer:
        """What has been said so far; finish_reason is "interrupted" until the last chunk."""
        last = self._last
        return Answer(
            text=self._text.strip(),
            tokens=tuple(self._tokens),
            prompt_tokens=self.prompt_tokens,
            finish_reason=(last and last.finish_reason) or "interrupted",
            timings=last.timings if last else Timings(),
        )

    def finish(self) -> Answer:
        """Run to the end and return the whole answer."""
        for _ in self:
            pass
        return self.answer


class Prefix:
    """Keys and values of the prompt's constant beginning, computed once per model.

    They are taken from the cache of the first prompt that begins so, hence cost nothing; later
    prompts start from them. Causal attention makes them independent of what follows.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)
        self._states: list[tuple[mx.array, mx.array]] = []

    def start(self, network: Network, ids: Sequence[int]) -> "tuple[list[KVCache], int]":
        """A cache for a prompt of these ids, and how many positions are in it already."""
        cache = network.new_cache()
        if not self._states or not self._begins(ids):
            return cache, 0
        for layer, (keys, values) in zip(cache, self._states, strict=True):
            # A cache whose buffer is exactly full grows into a new one: nothing shared is written.
            layer.keys, layer.values, layer.offset = keys, values, len(self._ids)
        return cache, len(self._ids)

    def learn(self, ids: Sequence[int], cache: "list[KVCache]") -> None:
        """Keep the beginning of a cache that a prompt of these ids was run into."""
        if self._states or not self._begins(ids):
            return
        length = len(self._ids)
        layers: list[Any] = list(cache)
        self._states = [
            (mx.contiguous(c.keys[..., :length, :]), mx.contiguous(c.values[..., :length, :]))
            for c in layers
        ]
        mx.async_eval(self._states)

    def _begins(self, ids: Sequence[int]) -> bool:
        return list(ids[: len(self._ids)]) == self._ids and len(ids) > len(self._ids)


def generate(
    network: Network,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    images: Sequence[mx.array],
    cache: "list[KVCache]",
    options: Options,
    eos: frozenset[int],
    timings: Timings,
    after_prefill: Callable[[], None] = lambda: None,
    constraint: Constraint | None = None,
) -> Iterator[Chunk]:
    """Answer expanded `ids`, whose IMAGE slots take `images` (N, hidden), continuing `cache`.

    `constraint` has a say in every token, and ends the answer when it is complete.
    `timings` holds what was measured before; prefill, first_token and decode are added to it.
    The cache ends up with the ids and all answer tokens but perhaps the last.
    """
    if options.seed is not None:
        mx.random.seed(options.seed)
    choose = token_sampler(options, network.vocabulary)
    started = time.perf_counter()
    logits = network.prefill(network.embed(ids, images), cache)
    mx.eval(logits)
    prefilled = time.perf_counter()
    after_prefill()
    history: list[int] = []
    upcoming = choose(logits, history, constraint.mask() if constraint else None)
    token = _token(upcoming)
    first = time.perf_counter()
    timings = replace(timings, prefill=prefilled - started, first_token=first - prefilled)
    text = TextStream(tokenizer, options.stop)
    while True:
        history.append(token)
        timings = replace(timings, decode=time.perf_counter() - first if len(history) > 1 else 0.0)
        if token in eos:
            yield Chunk(text.finish(), token, "stop", timings)
            return
        complete = constraint is not None and constraint.push(token)
        last = len(history) == options.max_tokens
        if not last and not complete:
            # Queue the next step before this token's text is handled.
            logits = network.decode(mx.array([token]), cache)
            if constraint:
                mx.async_eval(logits)  # the device works while the mask is made
            upcoming = choose(logits, history, constraint.mask() if constraint else None)
            mx.async_eval(upcoming)
        piece = text.push(token)
        if text.stopped or complete or last:
            piece += text.finish()
            yield Chunk(piece, token, "stop" if text.stopped or complete else "length", timings)
            return
        yield Chunk(piece, token, None, timings)
        token = _token(upcoming)


def _token(chosen: mx.array) -> int:
    token: Any = chosen.item()
    return int(token)


Sampler: TypeAlias = Callable[[mx.array, list[int], mx.array | None], mx.array]


def token_sampler(options: Options, vocabulary: int) -> Sampler:
    """A function of logits (B, vocab) and the answer so far to the next token ids, shape (B,).

    Its last argument is None or a mask (B, vocab), True for the tokens to choose from. With a
    repetition penalty B is 1, since there is one answer so far.
    """
    sampling: Any = mlx_lm_module("sample_utils")
    sample = sampling.make_sampler(
        temp=options.temperature,
        top_p=options.top_p if options.top_p < 1 else 0.0,
        min_p=options.min_p,
        top_k=options.top_k if options.top_k < vocabulary else 0,
    )
    penalize = None
    if options.repetition_penalty != 1:
        (penalize,) = sampling.make_logits_processors(
            repetition_penalty=options.repetition_penalty,
            repetition_context_size=options.max_tokens,
        )

    def choose(logits: mx.array, history: list[int], mask: mx.array | None) -> mx.array:
        if penalize is not None and history:
            logits = penalize(mx.array(history), logits)
        logits = logits.astype(mx.float32)
        if mask is not None:
            logits = mx.where(mask, logits, -mx.inf)
        token: mx.array = sample(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        return token

    return choose


class TextStream:
    """Tokens to text, holding back what may be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._decoder = tokenizer.stream()
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """What was held back; nothing behind a stop string."""
        if self.stopped:
            return ""
        certain = self._release(self._decoder.flush())
        held, self._held = self._held, ""
        return certain + held

    def _release(self, text: str) -> str:
        text = self._held + text
        ends = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max(
            (n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
