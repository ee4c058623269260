"""This library beside mlx-vlm, in one process: same weights, same BLAS, same picture, in turn.

    pip install mlx-vlm==0.7.10            # in an environment of its own, with this package
    python -m fastvlm_mlx.benchmarks.beside_mlx_vlm CHECKPOINT [--repeat 5] [--json FILE]

CHECKPOINT is in mlx-vlm's layout, for example from
`fastvlm_mlx.testing.random_checkpoint(path, "0.5b", "mlx-vlm", tokenizer=DIR)`. Features and first
tokens are compared before anything is timed; everything runs in float32.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvlm_mlx.blas import load_openblas

load_openblas()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import PIL.Image  # noqa: E402

import fastvlm_mlx as fv  # noqa: E402

QUESTION = "Describe the image."


def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = compare(options.checkpoint, options.repeat)
    for name, value in results.items():
        print(f"{name:<32} {value:.4g}" if isinstance(value, float) else f"{name:<32} {value}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def compare(checkpoint: Path, repeat: int) -> dict[str, Any]:
    """Errors, medians in seconds, ratios and peak memory in GB."""
    from mlx_vlm import load as load_peer
    from mlx_vlm import stream_generate
    from mlx_vlm.prompt_utils import apply_chat_template

    peer, processor = load_peer(str(checkpoint))
    peer.set_dtype(mx.float32)
    mx.eval(peer.parameters())
    ours = fv.load(checkpoint, dtype="float32", feature_cache=None)
    prompt = apply_chat_template(processor, peer.config, QUESTION, num_images=1)
    picture = _twelve_megapixels()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.jpg"
        file.write_bytes(picture)

        def our_first_token() -> int:
            return next(ours.stream(file, QUESTION, max_tokens=1)).token

        def their_first_token() -> int:
            answer = stream_generate(
                peer, processor, prompt, image=[str(file)], max_tokens=1, temperature=0.0
            )
            return int(next(iter(answer)).token)

        side = ours.config.vision.image_size
        pixels = mx.random.uniform(shape=(1, side, side, 3), key=mx.random.key(0))

        def our_features() -> mx.array:
            return ours.vision(pixels)

        def their_features() -> mx.array:
            features: mx.array = peer.vision_tower(pixels)[1]
            return features.reshape(1, -1, features.shape[-1])

        exact = their_features()
        error = mx.abs(our_features() - exact).max() / mx.abs(exact).max()
        results: dict[str, Any] = {
            "feature error": float(error),
            "same first token": our_first_token() == their_first_token(),
            "input": f"{side} x {side}",
        }
        results |= _in_turn("encoder", _evaluated(our_features), _evaluated(their_features), repeat)
        results |= _in_turn("ttft", our_first_token, their_first_token, repeat)
    return results


def _evaluated(function: Callable[[], mx.array]) -> Callable[[], None]:
    return lambda: mx.eval(function())


def _in_turn(
    name: str, ours: Callable[[], object], theirs: Callable[[], object], repeat: int
) -> dict[str, float]:
    """Median seconds of both, run alternately after one warm-up each, and the median ratio."""
    seconds: dict[str, list[float]] = {"ours": [], "mlx-vlm": []}
    peaks: dict[str, float] = {}
    for number in range(repeat + 1):
        for who, function in (("ours", ours), ("mlx-vlm", theirs)):
            mx.clear_cache()
            mx.reset_peak_memory()
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if number:
                seconds[who].append(elapsed)
                peaks[who] = max(peaks.get(who, 0.0), mx.get_peak_memory() / 1e9)
    pairs = zip(seconds["mlx-vlm"], seconds["ours"], strict=True)
    return {
        f"{name} ours, s": statistics.median(seconds["ours"]),
        f"{name} mlx-vlm, s": statistics.median(seconds["mlx-vlm"]),
        f"{name} ratio": statistics.median(theirs / ours for theirs, ours in pairs),
        f"{name} peak ours, GB": peaks["ours"],
        f"{name} peak mlx-vlm, GB": peaks["mlx-vlm"],
    }


def _twelve_megapixels() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (378, 504, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise).resize((4032, 3024), PIL.Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
