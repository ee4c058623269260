"""The `qwen_2` conversation as token ids, with `IMAGE` where image features go.

Several exchanges about the same pictures share one row: each segment sees the common
prefix and itself, at the positions it would have alone.  One vision pass and one prefix
thus pay for many answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import Tokenizer

from .language import Exchange
from .scenes import Thing

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
TURN = "\n{question}<|im_end|>\n<|im_start|>assistant\n"
NEXT = "\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
IMAGE = -200  # the placeholder id of LLaVA; never reaches the embedding
IGNORE = -100
COMMON = 0  # segment number of what every segment may see


@dataclass
class Row:
    """One line of a batch: ids, positions, segments and the label and weight of each next token."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    looks: list[tuple[int, tuple[Thing, ...]]] = field(default_factory=list)
    """Places that predict an answer's first token, with the things it is read from."""

    def add(self, ids: list[int], segment: int, start: int, learn: bool = False) -> int:
        """Append tokens from position `start` on; returns the position after them."""
        if learn:  # the token before predicts the first of these
            self.labels[-1:] = ids
            # A caption must not drown the one token in which a yes differs from a no.
            self.weights[-1:] = [len(ids) ** -0.5] * len(ids)
        self.labels += [IGNORE] * (1 if learn else len(ids))
        self.weights += [0.0] * (1 if learn else len(ids))
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.segments += [segment] * len(ids)
        return start + len(ids)


def prefix_ids(tokenizer: Tokenizer, slots: int, pictures: int = 1) -> list[int]:
    newline = tokenizer.encode("\n").ids
    ids = tokenizer.encode(SYSTEM).ids
    for index in range(pictures):
        ids += newline * (index > 0) + [IMAGE] * slots
    return ids


def pack(
    tokenizer: Tokenizer,
    slots: int,
    asked: list[Exchange],
    pictures: int = 1,
    dialogue: bool = False,
) -> Row:
    """All exchanges in one row: side by side, or as the turns of one dialogue."""
    row = Row()
    begin = row.add(prefix_ids(tokenizer, slots, pictures), COMMON, 0)
    position = begin
    for number, item in enumerate(asked, 1):
        segment = COMMON if dialogue else number
        turn = NEXT if dialogue and number > 1 else TURN
        if not dialogue:
            position = begin
        position = row.add(
            tokenizer.encode(turn.format(question=item.question)).ids, segment, position
        )
        if item.about is not None:
            row.looks.append((len(row.ids) - 1, item.about))
        position = row.add(tokenizer.encode(item.answer + END).ids, segment, position, learn=True)
    return row
