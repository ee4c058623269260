"""The encoder in use beside its plain forms, on a model's own shapes: `fastvlm doctor -m`."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx import ops
from fastvlm_mlx.encoder_check import check_encoder
from fastvlm_mlx.ops import device
from fastvlm_mlx.ops.device import backend
from fastvlm_mlx.vision import FastViTHD
from tests.test_cli import one_line, run

STAGES = ["stem", "stage1", "stage2", "stage3", "stage4", "stage5", "head"]


def tower(dtype: str, bits: int | None = None) -> FastViTHD:
    vision = fv.load("nano", dtype=dtype).vision
    if bits:
        divides = lambda _, m: isinstance(m, nn.Linear) and m.weight.shape[1] % 32 == 0  # noqa: E731
        nn.quantize(vision, 32, bits, class_predicate=divides)
    return vision


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_right_encoder_passes(dtype: str, bits: int | None) -> None:
    vision = tower(dtype, bits)
    check = check_encoder(vision, 128)
    assert check.passed and [stage.stage for stage in check.stages] == STAGES
    assert check.seconds > 0 and check.plain_seconds > 0
    assert vision.stem.conv.weight.dtype == check.dtype == getattr(mx, dtype), "left as it was"
    if dtype != "float32":
        assert all(0 < stage.rounding < 0.05 for stage in check.stages)


@pytest.mark.parametrize(("dtype", "mistake"), [("float32", 1e-3), ("float16", 0.05)])
def test_a_wrong_form_is_found_in_its_stage(
    monkeypatch: pytest.MonkeyPatch, dtype: str, mistake: float
) -> None:
    right = ops.depthwise_conv

    def wrong(x: mx.array, weight: mx.array, *args: object, **options: object) -> mx.array:
        y = right(x, weight, *args, **options)  # type: ignore[arg-type]
        # Only on a shape in use, as a mistake in a tile's edge would be; 7x7 comes with stage 1.
        if backend() != "reference" and weight.shape[0] == 7 and x.shape[1] == 32:
            y[:, -1] += mistake * mx.abs(y).max()
        return y

    monkeypatch.setattr(ops, "depthwise_conv", wrong)
    check = check_encoder(tower(dtype), 128)
    verdicts = {stage.stage: stage.passed for stage in check.stages}
    assert not check.passed
    assert verdicts["stem"] and not verdicts["stage1"]


@pytest.mark.parametrize(
    ("architecture", "tf32", "passes"),
    [("applegpu_g17g", "1", True), ("applegpu_g17g", "0", False), ("applegpu_g16g", "1", False)],
)
def test_float32_may_differ_where_products_are_not(
    monkeypatch: pytest.MonkeyPatch, architecture: str, tf32: str, passes: bool
) -> None:
    """With matrix units (M5) MLX rounds the factors of a product to TF32, our kernels do not."""
    right = ops.linear_gelu

    def in_tf32(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        def rounded(a: mx.array) -> mx.array:
            bits = (a.view(mx.uint32) + (1 << 12)) >> 13 << 13
            return bits.view(mx.float32)

        if backend() != "reference":
            return right(x, weight, bias)
        return right(rounded(x), rounded(weight), bias)

    monkeypatch.setattr(ops, "linear_gelu", in_tf32)
    monkeypatch.setattr(device, "device_info", lambda: {"architecture": architecture})
    monkeypatch.setenv("MLX_ENABLE_TF32", tf32)
    assert check_encoder(tower("float32"), 128).passed is passes


@pytest.mark.parametrize("side", [0, -64, 100])
def test_sizes_that_no_picture_has(side: int) -> None:
    with pytest.raises(fv.OptionError, match="multiple of 64"):
        check_encoder(tower("float32"), side)


def test_doctor_runs_a_models_encoder(tiny: Path) -> None:
    result = run("doctor", "-m", tiny, "--image-size", 128, "--dtype", "float32", "--json")
    assert result.returncode == 0, result.stderr
    lines = json.loads(result.stdout)["encoder, 128 x 128"]
    assert "ms in float32" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == STAGES
    assert not any("WRONG" in line for line in lines)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--image-size", "128"], "belong to --model"),
        (["-m", "nano", "--image-size", "100"], "multiple of 64"),
        (["-m", "nano", "--dtype", "int8"], "float16"),
    ],
)
def test_doctors_wrong_arguments(args: list[str], message: str) -> None:
    result = run("doctor", *args)
    assert result.returncode == 2 and message in one_line(result)
    assert result.stdout == b""
