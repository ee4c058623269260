"""Repeated, warmed-up measurements of one request."""

import io
import statistics
from dataclasses import asdict

import numpy as np
import PIL.Image

import fastvlm_mlx as fv

__all__ = ["measure_ttft"]


def measure_ttft(
    model: str, image: str | None, repeat: int, image_size: int | None = None
) -> dict[str, tuple[float, float, float]]:
    """Milliseconds (median, minimum, maximum) of each part up to the first token, and of TTFT.

    The picture's bytes are in memory before the clock starts; everything after is counted.
    """
    vlm = fv.load(model, image_size=image_size, feature_cache=None)
    picture = _picture_bytes(image)
    runs = []
    for number in range(repeat + 2):
        answer = vlm.caption(picture, max_tokens=1)
        if number >= 2:
            runs.append({**asdict(answer.timings), "ttft": answer.ttft})
    return {
        name: (
            1000 * statistics.median(values),
            1000 * min(values),
            1000 * max(values),
        )
        for name in runs[0]
        if name != "decode"
        for values in [[run[name] for run in runs]]
    }


def _picture_bytes(image: str | None) -> bytes:
    if image is not None:
        with open(image, "rb") as file:  # noqa: PTH123 - a plain path or a device
            return file.read()
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise).resize((1600, 1200), PIL.Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
