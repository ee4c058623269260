"""Measure the pieces of the claims, one network in memory at a time."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx import ops
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.model import flat_parameters
from fastvlm_mlx.vision import FastViTHD

from . import baselines
from .claims import Claim, Encode, Piece, Prefill
from .claims_plan import Plan
from .claims_table import ESTIMATE
from .clock import timed
from .language import LayerStack
from .machine import process_memory
from .record import OURS, Measurement, Operation, Skipped, Subject

__all__ = ["Tick", "claims_subject", "implementation_of", "kind_of", "measure_pieces"]

_LONG = 8.0
"""Seconds, predicted, from which one run is enough to be waited for."""

Tick = Callable[[Piece, Plan], None]
"""Is told what is measured next."""


def kind_of(piece: Piece) -> str:
    """Kind of measurement in the record."""
    return "encoder" if isinstance(piece, Encode) else "prefill"


def implementation_of(piece: Piece) -> str:
    """Whose figure it is in the record."""
    if isinstance(piece, Prefill):
        return piece.language_model
    return OURS if piece.encoder == "FastViTHD" else piece.encoder


def claims_subject(claims: Sequence[Claim], dtype: mx.Dtype) -> Subject:
    """What the record says was measured; parameters are counted from the networks themselves."""
    counts: dict[str, int] = {}
    for claim in claims:
        for pipeline in (claim.slow, claim.fast):
            for piece in pipeline.pieces if pipeline else ():
                if isinstance(piece, Encode) and piece.encoder not in counts:
                    network = build_encoder(piece)
                    if network is not None:
                        counts[piece.encoder] = sum(a.size for _, a in flat_parameters(network))
    name = str(dtype).removeprefix("mlx.core.")
    operations = tuple(dict.fromkeys(Operation(s.op, s.form) for s in ops.statuses(dtype)))
    return Subject("claims", counts, name, name, None, operations)


def build_encoder(piece: Encode) -> nn.Module | None:
    """The encoder for one tile of `piece`, not evaluated; None if there is none here."""
    if piece.encoder == "FastViTHD":
        return FastViTHD(VisionConfig())
    if piece.encoder not in baselines.BASELINES:
        return None
    return baselines.build(piece.encoder, piece.side // piece.tiles_across)


@dataclass(frozen=True)
class _Runs:
    """A piece, ready to be timed."""

    measured: Callable[[], Any]
    small: Callable[[], Any]
    """The same network on a small input: warms up what would take long to run twice."""


def measure_pieces(
    plans: Sequence[tuple[Piece, Plan]], dtype: mx.Dtype, tick: Tick
) -> Iterator[Measurement | Skipped]:
    """What was measured or skipped, each as soon as it is known."""
    for piece, plan in plans:
        if plan.skip:
            yield skipped(piece, plan.skip)
            continue
        tick(piece, plan)
        try:
            # The network must not outlive this call: the next one needs its memory.
            result = _measured(piece, plan, dtype)
            gc.collect()
            mx.clear_cache()
            yield result
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            yield skipped(piece, "out of memory")


def _is_out_of_memory(error: BaseException) -> bool:
    # MLX reports an allocation that failed as RuntimeError.
    text = str(error).lower()
    return isinstance(error, MemoryError) or "memory" in text or "alloc" in text


def skipped(piece: Piece, reason: str) -> Skipped:
    """A piece that was not measured."""
    side = piece.side if isinstance(piece, Encode) else None
    return Skipped(kind_of(piece), side, f"{piece}: {reason}")


def _measured(piece: Piece, plan: Plan, dtype: mx.Dtype) -> Measurement:
    encodes = isinstance(piece, Encode)
    runs = _encode(piece, plan, dtype) if encodes else _prefill(piece, plan, dtype)
    timed(runs.small if plan.seconds > _LONG else runs.measured)  # compiles
    mx.reset_peak_memory()
    times = tuple(timed(runs.measured)[0] for _ in range(plan.repeat))
    whole = "tower" if isinstance(piece, Encode) else "prefill"
    seconds = {whole: tuple(t * plan.scale for t in times)}
    if plan.estimate:
        seconds["measured_part"] = times
    return Measurement(
        kind=kind_of(piece),
        implementation=implementation_of(piece),
        image_size=piece.side if isinstance(piece, Encode) else None,
        image_tokens=None if isinstance(piece, Encode) else piece.tokens,
        prompt_tokens=None,
        answer_tokens=None,
        seconds=seconds,
        peak_memory=mx.get_peak_memory(),
        process_memory=process_memory(),
        launches=None,
        moved=None,
        notes=(ESTIMATE + plan.estimate,) if plan.estimate else (),
    )


def _encode(piece: Piece, plan: Plan, dtype: mx.Dtype) -> _Runs:
    assert isinstance(piece, Encode)
    network = build_encoder(piece)
    assert network is not None, "planned as skipped"
    randomize(network, dtype)
    side = piece.side // piece.tiles_across
    tiles = 1 if plan.scale > 1 else piece.tiles
    # A GPU takes all tiles at once; on the CPU one after another is as fast and needs less memory.
    on_gpu = mx.default_device() == mx.gpu
    call: Callable[[mx.array], mx.array] = mx.compile(network) if on_gpu else network
    pixels = mx.random.uniform(shape=(tiles, side, side, 3), key=mx.random.key(0)).astype(dtype)
    # A ViT has positions for one size only: its small input is a single tile.
    corner = side if isinstance(network, baselines.ViT) else min(side, 256)
    small = mx.contiguous(pixels[:1, :corner, :corner])
    mx.eval(pixels, small)

    def encode() -> mx.array:
        if on_gpu or tiles == 1:
            return call(pixels)
        outputs = []
        for n in range(tiles):
            outputs.append(call(pixels[n : n + 1]))
            mx.eval(outputs[-1])
        return mx.concatenate(outputs)

    return _Runs(encode, lambda: call(small))


def _prefill(piece: Piece, plan: Plan, dtype: mx.Dtype) -> _Runs:
    assert isinstance(piece, Prefill)
    stack = LayerStack(piece.language_model, dtype, plan.layers)
    embeddings, small = stack.embeddings(piece.tokens), stack.embeddings(min(piece.tokens, 64))
    return _Runs(lambda: stack.prefill(embeddings), lambda: stack.prefill(small))


def randomize(network: nn.Module, dtype: mx.Dtype) -> None:
    """Evaluate `network` in `dtype` with random numbers in place of weights that start as zeros."""
    network.set_dtype(dtype)
    for number, (name, array) in enumerate(flat_parameters(network)):
        if isinstance(network, FastViTHD):
            fan_in = math.prod(array.shape[1:] if array.ndim in (2, 4) else array.shape[:-1])
            drawn = mx.random.normal(array.shape, key=mx.random.key(number))
            array = (drawn / math.sqrt(max(fan_in, 1))).astype(dtype)
            network.load_weights([(name, array)], strict=False)
        mx.eval(array)
