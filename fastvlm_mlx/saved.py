"""Values in files: tensors and facts in one safetensors file, written all or nothing.

The header says what the file is, which version of the format, and a checksum over everything, so
that a file that is damaged, of another kind or of another version is told from a good one.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from .errors import SavedFileError

__all__ = ["VERSION", "check_replaceable", "flush", "read_saved", "write_saved"]

VERSION = "1"
_KIND, _VERSION, _FACTS, _CHECKSUM = (
    f"fastvlm_mlx.{n}" for n in ("kind", "version", "facts", "sha256")
)


def write_saved(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, mx.array],
    facts: Mapping[str, Any],
    *,
    durable: bool = True,
) -> None:
    """Write tensors and facts (what JSON can hold) as a file of this kind.

    The file appears, or replaces an earlier one, in one step. `durable` waits for the disk.
    Raises SavedFileError.
    """
    target = Path(os.path.realpath(path))
    tensors = {name: mx.contiguous(tensor) for name, tensor in tensors.items()}
    mx.eval(tensors)
    text = json.dumps(facts)
    metadata = {
        _KIND: kind,
        _VERSION: VERSION,
        _FACTS: text,
        _CHECKSUM: _checksum(text, tensors),
    }
    # A name of its own: a target's name may be as long as the file system allows.
    temporary = target.with_name(f".fastvlm-{secrets.token_hex(8)}.partial")
    try:
        with temporary.open("xb") as file:
            mx.save_safetensors(file, dict(tensors), metadata)
            file.flush()
            if durable:
                flush(file.fileno())
        temporary.replace(target)
    except (OSError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        raise SavedFileError(f"Cannot write {path} ({reason}); nothing was changed.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_saved(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Tensors and facts of a file of this kind, checked. Raises SavedFileError."""
    metadata = _header(Path(path), strict=True)
    if metadata.get(_KIND) != kind:
        raise SavedFileError(f"{path} is no {kind} saved by this library.")
    if metadata.get(_VERSION) != VERSION:
        raise SavedFileError(
            f"{path} is a {kind} in version {metadata.get(_VERSION)} of its format; this release "
            f"reads version {VERSION}. Install the release that wrote it, or save it anew."
        )
    text = metadata.get(_FACTS, "")
    try:
        loaded: Any = mx.load(str(path), format="safetensors")
        mx.eval(loaded)
        facts = json.loads(text)
    except (OSError, RuntimeError, ValueError) as error:
        raise SavedFileError(f"{path} is damaged ({error}); it cannot be used.") from error
    if metadata.get(_CHECKSUM) != _checksum(text, loaded) or not isinstance(facts, dict):
        raise SavedFileError(
            f"{path} is damaged (its contents do not match its checksum); it cannot be used."
        )
    return loaded, facts


def flush(handle: int) -> None:
    """Wait until what was written to a file is on the disk. Raises OSError."""
    os.fsync(handle)
    # macOS: fsync may end in the drive's own cache. Not every file system knows the stronger call.
    if (full := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(handle, full)


def check_replaceable(path: str | os.PathLike[str], kind: str) -> None:
    """Raise SavedFileError if something else than a file of this kind stands at `path`."""
    target = Path(path)
    if target.exists() and _header(target).get(_KIND) != kind:
        raise SavedFileError(
            f"{path} exists and is no {kind} of this library, so it is not replaced; choose "
            "another name or remove it."
        )


def _header(path: Path, *, strict: bool = False) -> dict[str, str]:
    """The metadata of a safetensors file; of any other file an error if `strict`, else nothing."""
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        if not strict:
            return {}
        if not path.exists():
            raise SavedFileError(f"There is no file {path}.") from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SavedFileError(f"{path} is not a complete safetensors file ({reason}).") from error


def _checksum(text: str, tensors: Mapping[str, mx.array]) -> str:
    """SHA-256 of the facts and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        if tensor.size:
            digest.update(memoryview(tensor.reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]
    return digest.hexdigest()
