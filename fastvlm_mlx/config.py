"""The shape of a model, frozen: a FastViTHD-family encoder, a projector and a Qwen2.

Numbers that follow from others are properties, so a token count or a width is never written twice.
`parse_config` reads every config.json dialect and refuses keys whose value would change the
mathematics in a way that is not implemented here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .errors import CheckpointError, UnsupportedCheckpoint

__all__ = ["SIDE_MULTIPLE", "Config", "TextConfig", "VisionConfig", "parse_config"]

SIDE_MULTIPLE = 64
"""Total stride of a five-stage encoder: every input side is a multiple of it."""


@dataclass(frozen=True)
class VisionConfig:
    """A FastViTHD-family encoder (paper section 3.2; the defaults are FastViTHD itself)."""

    layers: tuple[int, ...] = (2, 12, 24, 4, 2)
    dims: tuple[int, ...] = (96, 192, 384, 768, 1536)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4, 4)
    attention: tuple[bool, ...] = (False, False, False, True, True)
    """Per stage: self-attention (with a positional convolution in front) or RepMixer."""
    image_size: int = 1024
    """Side of the square that pictures are fitted to unless `load(image_size=)` says otherwise."""
    head_dim: int = 32
    head_ratio: int = 2
    squeeze_ratio: int = 16
    residual_scales: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    """Power of two that a folded checkpoint multiplies each stage's residual stream by, so that
    float16 does not overflow; the weights undo it, and attention's LayerNorm is told (eps)."""

    def __post_init__(self) -> None:
        stages = len(self.layers)
        if not stages == len(self.dims) == len(self.mlp_ratios) == len(self.attention):
            raise CheckpointError(
                f"vision_config describes {stages} stages in `layers` but {len(self.dims)} in "
                f"`embed_dims`, {len(self.mlp_ratios)} in `mlp_ratios` and {len(self.attention)} "
                "in `token_mixers`; they must agree."
            )
        if self.stride != SIDE_MULTIPLE:
            raise UnsupportedCheckpoint(
                f"An encoder of {stages} stages reduces a picture {self.stride} times; only "
                f"five-stage encoders of the FastViTHD family ({SIDE_MULTIPLE} times) are known."
            )
        if any(2 * a != b for a, b in pairwise(self.dims)):
            raise UnsupportedCheckpoint(
                f"Stage widths {list(self.dims)}: each must be twice the one before, as the "
                "downsampling convolutions have two outputs per channel."
            )
        for dim, attends in zip(self.dims, self.attention, strict=True):
            if attends and dim % self.head_dim:
                raise CheckpointError(
                    f"An attention stage of width {dim} cannot be split into heads of "
                    f"{self.head_dim}."
                )
        if min(self.layers) < 1 or min(self.mlp_ratios) < 1:
            raise CheckpointError(
                "vision_config: every stage needs at least one layer and ratio 1."
            )
        moved = zip(self.residual_scales, self.attention, strict=True)
        if any(scale != 1 and not attends for scale, attends in moved):
            raise CheckpointError("vision_config: residual_scales other than 1 need attention.")
        check_side(self.image_size, "image_size")

    @property
    def stride(self) -> int:
        """Input pixels per feature, along one side: the stem's 4, then 2 per downsampling."""
        return int(4 * 2 ** (len(self.layers) - 1))

    @property
    def out_dim(self) -> int:
        """Channels of the encoder's output (3072 for FastViTHD)."""
        return self.dims[-1] * self.head_ratio

    def tokens(self, height: int, width: int) -> int:
        """Image tokens that an input of height x width pixels becomes."""
        return (height // self.stride) * (width // self.stride)


@dataclass(frozen=True)
class TextConfig:
    """A Qwen2 language model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Config:
    """Everything about a checkpoint that its weights do not say themselves."""

    text: TextConfig
    vision: VisionConfig = field(default_factory=VisionConfig)
    eos_token_ids: frozenset[int] = frozenset({151645, 151643})
    context_length: int = 8192
    """Positions a prompt and its answer may take: the smaller of what the tokenizer's and the
    language model's config allow. The reference cuts longer prompts; here they are an error."""
    quantization: Mapping[str, Any] | None = None

    @property
    def image_tokens(self) -> int:
        """Tokens of one picture at the default size."""
        return self.vision.tokens(self.vision.image_size, self.vision.image_size)


def check_side(side: int, name: str) -> int:
    """Return `side` if an encoder can take it, else raise CheckpointError."""
    if isinstance(side, bool) or not isinstance(side, int) or side <= 0 or side % SIDE_MULTIPLE:
        raise CheckpointError(
            f"{name} is {side!r}; it must be a positive multiple of {SIDE_MULTIPLE}."
        )
    return side


# A key that changes the mathematics, and the values under which this implementation is right.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("flat",),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "image_aspect_ratio": ("pad", None),
    "image_grid_pinpoints": (None,),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "vision_feature_select_strategy": ("full",),
    "vision_feature_layer": (-1,),
}
_ONLY_VISION: dict[str, tuple[Any, ...]] = {
    "cls_ratio": (2, 2.0),
    "down_patch_size": (7,),
    "down_stride": (2,),
    "repmixer_kernel_size": (3,),
    "architecture": ("fastvit_mci3",),
}


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> Config:
    """Read a config.json of any dialect (reference: checkpoint notes, sections 1.2, 2 and 3).

    Raises UnsupportedCheckpoint for another kind of model or a value that is not implemented, and
    CheckpointError for missing or malformed keys. `where` names the file in messages.
    """
    kind = raw.get("model_type")
    if kind not in ("llava_qwen2", "fast_vlm", "fastvlm"):
        raise UnsupportedCheckpoint(
            f"{where} has model_type {kind!r}; FastVLM checkpoints have 'llava_qwen2', 'fast_vlm' "
            "or 'fastvlm'. Check that this is a FastVLM model."
        )
    text = raw.get("text_config") or raw
    vision = raw.get("vision_config") or {}
    for part in (text, vision):
        if not isinstance(part, Mapping):
            raise CheckpointError(f"{where}: text_config and vision_config must be objects.")
    if kind == "fast_vlm":
        if text.get("model_type", "qwen2") != "qwen2":
            raise UnsupportedCheckpoint(
                f"{where}: text_config is a {text.get('model_type')!r}; FastVLM uses 'qwen2'."
            )
        image_size = _native_image_size(raw, where)
    else:
        image_size = _tower_image_size(raw, where)
    _refuse(raw, _ONLY, where)
    _refuse(text, _ONLY, where)
    _refuse(vision, _ONLY_VISION, f"{where}: vision_config")
    return Config(
        text=_text_config(text, raw, where),
        vision=_vision_config(vision, image_size, where),
        eos_token_ids=_eos(raw, text),
        context_length=_context(raw, text),
        quantization=raw.get("quantization") or raw.get("quantization_config"),
    )


def _refuse(raw: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for key, allowed in only.items():
        if key in raw and raw[key] not in allowed:
            raise UnsupportedCheckpoint(
                f"{where}: {key} is {raw[key]!r}, which is not implemented; "
                f"expected {' or '.join(repr(a) for a in allowed)}."
            )


def _tower_image_size(raw: Mapping[str, Any], where: str) -> int:
    # Apple's towers are called mobileclip_l_<side>; other LLaVA-Qwen2 models carry CLIP or SigLIP.
    name = str(raw.get("mm_vision_tower", ""))
    side = name.rpartition("mobileclip_l_")[2]
    if "mobileclip_l_" not in name or not side.isdigit():
        raise UnsupportedCheckpoint(
            f"{where}: mm_vision_tower is {raw.get('mm_vision_tower')!r}; a FastVLM has "
            "'mobileclip_l_1024'. This looks like another LLaVA-Qwen2 model."
        )
    return check_side(int(side), f"{where}: the size in mm_vision_tower")


def _native_image_size(raw: Mapping[str, Any], where: str) -> int:
    tokens = raw.get("image_seq_length", 256)
    side = round(tokens**0.5) if isinstance(tokens, int) and tokens > 0 else 0
    if side * side != tokens:
        raise CheckpointError(f"{where}: image_seq_length is {tokens!r}; expected a square number.")
    return side * SIDE_MULTIPLE


def _vision_config(raw: Mapping[str, Any], image_size: int, where: str) -> VisionConfig:
    default = VisionConfig()
    mixers = raw.get("token_mixers")
    if mixers is not None and set(mixers) - {"repmixer", "attention"}:
        raise UnsupportedCheckpoint(
            f"{where}: token_mixers {mixers!r}; expected 'repmixer' or 'attention' per stage."
        )
    try:
        return VisionConfig(
            layers=tuple(raw.get("layers", default.layers)),
            dims=tuple(raw.get("embed_dims", default.dims)),
            mlp_ratios=tuple(int(r) for r in raw.get("mlp_ratios", default.mlp_ratios)),
            attention=(
                default.attention if mixers is None else tuple(m == "attention" for m in mixers)
            ),
            image_size=image_size,
            residual_scales=tuple(raw.get("residual_scales", default.residual_scales)),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: malformed vision_config ({error}).") from error


def _text_config(text: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> TextConfig:
    rope = text.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedCheckpoint(
            f"{where}: rope_parameters has type {rope['rope_type']!r}; only 'default' is known."
        )

    def number(key: str, default: float | None = None) -> Any:
        value = text.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise CheckpointError(f"{where}: {key} is {value!r}; expected a positive number.")
        return value

    config = TextConfig(
        hidden_size=number("hidden_size"),
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=number("num_attention_heads"),
        num_key_value_heads=number("num_key_value_heads"),
        vocab_size=number("vocab_size"),
        rms_norm_eps=number("rms_norm_eps", 1e-6),
        rope_theta=number("rope_theta", rope.get("rope_theta", 1e6)),
        max_position_embeddings=number("max_position_embeddings", 32768),
        # transformers' class default is false at the top, but inherited from text_config if true.
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False))
        or bool(raw.get("tie_word_embeddings", False)),
    )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.hidden_size % heads or heads % kv_heads:
        raise CheckpointError(
            f"{where}: hidden_size {config.hidden_size}, {heads} heads and {kv_heads} key/value "
            "heads do not divide evenly."
        )
    head_dim = text.get("head_dim")
    if head_dim not in (None, config.head_dim):
        raise UnsupportedCheckpoint(
            f"{where}: head_dim {head_dim!r}; expected hidden_size / heads = {config.head_dim}."
        )
    return config


def _eos(raw: Mapping[str, Any], text: Mapping[str, Any]) -> frozenset[int]:
    # Qwen2's end-of-turn and end-of-text both end an answer (checkpoint notes, section 6.4); the
    # tokenizer adds them by name, since small vocabularies number them otherwise.
    found: set[int] = set()
    for part in (raw, text):
        value = part.get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)


def _context(raw: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    limits = (raw.get("tokenizer_model_max_length"), text.get("max_position_embeddings"))
    return min([int(n) for n in limits if n] or [8192])
