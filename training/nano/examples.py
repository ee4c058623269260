"""Draw the pictures under `examples/`: held-out scenes chosen for variety and good looks."""

from __future__ import annotations

import argparse
from pathlib import Path

from .drawing import render
from .language import caption
from .scenes import HELD_OUT, make_scene

# Seeds counted from the first held-out one, far beyond those of the evaluation.
PICTURES = {
    "south": 100_042,
    "open": 100_053,
    "milk": 100_144,
    "number": 100_121,
    "stripes": 100_108,
    "small-print": 100_054,
    "wide": 100_081,
    "tall": 100_026,
}
FOLDER = Path(__file__).parents[2] / "examples"
LONGER = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, number in PICTURES.items():
        scene = make_scene(HELD_OUT + number)
        render(scene, LONGER).save(options.folder / f"{name}.jpg", quality=85, optimize=True)
        print(f"{name}.jpg: {caption(scene)}")


if __name__ == "__main__":
    main()
