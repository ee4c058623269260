"""Another implementation of FastVLM, in its own environment, asked over pipes.

    PYTHON peer_worker.py NAME CHECKPOINT DTYPE BLAS

NAME is "mlx-vlm" or "transformers"; PYTHON belongs to an environment that has it. Requests and
replies are JSON, one per line. This file imports nothing of ours: BLAS is the path of blas.py,
which is run on its own, so that MLX has the same BLAS on both sides.
"""

import contextlib
import importlib.util
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n"
    "{}<|im_end|>\n<|im_start|>assistant\n"
)


class MlxVlm:
    """mlx-vlm."""

    package = "mlx-vlm"

    def __init__(self, checkpoint: str, dtype: str) -> None:
        import mlx.core as mx
        from mlx_vlm import load, stream_generate

        _set_geometry(Path(checkpoint))
        self._mx, self._stream = mx, stream_generate
        self._model, self._processor = load(checkpoint)
        self._model.set_dtype(getattr(mx, dtype))
        mx.eval(self._model.parameters())
        self.device = str(mx.default_device().type.name)

    def answer(self, image: str, question: str, tokens: int) -> list[int]:
        """Greedy tokens."""
        chunks = self._stream(
            self._model,
            self._processor,
            PROMPT.format(question),
            image=[image],
            max_tokens=tokens,
            temperature=0.0,
        )
        return [int(chunk.token) for chunk in chunks][:tokens]

    def on_device(self, pixels: Any) -> Any:
        """(1, H, W, 3) as the tower takes it."""
        array = self._mx.array(pixels)
        self._mx.eval(array)
        return array

    def encode(self, pixels: Any) -> Any:
        """What `on_device` gave, to features (1, N, C)."""
        features = self._model.vision_tower(pixels)[1]
        features = features.reshape(1, -1, features.shape[-1])
        self._mx.eval(features)
        return features

    def to_numpy(self, features: Any) -> Any:
        """For the comparison."""
        return np.array(features.astype(self._mx.float32))

    def peak_memory(self) -> int | None:
        """Bytes."""
        return int(self._mx.get_peak_memory())


class Transformers:
    """Hugging Face transformers, on CUDA, MPS or the CPU."""

    package = "transformers"

    def __init__(self, checkpoint: str, dtype: str) -> None:
        import torch
        from transformers import AutoProcessor, FastVlmForConditionalGeneration

        backends = torch.backends.mps.is_available(), torch.cuda.is_available()
        self.device = "mps" if backends[0] else "cuda" if backends[1] else "cpu"
        self._torch = torch
        self._processor = AutoProcessor.from_pretrained(checkpoint)
        model = FastVlmForConditionalGeneration.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype)
        )
        self._model = model.eval().to(self.device)
        torch.set_grad_enabled(False)

    def answer(self, image: str, question: str, tokens: int) -> list[int]:
        """Greedy tokens."""
        from PIL import Image

        with Image.open(image) as picture:
            inputs = self._processor(
                text=PROMPT.format(question), images=[picture.convert("RGB")], return_tensors="pt"
            )
        inputs = inputs.to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        answer = self._model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        return [int(t) for t in answer[0, inputs["input_ids"].shape[1] :].tolist()]

    def on_device(self, pixels: Any) -> Any:
        """(1, H, W, 3) as the tower takes it."""
        tensor = self._torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return tensor.to(self.device, self._model.dtype)

    def encode(self, pixels: Any) -> Any:
        """What `on_device` gave, to features (1, N, C)."""
        torch = self._torch
        features = self._model.model.vision_tower(pixels).last_hidden_state
        if self.device != "cpu":
            (torch.cuda if self.device == "cuda" else torch.mps).synchronize()
        return features.flatten(2).transpose(1, 2)

    def to_numpy(self, features: Any) -> Any:
        """For the comparison."""
        return features.float().cpu().numpy()

    def peak_memory(self) -> int | None:
        """Bytes; unknown but on CUDA."""
        on_cuda = self.device == "cuda"
        return int(self._torch.cuda.max_memory_allocated()) if on_cuda else None


def _set_geometry(folder: Path) -> None:
    """Tell mlx-vlm's tower its sizes: class attributes there, which config.json does not reach."""
    from mlx_vlm.models.fastvlm.config import VisionConfig

    vision = json.loads((folder / "config.json").read_text()).get("vision_config") or {}
    for key in ("layers", "embed_dims", "mlp_ratios"):
        if key in vision:
            setattr(VisionConfig, key, vision[key])


def main() -> None:
    """Load, say hello, then answer requests until stdin ends."""
    name, checkpoint, dtype, blas = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the replies

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        spec = importlib.util.spec_from_file_location("fastvlm_blas", blas)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.load_openblas()
        kind: Any = {"mlx-vlm": MlxVlm, "transformers": Transformers}[name]
        side = kind(checkpoint, dtype)
        reply(version=version(kind.package), device=side.device)
    except Exception as error:  # whatever it is, the other process says it
        reply(error=_in_one_line(error))
        return
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            try:
                reply(**_handle(side, json.loads(line)))
            except Exception as error:
                reply(error=_in_one_line(error))


def _in_one_line(error: Exception) -> str:
    """Some libraries begin their messages with an empty line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _handle(side: Any, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "answer":
        started = time.perf_counter()
        tokens = side.answer(request["image"], request["question"], request["tokens"])
        return {"seconds": time.perf_counter() - started, "tokens": tokens,
                "peak_memory": side.peak_memory()}  # fmt: skip
    pixels = side.on_device(np.load(request["pixels"]))
    started = time.perf_counter()
    features = side.encode(pixels)
    seconds = time.perf_counter() - started
    if request.get("result"):
        np.save(request["result"], side.to_numpy(features))
    return {"seconds": seconds, "peak_memory": side.peak_memory()}


if __name__ == "__main__":
    main()
