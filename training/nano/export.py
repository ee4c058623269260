"""Write a trained run as a checkpoint folder in Apple's training-form names.

Nothing is fused here: the package's own reparameterization does that when it loads the
folder, as for any other training-form checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .model import Nano
from .settings import TextSettings, VisionSettings
from .train import RUNS, load_model

TOWER = "model.vision_tower.vision_tower.model."
IMAGE_SIZE = 256


def tensors(model: Nano) -> dict[str, Tensor]:
    """The state dict under Apple's prefixes, without the training helpers."""
    prefixes = {
        "vision_tower.": TOWER,
        "mm_projector.": "model.mm_projector.",
        "language.": "model.",
    }
    named: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        for ours, theirs in prefixes.items():
            if name.startswith(ours) and not name.endswith("num_batches_tracked"):
                named[theirs + name.removeprefix(ours)] = value.contiguous()
    return named


def config(vision: VisionSettings, text: TextSettings) -> dict[str, object]:
    """Apple's flat `llava_qwen2` keys, plus the block that tells the tower's dimensions."""
    base = text.vocab_size - 3  # the special tokens are the last three
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "hidden_act": "silu",
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "attention_dropout": 0.0,
        "max_position_embeddings": 2048,
        "sliding_window": 2048,
        "max_window_layers": text.num_hidden_layers,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "bos_token_id": base,
        "eos_token_id": base + 2,
        "torch_dtype": "float32",
        "use_cache": True,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": 2 * vision.embed_dims[-1],
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{IMAGE_SIZE}",
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": True,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "vision_config": {
            "cls_ratio": 2.0,
            "down_patch_size": 7,
            "down_stride": 2,
            "downsamples": [True] * 5,
            "embed_dims": list(vision.embed_dims),
            "image_size": IMAGE_SIZE,
            "layers": list(vision.layers),
            "mlp_ratios": list(vision.mlp_ratios),
            "patch_size": 64,
            "pos_embs_shapes": [None, None, None, [7, 7], [7, 7]],
            "repmixer_kernel_size": 3,
            "token_mixers": ["repmixer"] * 3 + ["attention"] * 2,
        },
    }


def export(run: Path, folder: Path) -> None:
    model, settings = load_model(run)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(model), folder / "model.safetensors", {"format": "pt"})
    described = config(VisionSettings(**settings["vision"]), TextSettings(**settings["text"]))
    for name, value in {
        "config.json": described,
        "generation_config.json": {"do_sample": False},
    }.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    shutil.copytree(run / "tokenizer", folder, dirs_exist_ok=True)
    for name in ("log.jsonl", "settings.json"):
        shutil.copy(run / name, folder / f"training_{name}")
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    print(f"{folder}: {megabytes:.1f} MB in float32 with all branches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", default="nano", help="name of the folder under runs/")
    options = parser.parse_args()
    export(RUNS / options.run, options.folder)


if __name__ == "__main__":
    main()
