"""What of a claim's pieces this machine can measure: all of it, a part, or nothing, and why."""

from dataclasses import dataclass

from fastvlm_mlx.config import VisionConfig

from .baselines import BASELINES, ConvNeXtConfig, ViTConfig
from .claims import Encode, Piece
from .language import SHAPES

__all__ = ["Budget", "Plan", "encoder_flops", "encoder_parameters", "plan_piece"]

_SLACK = 1.5
"""Activations and the allocator's cache, over the bytes worked out here."""

FASTVITHD = 122_710_000
"""Parameters of the folded encoder, for the memory it takes; what is reported is counted."""


@dataclass(frozen=True)
class Budget:
    """What a run may take."""

    memory: int | None
    """Bytes; None where the system does not tell."""
    flops_per_second: float
    """Of a large matrix product on this device."""
    item_bytes: int
    """Of a weight."""
    quick: bool = False
    run_seconds: float = 60.0
    """With `quick`: a single run predicted to take longer is cut down or left out."""
    total_seconds: float = 30.0
    """Repeats of one piece end when this is spent."""
    repeat: int = 5


@dataclass(frozen=True)
class Plan:
    """How a piece is measured."""

    seconds: float
    """Predicted for one run, at the speed of a matrix product: a lower limit."""
    repeat: int = 0
    scale: float = 1.0
    """Whole over measured part: above 1 the figure is an estimate."""
    layers: int | None = None
    """Of a language model; None is all."""
    estimate: str = ""
    """What the estimate assumes, and why it is one."""
    skip: str = ""
    """Why nothing is measured."""


def plan_piece(piece: Piece, budget: Budget) -> Plan:
    """Decide by memory and, if quick, by time."""
    return (
        _plan_encode(piece, budget) if isinstance(piece, Encode) else _plan_prefill(piece, budget)
    )


def _plan_encode(piece: Encode, budget: Budget) -> Plan:
    if piece.encoder != "FastViTHD" and piece.encoder not in BASELINES:
        return Plan(0, skip=f"no {piece.encoder} in MLX here")
    one = encoder_flops(piece.encoder, piece.side // piece.tiles_across)
    seconds = one * piece.tiles / budget.flops_per_second
    need = _SLACK * encoder_parameters(piece.encoder) * budget.item_bytes
    if reason := _too_big(need, budget):
        return Plan(seconds, skip=reason)
    if not budget.quick or seconds <= budget.run_seconds:
        return Plan(seconds, _repeats(seconds, budget))
    if piece.tiles > 1 and seconds / piece.tiles <= budget.run_seconds:
        return Plan(
            seconds / piece.tiles,
            _repeats(seconds / piece.tiles, budget),
            scale=piece.tiles,
            estimate=f"{piece.tiles} times the time of one tile: {_too_long(seconds, budget)}",
        )
    return Plan(seconds, skip=_too_long(seconds, budget))


def _plan_prefill(piece: Piece, budget: Budget) -> Plan:
    assert not isinstance(piece, Encode)
    shape = SHAPES[piece.language_model]
    seconds = shape.flops(piece.tokens) / budget.flops_per_second
    layer = _SLACK * shape.layer_parameters * budget.item_bytes
    too_big = _too_big(layer * shape.layers, budget)
    too_long = _too_long(seconds, budget) if budget.quick and seconds > budget.run_seconds else ""
    if not too_big and not too_long:
        return Plan(seconds, _repeats(seconds, budget))
    if not budget.quick:
        return Plan(seconds, skip=f"{too_big}; --quick estimates it from some of its layers")
    some = shape.layers
    while some > 2 and (
        _too_big(2 * layer * some, budget) or seconds * some / shape.layers > budget.run_seconds / 4
    ):
        some = some // 2
    part = seconds * some / shape.layers
    if reason := _too_big(layer * some, budget) or (
        _too_long(part, budget) if part > budget.run_seconds else ""
    ):
        return Plan(seconds, skip=reason)
    return Plan(
        part,
        _repeats(part, budget),
        scale=shape.layers / some,
        layers=some,
        estimate=f"{some} of its {shape.layers} equal layers, scaled up: {too_big or too_long}",
    )


def _repeats(seconds: float, budget: Budget) -> int:
    return max(1, min(budget.repeat, int(budget.total_seconds / max(seconds, 1e-9))))


def _too_big(need: float, budget: Budget) -> str:
    if budget.memory is None or need <= budget.memory:
        return ""
    return f"needs about {need / 1e9:.1f} GB of memory, {budget.memory / 1e9:.1f} GB are free"


def _too_long(seconds: float, budget: Budget) -> str:
    return f"one run would take {seconds:.0f} s or more, the limit is {budget.run_seconds:.0f} s"


def encoder_parameters(name: str) -> int:
    """About how many, in the matrices; for memory and time, not for a table."""
    if name == "FastViTHD":
        return FASTVITHD
    config = BASELINES[name].config
    if isinstance(config, ViTConfig):
        return config.depth * config.dim * (4 * config.dim + 2 * config.hidden)
    return sum(8 * d * dim**2 for d, dim in zip(config.depths, config.dims, strict=True))


def encoder_flops(name: str, side: int) -> int:
    """Of one side x side picture, in the matrix products and attention."""
    if name == "FastViTHD":
        return _fastvithd_flops(side)
    config = BASELINES[name].config
    if isinstance(config, ConvNeXtConfig):
        return 2 * sum(
            depth * (side // (4 << n)) ** 2 * dim * (8 * dim + 49)
            for n, (depth, dim) in enumerate(zip(config.depths, config.dims, strict=True))
        )
    tokens = config.tokens(side) + config.class_token
    return tokens * (2 * encoder_parameters(name) + 4 * config.depth * tokens * config.dim)


def _fastvithd_flops(side: int) -> int:
    config = VisionConfig()
    flops = 0
    stages = zip(config.layers, config.dims, config.attention, config.mlp_ratios, strict=True)
    for n, (depth, dim, attends, ratio) in enumerate(stages):
        tokens = (side // (4 << n)) ** 2
        matrices = (2 * ratio + 4 * attends) * dim**2
        flops += depth * tokens * (2 * matrices + 4 * attends * tokens * dim)
    return flops
