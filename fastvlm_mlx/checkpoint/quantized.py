"""Quantized tensors: what they are in a checkpoint, back to floating point, and made on loading.

A module is quantized if its file has `X.scales` beside `X.weight`; bits and group size follow
from the shapes, only the mode needs the config (checkpoint notes, section 3.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import CheckpointError
from .tensors import TensorRef

__all__ = ["Quantization", "Quantizer", "dequantized", "quantization_of", "quantize_linears"]

_PARTS = ("weight", "scales", "biases")
_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
_WITHOUT_BIASES = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}


@dataclass(frozen=True)
class Quantization:
    """How one module's weight is packed; the arguments of `mx.quantize`."""

    bits: int
    group_size: int
    mode: str = "affine"


def quantization_of(
    refs: Mapping[str, TensorRef],
    expected: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any] | None,
) -> dict[str, Quantization]:
    """Module name -> quantization. Raises CheckpointError if the parts do not fit together."""
    return {
        name: _one(name, refs, expected.get(f"{name}.weight"), config or {})
        for name in (n.removesuffix(".scales") for n in refs if n.endswith(".scales"))
    }


def _one(
    name: str,
    refs: Mapping[str, TensorRef],
    shape: tuple[int, ...] | None,
    config: Mapping[str, Any],
) -> Quantization:
    weight, scales = refs.get(f"{name}.weight"), refs[f"{name}.scales"]
    if shape is None and name.endswith("lm_head") and weight is not None:
        # A tied checkpoint that stores its head as well: shaped like the embedding table.
        shape = expected_rows(weight, scales, config)
    if weight is None or shape is None or len(shape) != 2:
        raise CheckpointError(f"{name}.scales quantizes nothing that this network knows.")
    inputs = shape[1]
    groups = scales.shape[-1]
    bits, rest = divmod(weight.shape[-1] * 32, inputs)
    if weight.dtype != "U32" or rest or bits not in (2, 3, 4, 5, 6, 8) or inputs % groups:
        raise CheckpointError(
            f"{name} looks quantized, but its weight {weight.dtype} {weight.shape} and scales "
            f"{scales.shape} do not describe {shape}."
        )
    own = config.get(name)
    declared = (own if isinstance(own, Mapping) else config).get("mode", "affine")
    if declared not in _MODES:
        raise CheckpointError(
            f"{name} is quantized as {declared!r}; expected one of {', '.join(_MODES)}."
        )
    # The tensors tell the mode; peers' configs name modules in their own way.
    group = inputs // groups
    mode = "affine" if f"{name}.biases" in refs else _WITHOUT_BIASES.get((bits, group))
    if mode is None:
        raise CheckpointError(
            f"{name} is quantized to {bits} bits in groups of {group} without biases, which is no "
            "mode of MLX; the file is incomplete."
        )
    return Quantization(bits, group, mode)


def expected_rows(
    weight: TensorRef, scales: TensorRef, config: Mapping[str, Any]
) -> tuple[int, int]:
    """Shape of a quantized matrix that the network itself does not describe."""
    return weight.shape[0], scales.shape[-1] * int(config.get("group_size", 64))


def dequantized(
    refs: Mapping[str, TensorRef], quantized: Mapping[str, Quantization]
) -> dict[str, TensorRef]:
    """Replace the parts of each module in `quantized` by its floating-point weight, lazily."""
    result = dict(refs)
    for name, how in quantized.items():
        parts = [result.pop(f"{name}.{p}", None) for p in _PARTS]
        result[f"{name}.weight"] = _float_weight(parts, how)
    return result


def _float_weight(parts: list[TensorRef | None], how: Quantization) -> TensorRef:
    weight, scales, biases = parts
    assert weight is not None and scales is not None

    def load() -> mx.array:
        # In float32: the peers' float16 scales would round the products once more.
        floats = how.mode == "affine"
        return mx.dequantize(
            weight.load(),
            scales.load().astype(mx.float32) if floats else scales.load(),
            biases.load().astype(mx.float32) if biases is not None else None,
            group_size=how.group_size,
            bits=how.bits,
            mode=how.mode,
        )

    shape = (*weight.shape[:-1], scales.shape[-1] * how.group_size)
    return TensorRef("F32", shape, load)


def quantize_linears(part: nn.Module, bits: int, *, keep_packed: bool) -> None:
    """Quantize every linear layer and embedding whose width a group divides."""
    if keep_packed:
        nn.quantize(
            part,
            class_predicate=lambda _, m: (
                {"group_size": g, "bits": bits} if (g := _group(m)) else False
            ),
        )
        return
    for module in part.modules():
        size = _group(module)
        if size is not None:
            packed = mx.quantize(module.weight, group_size=size, bits=bits)
            module.weight = mx.dequantize(*packed, group_size=size, bits=bits)


class Quantizer:
    """What `quantize_linears` does to language model and projector, weight by weight while loading.

    Made for a network without values; with `keep_packed` its modules become quantized ones.
    """

    def __init__(self, network: nn.Module, bits: int, keep_packed: bool) -> None:
        self._bits, self._keep_packed = bits, keep_packed
        self._groups = {
            name: size
            for name, module in network.named_modules()
            if not name.startswith("vision.") and (size := _group(module))
        }
        if keep_packed:
            nn.quantize(
                network,
                class_predicate=lambda path, _: (
                    {"group_size": self._groups[path], "bits": bits}
                    if path in self._groups
                    else False
                ),
            )

    def __call__(self, name: str, array: mx.array) -> list[tuple[str, mx.array]]:
        """The arrays that take the place of one."""
        module, _, part = name.rpartition(".")
        size = self._groups.get(module)
        if size is None or part != "weight":
            return [(name, array)]
        packed = mx.quantize(array, group_size=size, bits=self._bits)
        if not self._keep_packed:
            return [(name, mx.dequantize(*packed, group_size=size, bits=self._bits))]
        return [(f"{module}.{p}", a) for p, a in zip(_PARTS, packed, strict=True)]


def _group(module: nn.Module) -> int | None:
    """Weights per scale of a module that can be quantized."""
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return None
    width = module.weight.shape[-1]
    return next((g for g in (64, 32) if width % g == 0), None)
