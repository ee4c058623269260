"""Who wrote this checkpoint, and what its tensors are called.

Detection looks at tensor names alone; each dialect then has one function that turns a name into
the canonical one (`layout.py`), or into None when a named rule drops it. Names that no rule knows
keep their own spelling and are reported by the check that follows.
Source of all names: checkpoint notes, sections 0 to 4.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from ..config import VisionConfig
from ..errors import CheckpointError, UnsupportedCheckpoint
from .layout import stage_names

__all__ = ["Dialect", "FORMAT", "canonical_names", "detect"]

FORMAT = "fastvlm-mlx"
"""The `format` in the safetensors metadata of checkpoints that this library wrote."""


class Dialect(Enum):
    """The ways in which FastVLM checkpoints are written."""

    FOLDED = "fastvlm-mlx (folded)"
    APPLE = "Apple LLaVA"
    NATIVE = "transformers fast_vlm"
    MLX_VLM = "mlx-vlm"


_APPLE_TOWER = "model.vision_tower.vision_tower.model."
_NATIVE_TOWERS = ("model.vision_tower.timm_model.", "vision_tower.timm_model.")
_MLX_VLM_TOWER = "vision_tower.vision_model."


def detect(names: Iterable[str], metadata: Mapping[str, str], where: str) -> Dialect:
    """Tell the dialect. Raises UnsupportedCheckpoint for what is recognised but cannot be run."""
    if metadata.get("format") == FORMAT:
        return Dialect.FOLDED
    listed = list(names)

    def any_starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in listed)

    if any_starts(_APPLE_TOWER):
        return Dialect.APPLE
    if any_starts(*_NATIVE_TOWERS):
        return Dialect.NATIVE
    if any_starts(_MLX_VLM_TOWER):
        return Dialect.MLX_VLM
    if any_starts("multi_modal_projector.linear_0.", "language_model.model."):
        raise UnsupportedCheckpoint(
            f"{where} holds only the language model: this is Apple's Core ML export (its encoder "
            "is the fastvithd.mlpackage beside it). Use the PyTorch checkpoint of the same size "
            "instead: apple/FastVLM-0.5B, apple/FastVLM-1.5B or apple/FastVLM-7B."
        )
    if any_starts("model.vision_tower.", "vision_tower.", "vision_model."):
        raise UnsupportedCheckpoint(
            f"{where} has a vision tower, but not FastViTHD: its names begin with "
            f"{next(n for n in listed if 'vision' in n)!r}. This is another vision-language model."
        )
    if any_starts("patch_embed.", "stem.", "image_encoder.", "visual.trunk."):
        raise UnsupportedCheckpoint(
            f"{where} is an image encoder without a language model; a FastVLM checkpoint has both."
        )
    raise UnsupportedCheckpoint(
        f"{where} is not a FastVLM checkpoint: no vision tower among its {len(listed)} tensors "
        f"(the first is {listed[0]!r})."
        if listed
        else f"{where} holds no tensors."
    )


def canonical_names(dialect: Dialect, names: Iterable[str], config: VisionConfig) -> dict[str, str]:
    """Map canonical name -> name in the file, dropping what inference does not use.

    Raises CheckpointError if two names of the file mean the same tensor.
    """
    rules: dict[Dialect, Callable[[str], str | None]] = {
        Dialect.APPLE: _from_apple,
        Dialect.NATIVE: _NativeNames(config),
        Dialect.MLX_VLM: _from_mlx_vlm,
    }
    rename = rules[dialect]
    found: dict[str, str] = {}
    for name in names:
        if name.endswith((".num_batches_tracked", ".rotary_emb.inv_freq")):
            continue
        canonical = rename(name)
        if canonical is None:
            continue
        if canonical in found:
            raise CheckpointError(
                f"{found[canonical]} and {name} are both {canonical}; the checkpoint mixes two "
                "layouts. Keep the files of one."
            )
        found[canonical] = name
    return found


def _swap(name: str, *rules: tuple[str, str]) -> str | None:
    for old, new in rules:
        if name.startswith(old):
            return new + name[len(old) :]
    return None


def _drop_clip_head(name: str) -> str | None:
    # The CLIP projection that FastViTHD was pretrained with; a VLM never uses it.
    return None if name.startswith("vision.head.") else name


def _from_apple(name: str) -> str | None:
    name = name.removeprefix("base_model.")
    return _drop_clip_head(
        _swap(
            name,
            (_APPLE_TOWER, "vision."),
            ("model.mm_projector.0.", "projector.fc1."),
            ("model.mm_projector.2.", "projector.fc2."),
            ("model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
        )
        or name
    )


def _from_mlx_vlm(name: str) -> str | None:
    swapped = _swap(
        name,
        (_MLX_VLM_TOWER, "vision."),
        ("mm_projector.0.", "projector.fc1."),
        ("mm_projector.2.", "projector.fc2."),
        # Conversions made before mlx-vlm PR 1193 carry an unprefixed lm_head.
        ("lm_head.", "language_model.lm_head."),
    )
    return _drop_clip_head(
        (swapped or name).replace("vision.patch_embed.blocks.", "vision.patch_embed.")
    )


@dataclass(frozen=True)
class _NativeNames:
    """timm's names, in which a downsampling belongs to the stage after it."""

    config: VisionConfig

    def __call__(self, name: str) -> str | None:
        name = name.removeprefix("model.")
        return _swap(
            name,
            ("multi_modal_projector.linear_1.", "projector.fc1."),
            ("multi_modal_projector.linear_2.", "projector.fc2."),
            ("language_model.model.", "language_model.model."),
            ("language_model.lm_head.", "language_model.lm_head."),
            ("language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
        ) or self._tower(name)

    def _tower(self, name: str) -> str | None:
        tower = name.removeprefix("vision_tower.timm_model.")
        if tower == name:
            return name
        if tower.startswith("head."):
            return None
        moved = _swap(tower, ("stem.", "vision.patch_embed."), ("final_conv.", "vision.conv_exp."))
        return _timm_parts(moved or self._stage(tower) or tower)

    def _stage(self, name: str) -> str | None:
        match = re.match(r"stages\.(\d+)\.(blocks\.(\d+)|downsample\.proj|pos_emb)\.(.+)", name)
        if match is None or int(match[1]) >= len(self.config.layers):
            return None
        stage = stage_names(self.config)[int(match[1])]
        if match[3] is not None:
            block = int(match[3])
            owner = stage.blocks[block] if block < len(stage.blocks) else None
        else:
            owner = stage.position if match[2] == "pos_emb" else stage.downsample
        return f"{owner}.{match[4]}" if owner else None


def _timm_parts(name: str) -> str:
    name = name.replace(".se.fc1.", ".se.reduce.").replace(".se.fc2.", ".se.expand.")
    name = name.replace(".mlp.", ".convffn.").removesuffix(".gamma")
    for timm, apple in (
        (".conv_kxk.", ".rbr_conv."),
        (".conv_scale.", ".rbr_scale."),
        (".identity.", ".rbr_skip."),
        (".large_conv.", ".lkb_origin."),
        (".pos_enc.", ".pe."),
    ):
        name = name.replace(timm, apple)
    return re.sub(r"(\.proj\.0)\.reparam_conv\.", r"\1.lkb_reparam.", name)
