"""How likely given texts are as the answer, instead of what the model would say by itself.

A text's log-likelihood is the sum over its tokens and the end of the turn, so it is that of exactly
this answer, and "Yes" gains nothing from "Yes, two". Only the tokenizer's own split counts.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .errors import OptionError, PromptError
from .model import Network

if TYPE_CHECKING:
    from mlx_lm.models.cache import KVCache

__all__ = ["Choices", "Score", "check_choices", "log_likelihoods"]

# Answers run together: enough to read the weights rarely, few enough for their KV caches.
_ROWS = 16


@dataclass(frozen=True)
class Score:
    """How likely one text is as the answer."""

    text: str
    tokens: tuple[int, ...]
    """Ids of the text, and of the end of the turn."""
    log_likelihoods: tuple[float, ...]
    """Natural logarithm of each token's probability, given all that stands before it."""

    @property
    def total(self) -> float:
        """Natural logarithm of the probability that the answer is this text."""
        return math.fsum(self.log_likelihoods)


@dataclass(frozen=True)
class Choices:
    """Answers weighed against each other."""

    scores: tuple[Score, ...]
    """In the order in which the choices were given."""

    @property
    def probabilities(self) -> dict[str, float]:
        """Probability of each choice, if the answer is one of them; they sum to one."""
        highest = max(score.total for score in self.scores)
        shares = [math.exp(score.total - highest) for score in self.scores]
        whole = math.fsum(shares)
        return {s.text: share / whole for s, share in zip(self.scores, shares, strict=True)}

    @property
    def best(self) -> str:
        """The likeliest choice. Raises PromptError if that is a tie."""
        highest = max(score.total for score in self.scores)
        first, *others = [score.text for score in self.scores if score.total == highest]
        if others:
            raise PromptError(
                f"{first!r} and {others[0]!r} are exactly equally likely. Look at the "
                "probabilities, or word the choices differently."
            )
        return first


def check_choices(choices: Iterable[str]) -> tuple[str, ...]:
    """The choices, if they are at least two different texts. Raises OptionError."""
    if isinstance(choices, str) or not isinstance(choices, Iterable):
        raise OptionError(f"choices is {choices!r:.200}; expected a list of texts.")
    choices = tuple(choices)
    if any(not isinstance(choice, str) for choice in choices):
        raise OptionError(f"choices is {choices!r:.200}; expected a list of texts.")
    texts = [choice.strip() for choice in choices]
    if len(texts) < 2:
        raise OptionError(f"{len(texts)} choice was given; expected at least two to choose from.")
    if "" in texts:
        raise OptionError(f"Choice {texts.index('') + 1} is empty; expected a text.")
    twice = [text for n, text in enumerate(texts) if text in texts[:n]]
    if twice:
        raise OptionError(f"Choice {twice[0]!r} was given twice; leave one out.")
    return choices


def log_likelihoods(
    network: Network,
    logits: mx.array,
    cache: "list[KVCache]",
    answers: Sequence[Sequence[int]],
) -> list[tuple[float, ...]]:
    """Log-likelihood of each token of each answer, after a prompt that was run into `cache`.

    `logits` (1, vocab) are the prompt's last ones. The prompt's keys and values are shared by all
    answers; `cache` itself is left as it is.
    """
    beginnings: Any = _log_softmax(logits)[0, mx.array([answer[0] for answer in answers])].tolist()
    found: list[tuple[float, ...]] = []
    for at in range(0, len(answers), _ROWS):
        part = answers[at : at + _ROWS]
        first = beginnings[at : at + _ROWS]
        rest: list[list[float]] = [[] for _ in part]
        longest = max(len(answer) for answer in part) - 1
        if longest:
            # Padded on the right: what stands there is seen by nothing before it.
            padded = mx.array([[*answer, *[0] * longest][: longest + 1] for answer in part])
            following = _log_softmax(
                network.continuation(padded[:, :-1], _shared(network, cache, len(part)))
            )
            chosen: Any = mx.take_along_axis(following, padded[:, 1:, None], axis=2)[..., 0]
            rest = chosen.tolist()
        found += [
            (one, *others[: len(answer) - 1])
            for answer, one, others in zip(part, first, rest, strict=True)
        ]
    return found


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _shared(network: Network, cache: "list[KVCache]", rows: int) -> "list[KVCache]":
    """The same keys and values for `rows` rows, to be continued separately."""
    copies: Any = network.new_cache()
    layers: Any = cache
    for copy, layer in zip(copies, layers, strict=True):
        keys, values = layer.keys_and_values()
        copy.keys = mx.broadcast_to(keys, (rows, *keys.shape[1:]))
        copy.values = mx.broadcast_to(values, (rows, *values.shape[1:]))
        copy.offset = layer.offset
    shared: list[KVCache] = copies
    return shared
