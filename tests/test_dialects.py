"""Whose checkpoint is it, and what are its tensors called: by names alone."""

import json

import pytest

from fastvlm_mlx.checkpoint.dialects import FORMAT, Dialect, canonical_names, detect
from fastvlm_mlx.checkpoint.layout import expected_tensors
from fastvlm_mlx.checkpoint.reparam import is_training_form
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.errors import CheckpointError, UnsupportedCheckpoint
from fastvlm_mlx.testing_files import model_config, vocabulary_of
from fastvlm_mlx.testing_names import DIALECTS, plan
from tests.notes import NOTES

OF = {
    "apple": Dialect.APPLE,
    "apple-train": Dialect.APPLE,
    "native": Dialect.NATIVE,
    "native-train": Dialect.NATIVE,
    "mlx-vlm": Dialect.MLX_VLM,
}
TOWER = VisionConfig()


def names_of(dialect: str, size: str = "0.5b") -> list[str]:
    native = dialect.startswith("native")
    config = model_config(size, vocabulary_of(size, None), native=native, image_size=None)
    return [tensor.name for tensor in plan(config, dialect, "BF16")]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_dialect_is_recognised(dialect: str) -> None:
    names = names_of(dialect)
    assert detect(names, {"format": "pt"}, "x") is OF[dialect]
    assert detect(reversed(names), {}, "x") is OF[dialect]
    canonical = canonical_names(OF[dialect], names, TOWER)
    assert is_training_form(canonical) is dialect.endswith("-train")


@pytest.mark.parametrize("dialect", ["mlx-vlm", "apple"])
def test_our_own_stamp_outweighs_names(dialect: str) -> None:
    assert detect(names_of(dialect), {"format": FORMAT}, "x") is Dialect.FOLDED


def test_both_training_forms_have_the_same_canonical_names() -> None:
    apple, native = (
        canonical_names(OF[d], names_of(d), TOWER).keys() for d in ("apple-train", "native-train")
    )
    assert apple - native == {"language_model.lm_head.weight"}
    assert not native - apple


def test_native_names_come_with_and_without_their_first_word() -> None:
    config = model_config("0.5b", vocabulary_of("0.5b", None), native=True, image_size=None)
    older = [n.removeprefix("model.") for n in names_of("native")]
    older = [n.replace("language_model.", "language_model.model.") for n in older]
    assert detect(older, {}, "x") is Dialect.NATIVE
    assert canonical_names(Dialect.NATIVE, older, TOWER).keys() == expected_tensors(config).keys()


def test_apple_names_of_a_merged_adapter() -> None:
    names = [f"base_model.{n}" for n in names_of("apple")]
    plain = canonical_names(Dialect.APPLE, names_of("apple"), TOWER)
    assert canonical_names(Dialect.APPLE, names, TOWER).keys() == plain.keys()


def test_mlx_vlm_lm_head_with_and_without_prefix() -> None:
    names = names_of("mlx-vlm", "7b")
    head = "language_model.lm_head.weight"
    for spelt in (head, "lm_head.weight"):
        found = canonical_names(Dialect.MLX_VLM, [spelt if n == head else n for n in names], TOWER)
        assert found[head] == spelt


def test_unused_tensors_are_dropped_and_unknown_ones_kept() -> None:
    names = [*names_of("apple"), "model.layers.0.self_attn.rotary_emb.inv_freq", "model.surprise"]
    found = canonical_names(Dialect.APPLE, names, TOWER)
    assert not any("num_batches" in n or "head.proj" in n or "inv_freq" in n for n in found)
    assert found["language_model.model.surprise"] == "model.surprise"
    native = "model.vision_tower.timm_model.stages.9.blocks.0.mlp.fc1.weight"
    found = canonical_names(Dialect.NATIVE, [native, "vision_tower.timm_model.head.fc.bias"], TOWER)
    assert list(found.values()) == [native]
    assert (
        not found.keys()
        & expected_tensors(
            model_config("0.5b", vocabulary_of("0.5b", None), native=True, image_size=None)
        ).keys()
    )


def test_two_names_for_one_tensor_are_an_error() -> None:
    names = [*names_of("native"), "lm_head.weight", "language_model.lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"are both language_model\.lm_head\.weight"):
        canonical_names(Dialect.NATIVE, names, TOWER)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["language_model.model.norm.weight", "multi_modal_projector.linear_0.weight"],
            "Core ML export.*apple/FastVLM-0.5B",
        ),
        (
            ["model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"],
            "another vision-language model",
        ),
        (["vision_model.encoder.layers.0.mlp.fc1.weight"], "another vision-language model"),
        (["patch_embed.0.rbr_conv.0.conv.weight"], "image encoder without a language model"),
        (["image_encoder.model.patch_embed.0.x"], "image encoder without a language model"),
        (["visual.trunk.stem.0.conv_kxk.0.conv.weight"], "image encoder without a language model"),
        (["model.embed_tokens.weight", "lm_head.weight"], "no vision tower among its 2 tensors"),
        ([], "holds no tensors"),
    ],
)
def test_what_cannot_be_run_is_named(names: list[str], message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=f"^somewhere .*{message}"):
        detect(names, {}, "somewhere")


@pytest.mark.parametrize("size", ["0.5b", "1.5b", "7b"])
def test_genuine_core_ml_exports_are_refused(size: str) -> None:
    table = NOTES / "checkpoints" / f"tensors_applecoreml_{size}.json"
    if not table.is_file():
        pytest.skip("needs the tensor tables of the genuine files, kept beside the repo")
    with pytest.raises(UnsupportedCheckpoint, match="Core ML export"):
        detect(json.loads(table.read_text())["tensors"], {"format": "mlx"}, "x")
