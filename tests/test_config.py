"""config.json in every dialect, and the keys that must not be ignored."""

import json
from typing import Any

import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.config import VisionConfig, parse_config
from tests.notes import NOTES

APPLE: dict[str, Any] = {
    "model_type": "llava_qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "tokenizer_model_max_length": 8192,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "image_aspect_ratio": "pad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "mobileclip_l_1024",
}


def test_derived_numbers() -> None:
    config = parse_config(APPLE)
    assert config.image_tokens == 256
    assert config.vision.out_dim == 3072
    assert config.vision.tokens(448, 320) == 35
    assert config.text.head_dim == 64
    assert config.context_length == 8192


def test_sizes_come_from_the_config_not_from_constants() -> None:
    vision = {
        "layers": [1, 1, 1, 1, 1],
        "embed_dims": [16, 32, 64, 128, 256],
        "mlp_ratios": [3, 3, 3, 3, 3],
        "token_mixers": ["repmixer"] * 3 + ["attention"] * 2,
    }
    config = parse_config({**APPLE, "mm_vision_tower": "mobileclip_l_256", "vision_config": vision})
    assert (config.image_tokens, config.vision.out_dim) == (16, 512)


@pytest.mark.parametrize("tied", [{"tie_word_embeddings": True}, {}])
def test_native_config(tied: dict[str, bool]) -> None:
    text = {k: v for k, v in APPLE.items() if not k.startswith(("mm_", "image", "model", "token"))}
    text["model_type"] = "qwen2"
    raw = {
        "model_type": "fast_vlm",
        "text_config": text,
        "vision_config": {"architecture": "fastvit_mci3", "image_size": 256},
        "image_seq_length": 144,
        **tied,
    }
    config = parse_config(raw)
    assert config.vision.image_size == 768
    assert config.text.tie_word_embeddings, "text_config's own value is inherited"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llava"}, "model_type 'llava'"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "another LLaVA-Qwen2"),
        ({"mm_vision_tower": "mobileclip_l_1000"}, "multiple of 64"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"vision_config": {"embed_dims": [96, 192, 384, 768, 1000]}}, "twice the one before"),
        ({"vision_config": {"layers": [1, 1, 1, 1]}}, "4 stages"),
        ({"vision_config": {"token_mixers": ["pool"] * 5}}, "token_mixers"),
        ({"vision_config": {"down_patch_size": 3}}, "down_patch_size is 3"),
    ],
)
def test_values_that_would_change_the_mathematics_are_refused(
    change: dict[str, Any], named: str
) -> None:
    with pytest.raises(fv.CheckpointError, match=named):
        parse_config({**APPLE, **change})


def test_scaled_residuals_need_attention() -> None:
    with pytest.raises(fv.CheckpointError, match="need attention"):
        VisionConfig(residual_scales=(0.5, 1, 1, 1, 1))


@pytest.mark.skipif(not NOTES.is_dir(), reason="needs the genuine config files")
@pytest.mark.parametrize(
    "name", ["hf_apple_FastVLM-0.5B", "hf_apple_FastVLM-1.5B", "hf_apple_FastVLM-7B"]
)
def test_genuine_configs(name: str) -> None:
    raw = json.loads((NOTES / "checkpoints/raw" / f"{name}_config.json").read_text())
    config = parse_config(raw)
    assert config.vision == VisionConfig()
    assert config.text.tie_word_embeddings == (raw["hidden_size"] < 3584)
