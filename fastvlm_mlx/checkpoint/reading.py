"""Opening checkpoint files: what tensors there are, without reading their values yet."""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, UnsupportedCheckpoint
from .tensors import TensorRef
from .torch_file import read_torch_file

__all__ = ["OpenCheckpoint", "open_checkpoint", "read_json", "visible_files"]

# Pickles that training scripts leave beside the weights, and that are none.
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "trainer_state")


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint directory whose headers have been read."""

    folder: Path
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorRef]
    bytes: int
    """Size of the weight files."""


def open_checkpoint(folder: Path) -> OpenCheckpoint:
    """Read config.json and the header of every weight file. Raises CheckpointError."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"{folder} has no config.json; expected a checkpoint directory with config.json, "
            "weights and tokenizer files."
        )
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_file} holds a {type(config).__name__}; expected an object.")
    tensors: dict[str, TensorRef] = {}
    metadata: dict[str, str] = {}
    files = weight_files(folder)
    for file in files:
        if file.suffix == ".safetensors":
            found, extra = _read_safetensors(file)
        else:
            found, extra = read_torch_file(file), {}
        repeated = tensors.keys() & found.keys()
        if repeated:
            raise CheckpointError(
                f"{file} repeats {sorted(repeated)[0]}, which another file of {folder} also holds. "
                "Keep one copy of the weights in a directory."
            )
        tensors |= found
        metadata |= extra
    if not tensors:
        raise CheckpointError(f"The weight files in {folder} hold no tensors.")
    return OpenCheckpoint(folder, config, metadata, tensors, sum(f.stat().st_size for f in files))


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from error


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """The files that match, sorted, without hidden ones.

    On disks formatted as exFAT, and on many network volumes, macOS keeps a file's extended
    attributes in another of the same ending: ._model.safetensors beside model.safetensors.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises CheckpointError if one is missing."""
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedCheckpoint(
            f"{folder} is a LoRA adapter; merge it into its base model and load the result."
        )
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            return _indexed_files(folder / index)
    files = visible_files(folder, "*.safetensors")
    if not files:
        candidates = (f for s in ("bin", "pt", "pth") for f in visible_files(folder, f"*.{s}"))
        files = [f for f in candidates if not f.name.startswith(NOT_WEIGHTS)]
    if not files:
        raise CheckpointError(
            f"No weights in {folder}: expected *.safetensors (or .bin, .pt, .pth) files."
        )
    return files


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if file.parent != index.parent or file.name in ("", ".."):
            raise CheckpointError(f"{index} points outside its own directory: {file.name!r}.")
        if not file.is_file():
            raise CheckpointError(
                f"{file.name} is missing in {index.parent}, though {index.name} lists it; "
                "download the checkpoint again."
            )
    return files


def _read_safetensors(path: Path) -> tuple[dict[str, TensorRef], dict[str, str]]:
    try:
        # The library checks offsets against the file's length; a truncated file ends here.
        with safe_open(path, framework="numpy"):
            pass
        header = _header(path)
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); download or copy it again."
        ) from error
    metadata = header.pop("__metadata__", None) or {}
    shard = _Shard(path)
    return {
        name: TensorRef(
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            load=shard.loader(name),
        )
        for name, entry in header.items()
    }, metadata


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
        return header


class _Shard:
    """One safetensors file, read by MLX: lazily, and without keeping what was handed out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unread: dict[str, mx.array] = {}

    def loader(self, name: str) -> Callable[[], mx.array]:
        return lambda: self._take(name)

    def _take(self, name: str) -> mx.array:
        if name not in self._unread:
            loaded = mx.load(str(self._path))
            assert isinstance(loaded, dict)
            self._unread = loaded
        return self._unread.pop(name)
