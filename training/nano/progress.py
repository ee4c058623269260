"""Held-out accuracy while training: one teacher-forced pass.

An answer counts if every one of its tokens is the most likely one, which is the same as
greedy decoding giving exactly this answer.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import tokenizer as tokenizers
from .data import pad, to_pixels, to_square
from .drawing import render
from .language import exchanges
from .model import Nano
from .prompt import IGNORE, pack
from .scenes import HELD_OUT, make_scene
from .settings import TextSettings, VisionSettings


class Probe:
    def __init__(
        self,
        tokenizer_folder: Path,
        vision: VisionSettings,
        text: TextSettings,
        scenes: int = 256,
        size: int = 256,
    ) -> None:
        self.model = Nano(vision, text).eval()
        tokenizer = tokenizers.load(tokenizer_folder)
        rng = np.random.Generator(np.random.PCG64(HELD_OUT))
        self.parts = []
        for first in range(0, scenes, 32):
            # Far from the scenes of the final evaluation, which are the first ones held out.
            some = [make_scene(HELD_OUT * 2 + first + i) for i in range(32)]
            asked = [exchanges(scene, rng) for scene in some]
            batch = pad([pack(tokenizer, (size // 64) ** 2, a) for a in asked])
            batch["pictures"] = torch.arange(32)[:, None]
            images = np.stack([to_square(render(scene), size) for scene in some])
            kinds = [
                [_kind(e.kind, scene) for e in a] for a, scene in zip(asked, some, strict=True)
            ]
            self.parts.append((images, batch, kinds))

    @torch.no_grad()
    def measure(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Share of exactly right answers by kind of question, reading by print size."""
        self.model.load_state_dict(weights)
        right: dict[str, list[bool]] = defaultdict(list)
        for images, batch, kinds in self.parts:
            features, *_ = self.model.vision_tower(to_pixels(images))
            states, _ = self.model.hidden(self.model.project(features), batch)
            logits = self.model.logits(states)
            wrong = (logits.argmax(-1) != batch["labels"]) & (batch["labels"] != IGNORE)
            for i, row in enumerate(kinds):
                for segment, kind in enumerate(row, 1):
                    mistakes = wrong[i] & (batch["segments"][i] == segment)
                    right[kind].append(not mistakes.any().item())
        return {kind: round(sum(r) / len(r), 3) for kind, r in sorted(right.items())}


def _kind(kind: str, scene: object) -> str:
    sign = getattr(scene, "sign", None)
    return f"read_{sign.print_size if sign else 'none'}" if kind == "read" else kind
