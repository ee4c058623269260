"""Recipes: what they choose, what they refuse, and that "auto" spends its budget exactly."""

import itertools
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.quantized import Quantization
from fastvlm_mlx.convert import compare, sensitivity
from fastvlm_mlx.convert.allocation import allocate
from fastvlm_mlx.convert.calibration import samples
from fastvlm_mlx.convert.conversion import Conversion, Options, convert_checkpoint
from fastvlm_mlx.convert.recipes import (
    Packing,
    Recipe,
    Rule,
    mixed,
    packing,
    read_recipe,
    uniform,
)

MODULES = {
    "vision.stem.pointwise": 96,
    "vision.stages.1.blocks.0.convffn.fc1": 192,
    "vision.head.expand": 80,
    "projector.fc1": 3072,
    "language_model.model.embed_tokens": 896,
    **{f"language_model.model.layers.{i}.self_attn.q_proj": 896 for i in range(16)},
}


def test_uniform_takes_smaller_groups_in_the_tower() -> None:
    found = uniform(packing(4, 128), packing(8, 128)).quantization(MODULES)
    assert found["projector.fc1"] == Quantization(4, 128)
    assert found["vision.stages.1.blocks.0.convffn.fc1"] == Quantization(8, 64)
    assert found["vision.stem.pointwise"] == Quantization(8, 32)
    assert "vision.head.expand" not in found


def test_mixed_raises_the_edges() -> None:
    found = mixed(packing(4), MODULES).quantization(MODULES)
    bits = [found[f"language_model.model.layers.{i}.self_attn.q_proj"].bits for i in range(16)]
    assert bits == [6, 6, *[4] * 12, 6, 6]
    assert found["projector.fc1"].bits == found["language_model.model.embed_tokens"].bits == 6
    assert not any(name.startswith("vision.") for name in found)


@pytest.mark.parametrize(("bits", "higher"), [(2, 4), (3, 5), (4, 6), (5, 8), (6, 8), (8, 8)])
def test_mixed_goes_one_step_higher(bits: int, higher: int) -> None:
    found = mixed(packing(bits), MODULES).quantization(MODULES)
    assert found["projector.fc1"].bits == higher
    assert found["language_model.model.layers.8.self_attn.q_proj"].bits == bits


def test_a_rule_in_the_shade_of_another_is_no_mistake() -> None:
    rules = (Rule("projector.*", packing(8)), Rule("projector.fc1", packing(2)))
    found = Recipe("mine", packing(4), rules=rules).quantization(MODULES)
    assert found["projector.fc1"].bits == 8


def test_a_recipe_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'bits = 4\ngroup_size = 32\nvision_bits = 8\n[modules]\n"*.layers.3.*" = { bits = 2 }\n'
        '"*.layers.*.q_proj" = { mode = "nvfp4" }\n"projector.*" = false\n'
        '"*.embed_tokens" = { bits = 6, group_size = 128 }\n'
    )
    recipe = read_recipe(file)
    assert recipe.name == "mine"
    found = recipe.quantization(MODULES)
    assert found["language_model.model.layers.3.self_attn.q_proj"] == Quantization(2, 32)
    assert found["language_model.model.layers.4.self_attn.q_proj"] == Quantization(4, 16, "nvfp4")
    assert found["language_model.model.embed_tokens"] == Quantization(6, 128)
    assert found["vision.stem.pointwise"] == Quantization(8, 32)
    assert "projector.fc1" not in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bitz = 4", "unknown key bitz; expected bits, group_size, mode, modules"),
        ("bits = 4\nx = 1\ny = 2", "unknown keys x, y"),
        ("[modules]\n'*' = { bit = 4 }", r"modules.'\*': unknown key bit"),
        ("[modules]\n'*' = 4", "expected a table or false"),
        ("bits = 7", "bits is 7"),
        ("bits = true", "bits is True"),
        ("bits = 4\nvision_bits = 1", "vision_bits: bits is 1"),
        ("modules = 3", "modules is 3"),
        ("bits = ", "is not TOML"),
    ],
)
def test_a_wrong_recipe_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(fv.OptionError, match=message):
        read_recipe(file)


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("bits = 4\n[modules]\n'*.embed_token' = { bits = 8 }")
    with pytest.raises(fv.OptionError, match=r"'\*.embed_token' matches no module"):
        read_recipe(file).quantization(MODULES)


def test_packing_fits_what_it_can() -> None:
    assert Packing(4).for_module("projector.fc1", 96) == Quantization(4, 32)
    assert Packing(4).for_module("projector.fc1", 80) is None
    with pytest.raises(fv.OptionError, match="leave it in floating point"):
        Packing(4, 64).for_module("projector.fc1", 80)


@pytest.mark.parametrize("seed", range(12))
def test_allocation_is_the_optimum(seed: int) -> None:
    rng = random.Random(seed)
    count, options = rng.randint(1, 6), rng.randint(1, 4)
    unit = rng.choice([1, 7, 64])
    sizes = [[unit * rng.randint(1, 30) for _ in range(options)] for _ in range(count)]
    costs = [[rng.random() for _ in range(options)] for _ in range(count)]
    low = sum(map(min, sizes))
    budget = low + rng.randint(0, unit * 60)
    chosen = allocate(sizes, costs, budget)
    best = min(
        sum(costs[m][o] for m, o in enumerate(combination))
        for combination in itertools.product(range(options), repeat=count)
        if sum(sizes[m][o] for m, o in enumerate(combination)) <= budget
    )
    assert sum(sizes[m][o] for m, o in enumerate(chosen)) <= budget
    assert sum(costs[m][o] for m, o in enumerate(chosen)) == pytest.approx(best)
    with pytest.raises(ValueError, match="smallest options take"):
        allocate(sizes, costs, low - 1)


def test_allocation_keeps_a_huge_budget_within_bounds() -> None:
    sizes = [[10**9 + 7 * m, 2 * 10**9 + m] for m in range(20)]
    costs = [[2.0, 1.0 / (m + 1)] for m in range(20)]
    chosen = allocate(sizes, costs, 30 * 10**9)
    assert sum(sizes[m][o] for m, o in enumerate(chosen)) <= 30 * 10**9
    # What rounding up may cost: one of the ten upgrades that fit.
    assert sum(chosen) in (9, 10)


def test_auto_beats_uniform_at_the_same_size_and_repeats_itself(tiny: Path, tmp_path: Path) -> None:
    def convert(name: str, **options: Any) -> Conversion:
        return convert_checkpoint(str(tiny), tmp_path / name, Options(**options))

    plain = convert("uniform", bits=4, samples=8)
    auto = convert("auto", recipe="auto", target_bits=4.5, samples=8)
    again = convert("again", recipe="auto", target_bits=4.5, verify=False)
    assert auto.plan.quantization == again.plan.quantization
    assert auto.plan.bits_per_weight() <= plain.plan.bits_per_weight() == 4.5
    kl = [c.report["verification"]["kl_mean"] for c in (auto, plain)]
    assert kl[0] < kl[1]
    with pytest.raises(fv.OptionError, match=r"target_bits 2\.1 is too little"):
        convert("little", recipe="auto", target_bits=2.1, verify=False)


def test_recipes_side_by_side(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", str(tiny), "--recipes", "uniform:4,mixed:3:32", "--samples", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    compare.main()
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert head.startswith("| recipe | bits per weight | KL, mean")
    assert first.startswith("| uniform 4 | 4.50 |")
    assert second.startswith("| mixed 3, groups of 32 | ")
    for wrong in ("best:4", "uniform:x", "auto", "mixed:4:64:1"):
        monkeypatch.setattr("sys.argv", ["compare", str(tiny), "--recipes", wrong])
        with pytest.raises(SystemExit, match="expected such as uniform:4"):
            compare.main()


def test_auto_weighs_what_a_matrix_does_and_not_how_large_its_error_is(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL per squared error is what counts: a matrix with ten times the error is not worth more."""

    def error(matrix: mx.array, how: Quantization, _: object) -> float:
        return (10.0 if matrix.shape[0] == 64 else 1.0) * 2.0**-how.bits

    monkeypatch.setattr(sensitivity, "measure", lambda *_: 1.0)
    monkeypatch.setattr(sensitivity, "weight_error", error)
    options = Options(recipe="auto", target_bits=4.5, group_size=64)
    plan = convert_checkpoint(str(tiny), tmp_path / "out", options, dry_run=True).plan
    # As many weights each; only their rows tell them apart here.
    down, gate = (
        [how.bits for name, how in plan.quantization.items() if name.endswith(part)]
        for part in ("down_proj", "gate_proj")
    )
    assert len(down) == len(gate) == 2 and max(down + gate) - min(down + gate) <= 1


def test_calibration_and_verification_share_no_picture() -> None:
    calibration = samples(sensitivity._SAMPLES, sensitivity._SEED)
    for seed in range(3):
        for one in samples(8, seed):
            assert all(one.picture != other.picture for other in calibration)
