"""A benchmark run: what is to be measured, whether it fits, and the results one by one."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from fastvlm_mlx.config import SIDE_MULTIPLE
from fastvlm_mlx.errors import FastVLMError, OptionError
from fastvlm_mlx.memory import available_memory
from fastvlm_mlx.model import parameter_counts
from fastvlm_mlx.testing import random_checkpoint
from fastvlm_mlx.vision import FastViTHD
from fastvlm_mlx.vlm import DEFAULT_PROMPT, FastVLM

from .counting import count_encoder, total
from .machine import others_busy
from .measuring import (
    Effort,
    Tick,
    measure_cold_start,
    measure_decode,
    measure_encoder,
    measure_memory,
    measure_ttft,
)
from .record import Measurement, Skipped
from .subjects import Choice, stand_in_tokenizer

__all__ = [
    "KINDS",
    "SIZES",
    "Step",
    "check_size",
    "check_sizes",
    "needed_memory",
    "perform",
    "plan",
]

KINDS = ("encoder", "ttft", "decode", "memory", "cold_start")
SIZES = (256, 512, 768, 1024, 1536)

_COMPANY = 0.25
"""Cores; less than this is the system's own housekeeping."""
_TELLING = 0.5
"""Seconds below which the system's accounts (10 ms) say nothing."""


@dataclass(frozen=True)
class Step:
    """One measurement to be made."""

    kind: str
    image_size: int | None
    measure: Callable[[Tick], Measurement]
    obstacle: str | None = None
    """Why it cannot be made."""


def check_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes in ascending order, each once. Raises OptionError for one that no encoder takes."""
    if not sizes:
        raise OptionError("--sizes has nothing; expected numbers, as in 256,512.")
    return tuple(sorted({check_size(size) for size in sizes}))


def check_size(size: int) -> int:
    """The size, if an encoder can take it. Raises OptionError."""
    if size <= 0 or size % SIDE_MULTIPLE:
        raise OptionError(
            f"A size is {size}; expected a positive multiple of {SIDE_MULTIPLE}, such as 512."
        )
    return size


def plan(
    choice: Choice,
    vlm: FastVLM,
    kinds: Sequence[str],
    sizes: Sequence[int],
    effort: Effort,
    context: int | None = None,
) -> list[Step]:
    """Steps from small to large, so that an interrupted run has whole results."""
    steps: list[Step] = []
    for size in sizes:
        obstacle = _obstacle(vlm, size)
        if "encoder" in kinds:
            steps.append(Step("encoder", size, _encoder(vlm, size, effort), obstacle))
        if "ttft" in kinds:
            obstacle = obstacle or _too_long(vlm, size)
            steps.append(Step("ttft", size, _sized(measure_ttft, vlm, size, effort), obstacle))
    if "decode" in kinds:
        positions = context or _prompt_tokens(vlm, vlm.config.vision.image_size)
        steps.append(
            Step("decode", None, lambda tick: measure_decode(vlm, positions, effort, tick))
        )
    if "memory" in kinds:
        for size in sizes:
            obstacle = _obstacle(vlm, size) or _too_long(vlm, size)
            steps.append(Step("memory", size, _sized(measure_memory, vlm, size, effort), obstacle))
    if "cold_start" in kinds:
        size, obstacle = vlm.config.vision.image_size, _no_files(choice, vlm)
        steps.append(Step("cold_start", size, _cold_start(choice, vlm, effort), obstacle))
    return steps


def perform(
    steps: Sequence[Step], watch: Callable[[Step, int, int], None]
) -> Iterator[Measurement | Skipped]:
    """Make the measurements; `watch` is told (step, runs done, runs in all).

    A step that fails in a way of its own is reported as Skipped, and the next one follows.
    """
    for step in steps:
        if step.obstacle is not None:
            yield Skipped(step.kind, step.image_size, step.obstacle)
            continue
        watch(step, 0, 1)

        def tick(done: int, runs: int, step: Step = step) -> None:
            watch(step, done, runs)

        try:
            yield _with_company(step.measure, tick)
        except FastVLMError as error:
            yield Skipped(step.kind, step.image_size, f"failed: {error}")
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            yield Skipped(step.kind, step.image_size, "failed: out of memory")
        mx.clear_cache()


def _with_company(measure: Callable[[Tick], Measurement], tick: Tick) -> Measurement:
    """A measurement, with a note if other programs took a good part of a core meanwhile."""
    before, started = others_busy(), time.monotonic()
    result = measure(tick)
    after, elapsed = others_busy(), time.monotonic() - started
    if before is None or after is None or elapsed < _TELLING:
        return result
    cores = (after - before) / elapsed
    if cores < _COMPANY:
        return result
    note = f"other programs kept {cores:.1f} cores busy meanwhile"
    return replace(result, notes=(*result.notes, note))


def needed_memory(vlm: FastVLM, size: int) -> int:
    """Bytes that a picture of that size takes beside the weights: an estimate from above.

    Measured in float32 on a CPU: 82 to 114 values per pixel for FastViTHD, whose first stage is 96
    wide, and 24 to 45 for one of 16.
    """
    vision = vlm.config.vision
    item = vlm.network.vision.stem.conv.weight.dtype.size
    return int((40 + 1.2 * vision.dims[0]) * item * size * size)


def _obstacle(vlm: FastVLM, size: int) -> str | None:
    needed, room = needed_memory(vlm, size), available_memory()
    # MLX's own cache of freed memory is there to be used again.
    if room is None or needed <= room + mx.get_cache_memory():
        return None
    return f"needs about {needed / 1e9:.1f} GB beside the weights; {room / 1e9:.1f} GB are free"


def _too_long(vlm: FastVLM, size: int) -> str | None:
    tokens, limit = _prompt_tokens(vlm, size) + 2, vlm.config.context_length
    return f"{tokens} tokens; the context window is {limit}" if tokens > limit else None


def _prompt_tokens(vlm: FastVLM, size: int) -> int:
    return len(vlm.prompt_ids(DEFAULT_PROMPT)) - 1 + vlm.config.vision.tokens(size, size)


def _sized(
    measure: Callable[[FastVLM, int, Effort, Tick], Measurement],
    vlm: FastVLM,
    size: int,
    effort: Effort,
) -> Callable[[Tick], Measurement]:
    return lambda tick: measure(vlm, size, effort, tick)


def _encoder(vlm: FastVLM, size: int, effort: Effort) -> Callable[[Tick], Measurement]:
    def measure(tick: Tick) -> Measurement:
        measured = measure_encoder(vlm, size, effort, tick)
        # A tower of its own: the counter changes the type of the one that it is given.
        dtype = vlm.network.vision.stem.conv.weight.dtype
        cost = total(count_encoder(FastViTHD(vlm.config.vision), size, dtype).values())
        return replace(measured, launches=len(cost.launches), moved=cost.bytes)

    return measure


def _cold_start(choice: Choice, vlm: FastVLM, effort: Effort) -> Callable[[Tick], Measurement]:
    def measure(tick: Tick) -> Measurement:
        options = ["--dtype", choice.dtype] if choice.dtype else []
        options += ["--quantize", str(choice.bits)] if choice.bits else []
        if choice.source is not None:
            return measure_cold_start(vlm, choice.source, options, effort, tick)
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder) / "tokenizer"
            files.mkdir()
            stand_in_tokenizer().save(files / "tokenizer.json")
            model = random_checkpoint(Path(folder) / "model", str(choice.random), tokenizer=files)
            return measure_cold_start(vlm, str(model), options, effort, tick)

    return measure


def _no_files(choice: Choice, vlm: FastVLM) -> str | None:
    if choice.source is not None:
        return None
    needed = 2 * sum(parameter_counts(vlm.config).values())  # in bfloat16
    room = shutil.disk_usage(tempfile.gettempdir()).free
    if room < needed:
        return f"a random model must be written first: {needed / 1e9:.1f} GB, {room / 1e9:.1f} free"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "memory" in text or "alloc" in text
