"""Recipe "auto": how much each module's rounding moves the answer, and bits spent accordingly.

Each matrix of the language model and projector is quantized alone, to 4 bits, and the KL divergence
of the next-token distributions from the unquantized model's is measured on calibration pictures,
questions and the model's own answers. For small errors KL grows with the square of the weights'
error, so the other bit widths and group sizes follow from that one measurement and from their
errors on the matrix itself. `allocation.py` then finds the best choice within the budget.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.loading import Examined, load_checkpoint
from fastvlm_mlx.checkpoint.quantized import Quantization
from fastvlm_mlx.errors import CheckpointError, OptionError
from fastvlm_mlx.images import fit_image, to_pixels
from fastvlm_mlx.model import Network
from fastvlm_mlx.prompt import expand

from .allocation import allocate
from .calibration import samples
from .recipes import BITS, GROUPS, Packing, Recipe, Rule
from .streaming import dequantize, quantize, weight_error
from .verification import kl_divergence, memory_shortage

__all__ = ["automatic", "measure"]

_SIDE = 256
_SAMPLES = 4
_ANSWER = 12
_REFERENCE_BITS = 4
_SCALE_BITS = 32
"""A 16-bit scale and a 16-bit bias per group."""
_SEED = 1000
"""Calibration pictures are others than verification's, whatever the seed."""

Progress = Callable[[str, int, int], None]


def automatic(
    source: Examined,
    modules: Mapping[str, int],
    *,
    target_bits: float,
    group_size: int | None,
    vision: Packing | None,
    dtype: mx.Dtype,
    seed: int,
    progress: Progress,
) -> Recipe:
    """The recipe with the least expected KL within `target_bits` per weight, scales included.

    Raises OptionError for a target that cannot be met, CheckpointError if the model does not fit
    into memory.
    """
    shortage = memory_shortage(source.config, mx.float32)
    if shortage:
        raise CheckpointError(f"Recipe auto has to run the model, but {shortage}; use 'mixed'.")
    names = [name for name in modules if not name.startswith("vision.")]
    groups = GROUPS if group_size is None else (group_size,)
    network, probe = _prepare(source, seed)
    measured: list[str] = []
    options: list[list[Quantization]] = []
    sizes: list[list[int]] = []
    costs: list[list[float]] = []
    weights = 0
    for done, name in enumerate(names):
        progress("measuring sensitivity", done, len(names))
        matrix = _module(network, name).weight
        own = [Quantization(b, g) for b in BITS for g in groups if modules[name] % g == 0]
        if not own:
            continue
        measured.append(name)
        weights += matrix.size
        reference = Quantization(_REFERENCE_BITS, max(q.group_size for q in own))
        moved = measure(network, probe, name, reference, dtype)
        base = max(weight_error(matrix, reference, dtype), 1e-12) ** 2
        errors = [weight_error(matrix, how, dtype) ** 2 for how in own]
        options.append(own)
        sizes.append([_size(matrix.shape, how) for how in own])
        costs.append([moved * error / base for error in errors])
    try:
        chosen = allocate(sizes, costs, int(target_bits * weights))
    except ValueError as error:
        raise OptionError(
            f"target_bits {target_bits} is too little for this model ({error} bits)."
        ) from error
    rules = tuple(
        Rule(name, Packing(own[index].bits, own[index].group_size))
        for name, own, index in zip(measured, options, chosen, strict=True)
    )
    return Recipe(f"auto, {target_bits:g} bits per weight", None, vision, rules)


@dataclass(frozen=True)
class _Sample:
    """A prompt with its answer, run through the unquantized model."""

    ids: list[int]
    features: mx.array
    """The tower's output (1, N, features)."""
    hidden: list[mx.array]
    """Input of every layer, then of the last norm."""
    tail: int
    """Positions from the end of the prompt to the end of the answer."""
    logits: mx.array


def _prepare(source: Examined, seed: int) -> tuple[Network, list[_Sample]]:
    side = min(_SIDE, source.config.vision.image_size)
    # In float32 on a GPU too: what one matrix changes would drown in bfloat16's rounding.
    loaded = load_checkpoint(source.folder, dtype=mx.float32, keep_quantized=False)
    vlm = fv.FastVLM(loaded, image_size=side)
    network = vlm.network
    prepared = []
    for sample in samples(_SAMPLES, seed + _SEED):
        image = vlm.encode(sample.picture)
        answer = vlm.ask(image, sample.question, max_tokens=_ANSWER).tokens
        ids = expand(vlm.prompt_ids(sample.question), [image.tokens.shape[0]]) + list(answer)
        features = vlm.vision(to_pixels([fit_image(sample.picture, side)]))
        hidden = [network.embed(ids, [image.tokens])]
        for layer in network.language_model.model.layers:
            hidden.append(layer(hidden[-1], "causal", None))
        tail = len(answer) + 1
        logits = _logits(network, hidden[-1], tail)
        mx.eval(features, hidden, logits)
        prepared.append(_Sample(ids, features, hidden, tail, logits))
    return network, prepared


def measure(
    network: Network, probe: list[_Sample], name: str, how: Quantization, dtype: mx.Dtype
) -> float:
    """Mean KL divergence, in nats, that quantizing the module `name` alone causes."""
    module = _module(network, name)
    layers = network.language_model.model.layers
    rounded = dequantize(quantize(module.weight, how, dtype), how).astype(module.weight.dtype)
    with _weight(module, rounded):
        found = []
        for sample in probe:
            start = _first_layer(name, len(layers))
            if start is None:
                tokens = network.projector(sample.features)[0]
                hidden, start = network.embed(sample.ids, [tokens]), 0
            else:
                hidden = sample.hidden[start]
            for layer in layers[start:]:
                hidden = layer(hidden, "causal", None)
            found.append(kl_divergence(sample.logits, _logits(network, hidden, sample.tail)))
            mx.eval(found[-1])
    mean: Any = mx.concatenate(found).mean().item()
    return float(mean)


def _first_layer(name: str, count: int) -> int | None:
    """The first layer whose input a module leaves alone; None if it changes the embeddings."""
    parts = name.split(".")
    if "layers" in parts:
        return int(parts[parts.index("layers") + 1])
    return count if parts[-1] == "lm_head" else None


def _logits(network: Network, hidden: mx.array, tail: int) -> mx.array:
    model = network.language_model
    head = model.model.embed_tokens.as_linear if model.args.tie_word_embeddings else model.lm_head
    logits: mx.array = head(model.model.norm(hidden[:, -tail:]))[0]
    return logits.astype(mx.float32)


@contextmanager
def _weight(module: nn.Module, weight: mx.array) -> Iterator[None]:
    original = module.weight
    module.weight = weight
    try:
        yield
    finally:
        module.weight = original


def _module(network: Network, name: str) -> Any:
    found: Any = network
    for part in name.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


def _size(shape: tuple[int, ...], how: Quantization) -> int:
    rows, columns = shape
    return rows * (columns * how.bits + columns // how.group_size * _SCALE_BITS)
