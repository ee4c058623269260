"""Facts for `fastvlm info` and `fastvlm doctor`, as plain dictionaries."""

import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import ops
from .blas import INSTALL_HINT, openblas_loaded
from .checkpoint.loading import examine_checkpoint
from .encoder_check import EncoderCheck
from .model import parameter_counts

__all__ = ["describe_checkpoint", "describe_encoder", "describe_machine"]


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """What a checkpoint is, from its headers alone. Raises CheckpointError."""
    source = examine_checkpoint(folder)
    config = source.config
    vision, text = config.vision, config.text
    counts = parameter_counts(config)
    total = sum(counts.values())
    how = sorted({f"{q.bits}-bit {q.mode}" for q in source.quantized.values()})
    types = sorted({ref.dtype for ref in source.refs.values()})
    return {
        "dialect": source.dialect.value + (", training form" if source.training_form else ""),
        "made from": source.metadata.get("source", "-"),
        "encoder": f"{counts['vision'] / 1e6:.1f} M parameters, depths {list(vision.layers)}, "
        f"widths {list(vision.dims)}",
        "image size": f"{vision.image_size} x {vision.image_size} = {config.image_tokens} tokens",
        "projector": f"{vision.out_dim} -> {text.hidden_size}, "
        f"{counts['projector'] / 1e6:.1f} M parameters",
        "language model": f"Qwen2, {counts['language_model'] / 1e6:.1f} M parameters, "
        f"{text.num_hidden_layers} layers of {text.hidden_size}, "
        f"{text.num_attention_heads} heads ({text.num_key_value_heads} key/value)",
        "vocabulary": f"{text.vocab_size} rows, {len(source.tokenizer)} tokens, "
        f"{'tied' if text.tie_word_embeddings else 'untied'}",
        "context": f"{config.context_length} positions",
        "stored as": ", ".join([*how, *types]),
        "files": _size(source.file_bytes),
        "memory": f"about {_size(2 * total)} in 16 bit, {_size(4 * total)} in float32",
        "parameters": f"{total / 1e6:.1f} M",
    }


def describe_machine() -> dict[str, Any]:
    """Device, MLX build, BLAS, compiler and Hub, with what to do where something is slow."""
    gpu = mx.metal.is_available() or mx.cuda.is_available()
    facts: dict[str, Any] = {
        "fastvlm-mlx": version("fastvlm-mlx"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "mlx": f"{version('mlx')}, {_backend()}, default device {mx.default_device().type.name}",
        "mlx-lm": version("mlx-lm"),
    }
    if gpu:
        info = mx.device_info()
        facts["device"] = str(info.get("device_name", info.get("architecture", "GPU")))
        if "memory_size" in info:
            facts["memory"] = _size(int(info["memory_size"]))
    facts["matrix product"] = f"{_gflops():.0f} GFLOP/s in float32 (1024 x 1024)"
    if sys.platform.startswith("linux") and not mx.cuda.is_available():
        facts["BLAS"] = (
            "OpenBLAS"
            if openblas_loaded()
            else [
                "MLX's bundled reference BLAS: a few GFLOP/s, one thread",
                f"faster: {INSTALL_HINT}",
            ]
        )
        facts["compiler"] = shutil.which("g++") or [
            "no g++ on PATH: MLX skips compilation on the CPU",
            "faster: apt install g++",
        ]
    facts["operations"] = [
        f"{status.op}: {status.form}, error {status.error:.0e} ({status.reason})"
        for status in ops.statuses()
    ]
    facts["Hub"] = _hub()
    return facts


def describe_encoder(check: EncoderCheck) -> dict[str, Any]:
    """A model's encoder on this device: times, and every stage beside the plain forms."""
    dtype = str(check.dtype).removeprefix("mlx.core.")
    return {
        f"encoder, {check.side} x {check.side}": [
            f"{1e3 * check.seconds:.0f} ms in {dtype}, "
            f"{1e3 * check.plain_seconds:.0f} ms in plain forms",
            *(
                f"{stage.stage}: error {stage.error:.1e}, limit {stage.limit:.1e}"
                f"{'' if stage.passed else ': WRONG'}"
                for stage in check.stages
            ),
        ]
    }


def _backend() -> str:
    if mx.metal.is_available():
        return "Metal"
    return "CUDA" if mx.cuda.is_available() else "CPU"


def _gflops() -> float:
    a = mx.random.normal((1024, 1024))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best / 1e9


def _hub() -> str:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return f"offline (HF_HUB_OFFLINE is set); cache in {constants.HF_HUB_CACHE}"
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception as error:  # the client's own HTTP library differs between its releases
        return (
            f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}); cached models and "
            "--model nano still work"
        )
    return f"{constants.ENDPOINT} reachable; cache in {constants.HF_HUB_CACHE}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
