"""nano in MLX beside the PyTorch model it was trained as; needs a training run on this machine."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from training.nano.data import to_pixels, to_square
from training.nano.drawing import render
from training.nano.language import CAPTION
from training.nano.scenes import HELD_OUT, make_scene
from training.nano.train import RUNS

import fastvlm_mlx as fv
from fastvlm_mlx.images import to_pixels as mlx_pixels

RUN = RUNS / "nano"
SCENES = [make_scene(HELD_OUT + i) for i in range(20)]


@pytest.mark.skipif(not (RUN / "checkpoint.pt").is_file(), reason="no training run of nano here")
def test_features_and_greedy_tokens_agree(tmp_path: Path) -> None:
    from training.nano.decode import Reader
    from training.nano.export import export

    export(RUN, tmp_path / "nano")
    vlm = fv.load(tmp_path / "nano", dtype="float32")
    assert vlm.source.training_form
    reader = Reader(RUN, 256)
    worst = 0.0
    for scene in SCENES:
        picture = render(scene)
        square = np.array(to_square(picture, 256))
        with torch.no_grad():
            theirs = reader.model.vision_tower(to_pixels(square[None]))[0]
        expected = theirs.flatten(2).transpose(1, 2).numpy()
        got = np.array(vlm.vision(mlx_pixels([square])))
        worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
        questions = [CAPTION, "How many objects are there?"]
        answers = [vlm.ask(picture, question, max_tokens=80).text for question in questions]
        assert answers == [a.strip() for a in reader.ask(picture, questions)]
    print(f"largest relative error of the features over {len(SCENES)} scenes: {worst:.1e}")
    assert worst <= 1e-4
    mx.clear_cache()
