"""What `load` arranges with Metal, played through without one."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx import opening

# mx.device_info() of a Mac with 16 GB: two thirds of them are the GPU's.
M1 = {
    "device_name": "Apple M1",
    "architecture": "applegpu_g13g",
    "memory_size": 17_179_869_184,
    "max_buffer_length": 9_534_832_640,
    "max_recommended_working_set_size": 11_453_251_584,
    "resource_limit": 499_000,
}


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What was set, and MLX's defaults before: the cache may be as large as the memory."""
    now = {"wired": 0, "cache": int(1.5 * M1["max_recommended_working_set_size"])}

    def setter(name: str) -> Any:
        def change(limit: int) -> int:
            now[name], before = limit, now[name]
            return before

        return change

    monkeypatch.setattr(mx, "device_info", lambda: M1)
    monkeypatch.setattr(opening, "available_memory", lambda: M1["max_recommended_working_set_size"])
    monkeypatch.setattr(opening, "physical_memory", lambda: M1["memory_size"])
    monkeypatch.setattr(mx, "set_wired_limit", setter("wired"))
    monkeypatch.setattr(mx, "set_cache_limit", setter("cache"))
    return now


def test_weights_stay_resident_and_freed_memory_does_not_pile_up(limits: dict[str, int]) -> None:
    opening._prepare_metal()
    assert limits == {"wired": 11_453_251_584, "cache": 11_453_251_584 // 4}
    limits["cache"] = 1000
    opening._prepare_metal()
    assert limits["cache"] == 1000, "who has asked for less keeps it"


def test_a_mac_whose_default_device_is_the_cpu(
    tiny: Path, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if mx.default_device() != mx.cpu:
        monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M1"})
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert fv.load(tiny).caption(bytes_of_a_picture(), max_tokens=1).tokens
    assert limits["wired"] == 0


def bytes_of_a_picture() -> bytes:
    return b"P6 2 2 255 " + bytes(12)


@pytest.mark.parametrize(
    ("gigabytes", "quantize", "advice"),
    [(15.2, None, "--quantize 4"), (15.2, 8, "choose a smaller model")],
)
def test_more_weights_than_the_gpu_should_hold_are_told(
    limits: dict[str, int], gigabytes: float, quantize: int | None, advice: str
) -> None:
    told: list[str] = []
    opening._check_room(round(gigabytes * 1e9), quantize, told.append)
    (line,) = told
    assert "15.2 GB" in line and "17.2 GB" in line and "11.5 GB" in line and advice in line
    with pytest.warns(RuntimeWarning, match="will be slow"):
        opening._check_room(round(gigabytes * 1e9), quantize, None)


def test_more_weights_than_memory_are_refused_and_fewer_pass(limits: dict[str, int]) -> None:
    opening._check_room(11_000_000_000, None, pytest.fail)
    with pytest.raises(fv.CheckpointError, match=r"17\.2 GB macOS has 11\.5.*--quantize 4"):
        opening._check_room(18_000_000_000, None, pytest.fail)
