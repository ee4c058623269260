"""Checkpoints written for mlx-vlm, read by mlx-vlm itself: the same greedy tokens there and here.

mlx-vlm lives in an environment of its own; FASTVLM_MLX_VLM_PYTHON is its interpreter:

    python -m venv .venv-mlxvlm && .venv-mlxvlm/bin/pip install mlx-vlm==0.7.10 "mlx[cpu]"
    FASTVLM_MLX_VLM_PYTHON=.venv-mlxvlm/bin/python pytest tests/test_convert_mlx_vlm.py

FASTVLM_MLX_VLM_SIZE=0.5b runs the full size (minutes on a CPU, 6 GB of disk), with pictures of 256
pixels: mlx-vlm's quantized products are scalar on a CPU.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastvlm_mlx as fv
from fastvlm_mlx.convert.conversion import Options, convert_checkpoint
from fastvlm_mlx.testing import random_checkpoint
from tests.notes import NOTES

PYTHON = os.environ.get("FASTVLM_MLX_VLM_PYTHON")
SIZE = os.environ.get("FASTVLM_MLX_VLM_SIZE", "tiny")
QUESTION = "What is written here?"
TOKENS = 16

_PEER = """
import json, sys
folder, picture, question, count, tiny = sys.argv[1:]
from mlx_vlm.models.fastvlm.config import VisionConfig
if tiny == "tiny":  # the shape of the tower is in class attributes there, whatever the config says
    given = json.load(open(folder + "/config.json"))["vision_config"]
    for key in ("layers", "embed_dims", "mlp_ratios"):
        setattr(VisionConfig, key, given[key])
from mlx_vlm import load, stream_generate
from mlx_vlm.prompt_utils import apply_chat_template
model, processor = load(folder)
prompt = apply_chat_template(processor, model.config, question, num_images=1)
answer = stream_generate(
    model, processor, prompt, image=[picture], max_tokens=int(count), temperature=0.0
)
print(json.dumps({"prompt": prompt, "tokens": [int(r.token) for r in answer]}))
"""

pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="needs FASTVLM_MLX_VLM_PYTHON, an interpreter that has mlx-vlm 0.7.10"
)


@pytest.mark.parametrize("bits", [None, 4, "mixed"])
def test_the_same_greedy_tokens(tmp_path: Path, bits: int | str | None) -> None:
    genuine = NOTES / "qwen2_tokenizer"
    source = random_checkpoint(
        tmp_path / "source",
        size=SIZE,
        image_size=None if SIZE == "tiny" else 256,
        tokenizer=genuine if SIZE != "tiny" and genuine.is_dir() else None,
    )
    chosen: dict[str, Any] = {"recipe": "mixed", "bits": 4} if bits == "mixed" else {"bits": bits}
    target = tmp_path / "FastVLM-out"
    options = Options(layout="mlx-vlm", dtype="float32", verify=False, **chosen)
    convert_checkpoint(str(source), target, options)
    picture = np.random.default_rng(7).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    Image.fromarray(picture).resize((640, 360)).save(tmp_path / "picture.png")
    command = [PYTHON, "-c", _PEER, target, tmp_path / "picture.png", QUESTION, TOKENS, SIZE]
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    vlm = fv.load(target)
    ours = vlm.ask(tmp_path / "picture.png", QUESTION, max_tokens=TOKENS).tokens
    assert len(ours) == TOKENS
    assert len(set(ours)) > 3
    # The last record there repeats its token.
    assert tuple(theirs["tokens"][:TOKENS]) == ours
