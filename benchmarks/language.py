"""Language models of the shapes that the paper measures, with random weights: prefill only.

What is timed is what the paper's `mlx_lm.cache_prompt` does: embeddings through all layers into
the KV cache, no logits. The layers are mlx-lm's, the embeddings are drawn at random.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.model import mlx_lm_module

__all__ = ["SHAPES", "LayerStack", "Shape"]

CHUNK = 2048
"""Positions at a time, as mlx-lm's own generation does it (`prefill_step_size`)."""


@dataclass(frozen=True)
class Shape:
    """A decoder of equal layers: attention with grouped keys and values, gated MLP."""

    family: str
    """Module of `mlx_lm.models`."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rope_theta: float

    @property
    def layer_parameters(self) -> int:
        """Parameters of the matrices of one layer."""
        kv = self.hidden // self.heads * self.kv_heads
        return self.hidden * (2 * self.hidden + 2 * kv + 3 * self.intermediate)

    def flops(self, tokens: int) -> int:
        """Of a prefill: matrix products, and attention without credit for the causal mask."""
        return self.layers * tokens * (2 * self.layer_parameters + 4 * tokens * self.hidden)


SHAPES = MappingProxyType(
    {
        "Qwen2-0.5B": Shape("qwen2", 896, 4864, 24, 14, 2, 151936, 1e6),
        "Qwen2-1.5B": Shape("qwen2", 1536, 8960, 28, 12, 2, 151936, 1e6),
        "Qwen2-7B": Shape("qwen2", 3584, 18944, 28, 28, 4, 152064, 1e6),
        "Qwen1.5-0.5B": Shape("qwen2", 1024, 2816, 24, 16, 16, 151936, 1e6),
        "Vicuna-7B": Shape("llama", 4096, 11008, 32, 32, 32, 32000, 1e4),
        "LLaMA-3-8B": Shape("llama", 4096, 14336, 32, 32, 8, 128256, 5e5),
    }
)
"""By the names of `paper.PREFILLS`; from the models' published config.json files."""


class LayerStack:
    """The first `layers` layers of a language model, in memory."""

    def __init__(self, name: str, dtype: mx.Dtype, layers: int | None = None) -> None:
        if name not in SHAPES:
            raise OptionError(
                f"Unknown language model {name!r}; expected one of {', '.join(SHAPES)}."
            )
        shape = SHAPES[name]
        module = mlx_lm_module(f"models.{shape.family}")
        args = module.ModelArgs(
            model_type=shape.family,
            hidden_size=shape.hidden,
            num_hidden_layers=layers or shape.layers,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            rms_norm_eps=1e-6,
            vocab_size=shape.vocabulary,
            max_position_embeddings=32768,
            rope_theta=shape.rope_theta,
        )
        # Embedding and head are lazy too, and stay so: nothing asks for them.
        self._body: Any = module.Model(args).model
        self._hidden, self._dtype = shape.hidden, dtype
        for part in (*self._body.layers, self._body.norm):
            block: nn.Module = part
            block.set_dtype(dtype)
            mx.eval(block.parameters())

    def embeddings(self, tokens: int) -> mx.array:
        """Random embeddings (1, tokens, hidden), evaluated."""
        drawn = mx.random.normal((1, tokens, self._hidden), key=mx.random.key(tokens))
        drawn = drawn.astype(self._dtype)
        mx.eval(drawn)
        return drawn

    def prefill(self, embeddings: mx.array) -> list[mx.array]:
        """Run embeddings (1, N, hidden) into a new KV cache; its keys and values, by layer.

        All chunks but the last are evaluated here, as mlx-lm does it, to hold less at a time.
        """
        caches: Any = mlx_lm_module("models.cache")
        cache = [caches.KVCache() for _ in self._body.layers]
        for start in range(0, embeddings.shape[1], CHUNK):
            mx.eval([(layer.keys, layer.values) for layer in cache if start])
            hidden: mx.array = self._body(None, cache, embeddings[:, start : start + CHUNK])
        # The last layer's output is asked for too: every layer is then worked on in full.
        return [hidden, *(array for layer in cache for array in (layer.keys, layer.values))]
