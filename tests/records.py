"""Records with known numbers, for the tests of the report."""

import dataclasses
from pathlib import Path
from typing import Any

from fastvlm_mlx.benchmarks.record import (
    Conditions,
    Machine,
    Measurement,
    Operation,
    Record,
    Software,
    Subject,
)
from fastvlm_mlx.benchmarks.reporting.document import Document, Section

PARTS = ("load_image", "preprocess", "encode", "prefill", "first_token")
SIZES = Path(__file__).resolve().parents[1] / "training/nano/results/sizes-1000-scenes.json"


def measured(kind: str, size: int | None, seconds: dict[str, Any], **more: Any) -> Measurement:
    empty = {f.name: None for f in dataclasses.fields(Measurement) if f.name != "notes"}
    known = {"kind": kind, "implementation": "fastvlm-mlx", "image_size": size, "seconds": seconds}
    return Measurement(**empty | known | more)


def encoder(size: int, median: float) -> Measurement:
    return measured("encoder", size, {"tower": (median, 0.9 * median, 1.2 * median)})


def ttft(size: int, *parts: float, felt: float, paper: float) -> Measurement:
    seconds = {name: (part,) * 3 for name, part in zip(PARTS, parts, strict=True)}
    seconds |= {"felt": (felt, felt, 1.5 * felt), "paper": (0.5 * paper, paper, paper)}
    return measured(
        "ttft", size, seconds, image_tokens=(size // 64) ** 2, peak_memory=1_500_000_000
    )


def a_record(*measurements: Measurement, **more: Any) -> Record:
    plain: dict[str, Any] = {
        "date": "2026-11-20T12:00:00+00:00",
        "command": ("bench", "all", "--json", "a file.json"),
        "machine": Machine("A chip", 8, "A GPU", 10, 1 << 34, "macOS 26.0, arm64", "Metal"),
        "conditions": Conditions("mains", False, 0.4),
        "software": Software("0.1.0", None, "3.12.0", "0.32.4", "0.32.2", "Accelerate", None),
        "subject": Subject(
            "random 0.5b",
            {"vision": 122_710_000, "language_model": 494_000_000},
            "bfloat16",
            "float16",
            None,
            (Operation("gelu", "plain"),),
        ),
        "measurements": measurements,
    }
    return Record(**plain | more)


def full_record() -> Record:
    """Three sizes of encoder and TTFT, and decoding."""
    return a_record(
        encoder(512, 0.0301),
        ttft(512, 0.004, 0.0151, 0.031, 0.05, 0.001, felt=0.1013, paper=0.08125),
        encoder(1024, 0.1162),
        ttft(1024, 0.004, 0.02, 0.12, 0.06, 0.001, felt=1.2345, paper=0.1668),
        encoder(1536, 0.25),
        ttft(1536, 0.004, 0.02, 0.26, 0.13, 0.001, felt=0.43, paper=0.39),
        measured("decode", None, {"token": (0.004, 0.004, 0.005)}, prompt_tokens=280),
    )


def section(document: Document, name: str) -> Section:
    return next(s for s in document.sections if s.name == name)


def rows(found: Section) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in found.tables[0].rows}
