"""FastViTHD in training form: every branch and BatchNorm of the reparameterizable blocks.

Module names are those of Apple's checkpoints, so that `state_dict()` is the export.
Shapes are (batch, channels, height, width).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .settings import VisionSettings

HEAD_DIM = 32
LAYER_SCALE = 0.1  # the usual 1e-5 learns far more slowly at this depth and width


class ConvBN(nn.Module):
    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 16, 1)
        self.expand = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class MobileOne(nn.Module):
    """Parallel convolution, 1x1 scale and identity branches, each with its BatchNorm, summed."""

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        convs: int = 1,
        scale: bool = True,
        se: bool = False,
        activation: bool = True,
    ) -> None:
        super().__init__()
        if cin == cout and stride == 1:
            self.rbr_skip = nn.BatchNorm2d(cin)
        if convs:
            self.rbr_conv = nn.ModuleList(
                ConvBN(cin, cout, kernel, stride, groups) for _ in range(convs)
            )
        if scale and kernel > 1:
            self.rbr_scale = ConvBN(cin, cout, 1, stride, groups)
        if se:
            self.se = SqueezeExcite(cout)
        self.activation = activation

    def branches(self, x: Tensor) -> Iterator[Tensor]:
        for conv in getattr(self, "rbr_conv", ()):
            yield conv(x)
        for name in ("rbr_scale", "rbr_skip"):
            if hasattr(self, name):
                yield getattr(self, name)(x)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.branches(x)
        x = sum(rest, first)
        if hasattr(self, "se"):
            x = self.se(x)
        return F.gelu(x) if self.activation else x


def _layer_scale(channels: int) -> nn.Parameter:
    return nn.Parameter(torch.full((channels, 1, 1), LAYER_SCALE))


class ConvFFN(nn.Module):
    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.conv = ConvBN(channels, channels, 7, groups=channels)
        self.fc1 = nn.Conv2d(channels, channels * ratio, 1)
        self.fc2 = nn.Conv2d(channels * ratio, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class RepMixer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        plain = {"groups": channels, "activation": False}
        self.norm = MobileOne(channels, channels, 3, convs=0, scale=False, **plain)
        self.mixer = MobileOne(channels, channels, 3, **plain)
        self.layer_scale = _layer_scale(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))


class RepMixerBlock(nn.Module):
    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.token_mixer = RepMixer(channels)
        self.convffn = ConvFFN(channels, ratio)
        self.layer_scale = _layer_scale(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.layer_scale * self.convffn(x)


class ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(mixed).transpose(1, 2).unflatten(2, (height, width))


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, eps=1e-5)
        self.token_mixer = Attention(channels)
        self.convffn = ConvFFN(channels, ratio)
        self.layer_scale_1 = _layer_scale(channels)
        self.layer_scale_2 = _layer_scale(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1 * self.token_mixer(self.norm(x))
        return x + self.layer_scale_2 * self.convffn(x)


class LargeKernel(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.lkb_origin = ConvBN(cin, cout, 7, 2, cin)
        self.small_conv = ConvBN(cin, cout, 3, 2, cin)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.lkb_origin(x) + self.small_conv(x))


class Downsample(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(LargeKernel(cin, cout), MobileOne(cout, cout, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PositionConv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pe = nn.Conv2d(channels, channels, 7, 1, 3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe(x)


class FastViTHD(nn.Module):
    def __init__(self, settings: VisionSettings) -> None:
        super().__init__()
        dims = settings.embed_dims
        self.patch_embed = nn.Sequential(
            MobileOne(3, dims[0], 3, 2, scale=False),
            MobileOne(dims[0], dims[0], 3, 2, dims[0], scale=False),
            MobileOne(dims[0], dims[0], 1),
        )
        network: list[nn.Module] = []
        for stage, (dim, depth, ratio) in enumerate(
            zip(dims, settings.layers, settings.mlp_ratios, strict=True)
        ):
            if stage:
                network.append(Downsample(dims[stage - 1], dim))
            if stage >= 3:
                network.append(PositionConv(dim))
            block = AttentionBlock if stage >= 3 else RepMixerBlock
            network.append(nn.Sequential(*(block(dim, ratio) for _ in range(depth))))
        self.network = nn.ModuleList(network)
        self.conv_exp = MobileOne(dims[-1], 2 * dims[-1], 3, groups=dims[-1], se=True)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features at strides 64, 32 and 16: the model uses the first, training helpers all."""
        x = self.patch_embed(x)
        for index, part in enumerate(self.network):
            x = part(x)
            if index == 4:
                stride16 = x
            elif index == 7:
                stride32 = x
        return self.conv_exp(x), stride32, stride16


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        fan_in = module.weight[0].numel()
        nn.init.trunc_normal_(module.weight, std=fan_in**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
