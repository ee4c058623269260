"""nano in MLX beside the PyTorch model it was trained as; needs a training run on this machine."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from training.nano import scoring
from training.nano import tokenizer as tokenizers
from training.nano.data import Batches, to_pixels, to_square
from training.nano.drawing import render
from training.nano.language import CAPTION
from training.nano.prompt import IMAGE
from training.nano.scenes import HELD_OUT, make_scene
from training.nano.settings import TrainSettings
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
    for number, scene in enumerate(SCENES):
        picture = render(scene)
        square = np.array(to_square(picture, 256))
        with torch.no_grad():
            theirs = reader.model.vision_tower(to_pixels(square[None]))[0]
        expected = theirs.flatten(2).transpose(1, 2).numpy()
        got = np.array(vlm.vision(mlx_pixels([square])))
        worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
        asked = [item.question for item in scoring.questions(scene)]
        assert len(asked) >= 6 and asked[0] == CAPTION
        # The reader has no cache and is slow: two questions a scene, every kind over the scenes.
        questions = [CAPTION, *(asked[1 + (2 * number + n) % (len(asked) - 1)] for n in (0, 1))]
        answers = [vlm.ask(picture, question, max_tokens=80).text for question in questions]
        assert answers == [a.strip() for a in reader.ask(picture, questions)]
    print(f"largest relative error of the features over {len(SCENES)} scenes: {worst:.1e}")
    assert worst <= 1e-4
    mx.clear_cache()


def test_helpers_are_taught_to_look_where_the_answer_is(tmp_path: Path) -> None:
    """Decodes the batch back: the token looked at holds the centre of what is asked about."""
    tokenizer = tokenizers.train(300)
    tokenizers.save(tokenizer, tmp_path)
    settings = TrainSettings(images=6400)
    batches = Batches(settings, tmp_path)
    batch = batches[len(batches) - 1]  # of the last phase, which asks most
    slots = batch["look_at"].shape[1] - 1
    side = int(slots**0.5)
    start = batch["ids"][0].tolist().index(IMAGE)
    assert (batch["ids"][:, start : start + slots] == IMAGE).all()
    checked = 0
    for (row, place), share in zip(batch["look_from"], batch["look_at"], strict=True):
        assert share.sum() == pytest.approx(1)
        label = batch["labels"][row, place]
        assert label >= 0 and batch["labels"][row, place - 1] < 0, "where an answer begins"
        picture = batch["pictures"][row, 0]
        centres = batch["thing_at"][picture][batch["things"][picture, :, 0] >= 0]
        tokens = {int(y * side) * side + int(x * side) for x, y in centres.tolist()}
        looked = {int(i) - 1 for i in share.nonzero()}
        assert looked <= tokens | {-1} and (looked == {-1} or -1 not in looked)
        if looked == {-1}:
            assert tokenizer.decode([int(label)]) in ("No", "None")
        checked += 1
    assert checked > 30
