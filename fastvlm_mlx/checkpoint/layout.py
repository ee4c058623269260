"""The canonical form that every dialect is brought to: Apple's names, fused, in PyTorch's layout.

`expected_tensors` is the whole list for a config, so that names and shapes are checked both ways
before a single weight is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import Config, TextConfig, VisionConfig

__all__ = ["StageNames", "expected_tensors", "stage_names"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StageNames:
    """Where a stage's parts stand in Apple's flat `network` list."""

    downsample: str | None
    position: str | None
    blocks: tuple[str, ...]


def stage_names(config: VisionConfig) -> list[StageNames]:
    """FastViTHD: blocks in network.0, 2, 4, 7, 10; positional convolutions in 6 and 9."""
    entry = iter(range(3 * len(config.layers)))

    def next_entry() -> str:
        return f"vision.network.{next(entry)}"

    stages = []
    for index, depth in enumerate(config.layers):
        downsample = f"{next_entry()}.proj" if index else None
        position = next_entry() if config.attention[index] else None
        blocks = next_entry()
        stages.append(
            StageNames(downsample, position, tuple(f"{blocks}.{j}" for j in range(depth)))
        )
    return stages


def expected_tensors(config: Config) -> dict[str, Shape]:
    """Canonical name -> shape of every tensor that a checkpoint of this config must hold."""
    hidden, features = config.text.hidden_size, config.vision.out_dim
    projector = {
        **_linear("projector.fc1", features, hidden),
        **_linear("projector.fc2", hidden, hidden),
    }
    return {**dict(_vision(config.vision)), **projector, **_text(config.text)}


def _vision(config: VisionConfig) -> Iterator[tuple[str, Shape]]:
    dims = config.dims
    yield from _conv("vision.patch_embed.0.reparam_conv", 3, dims[0], 3).items()
    yield from _conv("vision.patch_embed.1.reparam_conv", 1, dims[0], 3).items()
    yield from _conv("vision.patch_embed.2.reparam_conv", dims[0], dims[0], 1).items()
    for index, names in enumerate(stage_names(config)):
        dim, hidden = dims[index], dims[index] * config.mlp_ratios[index]
        if names.downsample:
            yield from _conv(f"{names.downsample}.0.lkb_reparam", 1, dim, 7).items()
            yield from _conv(f"{names.downsample}.1.reparam_conv", dim, dim, 1).items()
        if names.position:
            yield from _conv(f"{names.position}.reparam_conv", 1, dim, 7).items()
        for block in names.blocks:
            if config.attention[index]:
                yield from _linear(f"{block}.norm", None, dim).items()
                yield f"{block}.token_mixer.qkv.weight", (3 * dim, dim)
                yield from _linear(f"{block}.token_mixer.proj", dim, dim).items()
                yield f"{block}.layer_scale_1", (dim, 1, 1)
                yield f"{block}.layer_scale_2", (dim, 1, 1)
            else:
                yield from _conv(f"{block}.token_mixer.reparam_conv", 1, dim, 3).items()
                yield f"{block}.layer_scale", (dim, 1, 1)
            yield f"{block}.convffn.conv.conv.weight", (dim, 1, 7, 7)
            for part in ("weight", "bias", "running_mean", "running_var"):
                yield f"{block}.convffn.conv.bn.{part}", (dim,)
            yield from _conv(f"{block}.convffn.fc1", dim, hidden, 1).items()
            yield from _conv(f"{block}.convffn.fc2", hidden, dim, 1).items()
    out = config.out_dim
    yield from _conv("vision.conv_exp.reparam_conv", 1, out, 3).items()
    yield from _conv("vision.conv_exp.se.reduce", out, out // config.squeeze_ratio, 1).items()
    yield from _conv("vision.conv_exp.se.expand", out // config.squeeze_ratio, out, 1).items()


def _text(config: TextConfig) -> dict[str, Shape]:
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    shapes: dict[str, Shape] = {
        "language_model.model.embed_tokens.weight": (config.vocab_size, hidden),
        "language_model.model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["language_model.lm_head.weight"] = (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        layer = f"language_model.model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes |= _linear(f"{layer}.self_attn.q_proj", hidden, hidden)
        shapes |= _linear(f"{layer}.self_attn.k_proj", hidden, kv)
        shapes |= _linear(f"{layer}.self_attn.v_proj", hidden, kv)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (config.intermediate_size, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (config.intermediate_size, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, config.intermediate_size)
    return shapes


def _conv(name: str, inputs: int, outputs: int, k: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs, k, k), f"{name}.bias": (outputs,)}


def _linear(name: str, inputs: int | None, outputs: int) -> dict[str, Shape]:
    weight = (outputs,) if inputs is None else (outputs, inputs)
    return {f"{name}.weight": weight, f"{name}.bias": (outputs,)}
