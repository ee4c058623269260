"""`Network` -> this library's own format: folded, stamped, written all or nothing.

A directory with config.json, tokenizer files and safetensors whose metadata carries the stamp
(`format`, `version`, `source`, `recipe`). Loading it guesses nothing and folds nothing.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import Config
from ..errors import CheckpointError
from ..model import Network, flat_parameters
from .dialects import FORMAT

__all__ = ["FORMAT_VERSION", "config_to_dict", "new_directory", "save_checkpoint"]

FORMAT_VERSION = "1"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def save_checkpoint(
    folder: Path,
    network: Network,
    config: Config,
    tokenizer_from: Path,
    *,
    source: str,
    recipe: str = "none",
    quantization: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folded checkpoint. Raises CheckpointError if `folder` exists and may not be replaced.

    `quantization` goes into config.json for other readers; our own loader reads it off the tensors.
    """
    tensors = dict(flat_parameters(network))
    metadata = {"format": FORMAT, "version": FORMAT_VERSION, "source": source, "recipe": recipe}
    with new_directory(folder, overwrite=overwrite) as temporary:
        mx.save_safetensors(str(temporary / "model.safetensors"), tensors, metadata)
        contents = config_to_dict(config)
        if quantization:
            contents["quantization"] = dict(quantization)
        (temporary / "config.json").write_text(json.dumps(contents, indent=2) + "\n")
        for name in _TOKENIZER_FILES:
            if (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, temporary / name)


@contextmanager
def new_directory(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` when the block ends well, else vanishes."""
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} already exists; choose another place or overwrite it.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"Cannot write to {folder.parent} ({error.strerror}).") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        replaced = None
        if folder.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            folder.rename(replaced / "old")
        temporary.rename(folder)
        _flush(folder.parent)
        if replaced is not None:
            shutil.rmtree(replaced)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def config_to_dict(config: Config) -> dict[str, Any]:
    """Apple's flat config.json plus a complete `vision_config`; `parse_config` undoes it."""
    vision = config.vision
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        **asdict(config.text),
        "hidden_act": "silu",
        "eos_token_id": sorted(config.eos_token_ids),
        "tokenizer_model_max_length": config.context_length,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": vision.out_dim,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{vision.image_size}",
        "vision_config": {
            "image_size": vision.image_size,
            "layers": list(vision.layers),
            "embed_dims": list(vision.dims),
            "mlp_ratios": list(vision.mlp_ratios),
            "token_mixers": ["attention" if a else "repmixer" for a in vision.attention],
            "cls_ratio": float(vision.head_ratio),
            "residual_scales": list(vision.residual_scales),
        },
    }


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
