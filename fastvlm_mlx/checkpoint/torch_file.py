"""`.bin`, `.pt` and `.pth` files, read without torch and without executing anything in them.

torch.save (1.6 and newer) writes a zip: `NAME/data.pkl`, a pickle of the state dict in which each
tensor is a storage key, offset, shape and strides, and `NAME/data/KEY`, the storages' raw bytes.
The pickle is interpreted here, by a machine that knows the few opcodes torch.save emits and has
no way to import or call anything: a global is a name to compare with a list, and that is all.
"""

from __future__ import annotations

import functools
import math
import mmap
import pickletools
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError
from .tensors import TensorRef

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["read_torch_file"]

# torch dtype -> (safetensors name, storage class, how NumPy sees the bytes)
_DTYPES: dict[str, tuple[str, str, str]] = {
    "float64": ("F64", "DoubleStorage", "<f8"),
    "float32": ("F32", "FloatStorage", "<f4"),
    "float16": ("F16", "HalfStorage", "<f2"),
    "bfloat16": ("BF16", "BFloat16Storage", "<u2"),
    "int64": ("I64", "LongStorage", "<i8"),
    "int32": ("I32", "IntStorage", "<i4"),
    "int16": ("I16", "ShortStorage", "<i2"),
    "int8": ("I8", "CharStorage", "<i1"),
    "uint8": ("U8", "ByteStorage", "<u1"),
    "bool": ("BOOL", "BoolStorage", "<u1"),
    "uint16": ("U16", "", "<u2"),
    "uint32": ("U32", "", "<u4"),
    "uint64": ("U64", "", "<u8"),
}
_STORAGES = {storage: dtype for dtype, (_, storage, _) in _DTYPES.items() if storage}
_UNTYPED = "UntypedStorage"
_CALLABLE = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
}
# The pickle of the largest published checkpoint is under 1 MB.
_MAX_PICKLE = 64 << 20


@dataclass(frozen=True)
class _Global:
    """A name in the pickle; never resolved to anything."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str  # "" for untyped bytes
    key: str
    length: int  # in elements of dtype; in bytes if untyped


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int  # offset and strides count elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


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
        root = _interpret(pickled, path)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise _damaged(path, error) from error

    starts: dict[str, int] = {}
    refs = {}
    for name, tensor in _state_dict(root, path).items():
        key = tensor.storage.key
        if key not in starts:
            starts[key] = _locate(buffer, entries.get(f"{prefix}data/{key}"), tensor, path)
        _check_bounds(tensor, f"{path}: {name!r}")
        load = functools.partial(_load, buffer, starts[key], tensor)
        refs[name] = TensorRef(_DTYPES[tensor.dtype][0], tensor.shape, load)
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


def _locate(buffer: mmap.mmap, entry: zipfile.ZipInfo | None, tensor: _Tensor, path: Path) -> int:
    """Where the storage's bytes start in the file; checked to be there in full."""
    key, storage = tensor.storage.key, tensor.storage
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
    width = np.dtype(_DTYPES[storage.dtype][2]).itemsize if storage.dtype else 1
    need = storage.length * width
    if fixed[:4] != b"PK\x03\x04" or need > entry.file_size or start + need > len(buffer):
        raise CheckpointError(
            f"{path}: storage {key!r} has {entry.file_size} bytes in a file of {len(buffer)}, "
            f"expected {need}: the file is damaged or incomplete, download it again"
        )
    return start


def _check_bounds(tensor: _Tensor, name: str) -> None:
    storage, width = tensor.storage, np.dtype(_DTYPES[tensor.dtype][2]).itemsize
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


def _load(buffer: mmap.mmap, start: int, tensor: _Tensor) -> mx.array:
    import mlx.core as mx

    kind = np.dtype(_DTYPES[tensor.dtype][2])
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


def _state_dict(root: Any, path: Path) -> dict[str, _Tensor]:
    if not isinstance(root, dict):
        raise CheckpointError(
            f"{path} holds a {_kind(root)}, expected a state dict: save model.state_dict()"
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
        if isinstance(value, _Tensor) and isinstance(name, str):
            tensors[name] = value
        # Bookkeeping such as a step count or version is no weight, and nothing is lost with it.
        elif not isinstance(value, (int, float, str, type(None))):
            raise CheckpointError(
                f"{path}: the state dict's entry {name!r} is a {_kind(value)}, expected a tensor "
                "with a name: save only tensors"
            )
    return tensors


def _has_tensors(values: dict[Any, Any]) -> bool:
    return any(isinstance(value, _Tensor) for value in values.values())


def _kind(value: Any) -> str:
    return type(value).__name__.lstrip("_").lower()


# --- the pickle ---


def _interpret(data: bytes, path: Path) -> Any:
    """Rebuild dicts, lists, tuples, numbers, strings, and tensors' descriptions; nothing else."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT" | "BINUNICODE"
                | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES"
            ):  # fmt: skip
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                item = stack.pop()
                _of(list, stack[-1]).append(item)
            case "APPENDS":
                items = pop_to_mark()
                _of(list, stack[-1]).extend(items)
            case "SETITEM":
                key, item = stack[-2:]
                del stack[-2:]
                _of(dict, stack[-1])[key] = item
            case "SETITEMS":
                items = pop_to_mark()
                _of(dict, stack[-1]).update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                module, name = argument.split(" ", 1)
                stack.append(_allowed(module, name, path))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_allowed(_of(str, module), _of(str, name), path))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = _of(tuple, stack.pop()), _of(_Global, stack.pop())
                stack.append(_rebuild(function.name, arguments))
            case "BUILD":  # attributes, such as a state dict's _metadata
                stack.pop()
                _of((dict, _Tensor), stack[-1])
            case "STOP":
                if len(stack) != 1 or marks:
                    raise ValueError("the pickle leaves values behind")
                return stack[0]
            case _:
                raise CheckpointError(
                    f"{path}: its pickle uses {opcode.name}, which torch.save does not write; "
                    f"nothing was executed. {_RESAVE}"
                )
    raise ValueError("the pickle has no end")


_RESAVE = (
    "Expected only tensors: use a safetensors version of the file, or, if you trust it, load it "
    "with torch and save model.state_dict()"
)


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"the pickle has a {_kind(value)} in the wrong place")
    return value


def _allowed(module: str, name: str, path: Path) -> _Global:
    full = f"{module}.{name}"
    storage = module in ("torch", "torch.storage", "torch.cuda") and name in (*_STORAGES, _UNTYPED)
    if full in _CALLABLE or storage or (module == "torch" and name in _DTYPES):
        return _Global(full)
    raise CheckpointError(
        f"{path}: its pickle asks for {full!r}, which is not a tensor of a kind that is read here; "
        f"nothing was executed. {_RESAVE}"
    )


def _storage(identity: Any) -> _Storage:
    kind, storage, key, _, length = _of(tuple, identity)[:5]
    name = _of(_Global, storage).name.rsplit(".", 1)[-1]
    if kind != "storage" or (name not in _STORAGES and name != _UNTYPED):
        raise ValueError("the pickle refers to something other than a storage")
    return _Storage(_STORAGES.get(name, ""), _of(str, key), _natural([length])[0])


def _natural(values: Iterable[Any]) -> tuple[int, ...]:
    numbers = tuple(values)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"expected whole numbers that are not negative, got {numbers!r:.80}")
    return numbers


def _rebuild(name: str, arguments: tuple[Any, ...]) -> Any:
    match name.rsplit(".", 1)[-1]:
        case "OrderedDict":
            return dict(*arguments[:1])
        case "Size":
            return _natural(_of((tuple, list), arguments[0]))
        case "device":
            return ":".join(str(part) for part in arguments)
        case "_rebuild_parameter" | "_rebuild_parameter_with_state":
            return _of(_Tensor, arguments[0])
        case "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3" as function:
            storage = _of(_Storage, arguments[0])
            dtype = storage.dtype
            if function == "_rebuild_tensor_v3":
                dtype = _of(_Global, arguments[6]).name.rsplit(".", 1)[-1]
            if dtype not in _DTYPES or (storage.dtype and storage.dtype != dtype):
                raise ValueError(f"a tensor of {dtype!r} in a storage of {storage.dtype!r}")
            offset = _natural(arguments[1:2])[0]
            shape, strides = _natural(arguments[2]), _natural(arguments[3])
            # MLX's own limits are near; without any, an empty tensor could overflow NumPy's.
            if len(shape) > 16 or math.prod(max(n, 1) for n in shape) > 2**40:
                raise ValueError(f"a tensor of shape {shape!r:.80}")
            if len(shape) != len(strides):
                raise ValueError(f"shape {shape} with strides {strides!r:.80}")
            return _Tensor(storage, dtype, offset, shape, strides)
    raise ValueError(f"{name} is called, but is no function")
