"""Training batches: a pure function of the settings, the step and the part of the step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from . import tokenizer as tokenizers
from .drawing import render
from .language import KINDS, Exchange, exchange, pair_exchange
from .prompt import IGNORE, Row, pack
from .scenes import COLOURS, POSITIONS, SHAPES, SIZES, Scene, Thing, letters, make_scene
from .settings import Phase, TrainSettings

T = TypeVar("T")
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_LETTERS = 5
MOST_THINGS = 4
PAIR_QUESTIONS = 3  # in a row about two pictures


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """The reference preprocessing up to bytes: black bars to a square, then PIL bicubic."""
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def to_pixels(images: np.ndarray | Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W), channels last in memory."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255


class Batches(Dataset[dict[str, Tensor]]):
    """The share of one process in every step; all shares of a step have one input size."""

    def __init__(self, settings: TrainSettings, tokenizer_folder: Path, part: int = 0) -> None:
        self.settings, self.part = settings, part
        self.tokenizer = tokenizers.load(tokenizer_folder)
        self.steps = settings.images // settings.batch

    def __len__(self) -> int:
        return self.steps

    def phase(self, index: int) -> tuple[Phase, float]:
        """The phase of a step, and how much of that phase has passed (0..1)."""
        done = index / self.steps
        for phase in self.settings.phases:
            if done < phase.share:
                break
            done -= phase.share
        return phase, done / phase.share

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        s, (phase, _) = self.settings, self.phase(index)
        rng = np.random.Generator(np.random.PCG64([s.seed, index]))
        size = int(rng.choice(list(phase.sizes), p=list(phase.sizes.values())))
        rng = np.random.Generator(np.random.PCG64([s.seed, index, self.part]))
        count = s.batch // s.processes
        first = index * s.batch + self.part * count
        scenes = [make_scene(first + i, phase.prints, s.text_share) for i in range(count)]
        images = np.stack([self._draw(scene, size, rng) for scene in scenes])
        slots = (size // 64) ** 2
        rows, pictures = [], []
        for i, scene in enumerate(scenes[: round(count * phase.told_share)]):
            dialogue = rng.random() < s.dialogue_share
            rows.append(pack(self.tokenizer, slots, self._ask(scene, phase, rng), 1, dialogue))
            pictures.append((i, -1))
        for _ in range(round(count * phase.pair_share)):
            a, b = (int(i) for i in rng.choice(count, 2, replace=False))
            asked = [pair_exchange(scenes[a], scenes[b], rng) for _ in range(PAIR_QUESTIONS)]
            rows.append(pack(self.tokenizer, slots, asked, 2))
            pictures.append((a, b))
        batch = {"images": torch.from_numpy(images), **pad(rows), **_truth(scenes)}
        batch |= _looks(rows, scenes, size // 64)
        batch["pictures"] = torch.tensor(pictures)
        return batch

    def _draw(self, scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
        own = max(scene.width, scene.height)
        longer = min(own, round(size * rng.uniform(1.0, 1.8)))
        return to_square(render(scene, longer), size)

    def _ask(self, scene: Scene, phase: Phase, rng: np.random.Generator) -> list[Exchange]:
        """Mostly the caption, the reading question if there is a sign, and others, shuffled."""
        others = [k for k in KINDS if k not in ("caption", "read")]
        kinds = list(rng.choice(others, phase.questions, replace=False))
        if rng.random() < phase.captioned_share:
            kinds.append("caption")
        if scene.sign or rng.random() < 0.3:
            kinds.append("read")
        asked = (exchange(scene, kinds[i], rng) for i in rng.permutation(len(kinds)))
        return [e for e in asked if e]


def pad(rows: list[Row]) -> dict[str, Tensor]:
    length = max(len(row.ids) for row in rows)

    def stack(lists: Sequence[list[T]], filler: T) -> Tensor:
        return torch.tensor([values + [filler] * (length - len(values)) for values in lists])

    return {
        "ids": stack([r.ids for r in rows], 0),
        "positions": stack([r.positions for r in rows], 0),
        "segments": stack([r.segments for r in rows], -1),
        "labels": stack([r.labels for r in rows], IGNORE),
        "weights": stack([r.weights for r in rows], 0.0),
    }


def _looks(rows: list[Row], scenes: list[Scene], side: int) -> dict[str, Tensor]:
    """Where the answers are to be looked up: places (K, 2) in rows, shares (K, 1 + slots).

    An answer's share is spread over the image tokens that hold the centres of its things; if
    there is none, it falls on the row's first token, which stands in column 0.
    """
    places, shares = [], []
    for number, row in enumerate(rows):
        for place, things in row.looks:
            share = np.zeros(1 + side * side, np.float32)
            for thing in things:
                x, y = centre(scenes[number], thing)
                share[1 + int(y * side) * side + int(x * side)] += 1 / len(things)
            share[0] = not things
            places.append((number, place))
            shares.append(share)
    return {
        "look_from": torch.tensor(places).reshape(-1, 2),
        "look_at": torch.from_numpy(np.array(shares).reshape(-1, 1 + side * side)),
    }


def centre(scene: Scene, thing: Thing) -> np.ndarray:
    """(x, y) of a thing in 0..1 of the padded square."""
    size = np.array([scene.width, scene.height], np.float32)
    return (np.array([thing.x, thing.y]) - 0.5) * size / size.max() + 0.5


def _truth(scenes: list[Scene]) -> dict[str, Tensor]:
    """Targets of the training helpers; places are 0..1 of the padded square."""
    count = len(scenes)
    cells = np.tile(np.array([len(SHAPES), len(COLOURS), len(SIZES)]), (count, 9, 1))
    letter = np.full((count, MOST_LETTERS), IGNORE)
    slots = np.full((count, MOST_LETTERS), IGNORE)
    things = np.full((count, MOST_THINGS, 4), IGNORE)
    thing_at = np.zeros((count, MOST_THINGS, 2), np.float32)
    letter_at = np.zeros((count, MOST_LETTERS, 2), np.float32)
    sign_at = np.zeros((count, 2), np.float32)
    for i, scene in enumerate(scenes):
        size = np.array([scene.width, scene.height], np.float32)
        share = size / size.max()
        for j, t in enumerate(scene.things):
            kind = (
                list(SHAPES).index(t.shape),
                list(COLOURS).index(t.colour),
                list(SIZES).index(t.size),
            )
            cells[i, POSITIONS.index(t.position)] = kind
            things[i, j] = (*kind, POSITIONS.index(t.position))
            thing_at[i, j] = centre(scene, t)
        for j, (character, x, y) in enumerate(letters(scene)):
            letter[i, j] = CHARACTERS.index(character)
            letter_at[i, j] = (np.array([x, y]) - 0.5) * share + 0.5
        if scene.sign:
            slots[i] = np.where(letter[i] == IGNORE, len(CHARACTERS), letter[i])
            sign_at[i] = (np.array([scene.sign.x, scene.sign.y]) - 0.5) * share + 0.5
    return {
        "cells": torch.from_numpy(cells),
        "things": torch.from_numpy(things),
        "thing_at": torch.from_numpy(thing_at),
        "letters": torch.from_numpy(letter),
        "slots": torch.from_numpy(slots),
        "letter_at": torch.from_numpy(letter_at),
        "sign_at": torch.from_numpy(sign_at),
    }
