"""The encoder's own operations: one public function each, fast where the device allows."""

from .attention import attention
from .depthwise import depthwise_conv
from .gelu import gelu
from .linear import ffn

__all__ = ["attention", "depthwise_conv", "ffn", "gelu"]
