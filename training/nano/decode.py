"""Greedy answers of a training run in PyTorch: for evaluation before export, and for parity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import tokenizer as tokenizers
from .data import to_pixels, to_square
from .prompt import COMMON, END, TURN, prefix_ids
from .train import load_model

MOST_TOKENS = 80


class Reader:
    """Plain decoding without a cache: the whole row again for every token."""

    def __init__(self, run: Path, size: int) -> None:
        self.model, _ = load_model(run)
        self.tokenizer = tokenizers.load(run / "tokenizer")
        self.size = size

    @torch.no_grad()
    def ask(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """Answers to several questions about one picture, decoded side by side."""
        pixels = to_pixels(np.array(to_square(image, self.size))[None])
        tokens = self.model.project(self.model.vision_tower(pixels)[0])
        prefix = prefix_ids(self.tokenizer, tokens.shape[1])
        rows = [prefix + self.tokenizer.encode(TURN.format(question=q)).ids for q in questions]
        lengths = torch.tensor([len(row) for row in rows])
        end = self.tokenizer.token_to_id(END)
        ids = torch.full((len(rows), int(lengths.max()) + MOST_TOKENS), end)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        starts, every, open_rows = (
            lengths.clone(),
            torch.arange(len(rows)),
            torch.ones(len(rows)).bool(),
        )
        while open_rows.any() and (lengths - starts).max() < MOST_TOKENS:
            length = int(lengths.max())
            text = {
                "ids": ids[:, :length],
                "positions": torch.arange(length).expand(len(rows), -1),
                "segments": torch.full((len(rows), length), COMMON),
                "pictures": torch.zeros(len(rows), 1, dtype=torch.long),
            }
            states, _ = self.model.hidden(tokens, text)
            chosen = self.model.logits(states[every, lengths - 1]).argmax(-1)
            open_rows &= chosen != end
            ids[every[open_rows], lengths[open_rows]] = chosen[open_rows]
            lengths += open_rows
        answers = [
            ids[i, a:b].tolist() for i, (a, b) in enumerate(zip(starts, lengths, strict=True))
        ]
        return [self.tokenizer.decode(answer) for answer in answers]
