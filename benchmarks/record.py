"""The record of a benchmark run: one JSON document, versioned, checked when it is read.

Times are seconds and sizes are bytes. Summaries are written beside the times for readers of the
file; reading makes them anew from the times.
"""

import contextlib
import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import BenchmarkError

from .summary import Drift, Summary, drift_of, summarize

__all__ = [
    "HEADLINE",
    "OURS",
    "SCHEMA",
    "VERSION",
    "Conditions",
    "Machine",
    "Measurement",
    "Operation",
    "Record",
    "Skipped",
    "Software",
    "Subject",
    "check_replaceable",
    "read_record",
    "write_record",
]

SCHEMA = "fastvlm-mlx benchmark"
VERSION = 1

OURS = "fastvlm-mlx"

HEADLINE = {
    "encoder": "tower",
    "ttft": "felt",
    "decode": "token",
    "cold_start": "first_text",
}
"""Kind of measurement -> the part that a table with one column shows ("memory" has no times)."""


@dataclass(frozen=True)
class Machine:
    """The computer; no host name. None is what the system does not tell."""

    chip: str | None
    cores: int | None
    gpu: str | None
    gpu_cores: int | None
    memory: int | None
    """Bytes; of the GPU where it has its own."""
    system: str
    device: str
    """What MLX computes on: "Metal", "CUDA" or "CPU"."""


@dataclass(frozen=True)
class Conditions:
    """What changes from run to run."""

    power_source: str | None
    """"mains" or "battery"."""
    low_power_mode: bool | None
    load_average: float | None
    """Processes wanting a core over the minute before; above 0.5 others were working."""


@dataclass(frozen=True)
class Software:
    """Versions."""

    package: str
    commit: str | None
    """Of the checkout the package is used from, "+" if it has changes; None if installed."""
    python: str
    mlx: str
    mlx_lm: str
    blas: str | None
    """"OpenBLAS", "Accelerate", "bundled" (MLX's Linux wheel); None on a CUDA machine."""
    openblas_coretype: str | None
    peers: dict[str, str] = field(default_factory=dict)
    """Other implementations measured in this run -> their versions."""


@dataclass(frozen=True)
class Operation:
    """One of `fastvlm_mlx.ops`, in the form it takes on this device."""

    op: str
    form: str


@dataclass(frozen=True)
class Subject:
    """What was measured."""

    model: str
    """A checkpoint's name, or "random 0.5b"."""
    parameters: dict[str, int]
    """Part ("vision", "projector", "language_model") -> number of parameters."""
    dtype: str
    """Of the language model; the CPU computes in float32."""
    vision_dtype: str
    bits: int | None
    """Of the quantized language model and projector."""
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Measurement:
    """One kind at one size: the time of every part in every repeat.

    Parts by kind:
        encoder: tower (pixels on the device -> features)
        ttft: load_image, preprocess, encode (tower and projector), prefill, first_token and, by
            a clock around them, felt; tower, visual_prefill (projector, then the language model
            over the image tokens alone) and their sum, paper, which is the paper's definition
        decode: token (mean of one repeat's tokens)
        cold_start: first_text (process start -> first character on stdout), exit
        memory: none
    """

    kind: str
    implementation: str
    """OURS, a peer ("mlx-vlm 0.7.10") or another network ("ViT-L/14")."""
    image_size: int | None
    image_tokens: int | None
    prompt_tokens: int | None
    """Positions of the prompt, image tokens included; for decode, those before the first token."""
    answer_tokens: int | None
    seconds: dict[str, tuple[float, ...]]
    peak_memory: int | None
    """Most that MLX held at once, weights included."""
    process_memory: int | None
    """Resident set of the whole process after the runs, where the system tells."""
    launches: int | None
    """Kernels of one encode on Metal, counted from the graph."""
    moved: int | None
    """Bytes that those kernels read and write."""
    notes: tuple[str, ...] = ()

    @property
    def headline(self) -> str | None:
        """The part that stands for all: the kind's own, else the first."""
        part = HEADLINE.get(self.kind)
        return part if part in self.seconds else next(iter(self.seconds), None)

    @property
    def summaries(self) -> dict[str, Summary]:
        """Part -> median, percentiles and interval."""
        return {part: summarize(times) for part, times in self.seconds.items()}

    @property
    def drift(self) -> Drift | None:
        """Of the headline part."""
        return drift_of(self.seconds[self.headline]) if self.headline else None


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why."""

    kind: str
    image_size: int | None
    reason: str


@dataclass(frozen=True)
class Record:
    """One run."""

    date: str
    """ISO 8601, UTC, of its beginning."""
    command: tuple[str, ...]
    machine: Machine
    conditions: Conditions
    software: Software
    subject: Subject
    measurements: tuple[Measurement, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    finished: bool = True
    """False if the run was interrupted or a part of it failed."""

    def find(
        self, kind: str, image_size: int | None = None, implementation: str = OURS
    ) -> Measurement | None:
        """The first measurement of that kind, at that size if one is given."""
        return next(
            (
                m
                for m in self.measurements
                if (m.kind, m.implementation) == (kind, implementation)
                and image_size in (None, m.image_size)
            ),
            None,
        )


def write_record(record: Record, path: Path) -> None:
    """Write the JSON document, whole or not at all. Raises BenchmarkError."""
    document = {"schema": SCHEMA, "version": VERSION, **asdict(record)}
    for plain, measurement in zip(document["measurements"], record.measurements, strict=True):
        plain["summary"] = {part: asdict(s) for part, s in measurement.summaries.items()}
        plain["drift"] = asdict(drift) if (drift := measurement.drift) else None
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise BenchmarkError(f"Cannot write {path}: {error.strerror or error}.") from error


def check_replaceable(path: Path) -> None:
    """Raise BenchmarkError if what stands at `path` is no record, of whatever version."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        document = None
    if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
        raise BenchmarkError(
            f"{path} exists and is no record of `fastvlm bench`, so it is not replaced; choose "
            "another name or remove it."
        )


def read_record(path: Path) -> Record:
    """Read and check a record. Raises BenchmarkError naming the file and what is wrong with it."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BenchmarkError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise BenchmarkError(f"{path} is not JSON ({error}).") from error
    if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
        raise BenchmarkError(
            f"{path} is not a result of `fastvlm bench`: its schema is not {SCHEMA!r}."
        )
    version = document.pop("version", None)
    if version != VERSION:
        raise BenchmarkError(
            f"{path} has version {version!r} of the record; this fastvlm-mlx reads {VERSION}. "
            "Measure again, or use the release that wrote it."
        )
    for derived in _dicts(document.get("measurements")):
        derived.pop("summary", None)
        derived.pop("drift", None)
    record: Record = _build(Record, document, str(path))
    for measurement in record.measurements:
        for part, times in measurement.seconds.items():
            if not times or not all(0 < t < float("inf") for t in times):
                raise BenchmarkError(
                    f"{path}: the times of {measurement.kind} {part!r} are not positive numbers."
                )
    return record


def _dicts(value: object) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value`, as JSON gives it, as a `kind`: a dataclass, a container or a plain type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin is types.UnionType:
        inner = next(a for a in arguments if a is not types.NoneType)
        return None if value is None else _build(inner, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_build(arguments[0], v, f"{where}[{n}]") for n, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _build(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        name = {tuple: "list", dict: "object"}.get(origin, getattr(kind, "__name__", str(kind)))
        raise BenchmarkError(f"{where} is {value!r:.60}; expected {name}.")
    return value


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise BenchmarkError(f"{where} is {value!r:.60}; expected an object.")
    hints = typing.get_type_hints(kind)
    missing, unknown = [n for n in hints if n not in value], [n for n in value if n not in hints]
    for names, what in ((missing, "lacks"), (unknown, "has the unknown")):
        if names:
            raise BenchmarkError(f"{where} {what} {', '.join(map(repr, names))}.")
    return kind(**{n: _build(hint, value[n], f"{where}: {n}") for n, hint in hints.items()})
