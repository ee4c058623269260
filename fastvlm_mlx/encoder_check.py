"""A model's encoder on this device, stage by stage: the forms in use beside the plain ones.

The self-checks of `ops` look at one operation on a small array. This looks at the shapes, weights
and sizes that a model really has, which is what a new device or MLX version has to be trusted with.
"""

import copy
import statistics
import time
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_map

from . import ops
from .config import SIDE_MULTIPLE
from .errors import OptionError
from .ops.device import float32_is_exact
from .ops.selfcheck import TOLERANCE, relative_error
from .vision import FastViTHD

__all__ = ["EncoderCheck", "StageCheck", "check_encoder"]

_RUNS, _PATIENCE = 5, 3.0  # timed runs at most, and seconds after which none is begun


@dataclass(frozen=True)
class StageCheck:
    """One stage's map against the plain forms in float32, relative to its largest magnitude."""

    stage: str
    error: float  # of the forms in use
    rounding: float  # of the plain forms in the same type: what the type alone costs
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class EncoderCheck:
    """What `check_encoder` found; seconds are medians of whole encoder runs."""

    side: int
    dtype: mx.Dtype
    stages: tuple[StageCheck, ...]
    seconds: float
    plain_seconds: float

    @property
    def passed(self) -> bool:
        return all(stage.passed for stage in self.stages)


def check_encoder(tower: FastViTHD, side: int) -> EncoderCheck:
    """Run `tower` on a square picture of noise: as it is, in plain forms, and these in float32.

    A stage passes if its error is at most twice that of the plain forms in the same type, or
    within what `ops.selfcheck` allows a single operation; in float32 that is twice float16's
    where the library's own products are TF32. Needs the memory of one more tower in float32.
    Raises OptionError unless `side` is a positive multiple of 64.
    """
    if side <= 0 or side % SIDE_MULTIPLE:
        raise OptionError(f"image size {side}; expected a positive multiple of {SIDE_MULTIPLE}.")
    pixels = mx.random.uniform(shape=(1, side, side, 3), key=mx.random.key(0))
    dtype: mx.Dtype = tower.stem.conv.weight.dtype
    maps, seconds = _run(tower, pixels)
    with ops.assume("reference"):
        rounded, plain_seconds = _run(tower, pixels)
        wide = rounded if dtype == mx.float32 else _run(_in_float32(tower), pixels, repeat=False)[0]
    allowed = TOLERANCE[dtype]
    if dtype == mx.float32 and not float32_is_exact():
        allowed = 2 * TOLERANCE[mx.float16]
    stages = []
    for stage, expected in wide.items():
        rounding = relative_error(rounded[stage], expected)
        limit = max(2 * rounding, allowed)
        error = relative_error(maps[stage], expected)
        stages.append(StageCheck(stage, error, rounding, limit))
    return EncoderCheck(side, dtype, tuple(stages), seconds, plain_seconds)


def _run(
    tower: FastViTHD, pixels: mx.array, repeat: bool = True
) -> tuple[dict[str, mx.array], float]:
    """Every stage's map, and the median seconds of a run; the first of several is not counted."""
    # As `FastVLM` runs it: one compiled graph on a GPU.
    on_gpu = mx.default_device() == mx.gpu
    encode = mx.compile(tower.feature_maps) if on_gpu else tower.feature_maps
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (repeat and len(times) <= _RUNS and time.perf_counter() - begin < _PATIENCE):
        start = time.perf_counter()
        maps = encode(pixels)
        mx.eval(maps)
        times.append(time.perf_counter() - start)
    return maps, statistics.median(times[1:] or times)


def _in_float32(tower: FastViTHD) -> FastViTHD:
    """A copy with wide weights; of a quantized product, scales and biases are."""
    wide = copy.deepcopy(tower)
    wide.update(
        tree_map(
            lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a,
            tower.parameters(),
        )
    )
    return wide
