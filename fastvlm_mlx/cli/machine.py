"""`fastvlm info` and `fastvlm doctor`: facts about a checkpoint, and about this machine."""

from typing import Annotated

import typer

from .options import Json, prepare_mlx
from .output import print_facts, say

__all__ = ["doctor", "info"]


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for --model.")],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is: dialect, architecture, sizes, memory. Reads no weights."""
    prepare_mlx()
    from ..checkpoint.source import checkpoint_folder
    from ..report import describe_checkpoint

    with checkpoint_folder(model, announce=say) as folder:
        print_facts(describe_checkpoint(folder), as_json)


def doctor(as_json: Json = False) -> None:
    """Check this machine: device, MLX, BLAS, compiler, operations in use, Hub."""
    prepare_mlx()
    from ..report import describe_machine

    print_facts(describe_machine(), as_json)
