"""Checks and timings while MLX traces the encoder's graph, as on a Mac's first picture.

The kernels' places are taken by plain forms, which unlike the emulator are operations of MLX.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.ops import (
    choice,
    device,
    linear,
    metal_attention,
    metal_depthwise,
    metal_linear,
    metal_stem,
    selfcheck,
    stem,
)
from tests.metal.modules import MODULES, attention_module, depthwise_module, gelu_module


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What ran in place of kernels."""
    used: list[str] = []

    def depthwise(x: mx.array, w: mx.array, b: Any, stride: int, pre: Any, act: bool, _: Any):
        used.append("depthwise_conv")
        return depthwise_module.plain(x, w, b, stride=stride, pre_bias=pre, gelu=act)

    def stand_in(name: str, plain: Any) -> Any:
        def run(*arguments: Any) -> mx.array:
            used.append(name)
            return plain(*arguments)

        return run

    def product(x: mx.array, w: mx.array, b: mx.array, _: Any) -> mx.array:
        used.append("linear_gelu")
        return linear.plain_linear_gelu(x, w, b)

    monkeypatch.setattr(metal_depthwise, "run", depthwise)
    monkeypatch.setattr(metal_linear, "run", product)
    monkeypatch.setattr(metal_attention, "run", stand_in("attention", attention_module.plain))
    monkeypatch.setattr(metal_stem, "run", stand_in("stem_conv", stem.plain))
    monkeypatch.setattr(gelu_module, "kernel", stand_in("gelu", gelu_module.plain))
    for module in MODULES:
        if hasattr(module, "backend"):
            monkeypatch.setattr(module, "backend", lambda: "metal")
    monkeypatch.setattr(device, "device_info", lambda: {"architecture": "applegpu_g14g"})
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    monkeypatch.setattr(choice, "_can_time", lambda: True)
    monkeypatch.setattr(choice, "_winners", {})
    monkeypatch.setattr(choice, "cache_file", lambda: tmp_path / "winners.json")
    choice._remembered.cache_clear()
    for name, value in (("WORTH", 2**18), ("ROUNDS", 1), ("CALLS", 2), ("BUDGET", 60.0)):
        monkeypatch.setattr(choice, name, value)
    yield used
    choice._remembered.cache_clear()


def test_a_compiled_encoder_is_checked_and_timed_as_it_is_traced(
    mac: list[str], picture: np.ndarray, tmp_path: Path
) -> None:
    vlm = fv.load("nano", dtype="float32", image_size=128, feature_cache=None)
    eager = vlm.encode(picture).tokens
    mx.eval(eager)
    ops = {"depthwise_conv", "linear_gelu", "attention", "stem_conv", "gelu"}
    assert set(mac) == {v.op for v in selfcheck.verdicts() if v.passed} == ops

    selfcheck._verdicts.clear()
    choice._winners.clear()
    choice._remembered.cache_clear()
    (tmp_path / "winners.json").unlink()
    mac.clear()
    vlm._encode_pixels = mx.compile(vlm.network.encode)
    traced = vlm.encode(picture).tokens
    assert mx.abs(traced - eager).max().item() < 1e-4
    assert set(mac) == ops and len(choice.winners()) > 3
    assert (tmp_path / "winners.json").exists()

    mac.clear()
    again = vlm.encode(picture[::-1]).tokens
    assert mac == [], "the graph is there: nothing is checked or timed a second time"
    assert mx.abs(again - traced).max().item() > 1e-3
