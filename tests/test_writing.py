"""The folded format: what is written loads to the same numbers, or nothing is written."""

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.dialects import Dialect
from fastvlm_mlx.checkpoint.writing import config_to_dict, new_directory
from fastvlm_mlx.config import parse_config
from fastvlm_mlx.convert.conversion import convert_checkpoint


def _logits(vlm: fv.FastVLM, picture: np.ndarray) -> mx.array:
    return vlm.logits(vlm.prompt_ids("What?"), [picture])


def test_config_survives_the_round_trip(vlm: fv.FastVLM) -> None:
    assert parse_config(config_to_dict(vlm.config)) == vlm.config
    scaled = dataclasses.replace(
        vlm.config,
        vision=dataclasses.replace(vlm.config.vision, residual_scales=(1, 1, 1, 0.5, 0.25)),
    )
    assert parse_config(config_to_dict(scaled)) == scaled


def test_folded_checkpoint_is_the_same_model(
    vlm: fv.FastVLM, tiny: Path, tmp_path: Path, picture: np.ndarray
) -> None:
    convert_checkpoint(str(tiny), tmp_path / "folded", dtype="float32")
    folded = fv.load(tmp_path / "folded")
    assert folded.source.dialect is Dialect.FOLDED
    assert folded.source.metadata["source"] == str(tiny)
    assert mx.array_equal(_logits(folded, picture), _logits(vlm, picture))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_checkpoint_equals_quantizing_while_loading(
    tiny: Path, tmp_path: Path, picture: np.ndarray, bits: int
) -> None:
    written = convert_checkpoint(str(tiny), tmp_path / "q", bits=bits, dtype="float32")
    assert written < (tiny / "model.safetensors").stat().st_size * 2
    assert json.loads((tmp_path / "q/config.json").read_text())["quantization"]["bits"] == bits
    expected = _logits(fv.load(tiny, quantize=bits), picture)
    assert mx.allclose(_logits(fv.load(tmp_path / "q"), picture), expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_overwritten_or_left_half_written(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    with pytest.raises(fv.CheckpointError, match="already exists"):
        convert_checkpoint(str(tiny), target)
    with pytest.raises(ZeroDivisionError), new_directory(target, overwrite=True) as temporary:
        (temporary / "half").write_text("")
        1 / 0  # noqa: B018
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert (target / "precious.txt").read_text() == "mine"
    convert_checkpoint(str(tiny), target, overwrite=True)
    assert (target / "model.safetensors").is_file() and not (target / "precious.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_place_that_cannot_be_written(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fv.CheckpointError, match="Cannot write"):
        convert_checkpoint(str(tiny), tmp_path / "file" / "inside")
