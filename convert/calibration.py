"""Pictures and questions that verification and calibration share: drawn, not downloaded.

Each picture has flat areas, edges, gradients, texture and print, which is what FastVLM is used on;
all is a function of the seed.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["QUESTIONS", "Sample", "draw_picture", "samples"]

QUESTIONS = (
    "Describe the image.",
    "What is written here?",
    "How many objects are there, and what colour are they?",
    "What is in the top left corner?",
)
_WORDS = ("open", "milk", "exit", "taxi", "north", "42", "bread", "7.50", "fish", "tea")


@dataclass(frozen=True)
class Sample:
    """One picture and one question about it."""

    picture: Image.Image
    question: str


def samples(count: int, seed: int = 0) -> list[Sample]:
    """`count` samples; a picture is asked about twice before the next one comes."""
    pictures = [draw_picture(seed * 1000 + n) for n in range(-(-count // 2))]
    return [Sample(pictures[n // 2], QUESTIONS[n % len(QUESTIONS)]) for n in range(count)]


def draw_picture(seed: int, side: int = 512) -> Image.Image:
    """A scene of coloured shapes and words over a textured gradient, RGB."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, side)
    left, right, top, bottom = random.uniform(40, 220, (4, 1, 3))
    across = left * (1 - ramp[:, None]) + right * ramp[:, None]
    down = top * (1 - ramp[:, None]) + bottom * ramp[:, None]
    base = (across[None] + down[:, None]) / 2
    noise = random.normal(0, 12, (side, side, 1))
    picture = Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y = (int(v) for v in random.integers(0, side, 2))
        size = int(random.integers(side // 12, side // 3))
        colour = tuple(int(c) for c in random.integers(0, 256, 3))
        box = (x - size // 2, y - size // 2, x + size // 2, y + size // 2)
        kind = int(random.integers(3))
        if kind == 0:
            draw.rectangle(box, fill=colour)
        elif kind == 1:
            draw.ellipse(box, fill=colour)
        else:
            draw.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)
    for _ in range(4):
        text = str(random.choice(_WORDS))
        x, y = (int(v) for v in random.integers(0, side * 3 // 4, 2))
        font = ImageFont.load_default(size=int(random.integers(16, 56)))
        draw.text((x, y), text, fill="white", font=font, stroke_width=2, stroke_fill="black")
    return picture
