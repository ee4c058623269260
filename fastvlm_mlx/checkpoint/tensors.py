"""The one record every checkpoint reader hands out: a tensor that has not been read yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["TensorRef"]


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file: what it is, and how to read it.

    `dtype` is spelt as in safetensors ("F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", ...) and
    is the type in the file; `load()` reads the values, and raises CheckpointError if it cannot.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], mx.array] = field(repr=False, compare=False)
