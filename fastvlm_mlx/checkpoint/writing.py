"""Writing checkpoints: tensor by tensor into shards, and all or nothing as a directory.

`ShardedWriter` knows every name and shape before the first value, so it lays out the files at once
and needs the memory of one piece. `new_directory` makes the result appear in one step.
"""

import ctypes
import errno
import fcntl
import itertools
import json
import math
import os
import re
import secrets
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from ..config import Config
from ..errors import CheckpointError
from ..saved import flush

__all__ = [
    "FORMAT_VERSION",
    "SHARD_BYTES",
    "TOKENIZER_FILES",
    "PlannedTensor",
    "ShardedWriter",
    "check_target",
    "config_to_dict",
    "new_directory",
    "remove_stale",
    "write_json",
]

FORMAT_VERSION = "1"
SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U32": 4, "U8": 1}


# --------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is going to be written; `dtype` is spelt as in safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


class ShardedWriter:
    """Safetensors files of at most `shard_bytes`, filled in any order, each tensor in pieces.

    A single file is called model.safetensors; several get numbers and an index. Use as a context
    manager: leaving it checks that everything was written. Raises CheckpointError.
    """

    def __init__(
        self,
        folder: Path,
        planned: Sequence[PlannedTensor],
        metadata: Mapping[str, str],
        *,
        shard_bytes: int = SHARD_BYTES,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._folder, self._metadata, self._progress = folder, dict(metadata), progress
        self._left = {tensor.name: tensor.nbytes for tensor in planned}
        self._total, self._done = sum(self._left.values()), 0
        self._files = ExitStack()
        self._where: dict[str, tuple[BinaryIO, int]] = {}
        self._shards = _shards(planned, shard_bytes)

    def __enter__(self) -> "ShardedWriter":
        with _disk_errors(self._folder, self._total):
            for index, shard in enumerate(self._shards, start=1):
                self._lay_out(self._name(index), shard)
            if len(self._shards) > 1:
                self._write_index()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with _disk_errors(self._folder, self._total):
            self._files.close()
        unwritten = [name for name, left in self._left.items() if left]
        assert kind is not None or not unwritten, f"never written: {unwritten[:3]}"

    def write(self, name: str, piece: mx.array) -> None:
        """Append the next rows (or all) of the tensor `name`."""
        if piece.size == 0:
            return
        data = memoryview(mx.contiguous(piece).reshape(-1).view(mx.uint8))  # type: ignore[arg-type]
        file, at = self._where[name]
        assert data.nbytes <= self._left[name], f"{name} is longer than planned"
        with _disk_errors(self._folder, self._total):
            file.seek(at)
            file.write(data)
        self._where[name] = file, at + data.nbytes
        self._left[name] -= data.nbytes
        self._done += data.nbytes
        if self._progress:
            self._progress(self._done, self._total)

    def _name(self, index: int) -> str:
        count = len(self._shards)
        numbered = f"model-{index:05}-of-{count:05}.safetensors"
        return numbered if count > 1 else "model.safetensors"

    def _lay_out(self, name: str, shard: Sequence[PlannedTensor]) -> None:
        header: dict[str, Any] = {"__metadata__": self._metadata}
        at = 0
        # Widest items first, as the safetensors library does: every tensor is then aligned.
        for tensor in sorted(shard, key=lambda t: -_ITEM_BYTES[t.dtype]):
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.nbytes],
            }
            at += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = self._files.enter_context((self._folder / name).open("wb"))
        file.write(struct.pack("<Q", len(text)) + text)
        start = 8 + len(text)
        file.truncate(start + at)
        for tensor in shard:
            self._where[tensor.name] = file, start + header[tensor.name]["data_offsets"][0]

    def _write_index(self) -> None:
        weight_map = {
            tensor.name: self._name(index)
            for index, shard in enumerate(self._shards, start=1)
            for tensor in shard
        }
        contents = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        write_json(self._folder / "model.safetensors.index.json", contents)


def _shards(planned: Sequence[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    # The parts of one quantized matrix stay together.
    for _, group in itertools.groupby(planned, key=lambda t: t.name.rpartition(".")[0] or t.name):
        tensors = list(group)
        needed = sum(t.nbytes for t in tensors)
        if shards[-1] and size + needed > limit:
            shards.append([])
            size = 0
        shards[-1] += tensors
        size += needed
    return shards


@contextmanager
def _disk_errors(folder: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"the disk is full; {needed / 1e6:.0f} MB are needed" if full else error.strerror
        raise CheckpointError(
            f"Cannot write to {folder.parent}: {reason}. Nothing was changed."
        ) from error


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------- directory


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if `folder` may not become a checkpoint directory."""
    if not (folder.exists() or folder.is_symlink()):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory; choose another place.")
    if all(path.name == ".DS_Store" for path in folder.iterdir()):
        return  # Finder leaves one wherever it has looked
    if not overwrite:
        raise CheckpointError(
            f"{folder} already exists; choose another place, or replace it with --force."
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no checkpoint (no config.json), so it is not replaced; remove it "
            "yourself or choose another place."
        )


@contextmanager
def new_directory(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` when the block ends well, else vanishes.

    Everything in it is flushed to the disk first; an existing `folder` is exchanged in one step
    where the system can, so that no moment has neither. What a killed run left behind is removed
    by the next one. Raises CheckpointError.
    """
    check_target(folder, overwrite=overwrite)
    missing = [p for p in (folder.parent, *folder.parent.parents) if not p.exists()]
    with ExitStack() as cleanup:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for created in reversed(missing):
                cleanup.callback(_remove_if_empty, created)
            remove_stale(folder)
            temporary = _sibling(folder, "partial")
            temporary.mkdir()
        except OSError as error:
            raise CheckpointError(f"Cannot write to {folder.parent} ({error.strerror}).") from error
        cleanup.callback(shutil.rmtree, temporary, ignore_errors=True)
        lock = os.open(temporary, os.O_RDONLY)
        cleanup.callback(os.close, lock)
        with suppress(OSError):  # network volumes may know no locks; then nothing counts as stale
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield temporary
        except OSError as error:
            raise CheckpointError(
                f"{folder} could not be completed ({error}); nothing was changed."
            ) from error
        try:
            for file in temporary.iterdir():
                _flush(file)
            _flush(temporary)
            _put_in_place(temporary, folder)
            _flush(folder.parent)
        except OSError as error:
            raise CheckpointError(
                f"Cannot put the result at {folder} ({error.strerror}); nothing was changed."
            ) from error


def remove_stale(folder: Path) -> None:
    """Remove what killed runs left beside `folder`; put back what one had only just set aside."""
    matches = re.compile(re.escape(f".{folder.name}.fastvlm-") + "(partial|old)-[0-9a-f]{8}")
    for path in list(folder.parent.iterdir()):
        found = matches.fullmatch(path.name)
        if not found or not path.is_dir() or _in_use(path):
            continue
        if found[1] == "old" and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.fastvlm-{kind}-{secrets.token_hex(4)}")


def _in_use(path: Path) -> bool:
    """Whether a living process holds the directory's lock; the kernel drops it with the process."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _put_in_place(temporary: Path, folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        temporary.rename(folder)
        return
    if _exchange(temporary, folder):
        # `temporary` is now the name of the old state, which the caller removes.
        return
    aside = _sibling(folder, "old")
    folder.rename(aside)
    temporary.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the system or file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    try:
        if sys.platform == "darwin":
            return bool(libc.renamex_np(first, second, 2) == 0)  # RENAME_SWAP
        here = -100  # AT_FDCWD
        return bool(libc.renameat2(here, first, here, second, 2) == 0)  # RENAME_EXCHANGE
    except AttributeError:
        return False


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    except OSError as error:
        # Network file systems take no flush of a directory, and need none.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------- config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Apple's flat config.json plus a complete `vision_config`; `parse_config` undoes it."""
    vision = config.vision
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        **asdict(config.text),
        "hidden_act": "silu",
        "eos_token_id": sorted(config.eos_token_ids),
        "tokenizer_model_max_length": config.context_length,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": vision.out_dim,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{vision.image_size}",
        "vision_config": {
            "image_size": vision.image_size,
            "layers": list(vision.layers),
            "embed_dims": list(vision.dims),
            "mlp_ratios": list(vision.mlp_ratios),
            "token_mixers": ["attention" if a else "repmixer" for a in vision.attention],
            "cls_ratio": float(vision.head_ratio),
            "residual_scales": list(vision.residual_scales),
        },
    }
