"""Drawing a scene: background, shapes, sign, then grain and JPEG artefacts."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw

from .scenes import Scene, Sign, Thing, font, sign_box


def render(scene: Scene, longer: int | None = None) -> Image.Image:
    """Draw the scene, `longer` pixels on its longer side (its own size if not given)."""
    scale = (longer or max(scene.width, scene.height)) / max(scene.width, scene.height)
    width, height = round(scene.width * scale), round(scene.height * scale)
    rng = np.random.Generator(np.random.PCG64([scene.seed, 1]))
    image = _draw_background(scene, rng, width, height)
    for thing in scene.things:
        radius = thing.radius * min(width, height) / 3
        mask = _shape_mask(thing, radius)
        corner = (
            round(thing.x * width - mask.width / 2),
            round(thing.y * height - mask.height / 2),
        )
        image.paste(thing.rgb, corner, mask)
    if scene.sign:
        _draw_sign(image, scene, scene.sign)
    if scene.noise:
        grain = rng.integers(-scene.noise, scene.noise + 1, (height, width, 3), dtype=np.int8)
        image = Image.fromarray(
            np.clip(np.asarray(image) + grain.astype(np.int16), 0, 255).astype(np.uint8)
        )
    if scene.jpeg:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=scene.jpeg)
        image = Image.open(buffer).convert("RGB")
    return image


def _draw_background(
    scene: Scene, rng: np.random.Generator, width: int, height: int
) -> Image.Image:
    first, second = (np.array(t, np.float32) for t in scene.tones)
    if scene.background == "plain":
        return Image.new("RGB", (width, height), scene.tones[0])
    if scene.background == "noise":  # soft blotches between the two tones
        mix = rng.random((7, 7, 1), np.float32)
        blotches = Image.fromarray((first + (second - first) * mix).astype(np.uint8))
        return blotches.resize((width, height), Image.Resampling.BICUBIC)
    x = np.arange(width, dtype=np.float32)[None, :] / max(width, height)
    y = np.arange(height, dtype=np.float32)[:, None] / max(width, height)
    ramp = x * abs(math.cos(scene.direction)) + y * math.sin(scene.direction)
    ramp = np.floor(ramp * 13) % 2 if scene.background == "stripes" else ramp / ramp.max()
    return Image.fromarray((first + (second - first) * ramp[..., None]).astype(np.uint8))


def _draw_sign(image: Image.Image, scene: Scene, sign: Sign) -> None:
    width, height = image.size
    left, top, right, bottom = sign_box(scene)
    box = (left * width, top * height, right * width, bottom * height)
    em = sign.em * max(width, height)
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle(box, em * 0.15, sign.plate, sign.ink, max(1, round(em * 0.05)))
    middle = (sign.x * width, sign.y * height)
    draw.text(middle, sign.text, sign.ink, font(max(4, round(em))), anchor="mm")


def _shape_mask(thing: Thing, radius: float) -> Image.Image:
    """Antialiased mask of a shape: drawn four times as large, then averaged."""
    side = 2 * math.ceil(radius * 1.3) + 2
    mask = Image.new("L", (4 * side, 4 * side))
    draw = ImageDraw.Draw(mask)
    middle, r = 2.0 * side, 4 * radius

    def polygon(points: list[tuple[float, float]]) -> None:
        cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
        turned = [
            (middle + r * (x * cos - y * sin), middle + r * (x * sin + y * cos)) for x, y in points
        ]
        draw.polygon(turned, fill=255)

    def disc(share: float, fill: int = 255) -> None:
        draw.ellipse([middle - r * share] * 2 + [middle + r * share] * 2, fill=fill)

    if thing.shape == "circle":
        disc(0.95)
    elif thing.shape == "ring":
        disc(1.0)
        disc(0.55, fill=0)
    elif thing.shape == "square":
        polygon([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])
    elif thing.shape == "diamond":
        polygon([(0, -1.15), (0.85, 0), (0, 1.15), (-0.85, 0)])
    elif thing.shape == "triangle":
        polygon([(0, -1), (1, 0.85), (-1, 0.85)])
    elif thing.shape == "cross":
        a = 0.33
        quarter = [(a, -1.0), (a, -a), (1.0, -a)]
        polygon([p for turn in range(4) for p in _turned(quarter, turn)])
    elif thing.shape == "star":
        turn = [(math.pi * i / 5, 1.12 if i % 2 == 0 else 0.45) for i in range(10)]
        polygon([(k * math.sin(t), -k * math.cos(t)) for t, k in turn])
    else:  # heart
        turns = [2 * math.pi * i / 40 for i in range(40)]
        polygon([(math.sin(t) ** 3, -_heart(t) / 15) for t in turns])
    return mask.reduce(4)


def _turned(points: list[tuple[float, float]], quarters: int) -> list[tuple[float, float]]:
    for _ in range(quarters):
        points = [(-y, x) for x, y in points]
    return points


def _heart(t: float) -> float:
    """Height of the usual heart curve, whose width is 16 sin(t)^3."""
    return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
