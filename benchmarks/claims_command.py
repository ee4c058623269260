"""`fastvlm bench claims` and `fastvlm bench roofline`: options in, tables out."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fastvlm_mlx.cli.options import prepare_mlx, spread

from .options import JsonFile, SubjectOptions, typed_command

__all__ = ["claims", "roofline"]


def claims(
    quick: Annotated[
        bool, typer.Option("--quick", help="Estimate or leave out what is too large or too slow.")
    ] = False,
    claim: Annotated[
        list[str] | None,
        typer.Option("--claim", help="Only this one, for example 85x; repeatable."),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16.")] = (
        None
    ),
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Runs of each part, time permitting.")
    ] = 5,
    limit: Annotated[
        float,
        typer.Option("--limit", min=0.1, help="With --quick: seconds that one run may take."),
    ] = 60.0,
    json: JsonFile = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", metavar="FILE", help="Keep what this record has, measure the rest."
        ),
    ] = None,
) -> None:
    """The paper's claims (85x, 3.2x ...) as ratios on this machine.

    With random weights of the published shapes.
    """
    prepare_mlx()
    from .claims_run import Effort, begin, chosen, run
    from .claims_table import claim_lines
    from .session import Keeper

    wanted = chosen(claim or [])
    keeper = Keeper(begin(wanted, dtype, resume), json or resume)
    try:
        with keeper, _status() as show:
            for result in run(
                keeper.record,
                wanted,
                Effort(quick, repeat, limit),
                lambda piece, plan: show(f"{piece}: {plan.repeat} x {plan.seconds:.1f} s or more"),
            ):
                keeper.add(result)
    finally:
        # Also after Ctrl-C: what was measured so far.
        print(*claim_lines(wanted, keeper.record), sep="\n", flush=True)


@spread
def roofline(
    subject: SubjectOptions,
    size: Annotated[int, typer.Option("--size", help="Input side, a multiple of 64.")] = 1024,
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Runs of each part, after one to warm up.")
    ] = 5,
    json: JsonFile = None,
) -> None:
    """Every part of the model beside the least time for it.

    That is the least time that this machine could take.
    """
    prepare_mlx()
    from .roofline_measure import measure_roofline
    from .running import check_size
    from .session import Keeper, new_record

    choice = subject.choice()
    check_size(size)
    keeper = Keeper(new_record(typed_command(), None), json)
    with keeper, _status() as show:
        lines = measure_roofline(choice, size, repeat, keeper, show)
    print(*lines, sep="\n")


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """What is being measured, on stderr, if a person is looking."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update
