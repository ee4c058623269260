"""Synthetic scenes: what is in a picture, a pure function of an integer seed.

A `Scene` is the ground truth, in relative units (0..1 of the picture); `drawing` makes the
picture, at any size. Pillow's bundled font is the only one used, so both are reproducible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import ImageFont

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
COLOURS = {
    "red": (214, 38, 40),
    "green": (40, 160, 60),
    "blue": (36, 78, 205),
    "yellow": (246, 220, 40),
    "orange": (250, 134, 20),
    "purple": (140, 56, 180),
    "black": (20, 20, 22),
    "white": (246, 246, 244),
}
SIZES = {"large": (0.37, 0.43), "small": (0.17, 0.21)}  # radius as a share of a grid cell
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
POSITIONS = tuple(" ".join(filter(None, (r, c))) or "center" for r in ROWS for c in COLUMNS)
# fmt: off
WORDS = (
    "STOP", "GO", "EXIT", "OPEN", "SALE", "PARK", "TAXI", "BUS", "CAFE",
    "ZOO", "MENU", "PUSH", "PULL", "SLOW", "HELP", "FREE", "HOT", "COLD",
    "NORTH", "SOUTH", "EAST", "WEST", "BANK", "SHOP", "HOTEL", "MILK", "BREAD",
    "FISH", "TEA", "LIFT", "DOWN", "UP", "LEFT", "RIGHT", "YES", "NO",
    "WAY", "ROAD", "BIKE", "TRAIN",
)
# fmt: on
# Height of the print as a share of the longer side: at 256 px 38, 22 and 10 px.
PRINTS = {"large": (0.130, 0.165), "medium": (0.075, 0.100), "small": (0.036, 0.046)}
PRINT_SHARES = {"large": 0.5, "medium": 0.38, "small": 0.12}
BACKGROUNDS = ("plain", "gradient", "stripes", "noise")
TEXT_SHARE = 0.6
HELD_OUT = 10**9  # training seeds lie below, evaluation seeds from here on


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    position: str
    x: float
    y: float
    radius: float  # share of the shorter cell side
    angle: float  # degrees
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Sign:
    text: str
    print_size: str
    em: float  # share of the longer side
    x: float
    y: float
    plate: tuple[int, int, int]
    ink: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    seed: int
    width: int
    height: int
    background: str
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]
    direction: float
    noise: int  # largest change of a pixel value
    jpeg: int | None  # quality, or None for no compression artefacts
    things: tuple[Thing, ...]  # in reading order
    sign: Sign | None


@cache
def font(pixels: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(pixels)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("scenes need a Pillow built with FreeType")
    return font


@cache
def _width_in_ems(text: str) -> float:
    return font(200).getlength(text) / 200


def sign_box(scene: Scene) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the plate in 0..1 of the picture."""
    sign, longer = scene.sign, max(scene.width, scene.height)
    assert sign is not None
    half_w, half_h = _plate(sign.text, sign.em)
    half_w, half_h = half_w * longer / scene.width, half_h * longer / scene.height
    return sign.x - half_w, sign.y - half_h, sign.x + half_w, sign.y + half_h


def _plate(text: str, em: float) -> tuple[float, float]:
    """Half width and half height of a plate around the text, in shares of the longer side."""
    return em * (_width_in_ems(text) + 0.6) / 2, em * 1.25 / 2


def letters(scene: Scene) -> list[tuple[str, float, float]]:
    """The characters on the sign with their centres in 0..1 of the picture."""
    sign = scene.sign
    if sign is None:
        return []
    ems = max(scene.width, scene.height) * sign.em / scene.width
    left = sign.x - _width_in_ems(sign.text) * ems / 2
    ends = [_width_in_ems(sign.text[: i + 1]) for i in range(len(sign.text))]
    middles = [end - _width_in_ems(c) / 2 for end, c in zip(ends, sign.text, strict=True)]
    return [(c, left + m * ems, sign.y) for c, m in zip(sign.text, middles, strict=True)]


def _text(rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return WORDS[rng.integers(len(WORDS))]
    digits = int(rng.integers(1, 4))
    return str(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def _tone(rng: np.random.Generator) -> np.ndarray:
    """A muted mid tone, so that every object colour stands out from it."""
    return rng.uniform(95, 185) + rng.uniform(-22, 22, 3)


def _rgb(values: np.ndarray) -> tuple[int, int, int]:
    r, g, b = np.clip(np.round(values), 0, 255).astype(int).tolist()
    return r, g, b


def _make_sign(rng: np.random.Generator, width: int, height: int, shares: dict[str, float]) -> Sign:
    longer = max(width, height)
    print_size = str(rng.choice(list(shares), p=list(shares.values())))
    em = float(rng.uniform(*PRINTS[print_size]))
    text = _text(rng)
    # A narrow picture cannot hold a long word in large print: take a shorter text.
    while 2 * _plate(text, em)[0] * longer > 0.94 * width:
        text = _text(rng)
    half_w, half_h = (
        h * longer / s for h, s in zip(_plate(text, em), (width, height), strict=True)
    )
    dark, light = np.array(rng.uniform(5, 60, 3)), rng.uniform(225, 255, 3)
    light[2] -= rng.choice([0, 0, 110])  # some plates are yellow
    if rng.random() < 0.25:
        dark, light = light, dark
    return Sign(
        text,
        print_size,
        em,
        float(rng.uniform(half_w + 0.02, 0.98 - half_w)),
        float(rng.uniform(half_h + 0.02, 0.98 - half_h)),
        _rgb(light),
        _rgb(dark),
    )


def make_scene(
    seed: int, print_shares: dict[str, float] = PRINT_SHARES, text_share: float = TEXT_SHARE
) -> Scene:
    """The scene of a seed.  The shares are arguments for the training curriculum only."""
    rng = np.random.Generator(np.random.PCG64(seed))
    longer = int(rng.integers(320, 641))
    stretch = 2.0 if rng.random() < 0.1 else 1.5
    aspect = math.exp(rng.uniform(-math.log(stretch), math.log(stretch)))
    width, height = (
        (longer, round(longer / aspect)) if aspect > 1 else (round(longer * aspect), longer)
    )
    tones = np.stack([_tone(rng), _tone(rng)])
    tones[1] = tones[0] + np.clip(tones[1] - tones[0], -40, 40)
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    direction = float(rng.uniform(0, math.pi))
    noise = int(rng.integers(0, 13)) if rng.random() < 0.6 else 0
    jpeg = int(rng.integers(50, 96)) if rng.random() < 0.5 else None
    sign = _make_sign(rng, width, height, print_shares) if rng.random() < text_share else None

    scene = Scene(
        seed,
        width,
        height,
        background,
        (_rgb(tones[0]), _rgb(tones[1])),
        direction,
        noise,
        jpeg,
        (),
        sign,
    )
    free = _free_cells(scene)
    chosen = rng.permutation(free)[: int(rng.integers(1, 5))]
    things = tuple(_make_thing(rng, int(cell)) for cell in sorted(chosen))
    return Scene(**{**scene.__dict__, "things": things})


def _free_cells(scene: Scene) -> list[int]:
    if scene.sign is None:
        return list(range(9))
    left, top, right, bottom = sign_box(scene)
    margin = 0.04  # objects fill less than their cell, so a plate may reach a little into it
    return [
        cell
        for cell in range(9)
        if (cell % 3 + 1) / 3 <= left + margin
        or cell % 3 / 3 >= right - margin
        or (cell // 3 + 1) / 3 <= top + margin
        or cell // 3 / 3 >= bottom - margin
    ]


def _make_thing(rng: np.random.Generator, cell: int) -> Thing:
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    size = "large" if rng.random() < 0.5 else "small"
    slack = 0.03 if size == "large" else 0.16
    dx, dy = rng.uniform(-slack, slack, 2)
    return Thing(
        SHAPES[rng.integers(len(SHAPES))],
        colour,
        size,
        POSITIONS[cell],
        float(cell % 3 + 0.5 + dx) / 3,
        float(cell // 3 + 0.5 + dy) / 3,
        float(rng.uniform(*SIZES[size])),
        float(rng.uniform(-10, 10)),
        _rgb(np.array(COLOURS[colour]) + rng.uniform(-16, 16, 3)),
    )
