"""What a graph costs on Metal, counted without a GPU: kernel launches, bytes moved, FLOPs.

The graph is traced with MLX's export (no evaluation), with our operations and MLX's fused ones in
the form they take on Metal. Bytes are those a kernel reads and writes, with no credit for caches;
views cost nothing, a copy of a strided array is a launch of its own. Where `mx.compile` is in use,
element-wise operations with a single consumer join that consumer's kernel, as MLX fuses them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
from mlx.nn.layers import activations

from fastvlm_mlx.ops.device import assume
from fastvlm_mlx.vision import FastViTHD

__all__ = ["Cost", "Launch", "count_encoder", "count_launches", "total"]

_FUSED_HEAD_DIMS = (64, 72, 80, 96, 128, 192, 256)
"""Head widths of MLX's Metal attention kernels (MLX 0.32, scaled_dot_product_attention.cpp)."""

_VIEWS = {
    "AsStrided", "Broadcast", "ExpandDims", "Flatten", "Slice", "Split", "Squeeze", "StopGradient",
    "Transpose", "Unflatten", "View",
}  # fmt: skip
_ELEMENTWISE = {
    "Abs", "Add", "AsType", "Ceil", "Clip", "Divide", "Equal", "Erf", "Exp", "Floor", "Greater",
    "GreaterEqual", "Less", "LessEqual", "Log", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum",
    "Minimum", "Multiply", "Negative", "NotEqual", "Power", "Reciprocal", "Remainder", "Round",
    "Rsqrt", "Select", "Sigmoid", "Sign", "Sqrt", "Square", "Subtract", "Tanh",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel."""

    name: str
    bytes: int
    flops: int


@dataclass(frozen=True)
class Cost:
    """All kernels of a graph."""

    launches: tuple[Launch, ...]

    @property
    def bytes(self) -> int:
        """Bytes read and written by all kernels."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def flops(self) -> int:
        """Floating-point operations in matrix products, convolutions and attention."""
        return sum(launch.flops for launch in self.launches)


def count_encoder(
    tower: FastViTHD, side: int = 1024, dtype: mx.Dtype = mx.float16
) -> dict[str, Cost]:
    """Cost of encoding one side x side picture, per stage: stem, stage1 ... stage5, head."""
    tower.set_dtype(dtype)
    mx.eval(tower.parameters())
    costs: dict[str, Cost] = {}
    steps: list[tuple[str, Callable[[mx.array], mx.array]]] = [
        ("stem", tower.stem),
        *((f"stage{n}", stage) for n, stage in enumerate(tower.stages, start=1)),
        ("head", tower.head),
    ]
    shape: tuple[int, ...] = (1, side, side, 3)
    for name, step in steps:
        x = mx.zeros(shape, dtype)
        costs[name] = count_launches(step, x, compiled=True)
        shape = _output_shape(step, x)
    return costs


def total(costs: Iterable[Cost]) -> Cost:
    """All of them together."""
    return Cost(tuple(launch for cost in costs for launch in cost.launches))


def count_launches(function: Callable[..., mx.array], *arrays: mx.array, compiled: bool) -> Cost:
    """Cost of `function(*arrays)` on Metal; `compiled` says whether it runs under `mx.compile`.

    Weights that the function closes over must be evaluated, else their initialisation is counted.
    """
    return Cost(tuple(_Graph(_trace(function, *arrays)).launches(compiled)))


def _output_shape(function: Callable[..., mx.array], *arrays: mx.array) -> tuple[int, ...]:
    (outputs,) = (r for r in _trace(function, *arrays) if r["type"] == "outputs")
    shape: tuple[int, ...] = outputs["outputs"][0][1]
    return shape


def _trace(function: Callable[..., mx.array], *arrays: mx.array) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    with assume("metal"), _markers():
        mx.export_function(records.append, function, *arrays)
    return records


@contextmanager
def _markers() -> Iterator[None]:
    """Stand-ins for kernels that a trace on the CPU expands into elementary operations.

    `mlx.nn` compiles its GELU by itself, which a trace does not show either.
    """
    plain_gelu = activations.gelu
    plain_norm, plain_attention = mx.fast.layer_norm, mx.fast.scaled_dot_product_attention

    def layer_norm(x: mx.array, weight: Any, bias: Any, eps: float) -> mx.array:
        return _marker("layer_norm", [x, *(a for a in (weight, bias) if a is not None)], x)

    def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, **more: Any) -> mx.array:
        if q.shape[-1] not in _FUSED_HEAD_DIMS:
            return plain_attention(q, k, v, scale=scale, **more)
        return _marker("attention", [q, k, v], q)

    fast: Any = mx.fast
    fast.layer_norm, fast.scaled_dot_product_attention = layer_norm, attention
    activations.gelu = lambda x: _marker("gelu", [x], x)
    try:
        yield
    finally:
        fast.layer_norm, fast.scaled_dot_product_attention = plain_norm, plain_attention
        activations.gelu = plain_gelu


def _marker(name: str, inputs: list[mx.array], like: mx.array) -> mx.array:
    kernel: Any = mx.fast.metal_kernel(
        name=f"mlx_{name}",
        input_names=[f"x{n}" for n in range(len(inputs))],
        output_names=["y"],
        source="y[0] = x0[0];",
        ensure_row_contiguous=False,
    )
    (output,) = kernel(
        inputs=inputs,
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[like.shape],
        output_dtypes=[like.dtype],
    )
    marked: mx.array = output
    return marked


@dataclass(frozen=True)
class _Value:
    """An array in the graph: the bytes behind it, and whether they lie in row order."""

    shape: tuple[int, ...]
    bytes: int
    contiguous: bool
    source: str


class _Graph:
    """A traced graph, walked once in order."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self._nodes = [r for r in records if r["type"] == "primitive"]
        self._values: dict[str, _Value] = {}
        for record in records:
            if record["type"] == "inputs":
                for name, shape, dtype in record["inputs"]:
                    self._set(name, shape, dtype.size)
            elif record["type"] == "constants":
                for name, array in record["constants"]:
                    self._set(name, array.shape, array.dtype.size)
        self._outputs = {
            name for r in records if r["type"] == "outputs" for name, _, _ in r["outputs"]
        }
        self._consumers: dict[str, list[int]] = {}
        for number, node in enumerate(self._nodes):
            for name, _, _ in node["inputs"]:
                self._consumers.setdefault(name, []).append(number)

    def _set(self, name: str, shape: tuple[int, ...], size: int) -> None:
        self._values[name] = _Value(shape, prod(shape) * size, True, name)

    def launches(self, compiled: bool) -> Iterator[Launch]:
        pending: dict[str, set[str]] = {}  # fused value -> what its future kernel must read
        for node in self._nodes:
            kind = node["name"]
            if kind in _VIEWS or (kind == "Reshape" and self._value(node).contiguous):
                self._view(node, kind)
                if (read := pending.get(node["inputs"][0][0])) is not None:
                    pending[node["outputs"][0][0]] = read
                continue
            if kind == "Contiguous" and self._value(node).contiguous:
                self._view(node, kind)
                continue
            for name, shape, dtype in node["outputs"]:
                self._set(name, shape, dtype.size)
            reads: set[str] = set()
            for name, _, _ in node["inputs"]:
                reads |= pending.get(name, {name})
            output = node["outputs"][0][0]
            if compiled and kind in _ELEMENTWISE and self._joins(output):
                pending[output] = reads
                continue
            if kind not in _ELEMENTWISE:
                yield from self._copies(node)
            if prod(node["outputs"][0][1]) > 0:
                yield Launch(_name(node), self._traffic(node, reads), self._flops(node))

    def _joins(self, output: str) -> bool:
        """Whether an element-wise result is computed inside its only consumer's kernel."""
        consumers = self._consumers.get(output, [])
        while len(consumers) == 1 and output not in self._outputs:
            node = self._nodes[consumers[0]]
            if node["name"] in _ELEMENTWISE:
                return True
            if node["name"] not in ("Broadcast",):
                return False
            output = node["outputs"][0][0]
            consumers = self._consumers.get(output, [])
        return False

    def _value(self, node: dict[str, Any]) -> _Value:
        return self._values[node["inputs"][0][0]]

    def _view(self, node: dict[str, Any], kind: str) -> None:
        value = self._value(node)
        for name, shape, dtype in node["outputs"]:
            kept = value.contiguous and kind in (
                "Reshape", "ExpandDims", "Squeeze", "Flatten", "Unflatten", "Contiguous",
            )  # fmt: skip
            # A slice reads its part only; a broadcast reads what is behind it.
            size = min(value.bytes, prod(shape) * dtype.size)
            self._values[name] = _Value(shape, size, kept or prod(shape) == 1, value.source)

    def _copies(self, node: dict[str, Any]) -> Iterator[Launch]:
        """Kernels that read rows get a contiguous copy of a strided input first."""
        if node["name"] not in ("Convolution", "Reshape", "CustomKernel"):
            return
        if node["name"] == "Reshape" or "mlx_" in _name(node):
            return  # a copying reshape is the launch itself; MLX's fused kernels take strides
        for name, _, _ in node["inputs"]:
            value = self._values[name]
            if not value.contiguous and value.source not in self._weights:
                yield Launch("copy", 2 * value.bytes, 0)

    @property
    def _weights(self) -> set[str]:
        # Prepared once: a transposed weight is copied at the first run only.
        return {name for name in self._values if name not in self._produced}

    @property
    def _produced(self) -> set[str]:
        return {name for node in self._nodes for name, _, _ in node["outputs"]}

    def _traffic(self, node: dict[str, Any], reads: set[str]) -> int:
        written = sum(int(prod(shape)) * dtype.size for _, shape, dtype in node["outputs"])
        return int(written) + sum(self._values[name].bytes for name in reads)

    def _flops(self, node: dict[str, Any]) -> int:
        kind, out = node["name"], prod(node["outputs"][0][1])
        shapes = [shape for _, shape, _ in node["inputs"]]
        if kind == "Convolution":
            return int(2 * out * prod(shapes[1][1:]))
        if kind in ("Matmul", "AddMM"):
            return int(2 * out * shapes[0][-1])
        if kind == "CustomKernel":
            return _custom_flops(_name(node), out, shapes)
        return 0


def _name(node: dict[str, Any]) -> str:
    if node["name"] != "CustomKernel":
        return str(node["name"])
    return next((str(a) for a in node["arguments"] if isinstance(a, str)), "CustomKernel")


def _custom_flops(name: str, out: int, shapes: list[tuple[int, ...]]) -> int:
    if "depthwise" in name:
        return int(2 * out * shapes[1][0] * shapes[1][1])
    if "linear" in name or "stem" in name:
        return int(2 * out * prod(shapes[1][1:]))
    if "attention" in name or "flash" in name:
        # Scores and their product with the values: 2 * 2 * N per output element.
        packed = len(shapes[0]) == 3
        return int(4 * out * (shapes[0][1] if packed else shapes[1][2]))
    return 0
