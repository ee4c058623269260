"""What verification is for: conversions that went wrong are found, whichever way they did."""

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint import fold
from fastvlm_mlx.checkpoint.loading import examine_checkpoint, unpacked
from fastvlm_mlx.checkpoint.quantized import Quantization
from fastvlm_mlx.convert import accuracy, conversion, layered, published
from fastvlm_mlx.convert.accuracy import compare_accuracy, held_out_scenes, is_nano
from fastvlm_mlx.convert.calibration import samples
from fastvlm_mlx.convert.conversion import Options, convert_checkpoint
from fastvlm_mlx.convert.plan import Plan
from fastvlm_mlx.convert.proof import _first, _fold_failures, prove
from fastvlm_mlx.convert.published import fold_error
from fastvlm_mlx.convert.stored import StoredWeights, _allowed, check_stored
from fastvlm_mlx.convert.streaming import dequantize, quantize, small_cache
from fastvlm_mlx.testing import random_checkpoint

Tensors = dict[str, mx.array]


# --------------------------------------------------------------------------------- every weight


def _change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Edit a checkpoint's tensors in place."""
    file = folder / "model.safetensors"
    loaded: Any = mx.load(str(file), return_metadata=True)
    tensors, metadata = loaded
    edit(tensors)
    tensors = {name: mx.contiguous(array) for name, array in tensors.items()}
    mx.eval(tensors)
    file.unlink()
    mx.save_safetensors(str(file), tensors, metadata)


def _converted(source: Path, target: Path, **options: Any) -> Plan:
    return convert_checkpoint(str(source), target, Options(verify=False, **options)).plan


def _check(source: Path, result: Path, plan: Plan) -> StoredWeights:
    return check_stored(examine_checkpoint(source), result, plan)


def _swap(tensors: Tensors) -> None:
    names = [f"language_model.model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    for part in ("weight", "scales", "biases"):
        a, b = (f"{name}.{part}" for name in names)
        if a in tensors:
            tensors[a], tensors[b] = tensors[b], tensors[a]


def _one_number(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., None]:
    def edit(tensors: Tensors) -> None:
        values = np.array(tensors[name].astype(mx.float32))
        flat = values.reshape(-1)
        flat[flat.size // 2] = change(flat[flat.size // 2])
        tensors[name] = mx.array(values).astype(tensors[name].dtype)

    return edit


def _wrong_fold(tensors: Tensors) -> None:
    """The sign of a bias that is taken off again in front of the 7x7 convolution."""
    name = "vision.stages.0.blocks.0.convffn.conv.pre_bias"
    tensors[name] = -tensors[name]


def _no_layer_scale(tensors: Tensors) -> None:
    name = "vision.stages.3.blocks.0.proj.weight"
    tensors[name] = tensors[name] * 3


MISTAKES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "two matrices swapped": (_swap, r"layers.0.mlp.up_proj.weight is [\d.]+ times as far"),
    "one scale": (
        _one_number("projector.fc1.scales", lambda x: x * 1.5),
        "projector.fc1.weight is .* times as far from the source as 4 bits in groups of 64",
    ),
    "one float": (
        _one_number("language_model.model.norm.weight", lambda x: x * 1.02),
        "model.norm.weight is .* as its dtype may put it",
    ),
    "not a number": (
        _one_number("language_model.model.norm.weight", lambda x: x * np.nan),
        "model.norm.weight is nan times",
    ),
    "wrong bias fold": (_wrong_fold, "stages.0.blocks.0.convffn.conv.pre_bias"),
    "missing layer scale": (_no_layer_scale, "stages.3.blocks.0.proj.weight"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(tiny: Path, tmp_path: Path, mistake: str) -> None:
    plan = _converted(tiny, tmp_path / "out", bits=4)
    good = _check(tiny, tmp_path / "out", plan)
    assert good.failures == []
    assert good.worst <= 1
    edit, named = MISTAKES[mistake]
    _change(tmp_path / "out", edit)
    bad = _check(tiny, tmp_path / "out", plan)
    assert any(re.search(named, failure) for failure in bad.failures), bad.failures
    others = 2 if mistake.startswith("two") else 1
    assert len(bad.failures) == others
    assert not bad.worst <= 1


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
def test_swapped_matrices_are_found_at_every_width(tiny: Path, tmp_path: Path, bits: int) -> None:
    plan = _converted(tiny, tmp_path / "out", bits=bits, vision_bits=bits)
    assert _check(tiny, tmp_path / "out", plan).failures == []
    _change(tmp_path / "out", _swap)
    assert len(_check(tiny, tmp_path / "out", plan).failures) == 2


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_floating_point_modes_are_checked_too(tiny: Path, tmp_path: Path, mode: str) -> None:
    plan = _converted(tiny, tmp_path / "out", mode=mode)
    assert _check(tiny, tmp_path / "out", plan).failures == []
    _change(tmp_path / "out", _swap)
    assert len(_check(tiny, tmp_path / "out", plan).failures) == 2


@pytest.mark.parametrize("layout", ["mlx-vlm", "apple"])
def test_other_layouts_are_read_back_through_their_own_names(
    tiny: Path, tmp_path: Path, layout: str
) -> None:
    plan = _converted(tiny, tmp_path / "out", layout=layout, bits=4)
    assert _check(tiny, tmp_path / "out", plan).failures == []
    name = next(n for n in mx.load(str(tmp_path / "out/model.safetensors")) if "layer_scale" in n)
    _change(tmp_path / "out", _one_number(name, lambda x: x * 1.1))
    assert len(_check(tiny, tmp_path / "out", plan).failures) == 1


def test_copied_weights_are_the_same_bits(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", size="tiny", dialect="mlx-vlm", quantize=4)
    plan = _converted(source, tmp_path / "out")
    assert _check(source, tmp_path / "out", plan).failures == []

    def edit(tensors: Tensors) -> None:
        name = "projector.fc1.weight"
        tensors[name] = tensors[name] ^ mx.array(1, dtype=mx.uint32)

    _change(tmp_path / "out", edit)
    assert _check(source, tmp_path / "out", plan).failures == [
        "projector.fc1.weight is not what the source holds"
    ]

    def widen(tensors: Tensors) -> None:
        name = "projector.fc2.scales"
        tensors[name] = tensors[name].astype(mx.float32)

    _change(tmp_path / "out", widen)
    failures = _check(source, tmp_path / "out", plan).failures
    assert "projector.fc2.scales is not what the source holds" in failures


def test_what_the_plan_does_not_know_is_found(tiny: Path, tmp_path: Path) -> None:
    plan = _converted(tiny, tmp_path / "planned")
    _converted(tiny, tmp_path / "out", bits=4)
    failures = _check(tiny, tmp_path / "out", plan).failures
    assert "projector.fc1.scales has no counterpart in the source" in failures


def test_another_config_is_found(tiny: Path, tmp_path: Path) -> None:
    plan = _converted(tiny, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"rope_theta": 1e4}))
    assert _check(tiny, tmp_path / "out", plan).failures == [
        "config.json describes another model than the source's"
    ]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(
    "how",
    [Quantization(b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
    + [Quantization(4, 32, "mxfp4"), Quantization(8, 32, "mxfp8"), Quantization(4, 16, "nvfp4")],
    ids=str,
)
def test_the_bound_is_what_quantization_gives(how: Quantization, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(0)
    worst = 0.0
    for values in (
        rng.standard_normal((600, 256)) * np.exp(rng.uniform(-5, 2, (600, 1))),
        rng.uniform(-1, 1, (600, 256)),
        np.abs(rng.standard_normal((600, 256))) + 3,
        # What small layer scales make of weights: below float16's normal numbers.
        rng.standard_normal((600, 256)) * np.exp(rng.uniform(-16, -8, (600, 1)))
        if how.mode == "affine"
        else np.ones((600, 256)),
    ):
        x = mx.array(values.astype(np.float32))
        groups = (600, -1, how.group_size)
        off = mx.abs(dequantize(quantize(x, how, dtype), how) - x).reshape(groups)
        ratio: Any = (off.max(axis=-1) / _allowed(x.reshape(groups), how, dtype)).max().item()
        worst = max(worst, ratio)
    assert worst <= 1
    # Not a bound that anything would keep to.
    assert worst > (0.5 if dtype == mx.bfloat16 or how.mode == "nvfp4" else 0.75)


def test_a_tower_with_small_layer_scales_can_be_quantized(tmp_path: Path) -> None:
    nano = Path(fv.__file__).parent / "nano"
    plan = _converted(nano, tmp_path / "out", vision_bits=8)
    assert _check(nano, tmp_path / "out", plan).failures == []


# ------------------------------------------------------------------------------------------ folding


def _pixels() -> mx.array:
    return mx.random.uniform(shape=(1, 128, 192, 3), key=mx.random.key(5))


def _fold_error(folder: Path) -> float:
    source = examine_checkpoint(folder)
    refs = unpacked(source)
    return fold_error(
        source.config.vision, lambda name: refs[name].load().astype(mx.float32), _pixels()
    )


@pytest.mark.parametrize("dialect", ["apple", "native", "apple-train", "mlx-vlm"])
def test_folding_changes_nothing(tmp_path: Path, dialect: str) -> None:
    source = random_checkpoint(tmp_path / "source", size="tiny", dialect=dialect)
    assert _fold_error(source) < 1e-5


def _without(*parts: str) -> Callable[..., Iterator[tuple[str, mx.array]]]:
    """`fold_vision` with these tensors of the source made neutral."""
    plain = fold.fold_vision

    def forgetful(config: Any, get: Any) -> Iterator[tuple[str, mx.array]]:
        def neutral(name: str) -> mx.array:
            array = get(name)
            if not any(part in name for part in parts):
                return array
            return mx.ones_like(array) if "scale" in name else mx.zeros_like(array)

        return plain(config, neutral)

    return forgetful


@pytest.mark.parametrize(
    "forgotten", ["layer_scale_1", "layer_scale", "fc2.bias", "proj.bias", "running_mean"]
)
def test_a_mistake_in_folding_is_found(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    monkeypatch.setattr(published, "fold_vision", _without(forgotten))
    assert _fold_error(tiny) > 100 * published.FOLD_LIMIT


# --------------------------------------------------------------------------------- the whole proof


def test_a_fold_that_is_no_number_fails() -> None:
    fold = {"run": True, "error": float("nan"), "limit": 1e-4}
    assert len(_fold_failures(fold)) == 1
    assert _fold_failures({**fold, "error": 1e-5}) == _fold_failures({"run": False}) == []


def test_only_the_first_failures_are_listed() -> None:
    assert _first(list("abc")) == list("abc")
    assert _first(list("abcde")) == [*"abc", "and 2 more tensors"]


def test_the_cache_of_freed_memory_is_as_before() -> None:
    limit = mx.set_cache_limit(12_345_678)
    try:
        with pytest.raises(KeyError), small_cache():
            raise KeyError
        assert mx.set_cache_limit(limit) == 12_345_678
    finally:
        mx.set_cache_limit(limit)


def test_a_wrong_file_is_thrown_away(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*args: Any) -> dict[str, Any]:
        _change(args[1], _swap)
        return prove(*args)

    monkeypatch.setattr(conversion, "prove", spoiled)
    with pytest.raises(fv.CheckpointError, match=r"Verification failed: .*up_proj.* times as far"):
        convert_checkpoint(str(tiny), tmp_path / "out", Options(bits=4, samples=1))
    assert not any(tmp_path.iterdir())


def test_a_wrong_fold_is_thrown_away(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "fold_vision", _without("layer_scale"))
    with pytest.raises(fv.CheckpointError, match="Verification failed: the folded tower's feat"):
        convert_checkpoint(str(tiny), tmp_path / "out", Options(bits=4, samples=1))
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- right answers


def test_the_questions_in_the_package_are_the_evaluations() -> None:
    from training.nano.held_out import SCENES, contents, picture

    scenes = held_out_scenes()
    expected = [
        tuple((a["kind"], a["question"], a["answer"]) for a in entry["asked"])
        for entry in contents()
    ]
    renew = "run `python -m training.nano.held_out`"
    assert [scene.asked for scene in scenes] == expected, renew
    assert len(scenes) == SCENES
    drawn = np.asarray(Image.open(io.BytesIO(picture(3))), dtype=float)
    assert np.abs(np.asarray(scenes[3].picture, dtype=float) - drawn).mean() < 3, renew


def test_nanos_accuracy_is_in_the_report(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = held_out_scenes()[:4]
    monkeypatch.setattr(accuracy, "held_out_scenes", lambda: few)
    done = convert_checkpoint("nano", tmp_path / "out", Options(bits=8, samples=1))
    found = done.report["verification"]["accuracy"]
    assert found["questions"] == sum(len(s.asked) for s in few)
    assert found["source"]["what"] == found["result"]["what"] == 1.0
    assert "held-out questions" in (tmp_path / "out/README.md").read_text()
    assert is_nano(tmp_path / "out") and not is_nano(tiny)
    # A model that does not see the pictures is not taken for one that does.
    blind = [dataclasses.replace(s, picture=few[i - 1].picture) for i, s in enumerate(few)]
    monkeypatch.setattr(accuracy, "held_out_scenes", lambda: blind)
    assert compare_accuracy(tmp_path / "out", tmp_path / "out")["result"]["caption"] == 0


def test_other_checkpoints_have_no_accuracy(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "source")
    done = convert_checkpoint(str(tmp_path / "source"), tmp_path / "out", Options(samples=1))
    assert done.report["verification"]["accuracy"] is None


def test_layer_by_layer_holds_one_embedding_table(
    qwen2_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random_checkpoint(tmp_path / "source", size="tiny", tokenizer=qwen2_tokenizer)
    rows = examine_checkpoint(source).config.text.vocab_size
    monkeypatch.setattr(layered, "_head", lambda *_: iter([mx.zeros((8, 64))]))
    with small_cache():
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        layered.observe_by_layer(source, 128, samples(8))
        assert mx.get_peak_memory() - before < 3 * rows * 64 * 2  # bfloat16
