"""Several prompts at once: pictures encoded together, rows of unequal length answered together.

Rows are padded on the left to the longest, counted with their image tokens. Padding is masked, and
a row's positions begin at 0 after it, so that each row is what it would be alone. A row that has
ended leaves the batch.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .constraint import Constraint
from .features import EncodedImage, FeatureCache, pixel_digest
from .generation import Answer, Options, TextStream, Timings, token_sampler
from .images import PreprocessedImage, to_pixels
from .model import Network, mlx_lm_module
from .tokenizer import Tokenizer

__all__ = [
    "Prompt",
    "encode_images",
    "encode_pictures",
    "fits_one_run",
    "generate_batch",
    "left_padded",
]

# Pictures are encoded together up to this many pixels: five of 1024 x 1024, a picture in 2x2 tiles.
# They keep a GPU busy; more cost memory, and a GPU that runs out of it ends the process.
_PIXELS_AT_ONCE = 5 * 1024 * 1024


@dataclass(frozen=True)
class Prompt:
    """One row of a batch."""

    ids: Sequence[int]
    """Expanded: IMAGE stands once per image token."""
    images: Sequence[mx.array]
    """(N, hidden) each, in order."""
    room: int
    """Positions that the context window leaves for the answer."""
    timings: Timings = field(default_factory=Timings)
    """What was spent on this row before."""
    constraint: Constraint | None = None
    """All rows of a batch have one, or none has."""


def fits_one_run(crops: Sequence[npt.NDArray[np.uint8]]) -> bool:
    """Whether a picture's crops are few enough to be encoded together."""
    return sum(math.prod(crop.shape[:2]) for crop in crops) <= _PIXELS_AT_ONCE


def encode_pictures(
    encode: Callable[[mx.array], mx.array], pictures: Sequence[Sequence[npt.NDArray[np.uint8]]]
) -> list[mx.array]:
    """Image tokens (N, hidden) of fitted pictures, in order; equal sizes go together.

    A picture is one or more crops (H, W, 3), whose tokens are put one after the other.
    """
    crops = [crop for picture in pictures for crop in picture]
    tokens: dict[int, mx.array] = {}
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for n, crop in enumerate(crops):
        by_shape.setdefault(crop.shape, []).append(n)
    for (height, width, _), numbers in by_shape.items():
        step = max(1, _PIXELS_AT_ONCE // (height * width))
        for at in range(0, len(numbers), step):
            part = numbers[at : at + step]
            encoded = encode(to_pixels([crops[n] for n in part]))
            mx.eval(encoded)
            tokens.update(zip(part, encoded, strict=True))
    in_order = (tokens[n] for n in range(len(crops)))
    return [mx.concatenate([next(in_order) for _ in picture]) for picture in pictures]


def encode_images(
    encode: Callable[[mx.array], mx.array],
    images: Sequence[PreprocessedImage | EncodedImage],
    cache: FeatureCache | None,
    model: str,
) -> list[EncodedImage]:
    """Every picture encoded: as it was given, as `cache` remembers it, or now, all together."""
    found: dict[int, EncodedImage] = {}
    waiting: dict[int, tuple[PreprocessedImage, str | None]] = {}
    for n, image in enumerate(images):
        if isinstance(image, EncodedImage):
            found[n] = image
            continue
        digest = pixel_digest(image.crops) if cache else None
        known = cache.get(model, digest) if cache and digest else None
        if known:
            found[n] = known
        else:
            waiting[n] = image, digest
    tokens = encode_pictures(encode, [image.crops for image, _ in waiting.values()])
    for (n, (_, digest)), own in zip(waiting.items(), tokens, strict=True):
        found[n] = EncodedImage(own, model, digest)
        if cache:
            cache.put(found[n])
    return [found[n] for n in range(len(images))]


def left_padded(network: Network, prompts: Sequence[Prompt]) -> tuple[mx.array, list[Any]]:
    """Embeddings (B, L, hidden) of all prompts, padded on the left, and a cache that knows it."""
    rows = [network.embed(prompt.ids, prompt.images) for prompt in prompts]
    longest = max(row.shape[1] for row in rows)
    padding = [longest - row.shape[1] for row in rows]
    padded = [mx.pad(row, [(0, 0), (n, 0), (0, 0)]) for row, n in zip(rows, padding, strict=True)]
    cache = mlx_lm_module("models.cache")
    layers = [cache.BatchKVCache(padding) for _ in network.language_model.layers]
    return mx.concatenate(padded), layers


def generate_batch(
    network: Network,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    options: Options,
    eos: frozenset[int],
) -> list[Answer]:
    """Answer all prompts together; greedy answers are those of each prompt alone.

    Clocks count the batch: of prefill, first_token and decode each row reports all that passed
    until it had ended.
    """
    if options.seed is not None:
        mx.random.seed(options.seed)
    started = time.perf_counter()
    embeddings, cache = left_padded(network, prompts)
    logits = network.prefill(embeddings, cache)
    mx.eval(logits)
    prefilled = time.perf_counter()
    rows = [_Row(prompt, TextStream(tokenizer, options.stop), options, eos) for prompt in prompts]
    choose = _chooser(options, network.vocabulary)
    upcoming, live = choose(logits, rows), rows
    tokens: Any = upcoming.tolist()
    first = time.perf_counter()
    while True:
        now = time.perf_counter()
        for row, token in zip(live, tokens, strict=True):
            row.push(token, now - first)
        going = [n for n, row in enumerate(live) if row.finish_reason is None]
        if not going:
            break
        if len(going) < len(live):
            live, rest = [live[n] for n in going], mx.array(going)
            upcoming = upcoming[rest]
            for layer in cache:
                layer.filter(rest)
        upcoming = choose(network.decode(upcoming, cache), live)
        tokens = upcoming.tolist()
    return [row.answer(prefilled - started, first - prefilled) for row in rows]


class _Row:
    """One answer of the batch while it grows."""

    def __init__(
        self, prompt: Prompt, text: TextStream, options: Options, eos: frozenset[int]
    ) -> None:
        self._prompt, self._text, self._eos = prompt, text, eos
        self.constraint = prompt.constraint
        self._limit = min(options.max_tokens, prompt.room)
        self._said = ""
        self._seconds = 0.0
        self.tokens: list[int] = []
        self.finish_reason: str | None = None

    def push(self, token: int, seconds: float) -> None:
        """Take the next token, `seconds` after the first one."""
        self._seconds = seconds
        if token in self._eos:
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)
            self._said += self._text.push(token)
            if self._text.stopped or (self.constraint and self.constraint.push(token)):
                self.finish_reason = "stop"
            elif len(self.tokens) == self._limit:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            self._said += self._text.finish()

    def answer(self, prefill: float, first_token: float) -> Answer:
        return Answer(
            text=self._said.strip(),
            tokens=tuple(self.tokens),
            prompt_tokens=len(self._prompt.ids),
            finish_reason=self.finish_reason or "interrupted",
            timings=replace(
                self._prompt.timings,
                prefill=prefill,
                first_token=first_token,
                decode=self._seconds,
            ),
        )


def _chooser(options: Options, vocabulary: int) -> Callable[[mx.array, Sequence[_Row]], mx.array]:
    """A function of logits (B, vocab) and the rows to their next token ids, shape (B,)."""
    choose = token_sampler(options, vocabulary)

    def choose_rows(logits: mx.array, rows: Sequence[_Row]) -> mx.array:
        masks = [row.constraint.mask() for row in rows if row.constraint]
        mask = mx.concatenate(masks) if masks else None
        if options.repetition_penalty == 1:
            return choose(logits, [], mask)
        return mx.concatenate(
            [
                choose(logits[n : n + 1], row.tokens, None if mask is None else mask[n : n + 1])
                for n, row in enumerate(rows)
            ]
        )

    return choose_rows
