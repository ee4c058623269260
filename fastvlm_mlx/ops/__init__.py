"""The encoder's own operations: one public function each, fast where the device allows.

In each file the plain form comes first: it is the specification. The special forms (Metal kernels,
strips on the CPU) compute the same numbers; `FASTVLM_OPS=reference` turns all of them off.
"""

from .attention import self_attention
from .depthwise import depthwise_conv
from .device import assume, backend
from .gelu import exact_gelu
from .linear import ffn, linear_gelu
from .status import OpStatus, statuses
from .stem import stem_conv

__all__ = [
    "OpStatus",
    "assume",
    "self_attention",
    "backend",
    "depthwise_conv",
    "ffn",
    "exact_gelu",
    "linear_gelu",
    "statuses",
    "stem_conv",
]
