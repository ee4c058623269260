"""The command line: the only place that prints or exits.

stdout carries the answer, stderr everything else. Exit codes: 0 all done, 1 something failed,
2 bad usage, 130 interrupted. Nothing heavy is imported before a command needs it.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from .errors import FastVLMError, OptionError

if TYPE_CHECKING:
    from .generation import Answer, Stream
    from .vlm import FastVLM

__all__ = ["app", "main"]

_PLUGINS = "fastvlm_mlx.commands"
_PLUGIN_HELP = {
    "convert": "Convert a PyTorch or MLX checkpoint to folded, quantized safetensors.",
    "bench": "Measure encoder latency and time to first token on this machine.",
}


class _Commands(TyperGroup):
    """Own commands, and those of the entry-point group, imported only when called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(e.name for e in entry_points(group=_PLUGINS))]

    def get_command(self, ctx: Any, name: str) -> Any:
        return super().get_command(ctx, name) or (
            TyperCommand(name, help=_PLUGIN_HELP.get(name, ""))
            if entry_points(group=_PLUGINS, name=name)
            else None
        )

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        for entry in entry_points(group=_PLUGINS, name=args[0]) if args else ():
            return args[0], typer.main.get_command(entry.load()), args[1:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        envvar="FASTVLM_MODEL",
        show_default="apple/FastVLM-0.5B",
        help="'nano' (built in), a checkpoint directory, a .zip from Apple, or a Hub id.",
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample within this much probability.")]
TopK = Annotated[int, typer.Option("--top-k", help="Sample from the k likeliest; 0 is all.")]
MinP = Annotated[float, typer.Option("--min-p", help="Least share of the likeliest token.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="1 is none.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this text; repeatable.")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16.")]
Quantize = Annotated[int | None, typer.Option("--quantize", "-q", help="Bits, while loading.")]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", help="Input side: a multiple of 64.")
]
FitOption = Annotated[str, typer.Option("--fit", help="pad (whole picture) or crop (its centre).")]
Private = Annotated[
    bool, typer.Option("--allow-private-urls", help="Allow picture URLs in private networks.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document per picture.")]
Stats = Annotated[bool, typer.Option("--stats", help="Timings on stderr after each answer.")]


def _show_version(value: bool) -> None:
    if value:
        print(f"fastvlm-mlx {version('fastvlm-mlx')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show version.")
    ] = False,
) -> None:
    """FastVLM in pure MLX: describe pictures and answer questions about them."""


@app.command()
def caption(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files or URLs; - reads stdin.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p")] = "Describe the image.",
    model: Model = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    dtype: DType = None,
    quantize: Quantize = None,
    image_size: ImageSize = None,
    fit: FitOption = "pad",
    allow_private_urls: Private = False,
    as_json: Json = False,
    stats: Stats = False,
) -> None:
    """Describe each picture. One that fails does not stop the rest."""
    options = _options(max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop)
    vlm = _load(model, dtype, quantize, image_size, fit, allow_private_urls)
    failed = False
    for image in images:
        try:
            label = f"{image}: " if len(images) > 1 else ""
            _answer(vlm, [image], prompt, options, as_json, stats, label)
        except FastVLMError as error:
            if len(images) == 1:
                raise
            failed = True
            _say(f"{image}: {error}")
    if failed:
        raise typer.Exit(1)


@app.command()
def ask(
    items: Annotated[
        list[str], typer.Argument(metavar="IMAGE... QUESTION", help="Pictures, then the question.")
    ],
    model: Model = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    dtype: DType = None,
    quantize: Quantize = None,
    image_size: ImageSize = None,
    fit: FitOption = "pad",
    allow_private_urls: Private = False,
    as_json: Json = False,
    stats: Stats = False,
) -> None:
    """Ask one question about all the pictures, in the order given.

    <image> in the question marks where each picture stands; without it they stand in front.
    """
    *images, question = items
    if not images:
        raise OptionError("Give at least one picture before the question.")
    options = _options(max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop)
    vlm = _load(model, dtype, quantize, image_size, fit, allow_private_urls)
    _answer(vlm, images, question, options, as_json, stats)


@app.command()
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for --model.")],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is: dialect, architecture, sizes, memory. Reads no weights."""
    _prepare_mlx()
    from .checkpoint.source import checkpoint_folder
    from .report import describe_checkpoint

    with checkpoint_folder(model, announce=_say) as folder:
        _print_facts(describe_checkpoint(folder), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: device, MLX, BLAS, compiler, operations in use, Hub."""
    _prepare_mlx()
    from .report import describe_machine

    _print_facts(describe_machine(), as_json)


def main() -> NoReturn:
    """Entry point of the `fastvlm` command."""
    try:
        app()
        sys.exit(0)
    except FastVLMError as error:
        _say(f"fastvlm: {error}")
        sys.exit(2 if isinstance(error, OptionError) else 1)
    except KeyboardInterrupt:
        _say("")
        sys.exit(130)
    except BrokenPipeError:
        # The reader has gone (`| head`); point stdout elsewhere so that exiting does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _prepare_mlx() -> None:
    from .blas import load_openblas

    load_openblas()


def _options(
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: list[str] | None,
) -> dict[str, Any]:
    """The options as keyword arguments, checked before any weights are loaded."""
    _prepare_mlx()
    from .generation import Options

    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    Options(**options)  # type: ignore[arg-type]
    return options


def _load(
    model: str | None,
    dtype: str | None,
    quantize: int | None,
    image_size: int | None,
    fit: str,
    allow_private_urls: bool,
) -> "FastVLM":
    from .vlm import load

    with _progress() as progress:
        return load(
            model,
            dtype=dtype,
            quantize=quantize,
            image_size=image_size,
            fit=fit,  # type: ignore[arg-type]
            allow_private_urls=allow_private_urls,
            announce=_say,
            progress=progress,
        )


def _answer(
    vlm: "FastVLM",
    images: list[str],
    question: str,
    options: dict[str, Any],
    as_json: bool,
    stats: bool,
    label: str = "",
) -> None:
    """Run one request; print the answer as it comes, or as one JSON document."""
    sources: list[Any] = [sys.stdin.buffer.read() if image == "-" else image for image in images]
    stream = vlm.stream(sources, question, **options)
    if as_json:
        print(json.dumps(_record(images, stream.finish()), ensure_ascii=False), flush=True)
    else:
        _print_stream(stream, label)
    if stats:
        _print_stats(stream.answer)


def _print_stream(stream: "Stream", label: str) -> None:
    sys.stdout.write(label)
    try:
        for chunk in stream:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    finally:
        # Also after Ctrl-C: what was said so far stands on a line of its own.
        sys.stdout.write("\n")
        sys.stdout.flush()


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr while weights load, if a person is looking and it takes long."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("Loading weights"), BarColumn(), MofNCompleteColumn())
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=False) as bar:
        task = bar.add_task("load", total=None, visible=False)

        def update(done: int, total: int) -> None:
            late = time.monotonic() - started > 1.0
            bar.update(task, completed=done, total=total, visible=late)

        yield update


def _record(images: list[str], answer: "Answer") -> dict[str, Any]:
    return {
        "image": images[0] if len(images) == 1 else images,
        "text": answer.text,
        "tokens": len(answer.tokens),
        "prompt_tokens": answer.prompt_tokens,
        "finish_reason": answer.finish_reason,
        "ttft": round(answer.ttft, 6),
        "timings": {name: round(s, 6) for name, s in asdict(answer.timings).items()},
    }


def _print_stats(answer: "Answer") -> None:
    parts = ", ".join(
        f"{name.replace('_', ' ')} {1000 * seconds:.0f} ms"
        for name, seconds in asdict(answer.timings).items()
    )
    later = len(answer.tokens) - 1
    rate = f"{later / answer.timings.decode:.1f} tokens/s" if answer.timings.decode else "-"
    _say(f"first token after {1000 * answer.ttft:.0f} ms ({parts}); decoding at {rate}")
    _say(f"{answer.prompt_tokens} prompt tokens, {len(answer.tokens)} answer tokens")


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        first, *rest = value if isinstance(value, list) else [value]
        print(f"{name:<{width}}  {first}")
        for line in rest:
            print(f"{'':<{width}}  {line}")
