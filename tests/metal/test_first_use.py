"""What the first answer on a new Mac waits for: forms to time, kernels to check and to compile."""

import re
from collections.abc import Iterator
from math import prod

import mlx.core as mx
import pytest

from fastvlm_mlx import ops
from fastvlm_mlx.ops import choice, device, selfcheck
from fastvlm_mlx.vision import FastViTHD
from tests.metal.launches import NETWORKS, build, recording
from tests.metal.modules import MODULES


class FirstUse:
    """A process that has run nothing yet; encoding says what was timed and checked for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, network: str = "FastViTHD") -> None:
        self.monkeypatch = monkeypatch
        self.tower = FastViTHD(NETWORKS[network])
        self.timed: dict[str, tuple[str, ...]] = {}
        self.checked: set[str] = set()
        monkeypatch.setattr(selfcheck, "passes", self.passes)
        monkeypatch.setattr(choice, "_can_time", lambda: True)
        monkeypatch.setattr(choice, "_winners", {})
        monkeypatch.setattr(choice, "_remembered", dict)
        monkeypatch.setattr(choice, "_timed", self.time)

    def passes(self, op: str, configuration: str, *_: object) -> bool:
        self.checked.add(f"{op} {configuration}")
        return True

    def time(self, key: str, forms: tuple[str, ...], _: object) -> str:
        assert key not in self.timed
        self.timed[key] = forms
        return forms[0]

    def encode(self, batch: int, height: int, width: int) -> tuple[int, int]:
        """How many forms this had to time, and kernels to check."""
        before = self.forms, len(self.checked)
        with recording(self.monkeypatch, form=None):
            build(self.tower, batch, height, width, mx.float16)
        return self.forms - before[0], len(self.checked) - before[1]

    @property
    def forms(self) -> int:
        return sum(map(len, self.timed.values()))


@pytest.fixture
def first_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[FirstUse]:
    for module in MODULES:
        if hasattr(module, "backend"):
            monkeypatch.setattr(module, "backend", lambda: "metal")
    monkeypatch.setattr(device, "device_info", lambda: {"architecture": "applegpu_g14g"})
    return FirstUse(monkeypatch)


def test_the_first_picture(first_use: FirstUse) -> None:
    """The figures of CONTRIBUTING.md."""
    assert first_use.encode(1, 1024, 1024) == (46, 11)
    assert len(first_use.timed) == 18


def test_sizes_and_batches_alike_wait_for_nothing(first_use: FirstUse) -> None:
    first_use.encode(1, 1024, 1024)
    assert first_use.encode(1, 768, 832) == first_use.encode(1, 960, 1024) == (0, 0)
    assert first_use.encode(4, 1024, 1024) == (25, 0), "the narrow products and the small maps"
    assert first_use.encode(17, 1024, 1024)[0] < 5
    assert first_use.encode(1, 512, 512)[0] < 46
    for size in ((64, 1024, 1024), (1, 2048, 2048), (1, 1536, 1536), (1, 448, 320), (1, 576, 448)):
        assert first_use.encode(*size) == (0, 0), size


def test_nothing_large_is_timed(first_use: FirstUse) -> None:
    """Not more than a picture of 1024 x 1024 has: memory that runs out ends the process."""
    for batch, side in ((1, 64), (1, 1024), (64, 1024), (1, 2048), (17, 2048)):
        first_use.encode(batch, side, side)
    for key in first_use.timed:
        shape = [int(n) for n in re.findall(r"(?:^|x)(\d+)(?=x|$)", key.split()[-2])]
        if key.startswith("linear_gelu"):
            rows, outputs, inputs = shape
            assert rows * outputs * inputs <= 2**32 and rows * max(shape[1:]) <= 2**25, key
        else:
            assert prod(shape) <= 2**23, key


def test_small_networks_time_little(monkeypatch: pytest.MonkeyPatch, first_use: FirstUse) -> None:
    """What takes a few microseconds takes the form listed first."""
    nano = FirstUse(monkeypatch, "nano")
    assert nano.encode(1, 256, 256)[0] == 0
    assert nano.encode(1, 1024, 1024)[0] <= 46


def test_an_assumed_device_times_nothing(first_use: FirstUse) -> None:
    with ops.assume("metal"):
        first_use.encode(1, 512, 512)
    assert first_use.timed == {}
