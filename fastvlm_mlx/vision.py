"""FastViTHD in its folded inference form (paper section 3.2), channels last.

BatchNorm, layer scales and LayerNorm's affine part are gone: `checkpoint/fold.py` has put them
into the weights around them. A 1x1 convolution is a matrix product over channels.

One trick runs through all blocks: the bias of a block's last matrix product is added by an
earlier bias, so that the residual itself can be the addend of that product. The one reader in
between, the 7x7 depthwise convolution, takes it off again (`pre_bias`).
"""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from . import ops
from .config import SIDE_MULTIPLE, VisionConfig
from .errors import ImageError

__all__ = ["FastViTHD"]


class Depthwise(nn.Module):
    """Depthwise k x k convolution, `outputs` per input channel; weight (k, k, channels*outputs)."""

    def __init__(
        self,
        channels: int,
        k: int,
        *,
        outputs: int = 1,
        stride: int = 1,
        bias: bool = True,
        pre_bias: bool = False,
        gelu: bool = False,
    ) -> None:
        super().__init__()
        self.weight = mx.zeros((k, k, channels * outputs))
        if bias:
            self.bias = mx.zeros((channels * outputs,))
        if pre_bias:
            self.pre_bias = mx.zeros((channels,))
        self._stride, self._gelu = stride, gelu

    def __call__(self, x: mx.array) -> mx.array:
        return ops.depthwise_conv(
            x,
            self.weight,
            self.get("bias"),
            stride=self._stride,
            pre_bias=self.get("pre_bias"),
            gelu=self._gelu,
        )


class Stem(nn.Module):
    """(B, H, W, 3) -> (B, H/4, W/4, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, dim, 3, stride=2, padding=1)
        self.depthwise = Depthwise(dim, 3, stride=2, gelu=True)
        self.pointwise = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.depthwise(ops.stem_conv(x, self.conv.weight, self.conv.bias))
        return _linear_gelu(self.pointwise, x)


class Downsample(nn.Module):
    """(B, H, W, dim) -> (B, H/2, W/2, 2*dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = Depthwise(dim, 7, outputs=2, stride=2, gelu=True)
        self.pointwise = nn.Linear(2 * dim, 2 * dim)

    def __call__(self, x: mx.array) -> mx.array:
        return _linear_gelu(self.pointwise, self.depthwise(x))


def _linear_gelu(layer: nn.Module, x: mx.array) -> mx.array:
    if isinstance(layer, nn.QuantizedLinear):
        return ops.exact_gelu(layer(x))
    return ops.linear_gelu(x, layer.weight, layer.bias)


class ConvFFN(nn.Module):
    """x + fc2(gelu(fc1(conv(x)))), where x comes in with fc2's bias already added."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.conv = Depthwise(dim, 7, bias=False, pre_bias=True)
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        if isinstance(self.fc1, nn.QuantizedLinear) or isinstance(self.fc2, nn.QuantizedLinear):
            return x + self.fc2(ops.exact_gelu(self.fc1(self.conv(x))))
        return ops.ffn(self.conv(x), x, self.fc1.weight, self.fc1.bias, self.fc2.weight)


class RepMixerBlock(nn.Module):
    """Token mixing by one 3x3 depthwise convolution (its skip is folded in), then the FFN."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.token_mixer = Depthwise(dim, 3)
        self.convffn = ConvFFN(dim, ratio)

    def __call__(self, x: mx.array) -> mx.array:
        return self.convffn(self.token_mixer(x))


class AttentionBlock(nn.Module):
    """Token mixing by self-attention over the whole map, then the FFN."""

    def __init__(self, dim: int, ratio: int, head_dim: int, scale: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.residual_bias = mx.zeros((dim,))  # proj's bias and fc2's
        self.convffn = ConvFFN(dim, ratio)
        self._heads = dim // head_dim
        self._eps = 1e-5 * scale**2

    def __call__(self, x: mx.array) -> mx.array:
        batch, height, width, dim = x.shape
        normed = mx.fast.layer_norm(x, None, None, self._eps)
        mixed = ops.self_attention(self.qkv(normed).reshape(batch, -1, 3 * dim), self._heads)
        mixed = mixed.reshape(batch, height, width, dim)
        residual = x + self.residual_bias
        if isinstance(self.proj, nn.QuantizedLinear):
            return self.convffn(residual + self.proj(mixed))
        return self.convffn(mx.addmm(residual, mixed, self.proj.weight.T))


class Stage(nn.Module):
    """Downsampling (but for the first), positions (before attention), blocks."""

    def __init__(self, config: VisionConfig, index: int) -> None:
        super().__init__()
        dim, ratio = config.dims[index], config.mlp_ratios[index]
        if index:
            self.downsample = Downsample(config.dims[index - 1])
        if config.attention[index]:
            self.position = Depthwise(dim, 7)
            scale = config.residual_scales[index]
            self.blocks: list[nn.Module] = [
                AttentionBlock(dim, ratio, config.head_dim, scale)
                for _ in range(config.layers[index])
            ]
        else:
            self.blocks = [RepMixerBlock(dim, ratio) for _ in range(config.layers[index])]

    def __call__(self, x: mx.array) -> mx.array:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return x

    def enter(self, x: mx.array) -> mx.array:
        """What comes before the blocks: the beginning of the stage's residual stream."""
        for name in ("downsample", "position"):
            if name in self:
                x = self[name](x)
        return x


class Head(nn.Module):
    """Channel expansion with squeeze-and-excitation: (B, H, W, dim) -> (B, H, W, ratio*dim)."""

    def __init__(self, dim: int, ratio: int, squeeze: int) -> None:
        super().__init__()
        out = ratio * dim
        self.conv = Depthwise(dim, 3, outputs=ratio)
        self.reduce = nn.Linear(out, out // squeeze)
        self.expand = nn.Linear(out // squeeze, out)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv(x)
        # In float32: a mean is a sum before it is divided, and 256 values sum to float16's end.
        pooled = x.astype(mx.float32).mean(axis=(1, 2), keepdims=True).astype(x.dtype)
        gate = mx.sigmoid(self.expand(nn.relu(self.reduce(pooled))))
        return ops.exact_gelu(x * gate)


class FastViTHD(nn.Module):
    """The encoder: (B, H, W, 3) pixels in [0, 1] -> (B, H/64 * W/64, out_dim) features.

    Features run in row-major order. H and W are multiples of 64; a picture of 1024 x 1024
    becomes 256 features of width 3072. Raises ImageError for other sizes.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.stem = Stem(config.dims[0])
        self.stages = [Stage(config, i) for i in range(len(config.layers))]
        self.head = Head(config.dims[-1], config.head_ratio, config.squeeze_ratio)

    def __call__(self, pixels: mx.array) -> mx.array:
        for _, x in self._walk(pixels):
            features = x
        return features.reshape(features.shape[0], -1, features.shape[-1])

    def feature_maps(self, pixels: mx.array) -> dict[str, mx.array]:
        """Every intermediate map (B, h, w, C): "stem", "stage1" ... "stage5", "head"."""
        return dict(self._walk(pixels))

    def _walk(self, pixels: mx.array) -> Iterator[tuple[str, mx.array]]:
        check_pixels(pixels)
        x = self.stem(pixels.astype(self.stem.conv.weight.dtype))
        yield "stem", x
        for number, stage in enumerate(self.stages, start=1):
            x = stage(x)
            yield f"stage{number}", x
        yield "head", self.head(x)


def check_pixels(pixels: mx.array) -> None:
    """Raise ImageError unless `pixels` is (B, H, W, 3) with sides that are multiples of 64."""
    shape = tuple(pixels.shape)
    if len(shape) != 4 or shape[3] != 3 or 0 in shape or shape[1] % 64 or shape[2] % 64:
        raise ImageError(
            f"Pixels of shape {shape}; expected (batch, height, width, 3) with height and width "
            f"multiples of {SIDE_MULTIPLE}."
        )
