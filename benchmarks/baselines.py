"""The encoders that the paper compares with, in MLX, with random weights: for latency only.

They get what FastViTHD gets: this library's operations (depthwise convolution, GELU, attention:
each takes the fastest form on the device), layer scales folded into the product before them, bias
and residual as addends. A ratio therefore compares architectures, not how well they are written.
`tests/parity/test_baselines.py` holds parameters and outputs against timm's models.

An encoder ends where a vision-language model reads it: at the tokens or the map of its last block,
without the pooling, projection and classifier of its pretraining.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx import ops
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.vision import Depthwise

__all__ = ["BASELINES", "Baseline", "ConvNeXt", "ConvNeXtConfig", "ViT", "ViTConfig", "build"]


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer."""

    dim: int
    depth: int
    heads: int
    hidden: int
    patch: int = 14
    class_token: bool = True
    patch_bias: bool = True
    pre_norm: bool = False
    """LayerNorm before the first block (CLIP)."""
    quick_gelu: bool = False
    """x * sigmoid(1.702 x) in place of the exact GELU (OpenAI's CLIP)."""
    eps: float = 1e-6

    def tokens(self, side: int) -> int:
        """Patches of a side x side picture; a remainder of the side is not looked at."""
        return (side // self.patch) ** 2


@dataclass(frozen=True)
class ConvNeXtConfig:
    """A ConvNeXt."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    eps: float = 1e-6

    def tokens(self, side: int) -> int:
        """Positions of the last stage's map."""
        return (side // int(2 ** (1 + len(self.dims)))) ** 2


@dataclass(frozen=True)
class Baseline:
    """An encoder of the paper."""

    config: ViTConfig | ConvNeXtConfig
    timm: str
    """timm's model with the same blocks."""
    parameters: float
    """Millions, as the paper prints them: with what follows the last block in pretraining."""


BASELINES = MappingProxyType(
    {
        "ViT-L/14": Baseline(
            ViTConfig(
                1024, 24, 16, 4096, patch_bias=False, pre_norm=True, quick_gelu=True, eps=1e-5
            ),
            "vit_large_patch14_clip_quickgelu_336",
            304,
        ),
        "SigLIP-SO400M": Baseline(
            ViTConfig(1152, 27, 16, 4304, class_token=False), "vit_so400m_patch14_siglip_384", 430
        ),
        "DINOv2 ViT-L/14": Baseline(ViTConfig(1024, 24, 16, 4096), "vit_large_patch14_dinov2", 304),
        "ConvNeXt-L": Baseline(
            ConvNeXtConfig((3, 3, 27, 3), (192, 384, 768, 1536)), "convnext_large", 200
        ),
        "ConvNeXt-XXL": Baseline(
            ConvNeXtConfig((3, 4, 30, 3), (384, 768, 1536, 3072), eps=1e-5), "convnext_xxlarge", 846
        ),
    }
)
"""By the names of `paper.ENCODERS`. OpenCLIP's ConvNeXt-L has ConvNeXt-L's blocks; ConvLLaVA adds
a fifth stage, which the paper's 200 M and latencies leave out too."""


def build(name: str, side: int) -> nn.Module:
    """The encoder of that name for side x side pictures; not evaluated. Raises OptionError.

    Called with pixels (B, side, side, 3), it returns (B, tokens, width).
    """
    if name not in BASELINES:
        raise OptionError(f"Unknown encoder {name!r}; expected one of {', '.join(BASELINES)}.")
    config = BASELINES[name].config
    stride = config.patch if isinstance(config, ViTConfig) else 2 ** (1 + len(config.dims))
    if side < stride:
        raise OptionError(f"{name} needs pictures of at least {stride} pixels; got {side}.")
    return ViT(config, side) if isinstance(config, ViTConfig) else ConvNeXt(config)


def _quick_gelu_ffn(
    x: mx.array, residual: mx.array, w1: mx.array, b1: mx.array, w2: mx.array
) -> mx.array:
    return mx.addmm(residual, nn.gelu_fast_approx(mx.addmm(b1, x, w1.T)), w2.T)


class ViTBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        self.fc1 = nn.Linear(config.dim, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.dim)
        self._heads = config.heads
        self._ffn: Callable[..., mx.array] = _quick_gelu_ffn if config.quick_gelu else ops.ffn

    def __call__(self, x: mx.array) -> mx.array:
        mixed = ops.self_attention(self.qkv(self.norm1(x)), self._heads)
        x = mx.addmm(x + self.proj.bias, mixed, self.proj.weight.T)
        residual = x + self.fc2.bias
        return self._ffn(self.norm2(x), residual, self.fc1.weight, self.fc1.bias, self.fc2.weight)


class ViT(nn.Module):
    """Patches -> blocks -> LayerNorm; the class token is worked on and left out of the result."""

    def __init__(self, config: ViTConfig, side: int) -> None:
        super().__init__()
        dim = config.dim
        self.patch_embed = nn.Conv2d(
            3, dim, config.patch, stride=config.patch, bias=config.patch_bias
        )
        if config.class_token:
            self.cls_token = mx.zeros((1, 1, dim))
        positions = config.tokens(side) + config.class_token
        self.pos_embed = mx.random.normal((1, positions, dim), scale=0.02)
        if config.pre_norm:
            self.norm_pre = nn.LayerNorm(dim, config.eps)
        self.blocks = [ViTBlock(config) for _ in range(config.depth)]
        self.norm = nn.LayerNorm(dim, config.eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self.patch_embed(pixels.astype(self.patch_embed.weight.dtype)).flatten(1, 2)
        if "cls_token" in self:
            first = mx.broadcast_to(self.cls_token, (x.shape[0], 1, x.shape[2]))
            x = mx.concatenate([first, x], axis=1)
        x = x + self.pos_embed
        if "norm_pre" in self:
            x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        tokens: mx.array = x[:, 1:] if "cls_token" in self else x
        return tokens


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise convolution, LayerNorm, two linear layers around a GELU."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.conv_dw = Depthwise(dim, 7)
        self.conv_dw.weight = mx.random.normal((7, 7, dim), scale=1 / 7)
        self.norm = nn.LayerNorm(dim, eps)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        normed = self.norm(self.conv_dw(x))
        residual = x + self.fc2.bias
        return ops.ffn(normed, residual, self.fc1.weight, self.fc1.bias, self.fc2.weight)


class ConvNeXt(nn.Module):
    """Stem of 4x4 patches, then stages, each at half the resolution of the one before."""

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        dims, eps = config.dims, config.eps
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), nn.LayerNorm(dims[0], eps))
        self.downsamples = [
            nn.Sequential(nn.LayerNorm(a, eps), nn.Conv2d(a, b, 2, stride=2))
            for a, b in pairwise(dims)
        ]
        self.stages = [
            [ConvNeXtBlock(dim, eps) for _ in range(depth)]
            for dim, depth in zip(dims, config.depths, strict=True)
        ]

    def __call__(self, pixels: mx.array) -> mx.array:
        x: mx.array = self.stem(pixels.astype(self.stem.layers[0].weight.dtype))
        for number, stage in enumerate(self.stages):
            if number:
                x = self.downsamples[number - 1](x)
            for block in stage:
                x = block(x)
        return x.flatten(1, 2)
