"""`fastvlm bench`: how fast this machine is."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fastvlm_mlx.cli.options import prepare_mlx, spread
from fastvlm_mlx.cli.output import say

from .claims_command import claims, roofline
from .options import (
    Context,
    EffortOptions,
    JsonFile,
    Sizes,
    SubjectOptions,
    integers,
    seconds_of,
    typed_command,
)
from .reporting.command import report

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)

_MEASURED = {
    "encoder": "Latency of the encoder, by input size.",
    "ttft": "Time to first token by input size, part by part.",
    "decode": "Tokens per second after a prompt of --context positions.",
    "memory": "Peak memory by input size.",
    "all": "All of these, and the start of a new process.",
}


@app.callback()
def _root() -> None:
    """Measure encoder latency and time to first token on this machine."""


def _command(name: str) -> Callable[..., None]:
    """The command for one kind of measurement, or "all", with the options that bear on it."""

    def run(
        subject: SubjectOptions, effort: EffortOptions, sizes: str | None, context: int | None
    ) -> None:
        prepare_mlx()
        from .running import KINDS
        from .session import run_session

        finished = run_session(
            subject.choice(),
            KINDS if name == "all" else (name,),
            effort.chosen_sizes(sizes),
            effort.effort(),
            context,
            effort.json,
            typed_command(),
        )
        if not finished:
            raise typer.Exit(1)

    def by_size(subject: SubjectOptions, sizes: Sizes = None, *, effort: EffortOptions) -> None:
        run(subject, effort, sizes, None)

    def decode(subject: SubjectOptions, context: Context = None, *, effort: EffortOptions) -> None:
        run(subject, effort, None, context)

    def everything(
        subject: SubjectOptions,
        sizes: Sizes = None,
        context: Context = None,
        *,
        effort: EffortOptions,
    ) -> None:
        run(subject, effort, sizes, context)

    commands: dict[str, Callable[..., None]] = {"decode": decode, "all": everything}
    return spread(commands.get(name, by_size))


for _name, _help in _MEASURED.items():
    app.command(_name, help=_help)(_command(_name))


@app.command()
def count(
    size: Annotated[int, typer.Option(help="Input side, a multiple of 64.")] = 1024,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
) -> None:
    """Launches, bytes and FLOPs of one encode on Metal.

    They are counted from FastViTHD's graph.
    """
    prepare_mlx()
    from fastvlm_mlx.config import VisionConfig
    from fastvlm_mlx.errors import OptionError
    from fastvlm_mlx.opening import DTYPES
    from fastvlm_mlx.vision import FastViTHD

    from .counting import count_encoder, total
    from .running import check_size

    if dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    costs = count_encoder(FastViTHD(VisionConfig()), check_size(size), DTYPES[dtype])
    print(f"{'':<8} {'launches':>8} {'GB':>7} {'GFLOP':>8}")
    for name, cost in [*costs.items(), ("total", total(costs.values()))]:
        launches, moved, work = len(cost.launches), cost.bytes / 1e9, cost.flops / 1e9
        print(f"{name:<8} {launches:>8} {moved:>7.3f} {work:>8.1f}")


@app.command()
def compare(
    records: Annotated[
        list[Path],
        typer.Argument(metavar="A B [A2 B2 ...]", help="Records from --json, before and after."),
    ],
) -> None:
    """Which medians differ between records by more than noise.

    Two starts of the same program can differ, too. With further pairs, taken in turn, a change
    is told only where every pair shows it.
    """
    prepare_mlx()
    from fastvlm_mlx.errors import OptionError

    from .comparison import compare_pairs
    from .record import read_record
    from .tables import comparison_lines

    if len(records) % 2:
        raise OptionError(f"got {len(records)} records; expected pairs, before and after.")
    read = [read_record(path) for path in records]
    pairs = list(zip(read[::2], read[1::2], strict=True))
    print(*comparison_lines(compare_pairs(pairs)), sep="\n")


@app.command()
@spread
def peers(
    subject: SubjectOptions,
    peer: Annotated[
        list[str],
        typer.Option("--peer", metavar="NAME=PYTHON", help="mlx-vlm or transformers; repeatable."),
    ],
    size: Annotated[
        int | None, typer.Option("--size", help="Input side of a random model.")
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Runs, after one.")] = 6,
    json: JsonFile = None,
) -> None:
    """Other implementations beside this one.

    With the same weights and picture, in turn, outputs first. PYTHON belongs to an environment
    that has the peer. A checkpoint given with --model must be in a layout that all of them read.
    """
    prepare_mlx()
    from .measuring import Effort
    from .peer_session import run_peers
    from .peers import parse_peer
    from .running import check_size

    wanted = [parse_peer(text) for text in peer]
    side = check_size(size) if size is not None else None
    if not run_peers(
        subject.choice(), wanted, side, Effort(repeat, warmup=1), json, typed_command()
    ):
        raise typer.Exit(1)


@app.command()
@spread
def advise(
    subject: SubjectOptions,
    ttft: Annotated[str, typer.Option("--ttft", metavar="TIME", help="As in 200ms or 1.5s.")],
    sizes: Sizes = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Runs, after two.")] = 10,
) -> None:
    """The largest input whose first token comes in time here.

    And with the least quantization. In time means that nine of ten did. Quantized forms are tried
    where they are faster: on a GPU.
    """
    prepare_mlx()
    from .advisor import Candidate, candidates, choose
    from .measuring import Effort
    from .running import SIZES, check_sizes
    from .tables import advice_lines, skipped_row, status_line

    budget = seconds_of(ttft, "--ttft")
    chosen_sizes = SIZES if sizes is None else check_sizes(integers(sizes, "--sizes"))
    found = []
    with status_line() as watch:
        for one in candidates(subject.choice(), chosen_sizes, budget, Effort(repeat), watch):
            if isinstance(one, Candidate):
                found.append(one)
            else:
                say(skipped_row(one)[0])
    best = choose(found)
    print(*advice_lines(found, best, budget), sep="\n")
    if best is None:
        raise typer.Exit(1)


for _own in (claims, roofline, report):
    app.command()(_own)
