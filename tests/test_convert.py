"""Conversions: what is written loads to the numbers that quantizing the source gives."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.dialects import Dialect
from fastvlm_mlx.checkpoint.loading import examine_checkpoint, load_checkpoint
from fastvlm_mlx.checkpoint.quantized import Quantization
from fastvlm_mlx.checkpoint.tensors import TensorRef
from fastvlm_mlx.convert.conversion import Conversion, Options, convert_checkpoint
from fastvlm_mlx.convert.plan import describe
from fastvlm_mlx.convert.planning import choose_dtypes
from fastvlm_mlx.convert.streaming import dequantize, quantize
from fastvlm_mlx.model import flat_parameters
from fastvlm_mlx.testing import random_checkpoint

TILES = [
    *[("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)],
    ("affine", 4, 32),
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
]
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def _convert(source: Path, target: Path, **options: Any) -> Conversion:
    return convert_checkpoint(str(source), target, Options(**{"verify": False, **options}))


def _weights(folder: Path) -> dict[str, mx.array]:
    return dict(
        flat_parameters(load_checkpoint(folder, dtype=mx.float32, keep_quantized=False).network)
    )


def _rounded(
    weights: dict[str, mx.array], hows: dict[str, Quantization], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """The source's weights, quantized and dequantized with MLX's own functions."""
    result = dict(weights)
    for module, how in hows.items():
        parts = quantize(weights[f"{module}.weight"], how, dtype)
        result[f"{module}.weight"] = dequantize(parts, how)
    return result


def _same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    wrong = [n for n in expected if not mx.array_equal(found[n], expected[n])]
    assert not wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("mode", "bits", "group"), TILES)
def test_every_mode_and_width(
    tiny: Path, tmp_path: Path, mode: str, bits: int, group: int, dtype: str
) -> None:
    given = {"mode": mode} if mode != "affine" else {"bits": bits, "group_size": group}
    done = _convert(tiny, tmp_path / "q", dtype=dtype, **given)
    hows = set(done.plan.quantization.values())
    assert hows == {Quantization(bits, group, mode)}
    # 2 layers of 7 matrices, the embeddings, and the projector.
    assert len(done.plan.quantization) == 17
    found = _weights(tmp_path / "q")
    cast = {name: array.astype(DTYPES[dtype]) for name, array in _weights(tiny).items()}
    expected = _rounded(cast, dict(done.plan.quantization), DTYPES[dtype])
    expected = {name: array.astype(mx.float32) for name, array in expected.items()}
    tower = {name for name in found if name.startswith("vision.")}
    # A tower in bfloat16 is scaled for float16 as well; that is another test.
    _same(
        {n: a for n, a in found.items() if n not in tower},
        {n: a for n, a in expected.items() if n not in tower},
    )
    assert {q.mode for q in examine_checkpoint(tmp_path / "q").quantized.values()} == {mode}


@pytest.mark.parametrize("dialect", ["apple", "apple-train", "native", "native-train", "mlx-vlm"])
@pytest.mark.parametrize("bits", [None, 4])
def test_every_dialect(tmp_path: Path, dialect: str, bits: int | None) -> None:
    source = random_checkpoint(tmp_path / "source", size="tiny", dialect=dialect)
    done = _convert(source, tmp_path / "out", bits=bits, vision_bits=bits, dtype="float32")
    found = load_checkpoint(tmp_path / "out", dtype=mx.float32, keep_quantized=False)
    assert found.source.dialect is Dialect.FOLDED
    assert set(found.config.vision.residual_scales) == {1.0}
    _same(
        dict(flat_parameters(found.network)),
        _rounded(_weights(source), dict(done.plan.quantization), mx.float32),
    )
    assert sum(m.startswith("vision.") for m in done.plan.quantization) == (0 if not bits else 19)


def test_quantized_folded_towers_run_packed(
    tiny: Path, tmp_path: Path, picture: np.ndarray
) -> None:
    _convert(tiny, tmp_path / "q", bits=8, vision_bits=8, dtype="float32")
    packed = load_checkpoint(tmp_path / "q", dtype=mx.float32)
    floats = load_checkpoint(tmp_path / "q", dtype=mx.float32, keep_quantized=False)
    pixels = mx.array(picture[:64, :128][None] / 255.0)
    a, b = packed.network.encode(pixels), floats.network.encode(pixels)
    assert mx.abs(a - b).max().item() < 1e-3 * mx.abs(b).max().item()


def test_floats_stay_the_same_model(
    tiny: Path, tmp_path: Path, vlm: fv.FastVLM, picture: np.ndarray
) -> None:
    _convert(tiny, tmp_path / "out", dtype="float32")
    out = fv.load(tmp_path / "out", dtype="float32")
    assert out.source.metadata["source"] == tiny.name
    ids = vlm.prompt_ids("What?")
    assert mx.array_equal(out.logits(ids, [picture]), vlm.logits(ids, [picture]))
    default = _convert(tiny, tmp_path / "default")
    assert {t.dtype for n, t in default.plan.tensors.items() if n.startswith("vision.")} == {"F16"}
    assert {t.dtype for n, t in default.plan.tensors.items() if "model" in n} == {"BF16"}


# ----------------------------------------------------------------------------------------- layouts


def _headers(folder: Path) -> dict[str, tuple[Any, ...]]:
    loaded: Any = mx.load(str(folder / "model.safetensors"))
    return {name: (array.dtype, tuple(array.shape)) for name, array in loaded.items()}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dialect", ["apple", "native", "apple-train", "native-train"])
def test_the_peers_layout_name_by_name(tmp_path: Path, dialect: str, bits: int | None) -> None:
    source = random_checkpoint(tmp_path / "source", size="tiny", dialect=dialect)
    theirs = random_checkpoint(tmp_path / "theirs", size="tiny", dialect="mlx-vlm", quantize=bits)
    _convert(source, tmp_path / "ours", layout="mlx-vlm", bits=bits)
    ours, expected = _headers(tmp_path / "ours"), _headers(theirs)
    if dialect.startswith("native"):  # has more vocabulary rows
        table = "language_model.model.embed_tokens."
        ours, expected = (
            {n: v for n, v in found.items() if not n.startswith(table)}
            for found in (ours, expected)
        )
    assert ours == expected
    examined = examine_checkpoint(tmp_path / "ours")
    assert examined.dialect is Dialect.MLX_VLM
    config, reference = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "ours", theirs)
    )
    assert reference["vision_config"].items() <= config["vision_config"].items()
    assert config["eos_token_id"] == reference["eos_token_id"]
    assert config["image_token_index"] == -200
    if bits:
        assert config["quantization"] == reference["quantization"]


def test_mixed_bits_are_told_to_peers_in_their_names(tiny: Path, tmp_path: Path) -> None:
    _convert(tiny, tmp_path / "out", layout="mlx-vlm", bits=4, recipe="mixed")
    entry = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert entry["bits"] == 6  # both of the two layers are first or last
    assert "mm_projector.0" not in entry
    recipe = tmp_path / "r.toml"
    recipe.write_text('bits = 4\n[modules]\n"projector.fc1" = { bits = 8 }\n"*.q_proj" = false\n')
    _convert(tiny, tmp_path / "toml", layout="mlx-vlm", recipe=str(recipe))
    entry = json.loads((tmp_path / "toml/config.json").read_text())["quantization"]
    assert entry["mm_projector.0"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert entry["language_model.model.layers.1.self_attn.q_proj"] is False
    hows = examine_checkpoint(tmp_path / "toml").quantized
    assert hows["projector.fc1"].bits == 8
    assert hows["projector.fc2"].bits == 4


def test_fuse_only(tmp_path: Path) -> None:
    source = random_checkpoint(
        tmp_path / "source", size="tiny", dialect="apple-train", dtype="float32"
    )
    _convert(source, tmp_path / "fused", fuse_only=True)
    examined = examine_checkpoint(tmp_path / "fused")
    assert examined.dialect is Dialect.APPLE
    assert not examined.training_form
    _same(_weights(tmp_path / "fused"), _weights(source))
    names = _headers(tmp_path / "fused").keys()
    genuine = _headers(random_checkpoint(tmp_path / "apple", size="tiny")).keys()
    # Left out: counters, and the lm_head that Apple's files repeat though it is tied.
    assert {n for n in genuine - names if not n.endswith("num_batches_tracked")} == {
        "lm_head.weight"
    }
    assert not names - genuine


def test_folding_cannot_be_undone(tiny: Path, tmp_path: Path) -> None:
    _convert(tiny, tmp_path / "folded")
    with pytest.raises(fv.OptionError, match="is folded, which cannot be undone"):
        _convert(tmp_path / "folded", tmp_path / "out", layout="mlx-vlm")
    _convert(tmp_path / "folded", tmp_path / "q", bits=4)
    assert examine_checkpoint(tmp_path / "q").quantized


# ------------------------------------------------------------------------------- quantized sources


def test_a_peers_quantized_file_is_kept_bit_for_bit(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", size="tiny", dialect="mlx-vlm", quantize=4)
    theirs: Any = mx.load(str(source / "model.safetensors"))
    for layout, prefix in (("fastvlm", "projector.fc1"), ("mlx-vlm", "mm_projector.0")):
        said: list[str] = []
        target = tmp_path / layout
        convert_checkpoint(
            str(source), target, Options(layout=layout, verify=False), say=said.append
        )
        assert "copied bit for bit" in said[0]
        ours: Any = mx.load(str(target / "model.safetensors"))
        for part in ("weight", "scales", "biases"):
            assert mx.array_equal(ours[f"{prefix}.{part}"], theirs[f"mm_projector.0.{part}"])
        found, expected = _weights(target), _weights(source)
        text = [n for n in expected if not n.startswith("vision.")]
        assert all(mx.array_equal(found[n], expected[n]) for n in text)


def test_dequantizing_and_quantizing_again(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", size="tiny", dialect="mlx-vlm", quantize=8)
    _convert(source, tmp_path / "floats", dequantize=True, dtype="float32")
    assert not examine_checkpoint(tmp_path / "floats").quantized
    _same(_weights(tmp_path / "floats"), _weights(source))
    said: list[str] = []
    convert_checkpoint(str(source), tmp_path / "q", Options(bits=4, verify=False), say=said.append)
    assert said[0].startswith("warning: source is already quantized (8 bits)")
    assert {h.bits for h in examine_checkpoint(tmp_path / "q").quantized.values()} == {4}


# -------------------------------------------------------------------------------------- the files


def test_shards_and_the_plan_tell_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    planned = convert_checkpoint(
        str(tiny), tmp_path / "out", Options(bits=4, shard_bytes=600_000), dry_run=True
    )
    assert not (tmp_path / "out").exists()
    assert "total" in describe(planned.plan)
    done = _convert(tiny, tmp_path / "out", bits=4, shard_bytes=600_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == planned.plan.nbytes == done.report["bytes"]
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all(f.stat().st_size < 600_000 + 20_000 for f in files)
    _convert(tiny, tmp_path / "one", bits=4)
    _same(_weights(tmp_path / "out"), _weights(tmp_path / "one"))


def test_apples_layout_takes_the_commonest_type() -> None:
    kinds = ["BF16", "F32", "F32", "I64", "I64", "I64"]
    refs = {str(n): TensorRef(kind, (1,), lambda: mx.zeros(1)) for n, kind in enumerate(kinds)}
    source: Any = SimpleNamespace(refs=refs)
    assert choose_dtypes(source, Options(fuse_only=True)) == ("float32", "float32")


def test_the_report_the_card_and_the_licence(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    (source / "LICENSE").write_text("do as you like")
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: 'like-it'\n---\n# Model\n"
    )
    before = _hashes(source)
    done = convert_checkpoint(str(source), tmp_path / "out", Options(bits=4, samples=2))
    assert _hashes(source) == before
    report = json.loads((tmp_path / "out/conversion.json").read_text())
    assert report["verification"]["run"] and report["verification"]["passed"]
    assert report["verification"]["samples"] == 2
    assert report["recipe"]["name"] == "uniform 4-bit"
    assert report["bits_per_weight"] == 4.5
    modules = report["modules"]
    assert len(modules) == 17
    assert all(0.01 < m["weight_error"] < 0.2 for m in modules.values())
    assert report["bytes"] == done.plan.nbytes
    card = (tmp_path / "out/README.md").read_text()
    assert "license_name: like-it" in card and "| licence | like-it |" in card
    assert "uniform 4-bit" in card and "top-1 agreement" in card
    assert (tmp_path / "out/LICENSE").read_text() == "do as you like"
    # Nothing that may be published names a folder of this computer.
    assert "converted from `source`" in card
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file


def _hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# ------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "bits is 7; expected one of 2, 3, 4, 5, 6, 8"),
        ({"bits": 4, "group_size": 48}, "group_size is 48; expected one of 32, 64, 128"),
        ({"bits": 4, "group_size": 128}, "does not divide the 64 inputs of .*; use 32 or 64"),
        ({"mode": "int4"}, "mode is 'int4'; expected one of affine, mxfp4, mxfp8, nvfp4"),
        ({"mode": "mxfp4", "bits": 8}, "mode mxfp4 has 4 bits and groups of 32"),
        ({"recipe": "best"}, "recipe is 'best'; expected uniform, mixed, auto or a .toml file"),
        ({"recipe": "absent.toml"}, "absent.toml cannot be read"),
        ({"recipe": "mixed", "mode": "nvfp4"}, "needs mode affine"),
        ({"target_bits": 4.5}, "belongs to recipe 'auto'"),
        ({"group_size": 32}, "group_size needs something to quantize"),
        ({"samples": 0}, "samples is 0"),
        ({"recipe": "auto", "bits": 4}, "takes target_bits"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"layout": "gguf"}, "layout is 'gguf'; expected one of fastvlm, mlx-vlm, apple"),
        ({"layout": "mlx-vlm", "vision_bits": 8}, "vision_bits needs layout 'fastvlm'"),
        ({"fuse_only": True, "bits": 4}, "fuse_only goes with dtype alone"),
        ({"dequantize": True, "bits": 4}, "dequantize contradicts"),
    ],
)
def test_wrong_options(tiny: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fv.OptionError, match=message):
        _convert(tiny, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_source_and_destination_must_be_apart(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    for target in (source, source / "inside", tmp_path):
        with pytest.raises(fv.CheckpointError, match="never modified"):
            _convert(source, target, overwrite=True)
    with pytest.raises(fv.CheckpointError, match="No checkpoint at"):
        _convert(tmp_path / "absent", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_no_space_is_found_before_starting(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(fv.CheckpointError, match="has 1 MB free, but 70 MB are needed"):
        _convert(tiny, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_damaged_weights_are_not_converted(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", size="tiny")
    tensors: Any = mx.load(str(source / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = mx.where(mx.arange(64) == 5, float("nan"), tensors[name])
    tensors = {n: mx.contiguous(t) for n, t in tensors.items()}
    mx.eval(tensors)
    mx.save_safetensors(str(source / "model.safetensors"), tensors, {"format": "pt"})
    for bits in (None, 4):
        with pytest.raises(fv.CheckpointError, match=r"up_proj.*NaN"):
            _convert(source, tmp_path / "out", bits=bits)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
