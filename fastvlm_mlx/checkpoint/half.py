"""Keeping float16 in range: how far to scale the residual streams of the attention stages.

The genuine towers reach about 6e4 in front of stage 5, float16 ends at 65504. A residual stream may
be multiplied by a power of two without changing a bit of the result: LayerNorm removes it (its
epsilon is told), and `fold.py` puts the inverse into the weights that read the stream.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..config import VisionConfig
from ..vision import FastViTHD
from .fold import fold_vision

__all__ = ["choose_residual_scales", "probe_pixels"]

_TARGET = 1024.0
"""Largest magnitude wanted on the probe: 64 times below float16's end, for pictures beyond it."""


def choose_residual_scales(
    config: VisionConfig, get: Callable[[str], mx.array]
) -> tuple[float, ...]:
    """Powers of two per stage that bring the residual streams of a probe picture to about 1000.

    `get` is `fold_vision`'s: canonical name -> float32 tensor. Runs the tower once in float32.
    """
    plain = dataclasses.replace(config, residual_scales=(1.0,) * len(config.layers))
    tower = FastViTHD(plain)
    tower.load_weights(list(fold_vision(plain, get)), strict=True)
    x = tower.stem(probe_pixels(config.image_size))
    scales = []
    for stage, attends in zip(tower.stages, config.attention, strict=True):
        x = stage.enter(x)
        peak = mx.abs(x).max()
        for block in stage.blocks:
            x = block(x)
            peak = mx.maximum(peak, mx.abs(x).max())
        scales.append(_scale(peak) if attends else 1.0)
    return tuple(scales)


def probe_pixels(side: int) -> mx.array:
    """A picture (1, side, side, 3) with flat, smooth, striped and noisy quarters."""
    ramp = mx.linspace(0, 1, side)
    smooth = mx.stack([mx.broadcast_to(ramp[:, None], (side, side))] * 3, axis=-1)
    stripes = (mx.arange(side) // 8 % 2).astype(mx.float32)[None, :, None]
    noise = mx.random.uniform(shape=(side, side, 3), key=mx.random.key(0))
    top = mx.arange(side)[:, None, None] < side // 2
    left = mx.arange(side)[None, :, None] < side // 2
    picture = mx.where(
        top, mx.where(left, mx.array([0.9, 0.2, 0.1]), smooth), mx.where(left, stripes, noise)
    )
    return picture[None]


def _scale(peak: mx.array) -> float:
    largest: Any = peak.item()
    return 1.0 if largest <= _TARGET else float(2.0 ** -math.ceil(math.log2(largest / _TARGET)))
