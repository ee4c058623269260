"""`fastvlm bench`: how fast this machine is."""

from typing import Annotated

import typer

from .reporting.command import report

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Measure encoder latency and time to first token on this machine."""


@app.command()
def ttft(
    model: Annotated[str, typer.Option("--model", "-m", help="As for `fastvlm caption`.")] = "nano",
    image: Annotated[
        str | None, typer.Option(help="A picture; a generated one by default.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Measured runs, after two warm-up runs.")] = 10,
    image_size: Annotated[int | None, typer.Option(help="Input side, a multiple of 64.")] = None,
) -> None:
    """Time to first token, part by part: medians over repeated runs in one process."""
    from fastvlm_mlx.blas import load_openblas

    load_openblas()
    from .latency import measure_ttft

    for name, (median, low, high) in measure_ttft(model, image, repeat, image_size).items():
        print(f"{name:<12} {median:9.1f} ms   ({low:.1f} to {high:.1f})")


@app.command()
def count(
    side: Annotated[int, typer.Option(help="Input side, a multiple of 64.")] = 1024,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
) -> None:
    """Kernel launches, bytes and FLOPs of one FastViTHD encode on Metal, counted from the graph."""
    from fastvlm_mlx.config import VisionConfig, check_side
    from fastvlm_mlx.errors import OptionError
    from fastvlm_mlx.vision import FastViTHD
    from fastvlm_mlx.vlm import DTYPES

    from .counting import count_encoder, total

    if dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    costs = count_encoder(FastViTHD(VisionConfig()), check_side(side, "side"), DTYPES[dtype])
    print(f"{'':<8} {'launches':>8} {'GB':>7} {'GFLOP':>8}")
    for name, cost in [*costs.items(), ("total", total(costs.values()))]:
        launches, moved, work = len(cost.launches), cost.bytes / 1e9, cost.flops / 1e9
        print(f"{name:<8} {launches:>8} {moved:>7.3f} {work:>8.1f}")


app.command()(report)
