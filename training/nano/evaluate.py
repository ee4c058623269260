"""Accuracy on scenes never trained on, by kind of question and input size.

    python -m training.nano.evaluate --model nano --scenes 1000 --sizes 128,192,256,384,512

Asks through the package's public interface, as a user would.  `--run NAME` asks a training
run's averaged weights in PyTorch instead, with the same scoring.  Questions about two pictures
(`--pairs`) are put to the package only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from .drawing import render
from .language import CAPTION
from .scenes import HELD_OUT, Scene, make_scene
from .scoring import Score, judge_all, judge_pairs

Ask = Callable[[Image.Image, Sequence[str]], list[str]]
AskPair = Callable[[tuple[Image.Image, Image.Image], str], str]
MOST_TOKENS = 80


def package_model(
    name: str, size: int, quantize: int | None
) -> tuple[Ask, AskPair, Callable[[Image.Image], float], str]:
    """How to ask a model of the package, also about two pictures, how to time it, and where."""
    from fastvlm_mlx.blas import load_openblas

    load_openblas()
    import fastvlm_mlx as fv
    from fastvlm_mlx.benchmarks.machine import describe_software, this_machine
    from fastvlm_mlx.benchmarks.reporting.words import where

    vlm = fv.load(name, image_size=size, quantize=quantize, feature_cache=None)

    def ask(image: Image.Image, questions: Sequence[str]) -> list[str]:
        encoded = vlm.encode(image)
        answers = vlm.ask_batch([(encoded, q) for q in questions], max_tokens=MOST_TOKENS)
        return [answer.text for answer in answers]

    def ask_pair(images: tuple[Image.Image, Image.Image], question: str) -> str:
        return vlm.ask(images, question, max_tokens=MOST_TOKENS).text

    def first_token(image: Image.Image) -> float:
        return vlm.ask(image, CAPTION, max_tokens=1).ttft

    dtype = str(vlm.network.language_model.model.norm.weight.dtype).removeprefix("mlx.core.")
    now = datetime.now(UTC).isoformat()
    place = where(this_machine(), describe_software().mlx, dtype, now)
    return ask, ask_pair, first_token, place


def run_model(run: str, size: int) -> Ask:
    from .decode import Reader
    from .train import RUNS

    return Reader(RUNS / run, size).ask


def with_progress(scenes: Sequence[Scene], label: str) -> Iterator[Scene]:
    """Yield the scenes, telling on a terminal how far it is."""
    begun = time.monotonic()
    for done, scene in enumerate(scenes):
        if sys.stderr.isatty():
            left = (time.monotonic() - begun) / max(done, 1) * (len(scenes) - done)
            print(f"\r{label}: {done}/{len(scenes)}, {left:.0f} s left ", end="", file=sys.stderr)
        yield scene
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)


def table(columns: dict[int, dict[str, float]]) -> str:
    """Markdown: one row per measure, one column per input size."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [
        "| | " + " | ".join(f"{size} px" for size in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in names:
        cells = []
        for column in columns.values():
            value = column.get(name)
            timed = name.startswith("TTFT")
            cells.append(
                "" if value is None else f"{value:.1f}" if timed else f"{100 * value:.1f}%"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ordered(score: Score) -> dict[str, float]:
    """Headline figures first, then the details."""
    shares = score.shares()
    first = ("object statements", "questions", "text", "whole captions")
    return {
        name: shares[name] for name in (*first, *sorted(set(shares) - set(first))) if name in shares
    }


def _ask_pairs(pairs: Sequence[tuple[Scene, Scene]], ask: AskPair, order: int) -> dict[str, float]:
    """Shares of right answers; with `order` -1 the pictures are shown the wrong way round."""
    score = judge_pairs(pairs, lambda scenes, q: ask(tuple(render(s) for s in scenes[::order]), q))
    if order > 0:
        return score.shares()
    return {"two pictures, shown the wrong way round": score.shares()["two pictures"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="nano", help="anything that fastvlm_mlx.load takes")
    parser.add_argument("--run", help="a training run in PyTorch instead of a model of the package")
    parser.add_argument("--quantize", type=int, help="bits to quantize the model to while loading")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=200, help="questions about two pictures")
    parser.add_argument("--sizes", default="128,192,256,384,512")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()

    scenes = [make_scene(HELD_OUT + i) for i in range(options.scenes)]
    seeds = range(HELD_OUT, HELD_OUT + 2 * options.pairs, 2)
    pairs = [(make_scene(seed), make_scene(seed + 1)) for seed in seeds]
    columns: dict[int, dict[str, float]] = {}
    where = ""
    for size in map(int, options.sizes.split(",")):
        if options.run:
            ask, ask_pair, first_token = run_model(options.run, size), None, None
        else:
            ask, ask_pair, first_token, where = package_model(options.model, size, options.quantize)
        label = f"{size} px"
        score = judge_all(
            with_progress(scenes, label), lambda scene, q, ask=ask: ask(render(scene), q)
        )
        columns[size] = ordered(score)
        if ask_pair:
            columns[size] |= {
                name: share
                for order in (1, -1)
                for name, share in _ask_pairs(pairs, ask_pair, order).items()
            }
        if first_token:
            times = [first_token(render(scene)) for scene in scenes[:21]]
            columns[size]["TTFT, ms (median)"] = 1000 * statistics.median(times[1:])
    print(table(columns))
    if options.json:
        report = {
            "model": options.run or options.model,
            "scenes": options.scenes,
            "where": where,
            "sizes": columns,
            "quantize": options.quantize,
        }
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
