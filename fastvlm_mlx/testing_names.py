"""What a random checkpoint holds: every tensor of a dialect with its name, dtype and shape.

The way back from `checkpoint/dialects.py`: canonical names (and, for the training form, Apple's
names of the branches) to the names in the file. Source: checkpoint notes, sections 1.3, 2, 3.1, 4.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .checkpoint.layout import expected_tensors, stage_names
from .config import Config, VisionConfig

__all__ = ["DIALECTS", "Planned", "plan"]

DIALECTS = ("apple", "apple-train", "native", "native-train", "mlx-vlm")

Shape = tuple[int, ...]

_CLIP_WIDTH = 768
_GROUP = 64


@dataclass(frozen=True)
class Planned:
    """One tensor of a checkpoint that is about to be written."""

    name: str
    dtype: str
    """As safetensors spells it."""
    shape: Shape
    source: str
    """Canonical name: tensors of one source hold the same values in every dialect."""
    source_shape: Shape
    axes: tuple[int, ...] | None = None
    """How the source is transposed, where it is."""
    part: str | None = None
    """Of a quantized matrix: "weight", "scales" or "biases"."""


def plan(config: Config, dialect: str, dtype: str, bits: int | None = None) -> list[Planned]:
    """Every tensor of a checkpoint, in the order in which its tool shards them."""
    rename = _renaming(config.vision, dialect)
    planned: list[Planned] = []
    for source, shape in _sources(config, dialect).items():
        name = rename(source)
        if name == "lm_head.weight" and config.text.tie_word_embeddings:
            source = "language_model.model.embed_tokens.weight"
        kind = "I64" if source.endswith(".num_batches_tracked") else dtype
        axes = _mlx_axes(source, shape) if dialect == "mlx-vlm" else None
        stored = shape if axes is None else tuple(shape[a] for a in axes)
        if bits is not None and _is_quantized(source, shape):
            planned += _quantized(name, source, shape, dtype, bits)
        else:
            planned.append(Planned(name, kind, stored, source, shape, axes))
    return planned


def _sources(config: Config, dialect: str) -> dict[str, Shape]:
    tensors = dict(sorted(expected_tensors(config).items(), key=lambda item: _order(item[0])))
    vision = {n: s for n, s in tensors.items() if n.startswith("vision.")}
    if dialect.endswith("-train"):
        vision = dict(_training_form(vision))
    if dialect != "mlx-vlm":
        vision = dict(_with_counters(vision))
    if not dialect.startswith("native"):
        vision["vision.head.proj"] = (config.vision.out_dim, _CLIP_WIDTH)
    projector = {n: s for n, s in tensors.items() if n.startswith("projector.")}
    text = {n: s for n, s in tensors.items() if n.startswith("language_model.model.")}
    head: dict[str, Shape] = {}
    # Apple's files store the output matrix even where it is tied (checkpoint notes, section 1.4).
    if dialect.startswith("apple") or not config.text.tie_word_embeddings:
        head["language_model.lm_head.weight"] = (config.text.vocab_size, config.text.hidden_size)
    if dialect.startswith("native"):
        return vision | projector | text | head
    return text | vision | projector | head


def _order(name: str) -> tuple[int, int, bool]:
    """Qwen2's own order: embedding, layers (their norms last), norm. The rest stays as it is."""
    layer = re.match(r"language_model\.model\.layers\.(\d+)\.", name)
    if layer:
        return 1, int(layer[1]), "layernorm" in name
    return (2 if name == "language_model.model.norm.weight" else 0), 0, False


def _training_form(fused: dict[str, Shape]) -> Iterator[tuple[str, Shape]]:
    for name, shape in fused.items():
        match = re.match(r"(.+)\.(reparam_conv|lkb_reparam)\.(weight|bias)$", name)
        if match is None:
            yield name, shape
        elif match[3] == "weight":
            for branch, branch_shape in _branches(match[1], shape).items():
                yield f"{match[1]}.{branch}", branch_shape


def _branches(owner: str, shape: Shape) -> dict[str, Shape]:
    out, inputs = shape[:2]
    if owner.endswith(".token_mixer"):
        return {
            "layer_scale": (out, 1, 1),
            **_norm("norm.rbr_skip", out),
            **_norm("mixer.rbr_skip", out),
            **_conv_norm("mixer.rbr_conv.0", shape),
            **_conv_norm("mixer.rbr_scale", (out, inputs, 1, 1)),
        }
    if owner.endswith(".proj.0"):
        return _conv_norm("lkb_origin", shape) | _conv_norm("small_conv", (out, inputs, 3, 3))
    if re.fullmatch(r"vision\.network\.\d+", owner):
        return {"pe.weight": shape, "pe.bias": (out,)}
    if owner == "vision.conv_exp":
        return _conv_norm("rbr_conv.0", shape) | _conv_norm("rbr_scale", (out, inputs, 1, 1))
    skip = _norm("rbr_skip", out) if shape == (out, out, 1, 1) else {}
    return skip | _conv_norm("rbr_conv.0", shape)


def _conv_norm(name: str, shape: Shape) -> dict[str, Shape]:
    return {f"{name}.conv.weight": shape, **_norm(f"{name}.bn", shape[0])}


def _norm(name: str, dim: int) -> dict[str, Shape]:
    return {f"{name}.{part}": (dim,) for part in ("weight", "bias", "running_mean", "running_var")}


def _with_counters(tensors: dict[str, Shape]) -> Iterator[tuple[str, Shape]]:
    for name, shape in tensors.items():
        yield name, shape
        if name.endswith(".running_var"):
            yield name.replace(".running_var", ".num_batches_tracked"), ()


# ------------------------------------------------------------------------------------- renaming


def _renaming(config: VisionConfig, dialect: str) -> Callable[[str], str]:
    if dialect.startswith("apple"):
        return _to_apple
    if dialect == "mlx-vlm":
        return _to_mlx_vlm
    owners: dict[str, str] = {
        "vision.patch_embed": "stem",
        "vision.conv_exp": "final_conv",
    }
    for index, stage in enumerate(stage_names(config)):
        if stage.downsample:
            owners[stage.downsample] = f"stages.{index}.downsample.proj"
        if stage.position:
            owners[stage.position] = f"stages.{index}.pos_emb"
        owners |= {block: f"stages.{index}.blocks.{j}" for j, block in enumerate(stage.blocks)}
    return lambda name: _to_native(name, owners)


def _to_apple(name: str) -> str:
    return _swap(
        name,
        ("vision.", "model.vision_tower.vision_tower.model."),
        ("projector.fc1.", "model.mm_projector.0."),
        ("projector.fc2.", "model.mm_projector.2."),
        ("language_model.", ""),
    )


def _to_mlx_vlm(name: str) -> str:
    return _swap(
        name,
        ("vision.patch_embed.", "vision_tower.vision_model.patch_embed.blocks."),
        ("vision.", "vision_tower.vision_model."),
        ("projector.fc1.", "mm_projector.0."),
        ("projector.fc2.", "mm_projector.2."),
    )


def _to_native(name: str, owners: dict[str, str]) -> str:
    if not name.startswith("vision."):
        return _swap(
            name,
            ("projector.fc1.", "model.multi_modal_projector.linear_1."),
            ("projector.fc2.", "model.multi_modal_projector.linear_2."),
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
        )
    owner = next(o for o in owners if name.startswith(f"{o}."))
    rest = name[len(owner) :]
    for apple, timm in (
        (".convffn.", ".mlp."),
        (".lkb_reparam.", ".reparam_conv."),
        (".se.reduce.", ".se.fc1."),
        (".se.expand.", ".se.fc2."),
        (".rbr_conv.", ".conv_kxk."),
        (".rbr_scale.", ".conv_scale."),
        (".rbr_skip.", ".identity."),
        (".lkb_origin.", ".large_conv."),
        (".pe.", ".pos_enc."),
    ):
        rest = rest.replace(apple, timm)
    rest = re.sub(r"(layer_scale(_\d)?)$", r"\1.gamma", rest)
    return f"model.vision_tower.timm_model.{owners[owner]}{rest}"


def _swap(name: str, *rules: tuple[str, str]) -> str:
    for old, new in rules:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


# --------------------------------------------------------------------------------- MLX's layout


def _mlx_axes(source: str, shape: Shape) -> tuple[int, ...] | None:
    if not source.startswith("vision."):
        return None
    return {4: (0, 2, 3, 1), 3: (1, 2, 0)}.get(len(shape))


def _is_quantized(source: str, shape: Shape) -> bool:
    # mlx-vlm leaves the tower alone and quantizes every other matrix, the projector included.
    matrix = len(shape) == 2 and not source.startswith("vision.")
    return matrix and shape[1] % _GROUP == 0


def _quantized(name: str, source: str, shape: Shape, dtype: str, bits: int) -> list[Planned]:
    rows, columns = shape
    module = name.removesuffix(".weight")
    packed, groups = (rows, columns * bits // 32), (rows, columns // _GROUP)
    return [
        Planned(f"{module}.weight", "U32", packed, source, shape, part="weight"),
        Planned(f"{module}.scales", dtype, groups, source, shape, part="scales"),
        Planned(f"{module}.biases", dtype, groups, source, shape, part="biases"),
    ]
