"""The encoder as it is published, unfolded: what folding must not change.

Convolutions, BatchNorm, layer scales and LayerNorm one after the other, as in Apple's
`mobileclip/mci.py`, by MLX's own functions and in float32: nothing here is shared with
`checkpoint/fold.py` or `fastvlm_mlx.ops`. It is slow, and runs once per conversion on a small
picture.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.checkpoint.fold import BN_EPS, fold_vision
from fastvlm_mlx.checkpoint.layout import StageNames, stage_names
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.vision import FastViTHD

__all__ = ["FOLD_LIMIT", "PublishedTower", "fold_error"]

Get = Callable[[str], mx.array]
"""Canonical name -> fused tensor in PyTorch's layout, float32."""

FOLD_LIMIT = 1e-4
"""Of the features, relative to the largest."""
_LN_EPS = 1e-5


def fold_error(config: VisionConfig, get: Get, pixels: mx.array) -> float:
    """Largest difference between the folded and the published tower's features, over the largest.

    `pixels` is (B, H, W, 3) in [0, 1].
    """
    tower = FastViTHD(config)
    tower.load_weights(list(fold_vision(config, get)), strict=True)
    folded = tower.feature_maps(pixels)["head"]
    mx.eval(folded)
    del tower
    published = PublishedTower(config, get)(pixels)
    error: Any = (mx.abs(folded - published).max() / mx.abs(published).max()).item()
    return float(error)


class PublishedTower:
    """(B, H, W, 3) pixels -> (B, H/64, W/64, out_dim), evaluated block by block."""

    def __init__(self, config: VisionConfig, get: Get) -> None:
        self._config, self._get = config, get

    def __call__(self, pixels: mx.array) -> mx.array:
        x = nn.gelu(self._conv("vision.patch_embed.0.reparam_conv", pixels, stride=2))
        x = nn.gelu(self._conv("vision.patch_embed.1.reparam_conv", x, stride=2))
        x = nn.gelu(self._conv("vision.patch_embed.2.reparam_conv", x))
        for names in stage_names(self._config):
            x = self._stage(names, x)
        x = self._conv("vision.conv_exp.reparam_conv", x)
        gate = x.mean(axis=(1, 2), keepdims=True)
        gate = nn.relu(self._conv("vision.conv_exp.se.reduce", gate))
        gate = mx.sigmoid(self._conv("vision.conv_exp.se.expand", gate))
        return nn.gelu(x * gate)

    def _stage(self, names: StageNames, x: mx.array) -> mx.array:
        if names.downsample:
            x = nn.gelu(self._conv(f"{names.downsample}.0.lkb_reparam", x, stride=2))
            x = nn.gelu(self._conv(f"{names.downsample}.1.reparam_conv", x))
        if names.position:
            x = self._conv(f"{names.position}.reparam_conv", x)
        for block in names.blocks:
            if names.position:
                x = x + self._scale(f"{block}.layer_scale_1") * self._attention(block, x)
                x = x + self._scale(f"{block}.layer_scale_2") * self._ffn(block, x)
            else:
                x = self._conv(f"{block}.token_mixer.reparam_conv", x)
                x = x + self._scale(f"{block}.layer_scale") * self._ffn(block, x)
            mx.eval(x)
        return x

    def _attention(self, block: str, x: mx.array) -> mx.array:
        batch, height, width, _ = x.shape
        gamma, beta = (self._get(f"{block}.norm.{part}") for part in ("weight", "bias"))
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = centred.square().mean(axis=-1, keepdims=True)
        normed = centred * mx.rsqrt(variance + _LN_EPS) * gamma + beta
        qkv = normed @ self._get(f"{block}.token_mixer.qkv.weight").T
        shape = (batch, height * width, 3, -1, self._config.head_dim)
        q, k, v = qkv.reshape(shape).transpose(2, 0, 3, 1, 4)
        weights = mx.softmax(q @ k.swapaxes(-1, -2) * self._config.head_dim**-0.5, axis=-1)
        mixed = (weights @ v).swapaxes(1, 2).reshape(x.shape)
        proj = f"{block}.token_mixer.proj"
        return mixed @ self._get(f"{proj}.weight").T + self._get(f"{proj}.bias")

    def _ffn(self, block: str, x: mx.array) -> mx.array:
        name = f"{block}.convffn"
        gamma, beta, mean, variance = (
            self._get(f"{name}.conv.bn.{part}")
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        x = self._conv(f"{name}.conv.conv", x, bias=False)
        x = (x - mean) / mx.sqrt(variance + BN_EPS) * gamma + beta
        return self._conv(f"{name}.fc2", nn.gelu(self._conv(f"{name}.fc1", x)))

    def _conv(self, name: str, x: mx.array, *, stride: int = 1, bias: bool = True) -> mx.array:
        weight = self._get(f"{name}.weight")
        side, groups = weight.shape[-1], x.shape[-1] // weight.shape[1]
        y = mx.conv2d(x, weight.transpose(0, 2, 3, 1), stride, side // 2, groups=groups)
        return y + self._get(f"{name}.bias") if bias else y

    def _scale(self, name: str) -> mx.array:
        return self._get(name).reshape(-1)
