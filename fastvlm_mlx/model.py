"""The network: encoder, projector and mlx-lm's Qwen2, joined through embeddings."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import ops
from .config import Config, TextConfig
from .errors import PromptError
from .prompt import IMAGE
from .vision import FastViTHD

if TYPE_CHECKING:
    from mlx_lm.models.cache import KVCache

__all__ = ["Network", "Projector", "flat_parameters", "mlx_lm_module", "parameter_counts"]


class Projector(nn.Module):
    """Image features to token embeddings: two linear layers (LLaVA's mlp2x_gelu)."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(ops.exact_gelu(self.fc1(x)))


class Network(nn.Module):
    """FastViTHD + projector + Qwen2. Attribute names are the folded checkpoint's names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.vision = FastViTHD(config.vision)
        self.projector = Projector(config.vision.out_dim, config.text.hidden_size)
        self.language_model = _qwen2(config.text)

    def encode(self, pixels: mx.array) -> mx.array:
        """(B, H, W, 3) pixels in [0, 1] -> (B, H/64 * W/64, hidden) image tokens; lazy."""
        return self.projector(self.vision(pixels))

    def embed(self, ids: Sequence[int], images: Sequence[mx.array]) -> mx.array:
        """Embeddings (1, L, hidden) of expanded `ids`, image tokens scattered into their slots.

        `ids` holds IMAGE once per image token (`prompt.expand`); `images` are (N, hidden), in
        order. Positions are worked out on the host, so nothing is synchronised here.
        Raises PromptError if the slots and the image tokens differ in number.
        """
        slots = [n for n, token in enumerate(ids) if token == IMAGE]
        given = sum(image.shape[0] for image in images)
        if len(slots) != given:
            raise PromptError(
                f"{len(slots)} image slots for {given} image tokens; expand the prompt with the "
                "token counts of the very pictures that are passed."
            )
        # IMAGE itself must never reach the table: any valid row will do, it is overwritten.
        text = self.language_model.model.embed_tokens(
            mx.array([0 if token == IMAGE else token for token in ids])
        )
        if slots:
            text[mx.array(slots)] = mx.concatenate(list(images)).astype(text.dtype)
        embeddings: mx.array = text[None]
        return embeddings

    def prefill(self, embeddings: mx.array, cache: "list[KVCache]") -> mx.array:
        """Run (B, L, hidden) embeddings into `cache`; logits (B, vocab) of the last position.

        One pass over the weights. The last layer works on the last position only: of the others
        nothing but keys and values is ever used. Rows of a batch are padded on the left, and
        `cache` knows by how much (`batching.left_padded`).
        """
        model = self.language_model.model
        *layers, last = model.layers
        mask = cache[0].make_mask(embeddings.shape[1], return_array=False, window_size=None)
        if isinstance(mask, mx.array):
            # Padding sees itself: what softmax makes of no keys at all is up to the device.
            places = mx.arange(mask.shape[-1])
            mask = mask | (places[-mask.shape[-2] :, None] == places)
        hidden = embeddings
        for layer, layer_cache in zip(layers, cache, strict=False):
            hidden = layer(hidden, mask, layer_cache)
        # Alone, the last position sees all that stands before it; in a batch, but for the padding.
        last_mask = mask[..., -1:, :] if isinstance(mask, mx.array) else None
        hidden = _last_position(last, hidden, last_mask, cache[-1])
        return self._logits(model.norm(hidden))[:, 0]

    def decode(self, token: mx.array, cache: "list[KVCache]") -> mx.array:
        """Run one token id of each row, shape (B,); logits (B, vocab) of the next."""
        return self.continuation(token[:, None], cache)[:, -1]

    def continuation(self, tokens: mx.array, cache: "list[KVCache]") -> mx.array:
        """Run token ids (B, L) that follow what is in `cache`; logits (B, L, vocab)."""
        logits: mx.array = self.language_model(tokens, cache)
        return logits

    def logits(self, embeddings: mx.array) -> mx.array:
        """Logits (1, L, vocab) of a whole prompt, without a cache."""
        return self._logits(self.language_model.model(None, None, embeddings))

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return int(self.language_model.args.vocab_size)

    def new_cache(self) -> "list[KVCache]":
        """An empty KV cache."""
        cache = mlx_lm_module("models.cache")
        return [cache.KVCache() for _ in self.language_model.layers]

    def _logits(self, hidden: mx.array) -> mx.array:
        model = self.language_model
        head = (
            model.model.embed_tokens.as_linear if model.args.tie_word_embeddings else model.lm_head
        )
        logits: mx.array = head(hidden)
        return logits


def _last_position(layer: Any, x: mx.array, mask: mx.array | None, cache: "KVCache") -> mx.array:
    """`layer(x, mask, cache)[:, -1:]`, without computing the other positions."""
    attention = layer.self_attn
    normed = layer.input_layernorm(x)
    position = cache.offset

    def heads(y: mx.array, count: int) -> mx.array:
        return y.reshape(*y.shape[:2], count, -1).transpose(0, 2, 1, 3)

    keys = attention.rope(heads(attention.k_proj(normed), attention.n_kv_heads), offset=position)
    values = heads(attention.v_proj(normed), attention.n_kv_heads)
    queries = attention.rope(
        heads(attention.q_proj(normed[:, -1:]), attention.n_heads),
        offset=position + x.shape[1] - 1,
    )
    keys, values = cache.update_and_fetch(keys, values)
    mixed = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=attention.scale, mask=mask
    )
    mixed = mixed.transpose(0, 2, 1, 3).reshape(x.shape[0], 1, -1)
    hidden = x[:, -1:] + attention.o_proj(mixed)
    out: mx.array = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out


def parameter_counts(config: Config) -> dict[str, int]:
    """Parameters of each part; nothing is allocated."""
    network = Network(config)
    parts = ("vision", "projector", "language_model")
    return {part: sum(a.size for _, a in flat_parameters(network[part])) for part in parts}


def flat_parameters(module: nn.Module) -> list[tuple[str, mx.array]]:
    """Every parameter with its dotted name."""
    flat: Any = tree_flatten(module.parameters())
    return list(flat)


def _qwen2(config: TextConfig) -> Any:
    qwen2 = mlx_lm_module("models.qwen2")
    return qwen2.Model(
        qwen2.ModelArgs(
            model_type="qwen2",
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )


class _DeferredPackage(ModuleType):
    """A package whose __init__ runs at the first use of a name that it defines."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if (name.startswith("__") and name.endswith("__")) or spec is None or spec.loader is None:
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)


def mlx_lm_module(name: str) -> Any:
    """Import `mlx_lm.<name>` without running mlx_lm's own __init__.

    That __init__ imports transformers (about two seconds), and nothing here needs it. It is
    deferred, not lost: `import mlx_lm; mlx_lm.load(...)` elsewhere still runs it.
    """
    if "mlx_lm" not in sys.modules:
        spec = importlib.util.find_spec("mlx_lm")
        if spec is None:
            raise ModuleNotFoundError("No module named 'mlx_lm'; pip install mlx-lm", name="mlx_lm")
        package = _DeferredPackage("mlx_lm")
        package.__spec__, package.__file__ = spec, spec.origin
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["mlx_lm"] = package
    return importlib.import_module(f"mlx_lm.{name}")
