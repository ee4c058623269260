"""The CPU as MLX sees it: a stream is one thread, memory comes from malloc, caches are small."""

import ctypes
import functools
import itertools
import os
import sys
import threading
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx

STRIP = 400_000  # elements of a strip of a map: its partial sums stay in the L3 cache
SMALL = 1 << 16
"""Elements of a result up to which the plain forms serve. The fast ones of convolution and
attention are some twenty loops compiled by g++: seconds at their first use on a machine."""
_MAX_STREAMS = 8


def strips(
    rows: int, row_size: int, *, size: int = STRIP, at_least: int = 1
) -> list[tuple[int, int]]:
    """Cut `rows` rows into equal strips of about `size` elements: (start, stop) of each."""
    count = min(rows, max(at_least, round(rows * row_size / size), 1))
    return list(itertools.pairwise(rows * i // count for i in range(count + 1)))


def parallel() -> int:
    """How many streams to spread elementwise work over.

    One outside the main thread: MLX 0.32.4 aborts at exit when another thread has compiled a
    graph of two streams.
    """
    if threading.current_thread() is not threading.main_thread():
        return 1
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MAX_STREAMS)
    return min(os.cpu_count() or 1, _MAX_STREAMS)


def stream(number: int) -> AbstractContextManager[object]:
    """The context in which strip `number` is computed, so that strips take turns over streams."""
    index = number % parallel()
    return mx.stream(_stream(index)) if index else nullcontext()


@functools.cache
def _stream(index: int) -> mx.Stream:
    return mx.new_stream(mx.cpu)


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what it has been given, unless the user has tuned it.

    MLX's CPU buffers are malloc'ed; by default glibc returns large ones to the kernel at once,
    and the page faults of getting them back take longer than a depthwise convolution.
    """
    if not sys.platform.startswith("linux") or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)  # glibc's maximum
