"""Files in mlx-vlm's layout against mlx-vlm itself, which runs in a Python of its own.

Make one (`python3 -m venv DIR && DIR/bin/pip install mlx-vlm==0.7.10`) and name it in
FASTVLM_MLX_VLM_PYTHON (`DIR/bin/python`); else these tests are skipped.
"""

import os
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

import fastvlm_mlx as fv
import reference
from conftest import Figure
from fastvlm_mlx.testing import random_checkpoint

PYTHON = os.environ.get("FASTVLM_MLX_VLM_PYTHON")
SIDE = Path(__file__).with_name("mlx_vlm_side.py")
LIMIT = 1e-4

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="FASTVLM_MLX_VLM_PYTHON does not name a Python with mlx-vlm 0.7.10"
)


def mlx_vlm(*arguments: str | Path) -> None:
    assert PYTHON
    command = [PYTHON, SIDE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def compare(folder: Path, tmp_path: Path, figure: Figure, name: str) -> None:
    vlm = fv.load(folder, dtype="float32", image_size=256)
    picture = reference.picture(tmp_path, 300, 200, seed=5)
    pixels = reference.to_unit(reference.padded(picture, 256))
    ids = vlm.prompt_ids("What are these?", images=1)  # one: mlx-vlm misplaces more
    np.savez(tmp_path / "given.npz", ids=np.array(ids), pixels=pixels)
    mlx_vlm(folder, tmp_path / "given.npz", tmp_path / "result.npz")
    theirs = np.load(tmp_path / "result.npz")
    features = np.array(vlm.vision(mx.array(pixels)))
    error = reference.relative_error(features, theirs["features"])
    figure(f"FEATURES vs. mlx-vlm, {name}", error, LIMIT)
    error = reference.relative_error(np.array(vlm.logits(ids, [picture])), theirs["logits"])
    figure(f"LOGITS vs. mlx-vlm, {name}", error, LIMIT)


@pytest.mark.parametrize("bits", [None, 4, 8], ids=["bfloat16", "4-bit", "8-bit"])
def test_random_checkpoint(tmp_path: Path, bits: int | None, figure: Figure) -> None:
    folder = random_checkpoint(tmp_path / "model", "tiny", "mlx-vlm", seed=3, quantize=bits)
    compare(folder, tmp_path, figure, f"{bits or 16} bits")


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_quantized_by_mlx_vlm(tmp_path: Path, bits: int, figure: Figure) -> None:
    folder = random_checkpoint(tmp_path / "model", "tiny", "mlx-vlm", seed=4)
    mlx_vlm("--quantize", str(bits), folder, tmp_path / "quantized")
    compare(tmp_path / "quantized", tmp_path, figure, f"{bits} bits, quantized by mlx-vlm")


def test_quantizing_changes_the_answer(tmp_path: Path) -> None:
    """So that the figures above are about quantized weights."""
    whole = random_checkpoint(tmp_path / "whole", "tiny", "mlx-vlm", seed=3)
    packed = random_checkpoint(tmp_path / "packed", "tiny", "mlx-vlm", seed=3, quantize=4)
    pixels = reference.noise_pixels(256, 256, torch.Generator().manual_seed(0))[0]
    bytes_ = np.round(pixels * 255).astype(np.uint8)
    logits = []
    for folder in (whole, packed):
        vlm = fv.load(folder, dtype="float32", image_size=256)
        ids = vlm.prompt_ids("What are these?", images=1)
        logits.append(np.array(vlm.logits(ids, [bytes_])))
    assert reference.relative_error(*logits) > 1e-3
