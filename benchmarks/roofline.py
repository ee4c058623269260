"""How near each part of the model comes to what the machine could do at most.

A part does some floating-point operations and moves some bytes; it cannot take less time than the
operations at the peak of a matrix product, nor than the bytes at the peak of a copy. The larger of
the two is its floor, and the share is floor over measured time. FLOPs and bytes of the encoder are
those of its kernels on Metal, counted from the graph (`counting.py`): arrays go to memory and come
back between kernels. Where caches keep them, a part can be faster than its memory floor.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx

from fastvlm_mlx.config import Config, VisionConfig
from fastvlm_mlx.vision import FastViTHD

from .chips import Peaks
from .counting import count_encoder
from .record import Measurement

__all__ = [
    "LIMIT",
    "Floor",
    "Work",
    "encoder_work",
    "floors_of",
    "language_work",
    "limit_measurement",
    "roofline_lines",
]

LIMIT = "limit"
"""Stands for the implementation in the record where the floors are, as if they were measured."""


@dataclass(frozen=True)
class Work:
    """What a part has to do at least."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Floor:
    """The least time that work can take, in seconds."""

    compute: float
    memory: float

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.compute, self.memory)

    @property
    def bound(self) -> str:
        """Which of the two it is."""
        return "compute" if self.compute >= self.memory else "memory"


def floors_of(work: dict[str, Work], peaks: Peaks) -> dict[str, Floor]:
    """Each part's floor."""
    return {
        part: Floor(w.flops / peaks.flops, w.bytes / peaks.bandwidth) for part, w in work.items()
    }


def encoder_work(config: VisionConfig, side: int, dtype: mx.Dtype) -> dict[str, Work]:
    """Stem, stage1 ... stage5 and head of one side x side picture, and all of them: encoder."""
    costs = count_encoder(FastViTHD(config), side, dtype)
    work = {name: Work(cost.flops, cost.bytes) for name, cost in costs.items()}
    return {**work, "encoder": sum(work.values(), Work(0, 0))}


def language_work(config: Config, side: int, item: int, weight_bytes: int) -> dict[str, Work]:
    """Projector, prefill of the image's tokens as `Network.prefill` does it, decoding one token.

    `item` is the bytes of an activation, `weight_bytes` those of the language model's weights as
    they are in memory. Attention is counted causal; the last layer's queries, MLP and the head
    are worked out for the last position only.
    """
    text, n = config.text, config.vision.tokens(side, side)
    hidden, layers, features = text.hidden_size, text.num_hidden_layers, config.vision.out_dim
    keys_and_values = 2 * hidden * text.head_dim * text.num_key_value_heads
    layer = keys_and_values + hidden * (2 * hidden + 3 * text.intermediate_size)
    head, projector = hidden * text.vocab_size, hidden * (features + hidden)
    stack = layers * layer
    # The embedding table is not read, unless it is the head too.
    unread = 0 if text.tie_word_embeddings else head
    read = weight_bytes * (stack + head) // (stack + head + unread)
    read += layers * keys_and_values // hidden * n * item
    prefill = 2 * n * ((layers - 1) * layer + keys_and_values) + 2 * (layer - keys_and_values)
    prefill += 2 * hidden * n * ((layers - 1) * (n + 1) + 2) + 2 * head
    return {
        "projector": Work(2 * n * projector, item * (projector + n * (features + 4 * hidden))),
        "prefill": Work(prefill, read),
        "decode": Work(2 * (stack + head) + 4 * layers * n * hidden, read),
    }


def limit_measurement(floors: dict[str, Floor], measured: Measurement, peaks: Peaks) -> Measurement:
    """The floors as a measurement of the record, beside the one that they belong to."""
    note = (
        f"{peaks.flops / 1e9:.4g} GFLOP/s and {peaks.bandwidth / 1e9:.4g} GB/s at most; "
        f"{peaks.source}"
    )
    return replace(
        measured,
        implementation=LIMIT,
        seconds={part: (floors[part].seconds,) for part in measured.seconds},
        peak_memory=None,
        process_memory=None,
        notes=(note,),
    )


def roofline_lines(measured: Measurement, work: dict[str, Work], peaks: Peaks) -> Iterator[str]:
    """The table: work, floor, measured time, share of the limit."""
    floors = floors_of(work, peaks)
    yield f"{'':<10}{'GFLOP':>9}{'GB':>8}{'floor':>11}{'bound by':>10}{'measured':>12}" + (
        f"{'p10 to p90':>20}{'of the limit':>14}"
    )
    for part, summary in measured.summaries.items():
        floor, spread = floors[part], f"{1e3 * summary.p10:.2f} to {1e3 * summary.p90:.2f}"
        yield (
            f"{part:<10}{work[part].flops / 1e9:>9.1f}{work[part].bytes / 1e9:>8.3f}"
            f"{1e3 * floor.seconds:>8.2f} ms{floor.bound:>10}{1e3 * summary.median:>9.2f} ms"
            f"{spread:>20}{floor.seconds / summary.median:>13.0%}"
        )
    yield ""
    yield (
        f"Limits: {peaks.flops / 1e12:.3g} TFLOP/s in matrix products, "
        f"{peaks.bandwidth / 1e9:.4g} GB/s; {peaks.source}."
    )
    yield (
        "Bytes are those of Metal's kernels, through memory each time; caches can beat that floor."
    )
