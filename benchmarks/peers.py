"""Other implementations beside this one: same weights, same picture, in turn, outputs first.

Each runs in a process of its own, under the Python of its own environment (`peer_worker.py`).
Before any time is taken, features and the first greedy tokens are held against ours; where they
differ, every row says so.
"""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fastvlm_mlx import blas
from fastvlm_mlx.errors import BenchmarkError, OptionError
from fastvlm_mlx.vlm import DEFAULT_PROMPT, FastVLM

from .clock import timed
from .measuring import Effort, Tick, picture_bytes
from .record import OURS, Measurement

__all__ = ["DIALECTS", "Peer", "beside", "parse_peer"]

DIALECTS = {"mlx-vlm": "mlx-vlm", "transformers": "native"}
"""Peer -> layout of the checkpoints that it reads."""

_TOKENS = 8
"""Compared before anything is timed."""
_CLOSE = 1e-3
"""Largest relative error of features that count as the same: far above rounding in float32."""


def parse_peer(text: str) -> tuple[str, Path]:
    """("mlx-vlm", python) from "mlx-vlm=PYTHON". Raises OptionError."""
    name, _, python = text.partition("=")
    if name not in DIALECTS or not python:
        raise OptionError(
            f"--peer is {text!r}; expected NAME=PYTHON, with NAME one of {', '.join(DIALECTS)}."
        )
    path = Path(python).expanduser()
    if not path.is_file():
        raise OptionError(f"--peer {name}: there is no {path}; give the Python that has {name}.")
    return name, path


class Peer:
    """A running peer. Raises BenchmarkError if it does not start or does not answer."""

    def __init__(self, name: str, python: Path, checkpoint: Path, dtype: str) -> None:
        self.name, self.dtype = name, dtype
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        worker = Path(__file__).with_name("peer_worker.py")
        try:
            self._process = subprocess.Popen(
                [python, worker, name, checkpoint, dtype, str(blas.__file__)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise BenchmarkError(f"{name}: {python} cannot be run ({error.strerror}).") from error
        try:
            hello = self._reply()
        except BaseException:
            self.close()
            raise
        self.version = str(hello["version"])
        self.device = str(hello["device"])

    @property
    def title(self) -> str:
        """For records: name and version."""
        return f"{self.name} {self.version}"

    def request(self, **message: Any) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        """End its process."""
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError, AttributeError):
                pipe.close()  # type: ignore[union-attr]

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in reply:
            raise BenchmarkError(f"{self.name}: {reply['error']}")
        return reply

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else "its process ended without a word"


@dataclass
class _Side:
    """One implementation while it is measured."""

    title: str
    encode: Any
    answer: Any
    notes: tuple[str, ...]
    tower: list[float]
    felt: list[float]
    peak: int | None = None


def beside(
    vlm: FastVLM, peers: Sequence[Peer], effort: Effort, tick: Tick
) -> Iterator[Measurement]:
    """Encoder latency and felt TTFT of this library and of its peers, in turn: A B A B.

    The picture is square, so that cropping and padding are the same; its size is the model's own.
    """
    size = vlm.config.vision.image_size
    with tempfile.TemporaryDirectory() as folder:
        image, pixels = Path(folder) / "picture.jpg", Path(folder) / "pixels.npy"
        image.write_bytes(picture_bytes(2048, 2048))
        array = np.random.default_rng(0).random((1, size, size, 3), np.float32)
        np.save(pixels, array)
        sides = [_ours(vlm, image, array), *(_theirs(p, image, pixels) for p in peers)]
        expected = vlm.vision(mx.array(array).astype(vlm.vision.stem.conv.weight.dtype))
        tokens = _first_tokens(vlm, image)
        for side, peer in zip(sides[1:], peers, strict=True):
            side.notes += _compared(peer, expected, tokens, image, pixels, Path(folder))
        stopped: BaseException | None = None
        try:
            _in_turn(sides, effort, tick)
        except BaseException as error:  # what was measured before is handed over first
            stopped = error
    prompt = len(vlm.prompt_ids(DEFAULT_PROMPT)) - 1 + vlm.config.image_tokens
    for side in sides:
        if not side.felt:
            continue
        common: dict[str, Any] = {
            "implementation": side.title, "image_size": size,
            "image_tokens": vlm.config.image_tokens, "peak_memory": side.peak,
            "process_memory": None, "launches": None, "moved": None, "notes": side.notes,
        }  # fmt: skip
        yield Measurement(
            kind="encoder", prompt_tokens=None, answer_tokens=None,
            seconds={"tower": tuple(side.tower)}, **common,
        )  # fmt: skip
        yield Measurement(
            kind="ttft", prompt_tokens=prompt, answer_tokens=1,
            seconds={"felt": tuple(side.felt)}, **common,
        )  # fmt: skip
    if stopped is not None:
        raise stopped


def _in_turn(sides: Sequence[_Side], effort: Effort, tick: Tick) -> None:
    runs = effort.warmup + effort.repeat
    for number in range(runs):
        for side in sides:
            encoded, first = side.encode(side), side.answer(side)
            if number >= effort.warmup:
                side.tower.append(encoded)
                side.felt.append(first)
        tick(number + 1, runs)


def _ours(vlm: FastVLM, image: Path, array: "np.ndarray[Any, Any]") -> _Side:
    pixels = mx.array(array).astype(vlm.vision.stem.conv.weight.dtype)
    tower = mx.compile(vlm.vision) if mx.default_device() == mx.gpu else vlm.vision

    def encode(side: _Side) -> float:
        mx.clear_cache()
        mx.reset_peak_memory()
        seconds, _ = timed(lambda: tower(pixels))
        return seconds

    def answer(side: _Side) -> float:
        mx.clear_cache()
        seconds, _ = timed(lambda: next(vlm.stream(image, DEFAULT_PROMPT, max_tokens=1)).token)
        side.peak = max(side.peak or 0, mx.get_peak_memory())
        return seconds

    return _Side(OURS, encode, answer, (), [], [])


def _theirs(peer: Peer, image: Path, pixels: Path) -> _Side:
    def encode(side: _Side) -> float:
        return float(peer.request(do="encode", pixels=str(pixels))["seconds"])

    def answer(side: _Side) -> float:
        reply = peer.request(do="answer", image=str(image), question=DEFAULT_PROMPT, tokens=1)
        side.peak = reply["peak_memory"]
        return float(reply["seconds"])

    return _Side(peer.title, encode, answer, (f"on {peer.device}, {peer.dtype}",), [], [])


def _first_tokens(vlm: FastVLM, image: Path) -> list[int]:
    stream = vlm.stream(image, DEFAULT_PROMPT, max_tokens=_TOKENS)
    return [chunk.token for chunk in stream]


def _compared(
    peer: Peer, expected: mx.array, tokens: list[int], image: Path, pixels: Path, folder: Path
) -> tuple[str, ...]:
    """What is to be said about a peer's outputs."""
    result = folder / f"{peer.name}.npy"
    peer.request(do="encode", pixels=str(pixels), result=str(result))
    theirs = np.load(result)
    ours = np.array(expected.astype(mx.float32))
    if theirs.shape != ours.shape:
        features = f"FEATURES DIFFER: shape {theirs.shape} instead of {ours.shape}"
    else:
        error = float(np.abs(theirs - ours).max() / np.abs(theirs).max())
        same = "features agree" if error < _CLOSE else "FEATURES DIFFER"
        features = f"{same}: relative error {error:.1e}"
    said = peer.request(do="answer", image=str(image), question=DEFAULT_PROMPT, tokens=_TOKENS)
    equal = next(
        (n for n, (a, b) in enumerate(zip(tokens, said["tokens"], strict=False)) if a != b),
        min(len(tokens), len(said["tokens"])),
    )
    if equal == len(tokens) == len(said["tokens"]):
        return features, f"first {equal} greedy tokens identical"
    return features, f"TOKENS DIFFER from token {equal + 1} on"
