"""`fastvlm convert`: any dialect in, a verified checkpoint out. Only typer at import."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None, add_completion=False)

Progress = Callable[[str, int, int], None]


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Directory, .zip, Hub id, or 'nano'.")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DESTINATION", help="The directory to write.")
    ],
    bits: Annotated[
        int | None, typer.Option(help="2, 3, 4, 5, 6 or 8: language model and projector.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights per scale: 32, 64 or 128.", show_default="64")
    ] = None,
    mode: Annotated[str, typer.Option(help="affine, mxfp4, mxfp8 or nvfp4.")] = "affine",
    recipe: Annotated[
        str | None, typer.Option(help="uniform, mixed, auto, or a .toml file.")
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Bits per weight for --recipe auto.", show_default="4.5")
    ] = None,
    vision_bits: Annotated[
        int | None, typer.Option(help="Quantize the tower's matrix products.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16.", show_default="bfloat16, tower float16"),
    ] = None,
    layout: Annotated[str, typer.Option(help="fastvlm, mlx-vlm or apple.")] = "fastvlm",
    fuse_only: Annotated[
        bool, typer.Option("--fuse-only", help="Only fuse a training form; Apple's layout.")
    ] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write a quantized source as floats.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the checkpoint at the destination.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run source and result side by side.")
    ] = True,
    samples: Annotated[int, typer.Option(help="Questions to verify with.")] = 4,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Keep a result that fails verification.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the generated pictures.")] = 0,
    upload: Annotated[
        str | None, typer.Option(metavar="REPO", help="Then upload to this Hub repository.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; write nothing.")
    ] = False,
) -> None:
    """Fold a checkpoint's encoder, quantize it, check the result, write safetensors."""
    from fastvlm_mlx.cli.options import prepare_mlx

    prepare_mlx()
    from .conversion import Options, convert_checkpoint, describe_result
    from .plan import describe
    from .upload import check_repository
    from .upload import upload as upload_folder

    options = Options(
        bits=bits,
        group_size=group_size,
        mode=mode,
        recipe=recipe,
        target_bits=target_bits,
        vision_bits=vision_bits,
        dtype=dtype,
        layout=layout,
        fuse_only=fuse_only,
        dequantize=dequantize,
        verify=verify,
        samples=samples,
        keep_failed=keep_failed,
        overwrite=force,
        seed=seed,
    )
    if upload is not None:
        check_repository(upload)
    with _progress() as progress:
        done = convert_checkpoint(
            source,
            destination,
            options,
            revision=revision,
            dry_run=dry_run,
            say=_say,
            progress=progress,
        )
    if dry_run:
        print(describe(done.plan))
        return
    for line in describe_result(done):
        _say(line)
    print(destination)
    if upload is not None:
        _say(f"uploading to {upload}")
        print(upload_folder(destination, upload))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """Bars on stderr if a person is looking, nothing otherwise."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    last = 0.0
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def update(what: str, done: int, total: int) -> None:
            nonlocal last
            new = not bars.tasks or bars.tasks[-1].description != what
            now = time.monotonic()
            if not new and done < total and now - last < 0.1:
                return
            last = now
            if new:
                for task in list(bars.task_ids):
                    bars.remove_task(task)
                bars.add_task(what, amount="")
            megabytes = f"{done / 1e6:.0f}/{total / 1e6:.0f} MB"
            amount = megabytes if what in ("writing", "checking") else f"{done}/{total}"
            bars.update(bars.task_ids[-1], completed=done, total=total, amount=amount)

        yield update
