"""Random checkpoints: the genuine names and files, one model in every dialect, sane activations."""

import dataclasses
import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx import testing, testing_files
from fastvlm_mlx.checkpoint.dialects import canonical_names, detect
from fastvlm_mlx.checkpoint.layout import expected_tensors
from fastvlm_mlx.checkpoint.loading import load_checkpoint
from fastvlm_mlx.checkpoint.reading import open_checkpoint
from fastvlm_mlx.config import Config, parse_config
from fastvlm_mlx.testing import random_checkpoint
from fastvlm_mlx.testing_files import model_config, vocabulary_of
from fastvlm_mlx.testing_names import DIALECTS, Planned, plan
from fastvlm_mlx.tokenizer import Tokenizer
from tests.notes import NOTES

FULL = ("0.5b", "1.5b", "7b")
TABLES = NOTES / "checkpoints"

needs_tables = pytest.mark.skipif(
    not TABLES.is_dir(), reason="needs the tensor tables of the genuine files, kept beside the repo"
)


def config_of(size: str, dialect: str) -> Config:
    native = dialect.startswith("native")
    return model_config(size, vocabulary_of(size, None), native=native, image_size=None)


def planned(size: str, dialect: str) -> list[Planned]:
    return plan(config_of(size, dialect), dialect, "BF16")


def table(name: str) -> Any:
    return json.loads((TABLES / name).read_text(encoding="utf-8"))


def total_bytes(tensors: list[Planned]) -> int:
    return sum(math.prod(t.shape) * {"BF16": 2, "I64": 8}[t.dtype] for t in tensors)


def file_of(folder: Path) -> Path:
    return folder / "model.safetensors"


def tensors_of(folder: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(file_of(folder)))
    assert isinstance(loaded, dict)
    return loaded


def float_words(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16 if array.dtype.size == 2 else mx.uint32))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny float32 checkpoint per dialect, same seed."""
    folder = tmp_path_factory.mktemp("dialects")
    return {d: random_checkpoint(folder / d, "tiny", d, dtype="float32") for d in DIALECTS}


# --------------------------------------------------------------------- as the genuine files are


@needs_tables
@pytest.mark.parametrize("size", FULL)
@pytest.mark.parametrize("dialect", ["apple", "native", "mlx-vlm"])
def test_names_shapes_and_dtypes_are_the_genuine_ones(size: str, dialect: str) -> None:
    genuine = table(f"tensors_{dialect.replace('-', '')}_{size}.json")["tensors"]
    made = {t.name: [t.dtype, list(t.shape)] for t in planned(size, dialect)}
    assert made == genuine


@needs_tables
@pytest.mark.parametrize(
    ("dialect", "names", "prefix"),
    [
        ("apple-train", "apple", "model.vision_tower.vision_tower.model."),
        ("native-train", "timm", "model.vision_tower.timm_model."),
    ],
)
def test_training_form_has_the_genuine_names(dialect: str, names: str, prefix: str) -> None:
    made = {
        t.name.removeprefix(prefix): list(t.shape)
        for t in planned("0.5b", dialect)
        if t.name.startswith(prefix) and not t.name.endswith(".head.proj")
    }
    assert made == table("tensors_fastvithd_trainform.json")[names]


@needs_tables
def test_bytes_are_those_of_the_genuine_files() -> None:
    genuine = table("verification.json")["bytes_vs_hub_listing"]
    for size in FULL:
        key = next(k for k in genuine if k.startswith(f"apple {size.upper()}") and "-" not in k)
        assert total_bytes(planned(size, "apple")) == genuine[key]["computed"]
    assert total_bytes(planned("0.5b", "native")) == genuine["native 0.5B"]["computed"]
    mlx_vlm = genuine["mlx-community 0.5B bf16"]["computed"]
    assert total_bytes(planned("0.5b", "mlx-vlm")) == mlx_vlm


def test_7b_is_sharded_as_the_genuine_one() -> None:
    shards = testing._shards(planned("7b", "apple"))
    assert [round(total_bytes(s) / 1e9, 2) for s in shards] == [4.88, 4.93, 4.63, 1.09]
    assert [t.name for t in shards[3]] == ["lm_head.weight"]
    assert shards[2][-1].name.startswith("model.mm_projector.")


def test_sharded_checkpoints_are_indexed_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: dict[str, Path]
) -> None:
    monkeypatch.setattr(testing, "_SHARD_BYTES", 1_000_000)
    folder = random_checkpoint(tmp_path / "sharded", "tiny", dtype="float32")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    whole = tensors_of(written["apple"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for name, ref in open_checkpoint(folder).tensors.items():
        assert mx.array_equal(ref.load(), whole[name])


@needs_tables
@pytest.mark.parametrize(
    ("size", "file"), [("0.5b", "zip_0.5b_stage3"), ("1.5b", "zip_1.5b_stage3")]
)
def test_apple_config_is_the_genuine_file(tmp_path: Path, size: str, file: str) -> None:
    write_metadata(tmp_path, size, "apple")
    genuine = (TABLES / "raw" / f"{file}_config.json").read_bytes()
    assert (tmp_path / "config.json").read_bytes() == genuine


@needs_tables
def test_the_other_small_files_are_the_genuine_ones(tmp_path: Path) -> None:
    raw = TABLES / "raw"
    for size, files in (
        ("7b", ("added_tokens",)),
        ("0.5b", ("added_tokens", "special_tokens_map", "tokenizer_config", "generation_config")),
    ):
        folder = tmp_path / size
        folder.mkdir()
        write_metadata(folder, size, "apple")
        for name in files:
            genuine = (raw / f"hf_apple_FastVLM-{size.upper()}_{name}.json").read_text()
            assert json.loads((folder / f"{name}.json").read_text()) == json.loads(genuine)
    config = json.loads((tmp_path / "7b" / "config.json").read_text())
    genuine_7b = json.loads((raw / "hf_apple_FastVLM-7B_config.json").read_text())
    del genuine_7b["auto_map"]  # points at remote code, which is not written
    assert config == genuine_7b


@needs_tables
def test_native_and_mlx_vlm_configs_hold_the_genuine_keys(tmp_path: Path) -> None:
    for dialect in ("native", "mlx-vlm"):
        (tmp_path / dialect).mkdir()
        write_metadata(tmp_path / dialect, "0.5b", dialect)
    native = json.loads((tmp_path / "native" / "config.json").read_text())
    sketch = json.loads((TABLES / "raw" / "native_FastVLM-0.5B_config_sketch.json").read_text())
    del sketch["_comment"]
    text = sketch.pop("text_config")
    assert {k: native[k] for k in sketch} == sketch
    assert {k: native["text_config"][k] for k in text} == text
    template = json.loads((TABLES / "raw" / "native_chat_template.json").read_text())
    assert (tmp_path / "native/chat_template.jinja").read_text() == template["chat_template"]
    block = json.loads((TABLES / "raw" / "mlx_vision_config_block.json").read_text())
    mlx_vlm = json.loads((tmp_path / "mlx-vlm" / "config.json").read_text())
    assert mlx_vlm["vision_config"] == block


def write_metadata(folder: Path, size: str, dialect: str) -> None:
    testing_files.metadata_files(
        folder,
        size,
        dialect,
        config_of(size, dialect),
        vocabulary_of(size, None),
        None,
        "bfloat16",
        None,
    )


@pytest.mark.parametrize(
    ("size", "dialect"),
    [*(("tiny", d) for d in DIALECTS), ("0.5b", "apple"), ("1.5b", "mlx-vlm"), ("7b", "native")],
)
def test_config_and_tokenizer_read_back(tmp_path: Path, size: str, dialect: str) -> None:
    write_metadata(tmp_path, size, dialect)
    config = parse_config(json.loads((tmp_path / "config.json").read_text()))
    wanted = config_of(size, dialect)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (config.text, config.vision) == (wanted.text, wanted.vision)
    assert config.eos_token_ids <= tokenizer.eos_token_ids
    first = 256 if size == "tiny" else 151643
    specials = "<|endoftext|><|im_start|><|im_end|>"
    assert tokenizer.encode(specials) == [first, first + 1, first + 2]
    text = "What are these?\nÉtang 池塘 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert len(tokenizer) <= config.text.vocab_size
    assert tokenizer.decode(range(256, first))[:14] == (" bababa bababe"[: 7 * (first - 256)])


def test_tokenizer_files_have_the_form_of_the_dialect(written: dict[str, Path]) -> None:
    for dialect, folder in written.items():
        apple = dialect.startswith("apple")
        assert (folder / "tokenizer.json").exists() is not apple
        assert (folder / "vocab.json").exists() is apple


# ------------------------------------------------------------------------------- one model in all


@pytest.mark.parametrize("size", testing.SIZES)
@pytest.mark.parametrize("dialect", ["apple", "native", "mlx-vlm"])
def test_canonical_names_are_complete_and_exact(size: str, dialect: str) -> None:
    config = config_of(size, dialect)
    tensors = {t.name: t for t in planned(size, dialect)}
    found = canonical_names(detect(tensors, {}, "x"), tensors, config.vision)
    expected = expected_tensors(config)
    head = {"language_model.lm_head.weight"} if dialect == "apple" else set()
    assert found.keys() == expected.keys() | head
    for canonical, shape in expected.items():
        made = tensors[found[canonical]]
        assert made.source_shape == shape
        assert sorted(made.shape) == sorted(shape)


def test_every_dialect_holds_the_same_values(written: dict[str, Path]) -> None:
    apple = canonical(written["apple"], "apple")
    for dialect in ("native", "mlx-vlm"):
        other = canonical(written[dialect], dialect)
        assert apple.keys() - other.keys() == {"language_model.lm_head.weight"}
        for name, values in other.items():
            rows = len(apple[name]) if "embed_tokens" in name else None
            assert mx.array_equal(values[:rows], apple[name]), (dialect, name)
    table_name = "language_model.model.embed_tokens.weight"
    assert mx.array_equal(apple["language_model.lm_head.weight"], apple[table_name])


def canonical(folder: Path, dialect: str) -> dict[str, mx.array]:
    tensors = tensors_of(folder)
    names = canonical_names(detect(tensors, {}, "x"), tensors, config_of("tiny", dialect).vision)
    found = {name: tensors[source] for name, source in names.items()}
    if dialect == "mlx-vlm":
        back = {4: (0, 3, 1, 2), 3: (2, 0, 1)}
        vision = {n: a for n, a in found.items() if n.startswith("vision.") and a.ndim in back}
        found |= {n: a.transpose(*back[a.ndim]) for n, a in vision.items()}
    return found


def test_every_dialect_loads_with_the_same_features(written: dict[str, Path]) -> None:
    pixels = mx.array(np.random.default_rng(1).random((1, 128, 192, 3), dtype=np.float32))
    networks = {d: load_checkpoint(f, dtype=mx.float32).network for d, f in written.items()}
    features = {d: np.array(n.vision(pixels)) for d, n in networks.items()}
    for dialect in ("native", "mlx-vlm"):
        assert np.array_equal(features["apple"], features[dialect])
    assert np.array_equal(features["apple-train"], features["native-train"])
    assert not np.allclose(features["apple"], features["apple-train"], atol=0.1)


@pytest.mark.parametrize("dialect", ["apple", "apple-train"])
@pytest.mark.parametrize("seed", [0, 1])
def test_activations_are_well_scaled(tmp_path: Path, dialect: str, seed: int) -> None:
    folder = random_checkpoint(tmp_path / "x", "tiny", dialect, seed=seed, dtype="float32")
    network = load_checkpoint(folder, dtype=mx.float32).network
    pixels = mx.array(np.random.default_rng(1).random((1, 256, 256, 3), dtype=np.float32))
    for stage, values in network.vision.feature_maps(pixels).items():
        assert 0.1 < mx.sqrt(mx.mean(values**2)).item() < 10, stage
        assert 0.1 < mx.abs(values).max().item() < 100, stage
        # The picture's parts differ: the map is no constant that would hide a mistake.
        assert mx.sqrt(values.var(axis=(1, 2)).mean()).item() > 0.02, stage
    tokens = network.encode(pixels)
    embedded = network.language_model.model.embed_tokens(mx.arange(200))
    ratio = mx.sqrt(mx.mean(tokens**2)) / mx.sqrt(mx.mean(embedded**2))
    assert 0.1 < ratio.item() < 10


def test_answers_vary_and_never_end_by_themselves(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    answer = vlm.caption(picture, max_tokens=24)
    assert answer.finish_reason == "length"
    assert len(set(answer.tokens)) > 4
    assert max(answer.tokens) < 256


# ------------------------------------------------------------------------------ values and dtypes


def test_batch_norms_and_layer_scales_are_far_from_neutral(written: dict[str, Path]) -> None:
    for dialect in ("apple", "apple-train"):
        tensors = tensors_of(written[dialect])
        parts = {
            part: np.concatenate([np.array(a).ravel() for n, a in tensors.items() if part in n])
            for part in ("running_var", "running_mean", "bn.weight", "bn.bias", "layer_scale")
        }
        assert parts["running_var"].min() < 0.01 < 2 < parts["running_var"].max()
        assert np.abs(parts["running_mean"]).mean() > 0.05
        assert np.abs(parts["bn.bias"]).mean() > 0.05
        assert parts["bn.weight"].std() > 0.3
        assert 0.1 <= parts["layer_scale"].min() < parts["layer_scale"].max() <= 0.5


def test_same_seed_same_bytes_on_every_platform(tmp_path: Path, tiny: Path) -> None:
    again = random_checkpoint(tmp_path / "again", "tiny")
    for file in tiny.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    other = random_checkpoint(tmp_path / "other", "tiny", seed=1)
    assert file_of(other).read_bytes() != file_of(tiny).read_bytes()
    # Pinned: numbers, names or rounding that change here change every recorded result.
    digest = hashlib.sha256(file_of(tiny).read_bytes()).hexdigest()
    assert digest.startswith(GOLDEN), digest


GOLDEN = "536fc9e5b901734e"


def test_half_precision_is_float32_rounded(tmp_path: Path, written: dict[str, Path]) -> None:
    exact = tensors_of(written["apple"])
    for dtype in (mx.bfloat16, mx.float16):
        name = str(dtype).removeprefix("mlx.core.")
        rounded = tensors_of(random_checkpoint(tmp_path / name, "tiny", dtype=name))
        for tensor, values in exact.items():
            if values.dtype == mx.float32:
                same = float_words(rounded[tensor]) == float_words(values.astype(dtype))
                assert same.all(), tensor
            else:
                assert rounded[tensor].dtype == mx.int64


def test_files_are_read_by_the_safetensors_library(written: dict[str, Path]) -> None:
    from safetensors import safe_open

    for dialect, folder in written.items():
        with safe_open(file_of(folder), framework="numpy") as file:
            assert file.metadata() == {"format": "mlx" if dialect == "mlx-vlm" else "pt"}
            for name, values in tensors_of(folder).items():
                assert np.array_equal(file.get_tensor(name), np.array(values)), name


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_as_mlx_vlm_does(tmp_path: Path, bits: int) -> None:
    plain = tensors_of(random_checkpoint(tmp_path / "plain", "tiny", "mlx-vlm"))
    folder = random_checkpoint(tmp_path / "packed", "tiny", "mlx-vlm", quantize=bits)
    packed = tensors_of(folder)
    modules = {n.removesuffix(".scales") for n in packed if n.endswith(".scales")}
    assert {"mm_projector.0", "mm_projector.2", "language_model.model.embed_tokens"} <= modules
    assert len(modules) == 2 + 1 + 2 * 7
    assert not any("vision" in m for m in modules)
    for module in modules:
        wanted = mx.quantize(plain[f"{module}.weight"], group_size=64, bits=bits)
        for part, values in zip(("weight", "scales", "biases"), wanted, strict=True):
            made = packed[f"{module}.{part}"]
            assert (made.dtype, made.shape) == (values.dtype, values.shape)
            assert mx.array_equal(made, values)
    for name in packed.keys() & plain.keys():
        if name.removesuffix(".weight") not in modules:
            assert mx.array_equal(packed[name], plain[name])
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": bits, "mode": "affine"}
    assert config["quantization_config"] == config["quantization"]


def test_rows_of_big_matrices_are_distinct_and_prefixes_agree() -> None:
    numbers = testing._Numbers(0, config_of("0.5b", "apple"), 3000)
    name = "language_model.model.embed_tokens.weight"
    made = np.concatenate(list(numbers.chunks(name, (3500, 896)))).reshape(3500, 896)
    longer = np.concatenate(list(numbers.chunks(name, (3700, 896)))).reshape(3700, 896)
    assert np.array_equal(made, longer[:3500])
    assert len(np.unique(made, axis=0)) == 3500
    assert made[:3000].std() == pytest.approx(testing._LOGITS / math.sqrt(896), rel=0.01)
    assert made[3000:].std() == pytest.approx(testing._LOGITS / math.sqrt(896) / 20, rel=0.01)
    matrix = np.concatenate(list(numbers.chunks("x.weight", (2000, 900)))).reshape(2000, 900)
    close = np.corrcoef(matrix) - np.eye(2000)
    assert np.abs(close).max() < 0.25  # of independent rows, four million pairs reach 0.18


def test_options_shape_the_model(tmp_path: Path, qwen2_tokenizer: Path) -> None:
    folder = random_checkpoint(
        tmp_path / "x", "tiny", "native", image_size=1024, tokenizer=qwen2_tokenizer
    )
    source = load_checkpoint(folder, dtype=mx.float32).source
    assert source.config.vision.image_size == 1024
    assert source.config.text.vocab_size >= len(source.tokenizer) == 151646
    assert (folder / "vocab.json").read_bytes() == (qwen2_tokenizer / "vocab.json").read_bytes()


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = random_checkpoint(
        tmp_path / "x", "tiny", "mlx-vlm", quantize=4, progress=lambda *now: seen.append(now)
    )
    header = file_of(folder).stat().st_size - seen[-1][1]
    assert 0 < header < 100_000
    assert seen[-1][0] == seen[-1][1]
    assert all(a[0] < b[0] for a, b in itertools.pairwise(seen))


# ------------------------------------------------------------------------------------- refusals


def test_nothing_is_overwritten_or_left_behind(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    random_checkpoint(target, "tiny")  # an empty directory is no obstacle
    before = {f.name: f.read_bytes() for f in target.iterdir()}
    with pytest.raises(fv.CheckpointError, match="not an empty directory"):
        random_checkpoint(target, "tiny", seed=1)
    assert {f.name: f.read_bytes() for f in target.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(fv.CheckpointError, match="not an empty directory"):
        random_checkpoint(tmp_path / "file", "tiny")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        random_checkpoint(tmp_path / "stopped", "tiny", progress=interrupt)
    with pytest.raises(fv.CheckpointError, match="No tokenizer"):
        random_checkpoint(tmp_path / "stopped", "tiny", tokenizer=tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "target"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "3b"}, "size is '3b'.*0.5b, 1.5b, 7b, tiny"),
        ({"dialect": "coreml"}, "dialect is 'coreml'.*apple, apple-train, native"),
        ({"dtype": "int8"}, "dtype is 'int8'.*bfloat16, float16, float32"),
        ({"quantize": 4}, "needs dialect 'mlx-vlm'"),
        ({"quantize": 7, "dialect": "mlx-vlm"}, "quantize is 7"),
        ({"image_size": 100}, "multiple of 64"),
    ],
)
def test_impossible_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fv.OptionError, match=message):
        random_checkpoint(tmp_path / "x", **({"size": "tiny"} | options))
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_with_too_many_tokens_is_refused(
    tmp_path: Path, qwen2_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision, text, window = testing_files._MODELS["0.5b"]
    small = dataclasses.replace(text, vocab_size=1000)
    monkeypatch.setitem(testing_files._MODELS, "0.5b", (vision, small, window))
    with pytest.raises(fv.CheckpointError, match="151646 tokens"):
        random_checkpoint(tmp_path / "x", tokenizer=qwen2_tokenizer)
