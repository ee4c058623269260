"""What a person asks of a conversion: one frozen object, checked before anything is opened."""

from collections.abc import Callable
from dataclasses import dataclass

from fastvlm_mlx.checkpoint.writing import SHARD_BYTES
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.opening import DTYPES

__all__ = ["Options", "Progress", "Say"]

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
"""Told (what is being done, done, total): bytes while "writing" or "checking", else steps."""


@dataclass(frozen=True)
class Options:
    """What to make of a checkpoint; checked when made. Raises OptionError."""

    bits: int | None = None
    """Of the language model and projector; None leaves them in floating point."""
    group_size: int | None = None
    mode: str = "affine"
    recipe: str | None = None
    """"uniform", "mixed", "auto", or a TOML file."""
    target_bits: float | None = None
    """Bits per weight, scales included, that recipe "auto" may spend."""
    vision_bits: int | None = None
    dtype: str | None = None
    """Of what is not quantized. By default bfloat16, and float16 for a folded tower."""
    layout: str = "fastvlm"
    fuse_only: bool = False
    """Only fuse the tower's training form; Apple's names, the source's dtype."""
    dequantize: bool = False
    verify: bool = True
    samples: int = 4
    keep_failed: bool = False
    overwrite: bool = False
    seed: int = 0
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OptionError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}.")
        if self.samples < 1:
            raise OptionError(f"samples is {self.samples}; expected at least 1.")
        if self.target_bits is not None and self.recipe != "auto":
            raise OptionError("target_bits belongs to recipe 'auto'.")
        if self.target_bits is not None and not 2 < self.target_bits <= 16:
            raise OptionError(f"target_bits is {self.target_bits!r}; expected 2 to 16.")
        if self.layout != "fastvlm" and self.vision_bits is not None:
            raise OptionError("vision_bits needs layout 'fastvlm'; no other can hold them.")
        quantizes = self.quantizes or self.vision_bits is not None
        if self.fuse_only and (quantizes or self.dequantize or self.layout != "fastvlm"):
            raise OptionError("fuse_only goes with dtype alone.")
        if self.group_size is not None and not quantizes:
            raise OptionError(
                "group_size needs something to quantize: bits, recipe or vision_bits."
            )
        if self.dequantize and quantizes:
            raise OptionError("dequantize contradicts bits, mode, recipe and vision_bits.")
        if self.recipe == "auto" and (self.bits is not None or self.mode != "affine"):
            raise OptionError("Recipe 'auto' takes target_bits; it chooses bits itself.")

    @property
    def quantizes(self) -> bool:
        """Whether the language model and projector are to be quantized."""
        return self.bits is not None or self.mode != "affine" or self.recipe is not None

    @property
    def target_layout(self) -> str:
        """The layout to write."""
        return "apple" if self.fuse_only else self.layout
