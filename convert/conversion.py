"""Load, quantize, write."""

from pathlib import Path

import mlx.core as mx

from fastvlm_mlx.checkpoint.loading import load_checkpoint
from fastvlm_mlx.checkpoint.source import checkpoint_folder
from fastvlm_mlx.checkpoint.writing import save_checkpoint
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.vlm import DTYPES, quantize_linears

__all__ = ["convert_checkpoint"]


def convert_checkpoint(
    source: str,
    destination: Path,
    *,
    bits: int | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> int:
    """Write `source` to `destination` in the folded format; returns the bytes of the weights.

    With `bits`, the language model and projector are quantized. Raises OptionError,
    CheckpointError or HubError; `destination` is complete or untouched.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    if bits is not None and bits not in (2, 3, 4, 5, 6, 8):
        raise OptionError(f"bits is {bits!r}; expected 2, 3, 4, 5, 6 or 8.")
    with checkpoint_folder(source) as folder:
        loaded = load_checkpoint(folder, dtype=DTYPES[dtype])
        network = loaded.network
        quantization = None
        if bits is not None:
            for part in (network.language_model, network.projector):
                quantize_linears(part, bits, keep_packed=True)
            mx.eval(network.parameters())
            quantization = {"group_size": 64, "bits": bits, "mode": "affine"}
        save_checkpoint(
            destination,
            network,
            loaded.config,
            folder,
            source=source,
            recipe=f"{bits}-bit, {dtype}" if bits else dtype,
            quantization=quantization,
            overwrite=overwrite,
        )
    return (destination / "model.safetensors").stat().st_size
