"""Where the package's Metal kernels run: on the GPU if there is one, else on the emulator."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from fastvlm_mlx.ops import choice
from tests.metal.emulator import Emulator
from tests.metal.modules import MODULES


class Device:
    """Apple's GPU: kernels are compiled and run by MLX itself."""

    def prepare(self, calls: Sequence[Callable[[], object]]) -> None:
        """Nothing has to be done ahead."""


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """Emulates every Metal kernel made while the test runs."""
    if mx.metal.is_available():
        pytest.skip("the GPU itself runs the kernels here")
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


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Device | Emulator:
    """What runs the kernels, for tests of their results: on a Mac these are the GPU's."""
    if mx.metal.is_available():
        return Device()
    return request.getfixturevalue("emulator")
