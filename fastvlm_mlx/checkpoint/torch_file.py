"""`.bin`, `.pt` and `.pth` files, read without torch and without executing anything in them.

torch.save (1.6 and newer) writes a zip: `NAME/data.pkl`, a pickle of the state dict in which each
tensor is a storage key, offset, shape and strides, and `NAME/data/KEY`, the storages' raw bytes.
The pickle is interpreted in torch_pickle.py; here its descriptions meet the bytes.
"""

from __future__ import annotations

import functools
import math
import mmap
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError
from .tensors import TensorRef
from .torch_pickle import DTYPES, Storage, Tensor, interpret, kind_of

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["read_torch_file"]

# The pickle of the largest published checkpoint is under 1 MB.
_MAX_PICKLE = 64 << 20


def read_torch_file(path: Path) -> dict[str, TensorRef]:
    """Name every tensor of a state dict saved by torch.save; the values are read on `load()`.

    The state dict may be the whole file or one entry of a dict, such as "state_dict" or "model".
    Numbers, strings and None beside the tensors are ignored; anything else is an error.
    Raises CheckpointError for files that are damaged, of another format, or more than data.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
            if not head.startswith(b"PK"):
                raise CheckpointError(f"{path} {_not_a_zip(head)}")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with zipfile.ZipFile(path) as archive:
            prefix, pickled = _read_pickle(archive, path)
            entries = {info.filename: info for info in archive.infolist()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise _damaged(path, error) from error

    try:
        root = interpret(pickled, path)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise _damaged(path, error) from error

    starts: dict[str, int] = {}
    refs = {}
    for name, tensor in _state_dict(root, path).items():
        storage, key = tensor.storage, tensor.storage.key
        if key not in starts:
            starts[key] = _locate(buffer, entries.get(f"{prefix}data/{key}"), storage, path)
        _check_bounds(tensor, f"{path}: {name!r}")
        load = functools.partial(_load, buffer, starts[key], tensor)
        refs[name] = TensorRef(DTYPES[tensor.dtype][0], tensor.shape, load)
    return refs


# --- the file ---


def _not_a_zip(head: bytes) -> str:
    resave = (
        "re-save it as safetensors where torch is installed: "
        "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
    )
    if not head:
        return "is empty; expected a file written by torch.save: download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights: run `git lfs pull`, or download the file"
    if head[8:9] == b"{":
        return "is a safetensors file under another name: rename it to *.safetensors"
    if head[257:262] == b"ustar":
        return f"is in torch's tar format of 2016, expected the zip format of torch 1.6: {resave}"
    if head[:1] == b"\x80":
        return f"is in torch's format from before 1.6, or a plain pickle, and is not read: {resave}"
    return (
        f"is not a file written by torch.save: it starts with {head[:8]!r}, expected a zip (b'PK'):"
        " check that it was downloaded completely"
    )


def _damaged(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or incomplete ({str(error) or type(error).__name__}); expected a file "
        "written by torch.save: download it again"
    )


def _read_pickle(archive: zipfile.ZipFile, path: Path) -> tuple[str, bytes]:
    names = set(archive.namelist())
    found = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(found) != 1:
        raise CheckpointError(
            f"{path} is a zip with {len(found)} entries named data.pkl, expected the one that "
            "torch.save writes: if it is an archive of a model directory, unpack it"
        )
    prefix = found[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a TorchScript program, expected weights: save module.state_dict() instead"
        )
    order = f"{prefix}byteorder"
    if order in names and archive.read(order).strip() != b"little":
        raise CheckpointError(f"{path} was written in big-endian order, expected little-endian")
    if archive.getinfo(found[0]).file_size > _MAX_PICKLE:
        raise CheckpointError(
            f"{path}: its data.pkl is larger than {_MAX_PICKLE >> 20} MiB, expected only the names "
            "and shapes of tensors there: save the state dict alone"
        )
    return prefix, archive.read(found[0])


def _locate(buffer: mmap.mmap, entry: zipfile.ZipInfo | None, storage: Storage, path: Path) -> int:
    """Where the storage's bytes start in the file; checked to be there in full."""
    key = storage.key
    if entry is None:
        raise CheckpointError(
            f"{path}: storage {key!r} is missing from the zip: download the file again"
        )
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise CheckpointError(
            f"{path}: storage {key!r} is compressed or encrypted, expected it as torch.save "
            "writes it: unpack and save it again"
        )
    # The local header repeats the name with an extra field of its own, which aligns the data.
    header = entry.header_offset
    fixed = buffer[header : header + 30]
    lengths = int.from_bytes(fixed[26:28], "little") + int.from_bytes(fixed[28:30], "little")
    start = header + 30 + lengths
    width = np.dtype(DTYPES[storage.dtype][2]).itemsize if storage.dtype else 1
    need = storage.length * width
    if fixed[:4] != b"PK\x03\x04" or need > entry.file_size or start + need > len(buffer):
        raise CheckpointError(
            f"{path}: storage {key!r} has {entry.file_size} bytes in a file of {len(buffer)}, "
            f"expected {need}: the file is damaged or incomplete, download it again"
        )
    return start


def _check_bounds(tensor: Tensor, name: str) -> None:
    storage, width = tensor.storage, np.dtype(DTYPES[tensor.dtype][2]).itemsize
    room = storage.length if storage.dtype else storage.length // width
    count = math.prod(tensor.shape)
    last = tensor.offset + sum(
        (length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    if count and last >= room:
        raise CheckpointError(
            f"{name} of shape {tensor.shape} reaches element {last} of a storage of {room}: "
            "the file is damaged, download it again"
        )
    if count > room:  # a few bytes must not become gigabytes
        raise CheckpointError(
            f"{name} of shape {tensor.shape} repeats a storage of {room} elements: "
            "save it with tensor.contiguous()"
        )


def _load(buffer: mmap.mmap, start: int, tensor: Tensor) -> mx.array:
    import mlx.core as mx

    kind = np.dtype(DTYPES[tensor.dtype][2])
    if 0 in tensor.shape:
        values = np.zeros(tensor.shape, kind)
    else:
        steps = zip(tensor.shape, tensor.strides, strict=True)
        values = np.ndarray(
            tensor.shape,
            kind,
            buffer,
            start + tensor.offset * kind.itemsize,
            # The stride of an axis of length 1 is never used, and torch may leave anything there.
            tuple(stride * kind.itemsize if length > 1 else 0 for length, stride in steps),
        )
    if tensor.dtype == "bool":
        return mx.array(values != 0)
    if tensor.dtype == "float64":  # MLX has float64 on the CPU only
        return mx.array(values.astype(np.float32))
    if not (values.flags.c_contiguous and values.flags.aligned):
        values = values.copy()
    array = mx.array(values)
    return array.view(mx.bfloat16) if tensor.dtype == "bfloat16" else array


# --- what is in it ---


def _state_dict(root: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(root, dict):
        raise CheckpointError(
            f"{path} holds a {kind_of(root)}, expected a state dict: save model.state_dict()"
        )
    inside = [key for key, value in root.items() if isinstance(value, dict) and _has_tensors(value)]
    if len(inside) + _has_tensors(root) > 1:
        places = [repr(key) for key in inside] + ["the top level"] * _has_tensors(root)
        raise CheckpointError(
            f"{path} has tensors in {' and '.join(places[:4])}, expected one state dict: "
            "save the one to use in a file of its own"
        )
    if not inside and not _has_tensors(root):
        raise CheckpointError(
            f"{path} has no tensors; its first entries are {list(root)[:5]!r:.200}: "
            "expected a state dict, such as model.state_dict()"
        )
    tensors = {}
    for name, value in (root[inside[0]] if inside else root).items():
        if isinstance(value, Tensor) and isinstance(name, str):
            tensors[name] = value
        # Bookkeeping such as a step count or version is no weight, and nothing is lost with it.
        elif not isinstance(value, (int, float, str, type(None))):
            raise CheckpointError(
                f"{path}: the state dict's entry {name!r} is a {kind_of(value)}, expected a tensor "
                "with a name: save only tensors"
            )
    return tensors


def _has_tensors(values: dict[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values.values())
