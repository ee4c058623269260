"""Peak speeds: published ones by the chip's name, else measured ones. A roofline stands on them."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from .record import Machine

__all__ = ["CHIPS", "Chip", "Peaks", "measure_peaks", "peaks_of", "published_chip"]


@dataclass(frozen=True)
class Chip:
    """An Apple chip with its largest GPU."""

    name: str
    gpu_cores: int
    bandwidth: float
    """GB/s of memory."""
    tflops: float
    """float32; 16-bit products run at the same rate but where there are matrix units."""
    matrix_tflops: float | None
    """16-bit, by matrix units."""
    source: str
    smaller: tuple[tuple[int, float], ...] = ()
    """(GPU cores, GB/s) of variants whose memory is slower too."""


_METAL = "TFLOPS: philipturner/metal-benchmarks; bandwidth: Apple's specifications"
_PRESS = "Apple's specifications as quoted in the press"
_KNOWN = "; bandwidth commonly quoted, not seen in a source"
_M5 = "bandwidth: press; 16-bit matrix rate estimated from tzakharko.github.io's A19 measurement"

CHIPS = (
    Chip("M1", 8, 68, 2.6, None, _METAL),
    Chip("M1 Pro", 16, 200, 5.3, None, _METAL),
    Chip("M1 Max", 32, 400, 10.6, None, _METAL),
    Chip("M1 Ultra", 64, 800, 21.2, None, _METAL + _KNOWN),
    Chip("M2", 10, 100, 3.6, None, _METAL),
    Chip("M2 Pro", 19, 200, 6.8, None, _METAL + _KNOWN),
    Chip("M2 Max", 38, 400, 13.6, None, _METAL + _KNOWN),
    Chip("M2 Ultra", 76, 800, 27.2, None, _METAL + _KNOWN),
    Chip("M3", 10, 100, 4.1, None, _PRESS + _KNOWN),
    Chip("M3 Pro", 18, 150, 7.4, None, _PRESS),
    Chip("M3 Max", 40, 400, 16.2, None, _PRESS, ((30, 300),)),
    Chip("M3 Ultra", 80, 819, 28, None, _PRESS + _KNOWN),
    Chip("M4", 10, 120, 4.6, None, _PRESS),
    Chip("M4 Pro", 20, 273, 9.2, None, _PRESS),
    Chip("M4 Max", 40, 546, 18.4, None, _PRESS, ((32, 410),)),
    Chip("M5", 10, 153, 3.76, 17, "float32 measured on a fanless M5; " + _M5),
    Chip("M5 Pro", 20, 307, 9, 35, "float32 estimated; " + _M5),
    Chip("M5 Max", 40, 614, 18, 70, "float32 estimated; " + _M5),
)
"""Figures of vendors and of third parties; none was measured by this project."""


@dataclass(frozen=True)
class Peaks:
    """The two limits of a roofline."""

    flops: float
    """Per second, in matrix products of the dtype in use."""
    bandwidth: float
    """Bytes per second, read or written."""
    source: str


def published_chip(name: str, gpu_cores: int | None = None) -> Chip | None:
    """The chip of a device or processor name such as "Apple M1 Max", at that many GPU cores.

    A smaller GPU of the same chip has a proportional part of the TFLOPS. None for other names.
    """
    found = re.search(r"\b(M\d+)(?: (Pro|Max|Ultra))?\b", name)
    wanted = " ".join(part for part in found.groups() if part) if found else None
    chip = next((c for c in CHIPS if c.name == wanted and "Apple" in name), None)
    if chip is None or gpu_cores is None or not 0 < gpu_cores < chip.gpu_cores:
        return chip
    part = gpu_cores / chip.gpu_cores
    return Chip(
        chip.name,
        gpu_cores,
        dict(chip.smaller).get(gpu_cores, chip.bandwidth),
        chip.tflops * part,
        None if chip.matrix_tflops is None else chip.matrix_tflops * part,
        f"{chip.source}; TFLOPS scaled from {chip.gpu_cores} GPU cores to {gpu_cores}",
    )


def peaks_of(machine: Machine, dtype: mx.Dtype) -> Peaks:
    """Published peaks where the device is an Apple GPU that is known, else measured ones."""
    if machine.device == "Metal":
        chip = published_chip(machine.gpu or machine.chip or "", machine.gpu_cores)
        if chip:
            fast = chip.matrix_tflops if dtype != mx.float32 else None
            return Peaks(1e12 * (fast or chip.tflops), 1e9 * chip.bandwidth, chip.source)
    return measure_peaks(dtype)


def measure_peaks(dtype: mx.Dtype, repeat: int = 3) -> Peaks:
    """The best of a few large products and copies on the default device, in a second or two.

    This is what MLX reaches at its best, not what the silicon could. Memory is read by a product
    with a vector too: MLX copies with one thread on a CPU, its BLAS reads with all of them.
    """
    on_gpu = mx.default_device() == mx.gpu
    n, wide = (8192, 16384) if on_gpu else (2048, 8192)
    a, b = (mx.random.normal((n, n), key=mx.random.key(k)).astype(dtype) for k in (0, 1))
    large, vector = mx.zeros((wide, wide), dtype), mx.zeros((1, wide), dtype)
    mx.eval(a, b, large, vector)
    product = _best(lambda: a @ b, repeat)
    copied = 2 * large.nbytes / _best(lambda: large + 1, repeat)
    read = large.nbytes / _best(lambda: vector @ large.T, repeat)
    return Peaks(
        2 * n**3 / product,
        max(copied, read),
        f"measured: product of two {n} x {n} matrices; "
        f"{'copying' if copied > read else 'product of a vector with'} {large.nbytes >> 20} MiB",
    )


def _best(function: Callable[[], mx.array], repeat: int) -> float:
    """Seconds of the fastest run after one that warms up."""
    mx.eval(function())
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        mx.eval(function())
        best = min(best, time.perf_counter() - start)
    return best
