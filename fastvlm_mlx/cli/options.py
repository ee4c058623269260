"""Options that commands share, each said once.

A command takes a whole group of options as one parameter, a frozen dataclass; `spread` shows its
fields to typer instead:

    @spread
    def caption(image: str, model: ModelOptions, answer: AnswerOptions) -> None: ...
"""

import functools
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FastVLMError, OptionError
from .output import loading_progress, say

if TYPE_CHECKING:
    from ..vlm import FastVLM

__all__ = [
    "AnswerOptions",
    "Json",
    "ModelOptions",
    "PrintOptions",
    "Stats",
    "prepare_mlx",
    "spread",
]

Json = Annotated[bool, typer.Option("--json", help="As a JSON document.")]
Stats = Annotated[bool, typer.Option("--stats", help="Timings on stderr after each answer.")]


@dataclass(frozen=True)
class ModelOptions:
    """What to load, and how it sees pictures: the arguments of `fastvlm_mlx.load`."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            envvar="FASTVLM_MODEL",
            show_default="apple/FastVLM-0.5B",
            help="'nano' (built in), a checkpoint directory, a .zip from Apple, or a Hub id.",
        ),
    ] = None
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16.")] = (
        None
    )
    quantize: Annotated[
        int | None,
        typer.Option("--quantize", "-q", help="Language model in 2 to 6, or 8 bits."),
    ] = None
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            metavar="SIDE|auto",
            help="Input side: a multiple of 64 up to 2048, or auto (as the picture needs).",
        ),
    ] = None
    tiles: Annotated[
        str,
        typer.Option(
            "--tiles",
            metavar="ROWSxCOLUMNS",
            help="Also cut the picture into tiles of that size, up to 4x4: reads small print.",
        ),
    ] = "1x1"
    fit: Annotated[str, typer.Option("--fit", help="pad (whole picture) or crop (its centre).")] = (
        "pad"
    )
    feature_cache: Annotated[
        str | None,
        typer.Option(
            "--feature-cache",
            metavar="DIR",
            envvar="FASTVLM_FEATURE_CACHE",
            help="Keep encoded pictures here, so that asking about one again starts sooner.",
        ),
    ] = None
    allow_private_urls: Annotated[
        bool, typer.Option("--allow-private-urls", help="Allow picture URLs in private networks.")
    ] = False

    def load(self) -> "FastVLM":
        """The model, with a bar on stderr if it takes long. Errors as in `fastvlm_mlx.load`."""
        prepare_mlx()
        from ..opening import load

        arguments: dict[str, Any] = asdict(self)
        # What is not a number goes on as it is: `load` says what it expected.
        if self.image_size and self.image_size.isdecimal():
            arguments["image_size"] = int(self.image_size)
        if re.fullmatch("[0-9]+x[0-9]+", self.tiles):
            arguments["tiles"] = tuple(map(int, self.tiles.split("x")))
        if not self.feature_cache:
            del arguments["feature_cache"]  # the library's default, in memory
        with loading_progress() as progress:
            return load(**arguments, announce=say, progress=progress)


@dataclass(frozen=True)
class AnswerOptions:
    """How to answer: the fields of `fastvlm_mlx.Options`."""

    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest answer, in tokens.")] = (
        256
    )
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0
    top_p: Annotated[
        float, typer.Option("--top-p", help="Sample within this much probability.")
    ] = 1.0
    top_k: Annotated[
        int, typer.Option("--top-k", help="Sample from the k likeliest; 0 is all.")
    ] = 0
    min_p: Annotated[float, typer.Option("--min-p", help="Least share of the likeliest token.")] = (
        0.0
    )
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="1 is none.")
    ] = 1.0
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; repeatable.")
    ] = None
    schema: Annotated[
        str | None,
        typer.Option(
            "--schema", metavar="FILE", help="Answer in JSON that this JSON schema allows."
        ),
    ] = None

    def checked(self) -> dict[str, Any]:
        """As keyword arguments, checked before any weights are loaded. Raises OptionError."""
        prepare_mlx()
        from ..generation import make_options

        options = {**asdict(self), "stop": tuple(self.stop or ())}
        schema = options.pop("schema")
        options["json_schema"] = None if schema is None else _read_json(schema)
        make_options(options)
        return options


@dataclass(frozen=True)
class PrintOptions:
    """What is printed beside the plain answer."""

    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document per answer, on a line.")
    ] = False
    stats: Stats = False


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The same command, with the fields of its dataclass parameters as parameters of its own."""
    groups: dict[str, type[Any]] = {}
    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        group = parameter.annotation
        if isinstance(group, type) and is_dataclass(group):
            groups[parameter.name] = group
            shown += inspect.signature(group).parameters.values()
        else:
            shown.append(parameter)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    # Keyword-only, since one with a default may stand before one without.
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shown]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown}
    return run


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise OptionError(f"The schema {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise OptionError(f"The schema {path} is not JSON: {error}.") from error


def prepare_mlx() -> None:
    """Bring a fast BLAS into the process, then MLX. Raises FastVLMError where it cannot start."""
    from ..blas import load_openblas

    load_openblas()
    try:
        import mlx.core as mx

        mx.device_info()
    except (ImportError, RuntimeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FastVLMError(
            f"MLX does not start here ({said}). It needs an Apple-silicon Mac with macOS 14 or "
            "newer, an arm64 Python, and Metal, which virtual machines and sandboxes may not have; "
            "or Linux."
        ) from error
