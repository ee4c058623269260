"""Runs the package's Metal kernels on a CPU, from the exact source that MLX would compile.

`emulated(monkeypatch)` replaces `mx.fast.metal_kernel`, so that the package's own launch code runs
unchanged. MLX prints the generated source while it exports a function that contains the kernel;
g++ compiles that text behind msl.h.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

HERE = Path(__file__).parent
REAL = mx.fast.metal_kernel


class KernelError(Exception):
    """The emulator saw the kernel do what no kernel may do."""


@dataclass
class Emulator:
    """Compiled kernels by source, and how to run them.

    edit changes a kernel's source before it is compiled: for planting faults.
    """

    cache: Path
    edit: Callable[[str], str] = lambda source: source
    seed: int = 0
    _collecting: list[str] | None = None
    _functions: dict[str, Any] = field(default_factory=dict)
    _sources: dict[tuple[object, ...], str] = field(default_factory=dict)

    def metal_kernel(self, **definition: Any) -> Callable[..., list[mx.array]]:
        """Stand in for mx.fast.metal_kernel."""
        definition["source"] = self.edit(definition["source"])
        kernel = REAL(**definition)
        names = tuple(definition["input_names"])

        def run(
            *,
            inputs: Sequence[mx.array],
            template: Any = (),
            output_shapes: Any,
            output_dtypes: Any,
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
        ) -> list[mx.array]:
            launch = {
                "template": template,
                "output_shapes": output_shapes,
                "output_dtypes": output_dtypes,
                "grid": grid,
                "threadgroup": threadgroup,
            }
            key = (definition["source"], str(template), *(str(a.dtype) for a in inputs))
            if key not in self._sources:
                self._sources[key] = generated_source(kernel, inputs, launch)
            source = self._sources[key]
            if self._collecting is not None:
                self._collecting.append(source)
                return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]
            if source not in self._functions:
                self.compile([source])
            return self._launch(source, dict(zip(names, inputs, strict=True)), launch)

        return run

    def prepare(self, calls: Sequence[Callable[[], object]]) -> None:
        """Compile all kernels that these calls launch, in one run of the compiler."""
        self._collecting = []
        for call in calls:
            call()
        sources, self._collecting = dict.fromkeys(self._collecting), None
        self.compile([s for s in sources if s not in self._functions])

    def compile(self, sources: Sequence[str]) -> None:
        """Build sources into one library, unless the cache has it."""
        if not sources:
            return
        text = '#include "msl.h"\n' + "\n".join(
            translated(source, number) for number, source in enumerate(sources)
        )
        headers = "".join((HERE / name).read_text() for name in ("msl.h", "simdgroup.h"))
        digest = hashlib.sha256((headers + text).encode()).hexdigest()[:16]
        library = self.cache / f"{digest}.so"
        if not library.exists():
            code = library.with_suffix(".cpp")
            code.write_text(text)
            command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-I{HERE}"]
            building = library.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, str(code), "-o", str(building)], check=True)
            building.rename(library)
        loaded = ctypes.CDLL(str(library))
        for number, source in enumerate(sources):
            function = loaded[f"run_{number}"]
            function.restype = ctypes.c_char_p
            self._functions[source] = function

    def _launch(
        self, source: str, inputs: dict[str, mx.array], launch: dict[str, Any]
    ) -> list[mx.array]:
        buffers, kept = [], []
        for array in inputs.values():
            data = np.array(array.view(mx.uint8))
            shape = (ctypes.c_int * max(1, array.ndim))(*array.shape)
            kept.append((data, shape))
            buffers.append(Buffer(data.ctypes.data, data.nbytes, shape))
        outputs = []
        for shape, dtype in zip(launch["output_shapes"], launch["output_dtypes"], strict=True):
            data = np.full(int(np.prod(shape)) * dtype.size, 0xFF, np.uint8)  # NaN in every type
            outputs.append((data, shape, dtype))
            buffers.append(Buffer(data.ctypes.data, data.nbytes, None))
        uint3 = ctypes.c_uint * 3
        message = self._functions[source](
            (Buffer * len(buffers))(*buffers),
            uint3(*launch["grid"]),
            uint3(*map(min, launch["threadgroup"], launch["grid"])),
            ctypes.c_uint(self.seed),
        )
        if message:
            raise KernelError(message.decode())
        return [mx.array(d).view(t).reshape(s) for d, s, t in outputs]


class Buffer(ctypes.Structure):
    """emulator::Buffer of msl.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("shape", ctypes.POINTER(ctypes.c_int)),
    )


def generated_source(kernel: Any, inputs: Sequence[mx.array], launch: dict[str, Any]) -> str:
    """What MLX would hand to the Metal compiler, less its own preamble."""

    def call(*arrays: mx.array) -> list[mx.array]:
        return kernel(inputs=list(arrays), verbose=True, **launch)

    text = printed(lambda: mx.export_function(os.devnull, call, *inputs))
    return text.split("```")[1]


def printed(action: Callable[[], object]) -> str:
    """What the action writes to file descriptor 1: C++ knows nothing of sys.stdout."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        saved = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            action()
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(saved, 1)
            os.close(saved)
        file.seek(0)
        return file.read().decode("ascii")


def translated(source: str, number: int) -> str:
    """C++ of one generated kernel, in a namespace of its own, with an entry point."""
    instance = re.search(r"template \[\[host_name.*decltype\((.*)\) \1;", source)
    assert instance, source
    source = source.replace(instance[0], "")
    signature = re.search(r"\[\[kernel\]\] void (\w+)\((.*?)\) \{", source, re.DOTALL)
    assert signature, source
    arguments = []
    buffers: dict[str, int] = {}
    for parameter in signature[2].split(","):
        declaration = re.sub(r"\[\[.*?\]\]", "", parameter).strip()
        name = declaration.split()[-1]
        if name.endswith("_shape"):
            arguments.append(f"buffers[{buffers[name.removesuffix('_shape')]}].shape")
        elif "device" in declaration:
            buffers[name] = len(buffers)
            arguments.append(
                f"{pointers(declaration).rsplit(maxsplit=1)[0]}(buffers[{buffers[name]}])"
            )
        else:
            arguments.append(f"t.{name}")
    body = re.sub(r"\[\[.*?\]\]", "", source)
    body = re.sub(r"#include <.*>\n", "", body)
    kind = r"(\w+(?:<[^<>]*>)?)"
    body = re.sub(rf"threadgroup {kind} (\w+)\[(.+?)\];", r"static Shared<\1, (\3)> \2;", body)
    return f"""
namespace kernel_{number} {{
{pointers(body)}
}}
extern "C" const char* run_{number}(
    const emulator::Buffer* arguments, uint3* grid, uint3* group, unsigned seed) {{
  return emulator::launch(
      [](const emulator::Buffer* buffers, const emulator::Thread& t) {{
        kernel_{number}::{instance[1]}({", ".join(arguments)});
      }},
      arguments, *grid, *group, seed);
}}
"""


def pointers(text: str) -> str:
    """Replace pointers into device and threadgroup memory by checked ones."""
    kind = r"(\w+(?:<[^<>]*>)?)\s*\*"
    text = re.sub(rf"const (?:device|threadgroup) {kind}", r"Ptr<const \1>", text)
    return re.sub(rf"(?:device|threadgroup) {kind}", r"Ptr<\1>", text)
