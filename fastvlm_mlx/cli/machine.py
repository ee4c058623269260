"""`fastvlm info` and `fastvlm doctor`: facts about a checkpoint, and about this machine."""

import sys
from typing import Annotated

import typer

from ..errors import OptionError
from .options import Json, ModelOptions, prepare_mlx
from .output import print_facts, say

__all__ = ["doctor", "info"]


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for --model.")],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is: dialect, architecture, sizes, memory.

    Reads no weights. Of a model on the Hub it fetches headers only, but .bin files whole.
    """
    prepare_mlx()
    from ..checkpoint.source import checkpoint_folder
    from ..report import describe_checkpoint

    with checkpoint_folder(model, announce=say, headers_only=True) as folder:
        print_facts(describe_checkpoint(folder), as_json)


def doctor(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", help="Also run this model's encoder."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="At this size; default: the model's own.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="In float32, float16 or bfloat16.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine: device, MLX, BLAS, compiler, operations, Hub.

    With --model, its encoder is run on this device in the forms in use and in plain ones, at full
    size and with its own weights, and compared stage by stage; exit code 1 if they differ.
    """
    if model is None and (image_size or dtype):
        raise OptionError("--image-size and --dtype belong to --model MODEL.")
    prepare_mlx()
    from ..encoder_check import check_encoder
    from ..report import describe_encoder, describe_machine

    if model is None:
        print_facts(describe_machine(), as_json)
        return
    vlm = ModelOptions(model, dtype=dtype).load()
    side = image_size or vlm.config.vision.image_size
    if sys.stderr.isatty():
        say(f"Running the encoder at {side} x {side} in three ways ...")
    check = check_encoder(vlm.vision, side)
    print_facts(describe_machine() | describe_encoder(check), as_json)
    if not check.passed:
        say(
            "fastvlm: the encoder's fast forms are wrong here (WRONG above). FASTVLM_OPS=reference "
            "turns them off; please report this output."
        )
        raise typer.Exit(1)
