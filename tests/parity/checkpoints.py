"""One random reference model, written in every published file layout.

transformers' own `save_pretrained` writes the native layout; the others follow from it by the
name rules below, which test_reference.py holds against the genuine files' names where it can.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import reference

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOWER = "model.vision_tower.timm_model."
APPLE_TOWER = "model.vision_tower.vision_tower.model."

# The native layout's own template: pictures first, a newline before each text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}"
    "{{'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Language:
    """The size of a Qwen2."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = True


TINY = Language(hidden=64, intermediate=192, layers=2, heads=4, kv_heads=2, vocab=512)
UNTIED = Language(hidden=96, intermediate=160, layers=3, heads=6, kv_heads=2, vocab=512, tied=False)
FULL_05B = Language(hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, vocab=152000)


@dataclass(frozen=True)
class Reference:
    """A reference model with its processor."""

    model: FastVlmForConditionalGeneration
    processor: LlavaProcessor
    image_size: int
    tokenizer: Path

    @property
    def image_tokens(self) -> int:
        """Tokens of one picture."""
        return (self.image_size // 64) ** 2


def build(
    language: Language,
    tokenizer: Path,
    *,
    image_size: int = 256,
    fused: bool = True,
    seed: int = 0,
    language_seed: int = 0,
) -> Reference:
    """A reference model with a full-size tower and random weights, in float32."""
    qwen = Qwen2Tokenizer.from_pretrained(str(tokenizer))
    usable = [i for token, i in qwen.get_vocab().items() if token not in SPECIAL]
    qwen.add_special_tokens({"additional_special_tokens": [*SPECIAL[1:], "<image>"]})
    qwen.chat_template = CHAT_TEMPLATE
    image_token = qwen.convert_tokens_to_ids("<image>")
    config = FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "model_args": {"inference_mode": fused},
            "hidden_size": 3072,
            "num_features": 3072,
        },
        text_config=Qwen2Config(
            hidden_size=language.hidden,
            intermediate_size=language.intermediate,
            num_hidden_layers=language.layers,
            num_attention_heads=language.heads,
            num_key_value_heads=language.kv_heads,
            vocab_size=language.vocab,
            tie_word_embeddings=language.tied,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            eos_token_id=qwen.convert_tokens_to_ids("<|im_end|>"),
        ).to_dict(),
        image_token_index=image_token,
        image_seq_length=(image_size // 64) ** 2,
        tie_word_embeddings=language.tied,
    )
    with reference.uninitialised():
        model = FastVlmForConditionalGeneration(config).eval()
    model.tie_weights()
    reference.randomise_tower(model.model.vision_tower.timm_model, seed)
    reference.randomise_language(model, usable, language_seed)
    reference.round_to_bfloat16(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = qwen.convert_tokens_to_ids("<|endoftext|>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=[0.0, 0.0, 0.0],
            image_std=[1.0, 1.0, 1.0],
        ),
        tokenizer=qwen,
        patch_size=64,
        num_additional_image_tokens=0,
        vision_feature_select_strategy=None,
        chat_template=CHAT_TEMPLATE,
    )
    return Reference(model, processor, image_size, tokenizer)


# --------------------------------------------------------------------------------------- writing


def write_native(made: Reference, folder: Path) -> Path:
    """What transformers itself writes, in float32."""
    made.model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return folder


def write_apple(made: Reference, folder: Path) -> Path:
    """Apple's LLaVA layout in bfloat16, with the tensors that it carries for nothing."""
    return _write(made, folder, apple_tensors(made), "pt", {})


def write_mlx_vlm(made: Reference, folder: Path) -> Path:
    """The layout of mlx-vlm's conversions in bfloat16."""
    extra = {"vision_config": {}, "image_token_index": -200}
    return _write(made, folder, mlx_vlm_tensors(made), "mlx", extra)


def _write(
    made: Reference,
    folder: Path,
    tensors: Mapping[str, Tensor],
    form: str,
    extra: Mapping[str, object],
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stored = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    stored = {n: t.contiguous() for n, t in stored.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": form})
    config = _apple_config(made) | dict(extra)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in made.tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _apple_config(made: Reference) -> dict[str, object]:
    text = made.model.config.text_config
    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "rms_norm_eps",
        "hidden_act",
        "max_position_embeddings",
        "tie_word_embeddings",
    )
    qwen = made.processor.tokenizer
    return {key: getattr(text, key) for key in same} | {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        "rope_theta": 1e6,
        "bos_token_id": qwen.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": qwen.convert_tokens_to_ids("<|im_end|>"),
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": 3072,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{made.image_size}",
        "sliding_window": 32768,
        "tokenizer_model_max_length": 8192,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
    }


def apple_tensors(made: Reference) -> dict[str, Tensor]:
    """The model's tensors under Apple's names; lm_head is stored even where it is tied."""
    tensors = {apple_name(n): t for n, t in made.model.state_dict().items()}
    tensors["lm_head.weight"] = made.model.get_output_embeddings().weight.detach().clone()
    tensors[APPLE_TOWER + "head.proj"] = torch.full((3072, 768), 0.5)
    return tensors


def mlx_vlm_tensors(made: Reference) -> dict[str, Tensor]:
    """The model's tensors under mlx-vlm's names, convolutions channels last."""
    tied = made.model.config.text_config.tie_word_embeddings
    tensors = {}
    for name, tensor in apple_tensors(made).items():
        new = mlx_vlm_name(name, tied=tied)
        if new is not None:
            tensors[new] = channels_last(tensor) if "vision_model" in new else tensor
    return tensors


def channels_last(tensor: Tensor) -> Tensor:
    """A convolution's weights or a layer scale as MLX lays them out; others are left alone."""
    order = {4: (0, 2, 3, 1), 3: (1, 2, 0)}.get(tensor.ndim)
    return tensor if order is None else tensor.permute(order)


# ----------------------------------------------------------------------------------------- names


def apple_name(native: str) -> str:
    """The name that transformers gives a tensor -> Apple's."""
    if native.startswith(TOWER):
        return APPLE_TOWER + apple_tower_name(native.removeprefix(TOWER))
    projector = re.fullmatch(r"model\.multi_modal_projector\.linear_([12])\.(.*)", native)
    if projector:
        return f"model.mm_projector.{2 * (int(projector[1]) - 1)}.{projector[2]}"
    return native.replace("model.language_model.", "model.")


def apple_tower_name(timm: str) -> str:
    """The name that timm gives a tower tensor, fused or in training form -> Apple's."""
    name = timm
    name = re.sub(r"^stem\.", "patch_embed.", name)
    name = re.sub(r"^final_conv\.", "conv_exp.", name)
    network = {0: 0, 1: 2, 2: 4, 3: 7, 4: 10}  # where each stage's blocks stand in Apple's list
    name = re.sub(r"^stages\.(\d)\.blocks\.", lambda m: f"network.{network[int(m[1])]}.", name)
    before = {1: 1, 2: 3, 3: 5, 4: 8}
    name = re.sub(r"^stages\.(\d)\.downsample\.", lambda m: f"network.{before[int(m[1])]}.", name)
    name = re.sub(r"^stages\.(\d)\.pos_emb\.", lambda m: f"network.{before[int(m[1])] + 1}.", name)
    name = re.sub(r"(network\.\d\.proj\.0)\.reparam_conv\.", r"\1.lkb_reparam.", name)
    name = name.replace(".se.fc1.", ".se.reduce.").replace(".se.fc2.", ".se.expand.")
    name = name.replace(".mlp.", ".convffn.").removesuffix(".gamma")
    name = name.replace(".pos_enc.", ".pe.").replace(".large_conv.", ".lkb_origin.")
    name = name.replace(".conv_kxk.", ".rbr_conv.").replace(".conv_scale.", ".rbr_scale.")
    return name.replace(".identity.", ".rbr_skip.")


def mlx_vlm_name(apple: str, *, tied: bool) -> str | None:
    """Apple's name of a tensor -> mlx-vlm's; None if it is left out there."""
    if apple.endswith("num_batches_tracked") or (tied and apple == "lm_head.weight"):
        return None
    if apple.startswith(APPLE_TOWER):
        name = re.sub(r"^patch_embed\.", "patch_embed.blocks.", apple.removeprefix(APPLE_TOWER))
        return f"vision_tower.vision_model.{name}"
    if apple.startswith("model.mm_projector."):
        return apple.removeprefix("model.")
    return f"language_model.{apple}"


# ------------------------------------------------------------------------------------- tokenizer


def write_small_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt, added_tokens.json and tokenizer_config.json of a small BPE."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(_corpus(), trainer)
    backend.model.save(str(folder))
    size = backend.get_vocab_size()
    added = {token: size + n for n, token in enumerate(SPECIAL)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    described = {str(i): {"content": t, "special": True, **flags} for t, i in added.items()}
    config = {
        "added_tokens_decoder": described,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 8192,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _corpus() -> Iterable[str]:
    yield from (
        "system\nYou are a helpful assistant.",
        "user\nWhat are these? What is written here? Describe the image in one sentence.",
        "assistant\nThe picture shows two cats on a sofa, and a dog under the table.",
        "What changed between the first picture and the second one? Nothing but the light.",
    )
