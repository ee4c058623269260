"""`fastvlm convert`: any dialect in, this library's folded format out."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint: directory, .zip or Hub id.")],
    destination: Annotated[Path, typer.Argument(help="The directory to write.")],
    bits: Annotated[int | None, typer.Option(help="Quantize the language model.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    force: Annotated[bool, typer.Option(help="Replace the destination if it exists.")] = False,
) -> None:
    """Fold a checkpoint's encoder, optionally quantize, and write it as safetensors."""
    from fastvlm_mlx.blas import load_openblas

    load_openblas()
    from .conversion import convert_checkpoint

    size = convert_checkpoint(source, destination, bits=bits, dtype=dtype, overwrite=force)
    print(f"{destination}: {size / 1e6:.1f} MB")
