"""Every dialect gives the same model; every damaged checkpoint gives one clear error."""

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint import loading
from fastvlm_mlx.checkpoint.loading import examine_checkpoint, load_checkpoint, weight_bytes
from fastvlm_mlx.checkpoint.quantized import quantize_linears
from fastvlm_mlx.model import flat_parameters
from fastvlm_mlx.testing import random_checkpoint
from fastvlm_mlx.testing_names import DIALECTS


def _load(source: Path) -> fv.FastVLM:
    """In float32, which is the default on a CPU only."""
    return fv.load(source, dtype="float32")


def _pixels() -> mx.array:
    return mx.random.uniform(shape=(1, 128, 192, 3), key=mx.random.key(3))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_weights_lie_in_rows(tmp_path: Path, dialect: str) -> None:
    """MLX would copy a transposed view before each launch of a Metal kernel that reads it."""
    folder = random_checkpoint(tmp_path / "checkpoint", size="tiny", dialect=dialect)
    vlm = fv.load(folder, dtype="float16")
    parameters = flat_parameters(vlm.network)
    assert {a.dtype for _, a in parameters} == {mx.float16} and len(parameters) > 50
    assert [name for name, a in parameters if not memoryview(a).c_contiguous] == []


@pytest.mark.parametrize("dialect", ["native", "mlx-vlm"])
def test_dialects_give_the_same_model(
    vlm: fv.FastVLM, tmp_path: Path, picture: np.ndarray, dialect: str
) -> None:
    folder = random_checkpoint(tmp_path / "checkpoint", size="tiny", dialect=dialect)
    other = fv.load(folder, dtype="float32")
    assert mx.array_equal(other.vision(_pixels()), vlm.vision(_pixels()))
    ids = vlm.prompt_ids("What?")
    expected, got = vlm.logits(ids, [picture]), other.logits(ids, [picture])
    rows = min(expected.shape[-1], got.shape[-1])  # dialects pad the vocabulary differently
    # Not bit for bit: a head of another width is another matrix product.
    assert mx.allclose(got[..., :rows], expected[..., :rows], rtol=1e-5, atol=1e-5)


def test_the_training_form_is_fused(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "train", size="tiny", dialect="apple-train")
    assert examine_checkpoint(folder).training_form
    features = fv.load(folder).vision(_pixels())
    assert 0.05 < float(mx.abs(features).max()) < 1e3


def test_a_way_of_quantizing_that_is_not_known(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "q", size="tiny", dialect="mlx-vlm", quantize=4)
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key] = {**config.get(key, {}), "mode": "awq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(fv.CheckpointError, match="quantized as 'awq'; expected one of affine"):
        load_checkpoint(folder, dtype=mx.float32)


def test_narrow_matrices_are_quantized_in_smaller_groups() -> None:
    layers = [nn.Linear(width, 8) for width in (64, 96, 80)]
    before = [mx.array(layer.weight) for layer in layers]
    for layer in layers:
        quantize_linears(layer, 4, keep_packed=False)
    changed = [not mx.array_equal(b, layer.weight) for b, layer in zip(before, layers, strict=True)]
    assert changed == [True, True, False]


def test_quantized_files_equal_their_dequantization(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "q", size="tiny", dialect="mlx-vlm", quantize=4)
    loaded = load_checkpoint(folder, dtype=mx.float32, keep_quantized=False).network
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    name = "language_model.model.layers.0.mlp.up_proj"
    expected = mx.dequantize(
        tensors[f"{name}.weight"],
        tensors[f"{name}.scales"].astype(mx.float32),
        tensors[f"{name}.biases"].astype(mx.float32),
        group_size=tensors[f"{name}.scales"].shape[-1] and 64,
        bits=4,
    )
    assert mx.array_equal(loaded.language_model.model.layers[0].mlp.up_proj.weight, expected)
    packed = load_checkpoint(folder, dtype=mx.float32, keep_quantized=True).network
    layer = packed.language_model.model.layers[0].mlp.up_proj
    assert (layer.bits, layer.weight.dtype) == (4, mx.uint32)


@pytest.mark.parametrize("keep_packed", [True, False])
def test_quantizing_while_loading_equals_quantizing_afterwards(
    tiny: Path, keep_packed: bool
) -> None:
    found = load_checkpoint(tiny, dtype=mx.bfloat16, quantize=4, keep_quantized=keep_packed).network
    expected = load_checkpoint(tiny, dtype=mx.bfloat16).network
    for part in (expected.language_model, expected.projector):
        quantize_linears(part, 4, keep_packed=keep_packed)
    ours, theirs = dict(flat_parameters(found)), dict(flat_parameters(expected))
    assert ours.keys() == theirs.keys()
    assert any(name.endswith(".scales") for name in ours) == keep_packed
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype and mx.array_equal(array, theirs[name]), name


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU's memory comes in larger pieces")
def test_quantizing_while_loading_never_holds_all_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a model fits whose quantized weights do: a 7B into 16 GB."""
    monkeypatch.setattr(loading, "_BATCH_BYTES", 1 << 14)
    nano = Path(fv.__file__).parent / "nano"

    def peak(quantize: int | None) -> tuple[int, int]:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        network = load_checkpoint(nano, dtype=mx.float32, quantize=quantize).network
        held = sum(array.nbytes for _, array in flat_parameters(network))
        return mx.get_peak_memory() - before, held

    floats, quantized = peak(None), peak(4)
    assert quantized[1] < 0.75 * floats[1]
    assert quantized[0] < floats[1], "less at its worst than the floats alone"


def test_weights_are_counted_before_they_are_read(tiny: Path, tmp_path: Path) -> None:
    packed = random_checkpoint(tmp_path / "q", size="tiny", dialect="mlx-vlm", quantize=4)
    for folder, quantize in ((tiny, None), (tiny, 4), (packed, None)):
        told: list[int] = []
        how: dict[str, Any] = {"dtype": mx.bfloat16, "vision_dtype": mx.float16}
        network = load_checkpoint(
            folder, **how, quantize=quantize,
            examined=lambda s: told.append(weight_bytes(s, *how.values(), quantize)),  # noqa: B023
        ).network  # fmt: skip
        held = sum(array.nbytes for _, array in flat_parameters(network))
        assert told[0] == pytest.approx(held, rel=0.03)


def test_what_macos_writes_beside_files_is_no_weights(
    vlm: fv.FastVLM, tiny: Path, tmp_path: Path
) -> None:
    """On an exFAT disk each file has an AppleDouble twin, of its ending but none of its kind."""
    folder = shutil.copytree(tiny, tmp_path / "on exFAT")
    apple_double = bytes.fromhex("00051607 00020000") + b"Mac OS X        " + bytes(58)
    for file in list(folder.iterdir()):
        file.with_name(f"._{file.name}").write_bytes(apple_double)
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert mx.array_equal(fv.load(folder).vision(_pixels()), fv.load(tiny).vision(_pixels()))
    (folder / "model.safetensors").unlink()
    with pytest.raises(fv.CheckpointError, match="No weights in"):
        fv.load(folder)


def test_a_zip_loads_without_unpacking_and_leaves_nothing(
    vlm: fv.FastVLM, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    archive = tmp_path / "llava-fastvithd_tiny.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in tiny.iterdir():
            packed.write(file, f"llava-fastvithd_tiny/{file.name}")
        packed.writestr("__MACOSX/llava-fastvithd_tiny/._config.json", b"\0")
        packed.writestr("__MACOSX/config.json", b"\0")
        packed.writestr("llava-fastvithd_tiny/trainer/config.json", b"{}")
    assert mx.array_equal(_load(archive).vision(_pixels()), vlm.vision(_pixels()))
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/evil.json", "a/../../evil.json"])
def test_a_zip_that_points_outside_is_refused(tiny: Path, tmp_path: Path, name: str) -> None:
    archive = tmp_path / "evil.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.write(tiny / "config.json", "m/config.json")
        packed.writestr(name, b"{}")
    with pytest.raises(fv.CheckpointError, match="outside the archive"):
        fv.load(archive)
    assert not (tmp_path.parent / "evil.json").exists()


def test_zips_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK nothing")
    with pytest.raises(fv.CheckpointError, match="not a zip"):
        fv.load(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as packed:
        packed.writestr("readme.txt", "hello")
    with pytest.raises(fv.CheckpointError, match=r"no config\.json"):
        fv.load(tmp_path / "b.zip")


Change = Callable[[Path], object]


def _edit_config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _edit_tensors(edit: Callable[[dict[str, mx.array]], object]) -> Change:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        edit(tensors)
        mx.eval(tensors)
        file.unlink()
        mx.save_safetensors(str(file), tensors, {"format": "pt"})

    return change


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


NORM = "model.norm.weight"
TOWER = "model.vision_tower.vision_tower.model."


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "No weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "not a complete safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "not a complete safetensors"),
        (_cut, "not a complete safetensors"),
        (lambda f: (f / "merges.txt").unlink(), "No tokenizer"),
        (_edit_config(model_type="llava_llama"), "model_type"),
        (_edit_config(num_hidden_layers=3), "12 tensors are missing"),
        (_edit_config(num_hidden_layers=1), "12 tensors are unknown"),
        (_edit_config(intermediate_size=256), "another shape than config.json"),
        (_edit_config(eos_token_id=7), "belongs to another model"),
        (_edit_tensors(lambda t: t.pop(NORM)), "1 tensors are missing: language_model.model.norm"),
        (_edit_tensors(lambda t: t.update(surprise=mx.zeros(3))), "unknown: surprise"),
        (_edit_tensors(lambda t: t.update({NORM: mx.zeros(3)})), r"norm.weight \(3,\) instead of"),
        (
            _edit_tensors(lambda t: t.update({NORM: t[NORM] * float("nan")})),
            "norm.weight holds NaN",
        ),
        (
            _edit_tensors(lambda t: [t.pop(n) for n in list(t) if n.startswith(TOWER)]),
            "not a FastVLM checkpoint: no vision tower",
        ),
        (
            _edit_tensors(
                lambda t: [t.update({"model.vision_tower." + n: t.pop(n)}) for n in list(t)]
            ),
            "another vision-language model",
        ),
    ],
)
def test_damaged_checkpoints(tiny: Path, tmp_path: Path, change: Change, named: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny, folder)
    change(folder)
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(fv.CheckpointError, match=named):
        fv.load(folder)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_core_ml_export_names_what_to_use_instead(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "coreml"
    folder.mkdir()
    shutil.copy(tiny / "config.json", folder)
    tensors = {
        "language_model.model.norm.weight": mx.zeros(64),
        "multi_modal_projector.linear_0.weight": mx.zeros((64, 512)),
    }
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    with pytest.raises(fv.UnsupportedCheckpoint, match=r"Core ML export.*apple/FastVLM-0\.5B"):
        fv.load(folder)


def test_a_different_lm_head_under_tied_embeddings_is_ignored_aloud(
    vlm: fv.FastVLM, tiny: Path, tmp_path: Path, picture: np.ndarray
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fv.load(tiny)  # the stored copy equals the table: nothing to say
    folder = tmp_path / "untied"
    shutil.copytree(tiny, folder)
    _edit_tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))(folder)
    with pytest.warns(UserWarning, match=r"ties its embeddings but stores another lm_head"):
        other = fv.load(folder, dtype="float32")
    ids = vlm.prompt_ids("What?", 0)
    assert mx.array_equal(other.logits(ids), vlm.logits(ids))
    _edit_config(tie_word_embeddings=False)(folder)
    assert not mx.array_equal(fv.load(folder, dtype="float32").logits(ids), vlm.logits(ids))


def test_an_untied_model_needs_its_lm_head(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    shutil.copytree(tiny, folder)
    _edit_config(tie_word_embeddings=False)(folder)
    _edit_tensors(lambda t: t.pop("lm_head.weight"))(folder)
    with pytest.raises(fv.CheckpointError, match=r"missing: language_model\.lm_head\.weight"):
        fv.load(folder)


def test_shards(vlm: fv.FastVLM, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(tiny, folder)
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        mx.save_safetensors(str(folder / file), {n: tensors[n] for n in part})
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert mx.array_equal(_load(folder).vision(_pixels()), vlm.vision(_pixels()))
    (folder / "b.safetensors").unlink()
    with pytest.raises(fv.CheckpointError, match=r"b\.safetensors is missing"):
        fv.load(folder)


def test_neither_a_path_nor_a_hub_id(tmp_path: Path) -> None:
    for name in ("no such place", str(tmp_path / "missing" / "model")):
        with pytest.raises(fv.CheckpointError, match="No checkpoint at"):
            fv.load(name)
    with pytest.raises(fv.CheckpointError, match="not a zip"):
        fv.load(__file__)


def test_an_unreachable_hub_names_nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("apple/FastVLM-9B", "apple/no--such..name-"):
        with pytest.raises(fv.HubError, match=rf"Cannot get {name}.*--model nano"):
            fv.load(name)


def test_loading_reports_progress(tiny: Path) -> None:
    seen: list[tuple[int, int]] = []
    fv.load(tiny, progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] > 100
