"""The largest input and the least quantization whose first token comes in time, by measurement."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from fastvlm_mlx.vlm import FastVLM

from .measuring import Effort
from .record import Measurement, Skipped
from .running import Step, perform, plan
from .subjects import Choice, build
from .summary import Summary

__all__ = ["Candidate", "candidates", "choose", "forms"]


@dataclass(frozen=True)
class Candidate:
    """One size in one form, measured."""

    image_size: int
    image_tokens: int
    bits: int | None
    felt: Summary
    holds: bool
    """Nine of ten first tokens come in time: the 90th percentile is within the budget."""


def forms(choice: Choice) -> tuple[int | None, ...]:
    """Bits to try, from the most exact on; a CPU computes in float32 whatever the weights were."""
    if choice.bits is not None or mx.default_device() == mx.cpu:
        return (choice.bits,)
    return (None, 8, 4)


def candidates(
    choice: Choice,
    sizes: Sequence[int],
    budget: float,
    effort: Effort,
    watch: Callable[[Step, int, int], None],
    make: Callable[[Choice], FastVLM] = build,
) -> Iterator[Candidate | Skipped]:
    """Measure size after size in each form, until one is too slow: larger ones only take longer."""
    for bits in forms(choice):
        vlm = make(replace(choice, bits=bits))
        for step in plan(choice, vlm, ("ttft",), sizes, effort):
            (result,) = perform([step], watch)
            if isinstance(result, Skipped):
                yield result
                break
            one = _candidate(result, bits, budget)
            yield one
            if not one.holds:
                break
        del vlm
        mx.clear_cache()


def choose(found: Sequence[Candidate]) -> Candidate | None:
    """Of those in time the largest; of that size the one with the most bits."""
    holding = [one for one in found if one.holds]
    return max(holding, key=lambda one: (one.image_size, one.bits or 16), default=None)


def _candidate(measured: Measurement, bits: int | None, budget: float) -> Candidate:
    felt = measured.summaries["felt"]
    size, tokens = measured.image_size or 0, measured.image_tokens or 0
    return Candidate(size, tokens, bits, felt, felt.p90 <= budget)
