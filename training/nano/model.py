"""Nano in PyTorch: encoder, projector and a small Qwen2, plus helpers that only training uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .prompt import COMMON, IMAGE
from .settings import TextSettings, VisionSettings
from .vision import FastViTHD


class SelfAttention(nn.Module):
    def __init__(self, s: TextSettings) -> None:
        super().__init__()
        self.head_dim = s.hidden_size // s.num_attention_heads
        shared = s.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(s.hidden_size, s.hidden_size)
        self.k_proj = nn.Linear(s.hidden_size, shared)
        self.v_proj = nn.Linear(s.hidden_size, shared)
        self.o_proj = nn.Linear(s.hidden_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, rope), _rotate(k, rope)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions in the half-split form of Qwen2."""
    cos, sin = rope
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class FeedForward(nn.Module):
    def __init__(self, s: TextSettings) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.up_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.down_proj = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: TextSettings) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.self_attn = SelfAttention(s)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.mlp = FeedForward(s)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        return x + self.mlp(self.post_attention_layernorm(x))

    def gaze(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, places: Tensor) -> Tensor:
        """Log-probabilities (K, L) with which the first head attends from places (K, 2)."""
        attention = self.self_attn
        x, width = self.input_layernorm(x), attention.head_dim
        q, k = (
            _rotate(F.linear(x, proj.weight[:width], proj.bias[:width])[:, None], rope)[:, 0]
            for proj in (attention.q_proj, attention.k_proj)
        )
        row, place = places.unbind(-1)
        scores = torch.einsum("kc,klc->kl", q[row, place], k[row]) * width**-0.5
        return scores.masked_fill(~mask[row, 0, place], -torch.inf).log_softmax(-1)


class Qwen2(nn.Module):
    """Hidden states of a Qwen2 with tied embeddings; the caller picks where logits are needed."""

    def __init__(self, settings: TextSettings) -> None:
        super().__init__()
        self.settings = settings
        self.embed_tokens = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.num_hidden_layers))
        self.norm = nn.RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.04)

    def forward(
        self, x: Tensor, positions: Tensor, segments: Tensor, look_from: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """States of X (B, L, hidden), and the gaze of the last layer but one from `look_from`.

        A place sees earlier places of its own segment and the common one.
        """
        s = self.settings
        half = s.hidden_size // s.num_attention_heads // 2
        frequency = s.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = (positions[:, None, :, None] * frequency).repeat(1, 1, 1, 2)
        rope = angle.cos(), angle.sin()
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        same = (segments[:, :, None] == segments[:, None]) | (segments[:, None] == COMMON)
        mask = (mask & same)[:, None]
        gaze = None
        for number, layer in enumerate(self.layers):
            if look_from is not None and number == len(self.layers) - 2:
                gaze = layer.gaze(x, rope, mask, look_from)
            x = layer(x, rope, mask)
        return self.norm(x), gaze


class Helpers(nn.Module):
    """Extra losses that make seeing and reading start early; dropped at export.

    Cells: what stands at each of the nine positions, from the last features.  Letters: the
    character at a known place, from strides 16 and 32.  Slots: the text, from the last
    features at the sign. Names: which things have their centre in an image token and where in the
    picture that is, read off that token alone. Looks: one head of the language model attends from
    the place that answers "Where is the red star?" to the token that holds the red star; before
    this and the positions in Names, 260 k images had not taught it to find things by what they are.
    """

    CELL = (9, 9, 3)  # shapes, colours, sizes, each with "nothing" as the last class
    NAMES = 8 + 8 + 8 * 8 + 8 * 2 + 9  # shape; colour; both; shape and size; position
    LETTERS, SLOTS = 37, 5  # 26 + 10 + "nothing"

    def __init__(self, dims: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        self.names = nn.Linear(hidden, self.NAMES)
        nn.init.constant_(self.names.bias, -4.0)  # most names are absent
        self.cells = nn.Parameter(torch.randn(9, 2 * dims[-1], sum(self.CELL)) * 0.02)
        self.near = nn.Conv2d(dims[2], self.LETTERS, 1)
        self.far = nn.Conv2d(dims[3], self.LETTERS, 1)
        self.slots = nn.Conv2d(2 * dims[-1], self.SLOTS * self.LETTERS, 1)

    def forward(
        self, features: tuple[Tensor, Tensor, Tensor], tokens: Tensor, truth: dict[str, Tensor]
    ) -> Tensor:
        last, stride32, stride16 = features
        pooled = F.adaptive_avg_pool2d(last, 3).flatten(2)
        cells = torch.einsum("bcp,pck->bpk", pooled, self.cells).split(self.CELL, -1)
        loss = sum(_cross_entropy(c, truth["cells"][..., i]) for i, c in enumerate(cells))
        at = truth["letter_at"][:, None] * 2 - 1  # (B, 1, 5, 2) in -1..1
        for head, feature in ((self.near, stride16), (self.far, stride32)):
            sampled = F.grid_sample(head(feature), at, align_corners=False)
            loss = loss + 0.5 * _cross_entropy(sampled[:, :, 0].transpose(1, 2), truth["letters"])
        middle = truth["sign_at"][:, None, None] * 2 - 1
        slots = F.grid_sample(self.slots(last), middle, align_corners=False)
        slots = slots.flatten(1).unflatten(1, (self.SLOTS, self.LETTERS))
        loss = loss + 0.5 * _cross_entropy(slots, truth["slots"])
        return loss + self._naming(tokens, last.shape[-1], truth)

    def _naming(self, tokens: Tensor, side: int, truth: dict[str, Tensor]) -> Tensor:
        shape, colour, size, position = truth["things"].unbind(-1)
        column, row = (truth["thing_at"] * side).long().clamp(0, side - 1).unbind(-1)
        both = 16 + 8 * shape + colour
        names = (shape, 8 + colour, both, 80 + 2 * shape + size, 96 + position)
        picture, thing = (shape >= 0).nonzero(as_tuple=True)
        target = torch.zeros(*tokens.shape[:2], self.NAMES)
        for name in names:
            place = (row * side + column)[picture, thing]
            target[picture, place, name[picture, thing]] = 1.0
        loss = F.binary_cross_entropy_with_logits(self.names(tokens), target, reduction="sum")
        return 0.1 * loss / len(thing)


def _looking(gaze: Tensor, ids: Tensor, truth: dict[str, Tensor]) -> Tensor:
    """Cross-entropy between where a place looks, (K, L), and where its answer is."""
    wanted = truth["look_at"]
    start = int((ids[0] == IMAGE).int().argmax())  # of the slots: the same in all rows
    seen = torch.cat([gaze[:, :1], gaze[:, start : start + wanted.shape[1] - 1]], 1)
    return -(wanted * seen).sum() / max(len(wanted), 1)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(
        logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum"
    )
    return loss / (target != -100).sum().clamp(min=1)


class Nano(nn.Module):
    def __init__(self, vision: VisionSettings, text: TextSettings) -> None:
        super().__init__()
        self.vision_tower = FastViTHD(vision)
        width = 2 * vision.embed_dims[-1]
        self.mm_projector = nn.Sequential(
            nn.Linear(width, text.hidden_size),
            nn.GELU(),
            nn.Linear(text.hidden_size, text.hidden_size),
        )
        self.language = Qwen2(text)
        self.helpers = Helpers(vision.embed_dims, text.hidden_size)

    def project(self, last: Tensor) -> Tensor:
        """(B, C, h, w) features to (B, h*w, hidden) tokens, row by row."""
        return self.mm_projector(last.flatten(2).transpose(1, 2))

    def hidden(self, image_tokens: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """States of packed rows, and the gaze from `look_from` if that is in `text`.

        `pictures` (B, P) says which images fill a row's slots.
        """
        ids = text["ids"]
        slots = ids == IMAGE
        x = self.language.embed_tokens(ids.masked_fill(slots, 0))
        wanted = text["pictures"]
        tokens = image_tokens[wanted.clamp(min=0)][wanted >= 0].flatten(0, 1)
        x = x.masked_scatter(slots[..., None], tokens.to(x.dtype))
        return self.language(x, text["positions"], text["segments"], text.get("look_from"))

    def logits(self, states: Tensor) -> Tensor:
        return F.linear(states, self.language.embed_tokens.weight)

    def forward(
        self, pixels: Tensor, text: dict[str, Tensor], truth: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Language loss and helper loss of a batch."""
        features = self.vision_tower(pixels)
        tokens = self.project(features[0])
        states, gaze = self.hidden(tokens, text)
        labels = text["labels"]
        learned = labels >= 0
        losses = F.cross_entropy(self.logits(states[learned]), labels[learned], reduction="none")
        weights = text["weights"][learned]
        loss = (losses * weights).sum() / weights.sum()
        helpers = self.helpers(features, tokens, truth)
        return loss, helpers + _looking(gaze, text["ids"], truth)
