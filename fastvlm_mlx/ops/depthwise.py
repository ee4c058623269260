"""Depthwise convolution: one or two outputs per input channel."""

import mlx.core as mx

from .gelu import gelu as _gelu


def depthwise_conv(x, weight, bias=None, *, stride=1, pre_bias=None, gelu=False):
    k, channels = weight.shape[0], x.shape[-1]
    if pre_bias is not None:
        x = x + pre_bias
    y = mx.conv2d(x, weight.transpose(2, 0, 1)[..., None], stride, k // 2, groups=channels)
    if bias is not None:
        y = y + bias
    return _gelu(y) if gelu else y
