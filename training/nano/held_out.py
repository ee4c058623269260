"""The held-out questions by which `fastvlm convert` judges conversions of nano.

    python -m training.nano.held_out

writes `convert/held_out.zip`: the first scenes of the evaluation, fitted to nano's own 256 pixels,
with the evaluation's questions and their answers.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image

from fastvlm_mlx.images import fit_image

from .drawing import render
from .scenes import HELD_OUT, make_scene
from .scoring import questions

TARGET = Path(__file__).resolve().parents[2] / "convert/held_out.zip"
SCENES = 24
SIDE = 256
QUALITY = 92


def contents() -> list[dict[str, Any]]:
    """Per scene: the picture's name, and kind, question and answer of everything asked about it."""
    return [
        {
            "picture": f"{number:02}.jpg",
            "asked": [
                {"kind": e.kind, "question": e.question, "answer": e.answer}
                for e in questions(make_scene(HELD_OUT + number))
            ],
        }
        for number in range(SCENES)
    ]


def picture(number: int) -> bytes:
    """The scene as JPEG."""
    buffer = io.BytesIO()
    scene = render(make_scene(HELD_OUT + number))
    Image.fromarray(fit_image(scene, SIDE)).save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()


def main() -> None:
    with zipfile.ZipFile(TARGET, "w", zipfile.ZIP_DEFLATED) as archive:
        # ZipInfo has a date of its own, so that the same questions are the same bytes.
        archive.writestr(zipfile.ZipInfo("questions.json"), json.dumps(contents(), indent=1))
        for number in range(SCENES):
            archive.writestr(zipfile.ZipInfo(f"{number:02}.jpg"), picture(number))
    print(f"{TARGET}: {TARGET.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
