"""The emulator as a fixture: inside a test, the package's Metal kernels run on the CPU."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from fastvlm_mlx.ops import choice
from tests.metal.emulator import Emulator
from tests.metal.modules import MODULES


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """Emulates every Metal kernel made while the test runs."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    cache = Path(tempfile.gettempdir()) / "fastvlm-metal-emulator"
    cache.mkdir(exist_ok=True)
    emulator = Emulator(cache)
    kernels = [m._metal_kernel for m in MODULES if hasattr(m, "_metal_kernel")]
    for kernel in kernels:
        kernel.cache_clear()
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    monkeypatch.setattr(choice, "_can_time", lambda: False)  # it would time the emulator
    yield emulator
    for kernel in kernels:
        kernel.cache_clear()
