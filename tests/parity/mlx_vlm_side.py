"""What mlx-vlm says; run by test_mlx_vlm.py under the Python that has mlx-vlm.

`FOLDER INPUT.npz OUTPUT.npz` computes features and logits in float32,
`--quantize BITS FOLDER RESULT` runs mlx-vlm's own conversion.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_vlm.models.fastvlm.config import VisionConfig


def set_geometry(folder: Path) -> None:
    """Its tower's sizes are class attributes that config.json does not reach."""
    vision = json.loads((folder / "config.json").read_text()).get("vision_config") or {}
    for key in ("layers", "embed_dims", "mlp_ratios"):
        if key in vision:
            setattr(VisionConfig, key, vision[key])


def run(folder: Path, given: Path, result: Path) -> None:
    """Features (B, N, C) and logits (1, L, vocab) of `ids` and `pixels` (B, H, W, 3)."""
    from mlx_vlm.utils import load_model

    model = load_model(folder)
    model.set_dtype(mx.float32)  # weights, scales and biases; packed integers stay
    inputs = np.load(given)
    ids, pixels = mx.array(inputs["ids"])[None], mx.array(inputs["pixels"])
    _, features, _ = model.vision_tower(pixels)
    embedded = model.get_input_embeddings(ids, pixels.transpose(0, 3, 1, 2), mx.ones_like(ids))
    logits = model.language_model(ids, inputs_embeds=embedded.inputs_embeds).logits
    features = features.reshape(features.shape[0], -1, features.shape[-1])
    np.savez(result, features=np.array(features), logits=np.array(logits))


def quantize(bits: int, folder: Path, result: Path) -> None:
    """Convert as `mlx_vlm.convert -q` does."""
    from mlx_vlm.convert import convert

    convert(str(folder), str(result), quantize=True, q_bits=bits)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0] == "--quantize":
        set_geometry(Path(arguments[2]))
        quantize(int(arguments[1]), *map(Path, arguments[2:]))
    else:
        set_geometry(Path(arguments[0]))
        run(*map(Path, arguments))
