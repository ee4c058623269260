"""What networks would launch on Metal, recorded while their graphs are built: nothing runs."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import pytest

from fastvlm_mlx import ops
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.ops import choice
from fastvlm_mlx.vision import FastViTHD
from tests.metal.modules import MODULES

NETWORKS = {
    "FastViTHD": VisionConfig(),  # of 0.5B, 1.5B and 7B
    "nano": VisionConfig(layers=(1, 1, 4, 3, 1), dims=(16, 32, 64, 128, 256), image_size=256),
}
INT = 2**31


@dataclass(frozen=True)
class Launch:
    """One call of a kernel."""

    definition: Mapping[str, Any]
    inputs: Sequence[mx.array]
    call: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.definition["name"])

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for launches of one pipeline."""
        return (self.name, str(self.call["template"]), *(str(a.dtype) for a in self.inputs))

    @property
    def output(self) -> int:
        """Elements."""
        return math.prod(self.call["output_shapes"][0])

    @property
    def grid(self) -> tuple[int, ...]:
        """Threads."""
        return tuple(self.call["grid"])

    @property
    def group(self) -> tuple[int, ...]:
        return tuple(self.call["threadgroup"])

    @property
    def largest_index(self) -> int:
        """The largest number that the kernel's index arithmetic makes, in `int`."""
        sizes = [a.size for a in self.inputs]
        if "linear" in self.name:  # in elements
            return max(*sizes, self.output)
        if "stem" in self.name:  # pixels and weights in elements, outputs in vectors
            return max(*sizes, self.output // 4)
        if "depthwise" in self.name:  # in vectors, of two elements where two outputs come of one
            multiplier = dict(self.call["template"])["M"]
            return max(sizes[0] * multiplier // 4, sizes[1] // 4, self.output // 4)
        return max(*sizes, self.output) // 4

    @property
    def threadgroup_memory(self) -> int:
        """Bytes that a group's arrays take."""
        template = dict(self.call["template"])
        values = {name: int(v) for name, v in template.items() if not isinstance(v, mx.Dtype)}
        source = self.definition["header"] + self.definition["source"]
        for names in re.findall(r"constexpr int (.*?);", source, re.DOTALL):
            for name, expression in re.findall(r"(\w+) = ([^,]+)", names):
                values[name] = evaluated(expression, values)
        width = {"float4": 16, "vec<T, 4>": 4 * template["T"].size}
        arrays = re.findall(r"^ *threadgroup (\S+(?: 4>)?) \w+\[(.*)\];", source, re.MULTILINE)
        return sum(width[kind] * evaluated(count, values) for kind, count in arrays)


def evaluated(expression: str, values: dict[str, int]) -> int:
    return int(eval(expression.replace("/", "//"), {}, dict(values)))


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch, form: int | None = 0) -> Iterator[list[Launch]]:
    """Launches from here on, as of an assumed Mac; of competing forms, the one of this number.

    Without a number the choice is made as it would be, on the device there is.
    """
    launches: list[Launch] = []

    def metal_kernel(**definition: Any) -> Any:
        def run(*, inputs: Sequence[mx.array], **call: Any) -> list[mx.array]:
            launches.append(Launch(definition, inputs, call))
            shapes, dtypes = call["output_shapes"], call["output_dtypes"]
            return [mx.zeros(s, d) for s, d in zip(shapes, dtypes, strict=True)]

        return run

    kernels = [m._metal_kernel for m in MODULES if hasattr(m, "_metal_kernel")]
    assumed = nullcontext() if form is None else ops.assume("metal")
    with monkeypatch.context() as patch, assumed:
        patch.setattr(mx.fast, "metal_kernel", metal_kernel)
        if form is not None:
            patch.setattr(choice, "fastest", lambda op, case, forms, prepare: (forms * 2)[form])
        for kernel in kernels:
            kernel.cache_clear()
        yield launches
        for kernel in kernels:
            kernel.cache_clear()


def build(tower: FastViTHD, batch: int, height: int, width: int, dtype: mx.Dtype) -> None:
    """The graph of encoding, in this type."""
    tower.set_dtype(dtype)
    tower(mx.zeros((batch, height, width, 3), dtype))
