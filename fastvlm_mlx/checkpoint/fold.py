"""Fused weights -> the inference network of `vision.py`. Exact algebra, in float32.

* BatchNorm's scale goes into the 7x7 depthwise weights before it, its shift through fc1 into
  fc1's bias (nothing pads in between).
* Layer scales go into the product before them; LayerNorm's affine part into qkv.
* The bias of fc2 (and of attention's proj) moves to the last addition before it, see `vision.py`.
* Optionally a stage's residual stream is multiplied by a power of two, exactly.
"""

from collections.abc import Callable, Iterator

import mlx.core as mx

from ..config import VisionConfig
from .layout import StageNames, stage_names

__all__ = ["BN_EPS", "fold_vision"]

BN_EPS = 1e-5
"""Epsilon of every BatchNorm in the family."""

Get = Callable[[str], mx.array]
Named = Iterator[tuple[str, mx.array]]


def fold_vision(config: VisionConfig, get: Get) -> Named:
    """Yield (name in `FastViTHD`, float32 array) block by block.

    `get(canonical name)` returns the fused tensor in PyTorch's layout, as float32. Arrays come out
    row-contiguous: MLX copies any other before each launch of a Metal kernel of ours.
    """
    for name, array in _folded(config, get):
        yield name, mx.contiguous(array)


def _folded(config: VisionConfig, get: Get) -> Named:
    yield "stem.conv.weight", get("vision.patch_embed.0.reparam_conv.weight").transpose(0, 2, 3, 1)
    yield "stem.conv.bias", get("vision.patch_embed.0.reparam_conv.bias")
    yield from _depthwise("stem.depthwise", "vision.patch_embed.1.reparam_conv", get)
    yield from _pointwise("stem.pointwise", "vision.patch_embed.2.reparam_conv", get)
    scale_before = 1.0
    for index, names in enumerate(stage_names(config)):
        scale = config.residual_scales[index]
        yield from _stage(f"stages.{index}", names, get, scale_before, scale)
        scale_before = scale
    head = "vision.conv_exp"
    weight = _taps(get(f"{head}.reparam_conv.weight")) / scale_before
    yield "head.conv.weight", weight
    yield "head.conv.bias", get(f"{head}.reparam_conv.bias")
    yield from _pointwise("head.reduce", f"{head}.se.reduce", get)
    yield from _pointwise("head.expand", f"{head}.se.expand", get)


def _stage(name: str, names: StageNames, get: Get, scale_before: float, scale: float) -> Named:
    if names.downsample:
        source = f"{names.downsample}.0.lkb_reparam"
        yield f"{name}.downsample.depthwise.weight", _taps(get(f"{source}.weight")) / scale_before
        yield f"{name}.downsample.depthwise.bias", get(f"{source}.bias")
        yield from _pointwise(
            f"{name}.downsample.pointwise", f"{names.downsample}.1.reparam_conv", get
        )
    if names.position:
        source = f"{names.position}.reparam_conv"
        yield f"{name}.position.weight", _taps(get(f"{source}.weight")) * scale
        yield f"{name}.position.bias", get(f"{source}.bias") * scale
    for j, block in enumerate(names.blocks):
        fold_block = _attention_block if names.position else _repmixer_block
        yield from fold_block(f"{name}.blocks.{j}", block, get, scale)


def _repmixer_block(name: str, block: str, get: Get, scale: float) -> Named:
    # RepMixer stages have no layer that could absorb a scale on the way in: theirs is 1.
    layer_scale = get(f"{block}.layer_scale").reshape(-1)
    bias = get(f"{block}.convffn.fc2.bias") * layer_scale
    mixer = f"{block}.token_mixer.reparam_conv"
    yield f"{name}.token_mixer.weight", _taps(get(f"{mixer}.weight"))
    yield f"{name}.token_mixer.bias", get(f"{mixer}.bias") + bias
    yield from _ffn(f"{name}.convffn", f"{block}.convffn", get, layer_scale, bias, scale)


def _attention_block(name: str, block: str, get: Get, scale: float) -> Named:
    gamma, beta = get(f"{block}.norm.weight"), get(f"{block}.norm.bias")
    qkv = get(f"{block}.token_mixer.qkv.weight")
    yield f"{name}.qkv.weight", qkv * gamma
    yield f"{name}.qkv.bias", qkv @ beta
    scale_1 = get(f"{block}.layer_scale_1").reshape(-1) * scale
    scale_2 = get(f"{block}.layer_scale_2").reshape(-1) * scale
    bias = get(f"{block}.convffn.fc2.bias") * scale_2
    yield f"{name}.proj.weight", get(f"{block}.token_mixer.proj.weight") * scale_1[:, None]
    yield f"{name}.residual_bias", get(f"{block}.token_mixer.proj.bias") * scale_1 + bias
    yield from _ffn(f"{name}.convffn", f"{block}.convffn", get, scale_2, bias, scale)


def _ffn(
    name: str, source: str, get: Get, out_scale: mx.array, bias: mx.array, in_scale: float
) -> Named:
    bn = {
        p: get(f"{source}.conv.bn.{p}") for p in ("weight", "bias", "running_mean", "running_var")
    }
    gain = bn["weight"] * mx.rsqrt(bn["running_var"] + BN_EPS)
    shift = bn["bias"] - bn["running_mean"] * gain
    fc1 = _matrix(get(f"{source}.fc1.weight"))
    yield f"{name}.conv.weight", _taps(get(f"{source}.conv.conv.weight")) * (gain / in_scale)
    yield f"{name}.conv.pre_bias", -bias
    yield f"{name}.fc1.weight", fc1
    yield f"{name}.fc1.bias", get(f"{source}.fc1.bias") + fc1 @ shift
    yield f"{name}.fc2.weight", _matrix(get(f"{source}.fc2.weight")) * out_scale[:, None]


def _depthwise(name: str, source: str, get: Get) -> Named:
    yield f"{name}.weight", _taps(get(f"{source}.weight"))
    yield f"{name}.bias", get(f"{source}.bias")


def _pointwise(name: str, source: str, get: Get) -> Named:
    yield f"{name}.weight", _matrix(get(f"{source}.weight"))
    yield f"{name}.bias", get(f"{source}.bias")


def _taps(weight: mx.array) -> mx.array:
    # (O, 1, k, k) -> (k, k, O): neighbouring channels side by side, as the kernels read them.
    return weight[:, 0].transpose(1, 2, 0)


def _matrix(weight: mx.array) -> mx.array:
    return weight.reshape(weight.shape[:2])
