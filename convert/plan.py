"""The plan of a conversion: every module's bits, every tensor's place, every byte, before reading.

`--dry-run` prints it, the writer lays the files out by it, and the space check adds it up.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastvlm_mlx.checkpoint.loading import Examined
from fastvlm_mlx.checkpoint.quantized import Quantization
from fastvlm_mlx.checkpoint.writing import PlannedTensor

from .layouts import Layout

__all__ = ["Plan", "describe", "make_plan", "quantized_tensors"]

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Plan:
    """What will be written."""

    layout: Layout
    quantization: Mapping[str, Quantization]
    """Canonical module name -> how it is packed; all others stay in floating point."""
    kept: frozenset[str]
    """Modules that are packed in the source already and are copied bit for bit."""
    tensors: Mapping[str, PlannedTensor]
    """Canonical tensor name -> the tensor in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def weights(self, module: str) -> int:
        """How many weights a module's matrix has."""
        return math.prod(self.layout.shapes[f"{module}.weight"])

    def module_bytes(self, module: str) -> int:
        """Bytes of a module's matrix, scales and biases of quantization included."""
        parts = (f"{module}.{part}" for part in ("weight", "scales", "biases"))
        return sum(self.tensors[p].nbytes for p in parts if p in self.tensors)

    def bits_per_weight(self) -> float:
        """Average over the matrices of the language model and projector."""
        modules = [m for m in self.layout.modules if not m.startswith("vision.")]
        return 8 * sum(map(self.module_bytes, modules)) / sum(map(self.weights, modules))

    def config_entry(self) -> dict[str, object] | None:
        """`quantization` for config.json: the commonest, and every module that differs."""
        if not self.quantization:
            return None
        hows = list(self.quantization.values())
        common = max(dict.fromkeys(hows), key=hows.count)
        entry: dict[str, object] = {
            "group_size": common.group_size,
            "bits": common.bits,
            "mode": common.mode,
        }
        for module in self.layout.modules:
            how = self.quantization.get(module)
            if how is None:
                entry[self.layout.rename(module)] = False
            elif how != common:
                entry[self.layout.rename(module)] = {
                    "group_size": how.group_size,
                    "bits": how.bits,
                    "mode": how.mode,
                }
        return entry


def make_plan(
    layout: Layout,
    source: Examined,
    quantization: Mapping[str, Quantization],
    kept: Mapping[str, Quantization],
    *,
    dtype: str,
    vision_dtype: str,
) -> Plan:
    """Lay out every tensor. `kept` modules keep the dtypes of their scales."""
    tensors: dict[str, PlannedTensor] = {}
    packed = {**quantization, **kept}
    for name, shape in layout.shapes.items():
        kind = _NAMES[vision_dtype if name.startswith("vision.") else dtype]
        module = name.removesuffix(".weight")
        how = packed.get(module) if name.endswith(".weight") else None
        if how is None:
            tensors[name] = PlannedTensor(layout.rename(name), kind, shape)
            continue
        for part, (part_kind, part_shape) in quantized_tensors(how, kind, shape).items():
            full = f"{module}.{part}"
            if module in kept:
                part_kind = source.refs[full].dtype
            tensors[full] = PlannedTensor(layout.rename(full), part_kind, part_shape)
    return Plan(layout, packed, frozenset(kept), tensors)


def quantized_tensors(
    how: Quantization, dtype: str, shape: tuple[int, ...]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part -> (dtype, shape) of what `mx.quantize` makes of a matrix."""
    rows, columns = shape
    groups = (rows, columns // how.group_size)
    parts = {"weight": ("U32", (rows, columns * how.bits // 32))}
    if how.mode != "affine":
        return {**parts, "scales": ("U8", groups)}
    return {**parts, "scales": (dtype, groups), "biases": (dtype, groups)}


def describe(plan: Plan) -> str:
    """The plan as text: modules of the same kind and packing on one line, layers gathered."""
    rows: dict[tuple[str, str], list[str]] = {}
    for module in plan.layout.modules:
        how = plan.quantization.get(module)
        label = plan.tensors[f"{module}.weight"].dtype.lower() if how is None else _label(how)
        if module in plan.kept:
            label += " (kept)"
        rows.setdefault((re.sub(r"\.\d+\.", ".*.", module), label), []).append(module)
    lines = [f"{'module':<46} {'count':>5}  {'bits':<22} {'size':>10}"]
    for (pattern, label), modules in rows.items():
        size = sum(map(plan.module_bytes, modules))
        lines.append(f"{pattern:<46} {len(modules):>5}  {label:<22} {_megabytes(size):>10}")
    rest = plan.nbytes - sum(plan.module_bytes(m) for m in plan.layout.modules)
    lines.append(f"{'everything else (never quantized)':<76} {_megabytes(rest):>9}")
    lines.append(
        f"{'total':<46} {len(plan.tensors):>5}  "
        f"{f'{plan.bits_per_weight():.2f} bits per weight':<22} {_megabytes(plan.nbytes):>10}"
    )
    return "\n".join(lines)


def _label(how: Quantization) -> str:
    name = f"{how.bits}" if how.mode == "affine" else how.mode
    return f"{name}, groups of {how.group_size}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
