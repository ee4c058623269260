"""The measurements: warm up, then repeat; every clock is closed by an evaluation.

Two definitions of time to first token are taken side by side. *felt* is what a person waits for:
the picture's bytes in, the first token out. *paper* is what FastVLM's paper calls TTFT (arXiv
2412.13303, section 4): encoder latency plus the language model's prefill of the image tokens
alone, without reading and resizing the picture, the text of the prompt, and choosing a token.
"""

import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import PIL.Image

from fastvlm_mlx.errors import BenchmarkError
from fastvlm_mlx.generation import Options, Timings, generate
from fastvlm_mlx.vlm import DEFAULT_PROMPT, FastVLM

from .clock import check_split, timed
from .machine import process_memory
from .record import OURS, Measurement

__all__ = [
    "Effort",
    "Tick",
    "measure_cold_start",
    "measure_decode",
    "measure_encoder",
    "measure_memory",
    "measure_ttft",
    "picture_bytes",
]

Tick = Callable[[int, int], None]
"""Is told (runs done, runs in all)."""

_SPLIT = ("load_image", "preprocess", "encode", "prefill", "first_token")


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    repeat: int = 12
    warmup: int = 2
    answer_tokens: int = 32
    """Of a decode run."""
    cold_starts: int = 5


def picture_bytes(width: int = 1600, height: int = 1200) -> bytes:
    """A JPEG with detail at every scale, always the same."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measure_encoder(vlm: FastVLM, size: int, effort: Effort, tick: Tick) -> Measurement:
    """The tower alone: pixels on the device -> features."""
    tower, pixels = _on_device(vlm.network.vision), _pixels(size)
    seconds = _repeat(lambda: {"tower": timed(lambda: tower(pixels))[0]}, effort, tick)
    return _measurement(vlm, "encoder", size, seconds)


def measure_ttft(
    vlm: FastVLM, size: int, effort: Effort, tick: Tick, picture: bytes | None = None
) -> Measurement:
    """Time to first token, felt (with its parts) and by the paper's definition."""
    network = vlm.network
    tower, pixels = _on_device(network.vision), _pixels(size)
    picture = picture or picture_bytes()
    vlm.image_size = size

    def visual_prefill(features: mx.array) -> mx.array:
        return network.prefill(network.projector(features), network.new_cache())

    def first_answer() -> tuple[int, Timings]:
        stream = vlm.stream(picture, DEFAULT_PROMPT, max_tokens=1)
        chunk = next(stream)
        return chunk.token, chunk.timings

    def once() -> dict[str, float]:
        told: list[Timings] = []
        felt, _ = timed(lambda: _keep(first_answer(), told))
        tower_seconds, features = timed(lambda: tower(pixels))
        prefill_seconds, _ = timed(lambda: visual_prefill(features))
        split = asdict(told[0])
        return {
            **{part: max(split[part], 1e-9) for part in _SPLIT},
            "felt": felt,
            "tower": tower_seconds,
            "visual_prefill": prefill_seconds,
            "paper": tower_seconds + prefill_seconds,
        }

    seconds = _repeat(once, effort, tick)
    median = {part: statistics.median(times) for part, times in seconds.items()}
    # The split is the library's own; its clocks are held against ours.
    check_split("encode", median["encode"], median["tower"])
    check_split("prefill", median["prefill"], median["visual_prefill"])
    prompt = len(vlm.prompt_ids(DEFAULT_PROMPT)) - 1 + _tokens(vlm, size)
    return _measurement(vlm, "ttft", size, seconds, prompt_tokens=prompt, answer_tokens=1)


def measure_decode(vlm: FastVLM, context: int, effort: Effort, tick: Tick) -> Measurement:
    """Seconds per token after a prompt of `context` positions, in a run of `answer_tokens`."""
    options = Options(max_tokens=effort.answer_tokens)
    room = vlm.config.context_length - effort.answer_tokens
    if not 1 <= context <= room:
        raise BenchmarkError(
            f"A context of {context} and {effort.answer_tokens} tokens are more than the "
            f"{vlm.config.context_length} positions of this model; give --context {room} or less."
        )
    if effort.answer_tokens < 2:
        raise BenchmarkError("Decoding is measured between tokens; at least two are needed.")
    ids = [n % 256 for n in range(context)]

    def once() -> dict[str, float]:
        # No token ends the run, whatever a random model says.
        *_, last = generate(
            vlm.network, vlm.tokenizer, ids, [], vlm.network.new_cache(), options, frozenset(),
            Timings(),
        )  # fmt: skip
        return {"token": last.timings.decode / (effort.answer_tokens - 1)}

    seconds = _repeat(once, effort, tick)
    return _measurement(
        vlm, "decode", None, seconds, prompt_tokens=context, answer_tokens=effort.answer_tokens
    )


def measure_memory(vlm: FastVLM, size: int, effort: Effort, tick: Tick) -> Measurement:
    """Most memory held while a picture of that size is answered; one run, no times."""
    vlm.image_size = size
    mx.clear_cache()
    mx.reset_peak_memory()
    stream = vlm.stream(picture_bytes(), DEFAULT_PROMPT, max_tokens=2)
    stream.finish()
    tick(1, 1)
    return _measurement(
        vlm, "memory", size, {}, prompt_tokens=stream.prompt_tokens, answer_tokens=2
    )


def measure_cold_start(
    vlm: FastVLM, model: str, options: list[str], effort: Effort, tick: Tick
) -> Measurement:
    """`fastvlm caption` in a new process: until its first character, and until it ends.

    Files are in the system's cache after the first start, which is not counted.
    """
    code = "from fastvlm_mlx.cli import main; main()"
    seconds: dict[str, list[float]] = {"first_text": [], "exit": []}
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.jpg"
        picture.write_bytes(picture_bytes())
        command = [sys.executable, "-c", code, "caption", str(picture), "--model", model, *options]
        for number in range(effort.cold_starts + 1):
            first, end = _start([*command, "--max-tokens", "1"])
            if number:
                seconds["first_text"].append(first)
                seconds["exit"].append(end)
            tick(number + 1, effort.cold_starts + 1)
    return _measurement(
        vlm, "cold_start", vlm.config.vision.image_size, _tuples(seconds), answer_tokens=1
    )


def _start(command: list[str]) -> tuple[float, float]:
    started = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            process.stdout.read(1)
            first = time.perf_counter() - started
            _, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise BenchmarkError(f"fastvlm caption failed: {lines[-1] if lines else 'no message'}")
    return first, time.perf_counter() - started


def _repeat(
    once: Callable[[], dict[str, float]], effort: Effort, tick: Tick
) -> dict[str, tuple[float, ...]]:
    seconds: dict[str, list[float]] = {}
    runs = effort.warmup + effort.repeat
    for number in range(runs):
        if number == effort.warmup:
            mx.reset_peak_memory()
        parts = once()
        if number >= effort.warmup:
            for part, value in parts.items():
                seconds.setdefault(part, []).append(value)
        tick(number + 1, runs)
    return _tuples(seconds)


def _tuples(seconds: dict[str, list[float]]) -> dict[str, tuple[float, ...]]:
    return {part: tuple(times) for part, times in seconds.items()}


def _keep(answer: tuple[int, Timings], told: list[Timings]) -> int:
    told.append(answer[1])
    return answer[0]


def _on_device(function: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """Compiled where the library compiles it: MLX's CPU backend gains nothing from it."""
    on_gpu = mx.default_device() == mx.gpu
    compiled: Callable[[mx.array], mx.array] = mx.compile(function) if on_gpu else function
    return compiled


def _pixels(size: int) -> mx.array:
    pixels = mx.random.uniform(shape=(1, size, size, 3), key=mx.random.key(0))
    mx.eval(pixels)
    return pixels


def _tokens(vlm: FastVLM, size: int) -> int:
    return vlm.config.vision.tokens(size, size)


def _measurement(
    vlm: FastVLM, kind: str, size: int | None, seconds: dict[str, tuple[float, ...]], **more: Any
) -> Measurement:
    return Measurement(
        kind=kind,
        implementation=OURS,
        image_size=size,
        image_tokens=None if size is None else _tokens(vlm, size),
        prompt_tokens=more.get("prompt_tokens"),
        answer_tokens=more.get("answer_tokens"),
        seconds=seconds,
        peak_memory=None if kind == "cold_start" else mx.get_peak_memory(),
        process_memory=None if kind == "cold_start" else process_memory(),
        launches=None,
        moved=None,
    )
