"""The small files of a random checkpoint: config.json, the tokenizer and what lies beside them.

Source: checkpoint notes, sections 1.1, 1.2, 1.5, 2 and 3.1.
"""

import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .config import Config, TextConfig, VisionConfig
from .errors import CheckpointError
from .tokenizer import Tokenizer as FastVLMTokenizer

__all__ = ["SIZES", "Vocabulary", "metadata_files", "model_config", "vocabulary_of"]

_TINY_TOWER = VisionConfig(layers=(1, 1, 1, 1, 1), dims=(16, 32, 64, 128, 256), image_size=256)

# Size -> tower, language model and sliding_window, which no FastVLM uses.
_MODELS: dict[str, tuple[VisionConfig, TextConfig, int]] = {
    "0.5b": (VisionConfig(), TextConfig(896, 4864, 24, 14, 2, 151936), 32768),
    "1.5b": (VisionConfig(), TextConfig(1536, 8960, 28, 12, 2, 151936), 32768),
    "7b": (
        VisionConfig(),
        TextConfig(3584, 18944, 28, 28, 4, 152064, tie_word_embeddings=False),
        131072,
    ),
    "tiny": (_TINY_TOWER, TextConfig(64, 128, 2, 4, 2, 320), 32768),
}
SIZES = tuple(_MODELS)

_NATIVE_ROWS = 64
"""Rows that transformers' conversion adds for the image token, padded."""

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN25 = (
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN25_PLAIN = (  # added to the vocabulary, but part of the text
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NATIVE_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n'}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "tokenizer.json",
)


@dataclass(frozen=True)
class Vocabulary:
    """The ids that a model's tokenizer and its embedding table agree on."""

    rows: int
    ordinary: int
    """Ids below this one may be answered; the others are special tokens and padding."""
    end_of_text: int
    end_of_turn: int


def vocabulary_of(size: str, tokenizer: Path | None) -> Vocabulary:
    """The vocabulary of a size; "tiny" takes as many rows as a given tokenizer needs.

    Raises CheckpointError if the tokenizer cannot be read or has too many tokens.
    """
    rows = _MODELS[size][1].vocab_size
    first = 256 if size == "tiny" else 151643
    if tokenizer is None:
        return Vocabulary(rows, first, first, first + 2)
    given = FastVLMTokenizer.from_directory(tokenizer)
    length = len(given)
    if size == "tiny":
        rows = -(-length // 64) * 64
    if length > rows:
        raise CheckpointError(
            f"The tokenizer in {tokenizer} has {length} tokens; size {size!r} has {rows} rows."
        )
    text, turn = given.encode("<|endoftext|><|im_end|>")
    return Vocabulary(rows, text if text > length // 2 else length, text, turn)


def model_config(
    size: str, vocabulary: Vocabulary, *, native: bool, image_size: int | None
) -> Config:
    """The shape of a model of that size; transformers-native ones have more vocabulary rows."""
    vision, text, _ = _MODELS[size]
    rows = vocabulary.rows + (_NATIVE_ROWS if native else 0)
    return Config(
        text=replace(text, vocab_size=rows),
        vision=vision if image_size is None else replace(vision, image_size=image_size),
    )


def metadata_files(
    folder: Path,
    size: str,
    dialect: str,
    config: Config,
    vocabulary: Vocabulary,
    tokenizer: Path | None,
    dtype: str,
    bits: int | None,
) -> None:
    """Write everything but the weights; the tokenizer's files are copied from `tokenizer`."""
    native = dialect.startswith("native")
    if native:
        contents = _native_config(size, config, vocabulary, dtype, fused=dialect == "native")
    else:
        contents = _flat_config(size, config, vocabulary, dtype)
        if dialect == "mlx-vlm" or size == "tiny":
            contents["vision_config"] = _vision_block(config.vision)
        if dialect == "mlx-vlm":
            del contents["_name_or_path"]
            contents["image_token_index"] = -200
    if bits is not None:
        contents["quantization"] = {"group_size": 64, "bits": bits, "mode": "affine"}
        contents["quantization_config"] = contents["quantization"]
    _write(folder / "config.json", dict(sorted(contents.items())))
    _write(
        folder / "generation_config.json",
        {"do_sample": True, "temperature": None, "top_p": None, "transformers_version": "4.39.3"},
    )
    if not dialect.startswith("apple"):
        _processor_files(folder, config.vision.image_size)
    if native:
        (folder / "chat_template.jinja").write_text(_NATIVE_TEMPLATE, encoding="utf-8")
    if tokenizer is not None:
        for file in _TOKENIZER_FILES:
            if (tokenizer / file).is_file():
                shutil.copyfile(tokenizer / file, folder / file)
    else:
        _write_tokenizer(folder, size, dialect, vocabulary.ordinary)


def _write(path: Path, contents: Mapping[str, Any]) -> None:
    text = json.dumps(contents, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------- config


def _flat_config(size: str, config: Config, vocabulary: Vocabulary, dtype: str) -> dict[str, Any]:
    """Apple's config.json; 0.5b and 1.5b equal the genuine files of the published archives."""
    text = config.text
    return {
        "_name_or_path": "./llava-v1.5-13b",
        "architectures": ["LlavaQwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary.end_of_text,
        "eos_token_id": vocabulary.end_of_turn,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "max_window_layers": text.num_hidden_layers,
        "mm_hidden_size": config.vision.out_dim,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{config.vision.image_size}",
        "model_type": "llava_qwen2",
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "sliding_window": _MODELS[size][2],
        "tie_word_embeddings": text.tie_word_embeddings,
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "torch_dtype": dtype,
        "transformers_version": "4.39.3",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vocab_size": text.vocab_size,
    }


def _native_config(
    size: str, config: Config, vocabulary: Vocabulary, dtype: str, *, fused: bool
) -> dict[str, Any]:
    text, vision = config.text, config.vision
    tower: dict[str, Any] = {
        "model_type": "timm_wrapper",
        "architecture": "fastvit_mci3",
        "model_args": {"inference_mode": fused},
        "hidden_size": vision.out_dim,
        "num_features": vision.out_dim,
        "global_pool": "avg",
        "do_pooling": True,
        "initializer_range": 0.02,
    }
    if size == "tiny":  # timm's name alone would mean FastViTHD
        tower |= _shape_keys(vision)
    return {
        "architectures": ["FastVlmForConditionalGeneration"],
        "dtype": dtype,
        "image_seq_length": vision.tokens(vision.image_size, vision.image_size),
        "image_token_index": vocabulary.end_of_turn + 1,
        "model_type": "fast_vlm",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": {
            "bos_token_id": vocabulary.end_of_text,
            "eos_token_id": vocabulary.end_of_turn,
            "hidden_act": "silu",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
            "model_type": "qwen2",
            "num_attention_heads": text.num_attention_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "num_key_value_heads": text.num_key_value_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_theta,
            "tie_word_embeddings": text.tie_word_embeddings,
            "vocab_size": text.vocab_size,
        },
        "tie_word_embeddings": text.tie_word_embeddings,
        "vision_config": tower,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def _shape_keys(vision: VisionConfig) -> dict[str, Any]:
    mixers = ["attention" if attends else "repmixer" for attends in vision.attention]
    return {
        "embed_dims": list(vision.dims),
        "layers": list(vision.layers),
        "mlp_ratios": list(vision.mlp_ratios),
        "token_mixers": mixers,
    }


def _vision_block(vision: VisionConfig) -> dict[str, Any]:
    """mlx-vlm's `vision_config`; the hidden size in it is as meaningless as in its files."""
    return {
        "cls_ratio": 2.0,
        "down_patch_size": 7,
        "down_stride": 2,
        "downsamples": [True] * len(vision.layers),
        "hidden_size": 1024,
        "image_size": vision.image_size,
        "intermediate_size": vision.out_dim,
        "layer_scale_init_value": 1e-05,
        "num_classes": 1000,
        "patch_size": vision.stride,
        "pos_embs_shapes": [[7, 7] if attends else None for attends in vision.attention],
        "projection_dim": 768,
        "repmixer_kernel_size": 3,
        **_shape_keys(vision),
    }


def _processor_files(folder: Path, side: int) -> None:
    _write(
        folder / "preprocessor_config.json",
        {
            "crop_size": {"height": side, "width": side},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.0, 0.0, 0.0],
            "image_processor_type": "CLIPImageProcessor",
            "image_std": [1.0, 1.0, 1.0],
            "processor_class": "LlavaProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": side},
        },
    )
    _write(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 0,
            "patch_size": 64,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": None,
        },
    )


# ------------------------------------------------------------------------------------ tokenizer


def _write_tokenizer(folder: Path, size: str, dialect: str, first: int) -> None:
    """A byte-level BPE without merges, in the form of the dialect's genuine files."""
    special = [*_SPECIAL, *(_QWEN25 if size == "7b" else ())]
    if dialect.startswith("native"):
        special.insert(len(_SPECIAL), "<image>")
    content = [*special, *(_QWEN25_PLAIN if size == "7b" else ())]
    added = {token: first + n for n, token in enumerate(content)}
    vocabulary = _vocabulary(first)
    if dialect.startswith("apple"):
        text = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
        (folder / "vocab.json").write_text(text, encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        _write(folder / "added_tokens.json", dict(sorted(added.items())))
    else:
        backend = Tokenizer(models.BPE(vocabulary, []))
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_tokens([AddedToken(t, normalized=False, special=t in special) for t in content])
        backend.save(str(folder / "tokenizer.json"), pretty=False)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    extra = special[1:]
    _write(
        folder / "special_tokens_map.json",
        {
            "additional_special_tokens": extra,
            **{key: {"content": token, **flags} for key, token in ends.items()},
        },
    )
    _write(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(i): {"content": token, **flags, "special": token in special}
                for token, i in added.items()
            },
            "additional_special_tokens": extra,
            "bos_token": None,
            "chat_template": _TEMPLATE,
            "clean_up_tokenization_spaces": False,
            **ends,
            "errors": "replace",
            "model_max_length": 8192,
            "padding_side": "right",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def _vocabulary(size: int) -> dict[str, int]:
    """256 bytes, then made-up words that no text is cut into but any answer may hold."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    words = ("\u0120" + "".join(word) for word in itertools.product(syllables, repeat=3))
    return {t: i for i, t in enumerate(itertools.islice(itertools.chain(symbols, words), size))}
