"""Every kernel in use, as MLX generates it, read by clang: address spaces and conversions.

The emulator's compiler knows neither. C++ for OpenCL does, with Metal's rules for both.
"""

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from fastvlm_mlx.vision import FastViTHD
from tests.metal.emulator import HERE, REAL, generated_source
from tests.metal.launches import NETWORKS, build, recording

OLDEST = 16  # knows bfloat and its vectors


@functools.cache
def clang() -> str | None:
    for name in ("clang", *(f"clang-{n}" for n in range(30, OLDEST - 1, -1))):
        if path := shutil.which(name):
            text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            version = re.search(r"clang version (\d+)", text)
            if version and int(version[1]) >= OLDEST:
                return path
    return None


pytestmark = [
    pytest.mark.skipif(sys.platform == "darwin", reason="kernels are compiled for the GPU itself"),
    pytest.mark.skipif(clang() is None, reason=f"needs clang {OLDEST} or newer"),
]


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """One per pipeline: every network, form and type."""
    launches = {}
    with pytest.MonkeyPatch.context() as patch:
        for config in NETWORKS.values():
            tower = FastViTHD(config)
            for dtype in (mx.float16, mx.bfloat16, mx.float32):
                for form in (0, 1):
                    with recording(patch, form) as recorded:
                        build(tower, 1, 512, 512, dtype)
                    launches |= {launch.key: launch for launch in recorded}
    kernels = {launch.name: REAL(**launch.definition) for launch in launches.values()}
    return [generated_source(kernels[n.name], n.inputs, dict(n.call)) for n in launches.values()]


def complaints(sources: list[str], folder: Path) -> str:
    """What clang says of these kernels, with its warnings on."""
    file = folder / "kernels.clcpp"
    file.write_text('#include "clang.h"\n' + "\n".join(map(translated, range(99), sources)))
    # Without the generic address space, a pointer that names none points to thread memory.
    without = ",".join(f"-__opencl_c_{x}" for x in ("generic_address_space", "pipes"))
    options = [
        "-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-target", "x86_64-linux-gnu",
        "-Xclang", f"-cl-ext={without},-__opencl_c_device_enqueue", "-fsyntax-only",
        "-Wall", "-Wextra", "-Wconversion", "-Wshadow", f"-I{HERE}", str(file),
    ]  # fmt: skip
    return subprocess.run([str(clang()), *options], capture_output=True, text=True).stderr


def translated(number: int, source: str) -> str:
    """One kernel in a namespace of its own: no template, as OpenCL has none, but its arguments."""
    parameters = re.search(r"template <(.*)>\n\[\[kernel\]\]", source)
    instance = re.search(r"template \[\[host_name.*?decltype\(\w+<(.*?)>\) .*;", source)
    assert parameters and instance, source
    given = []
    for parameter, value in zip(parameters[1].split(", "), instance[1].split(", "), strict=True):
        kind, name = parameter.split()
        what = f"using {name}" if kind == "typename" else f"constant constexpr {kind} {name}"
        given.append(f"{what} = {value};")
    body = source.replace(instance[0], "").replace(parameters[0], "__kernel")
    body = re.sub(r"#include <.*>\n|\[\[.*?\]\]", "", body)
    body = re.sub(r"\bfloat4\(", "make<float, 4>(", body)
    body = re.sub(r"\bvec<(\w+), (\d)>\(", r"make<\1, \2>(", body)
    lines = [f"namespace kernel_{number} {{", *given, body, "}"]
    return "\n".join(lines)


def test_clang_has_nothing_to_say(sources: list[str], tmp_path: Path) -> None:
    assert len(sources) > 40
    assert complaints(sources, tmp_path) == ""


@pytest.mark.parametrize(
    ("kernel", "old", "new", "complaint"),
    [
        ("depthwise", "device vec<T, 4>* out = (device", "vec<T, 4>* out = (", "address space"),
        ("depthwise", "const device vec<T, 4>* taps", "device vec<T, 4>* taps", "cannot init"),
        ("depthwise", "const float4 tap = float4(", "const float4 tap = (", "cannot init"),
        ("attention", "(const device vec<T, 4>*)qkv", "(const threadgroup T*)qkv", "address space"),
        ("linear", "const threadgroup T* scalars = (const threadgroup", "const T* scalars = (const",
         "address space"),
        ("linear", "simdgroup_multiply_accumulate(sums", "simdgroup_multiply(sums", "undeclared"),
        ("stem", "= vec<T, 4>(fastvlm_gelu(acc[t][i]))", "= fastvlm_gelu(acc[t][i])", "assigning"),
        ("gelu", "t * metal::fast::divide(p, q)", "t * metal::fast::quotient(p, q)", "no member"),
    ],
)  # fmt: skip
def test_faults_that_clang_sees(
    sources: list[str], tmp_path: Path, kernel: str, old: str, new: str, complaint: str
) -> None:
    source = next(s for s in sources if f"fastvlm_{kernel}" in s and "float16_t" in s and old in s)
    assert complaint in complaints([source.replace(old, new)], tmp_path)
