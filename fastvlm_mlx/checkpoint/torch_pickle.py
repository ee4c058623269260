"""The pickle inside torch.save's files, interpreted: tensors' descriptions, and nothing executed.

A machine that knows the few opcodes torch.save emits and has no way to import or call anything:
a global is a name to compare with a list, and that is all.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

__all__ = ["DTYPES", "Storage", "Tensor", "interpret", "kind_of"]

# torch dtype -> (safetensors name, storage class, how NumPy sees the bytes)
DTYPES: dict[str, tuple[str, str, str]] = {
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
_STORAGES = {storage: dtype for dtype, (_, storage, _) in DTYPES.items() if storage}
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
_RESAVE = (
    "Expected only tensors: use a safetensors version of the file, or, if you trust it, load it "
    "with torch and save model.state_dict()"
)


@dataclass(frozen=True)
class _Global:
    """A name in the pickle; never resolved to anything."""

    name: str


@dataclass(frozen=True)
class Storage:
    dtype: str  # "" for untyped bytes
    key: str
    length: int  # in elements of dtype; in bytes if untyped


@dataclass(frozen=True)
class Tensor:
    storage: Storage
    dtype: str
    offset: int  # offset and strides count elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def interpret(data: bytes, path: Path) -> Any:
    """Rebuild dicts, lists, tuples, numbers, strings, and tensors' descriptions; nothing else.

    Raises CheckpointError if there is more than that in it. Damage shows as ValueError, TypeError,
    KeyError, IndexError or OverflowError, which the caller puts into words.
    """
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
                _of((dict, Tensor), stack[-1])
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


def kind_of(value: Any) -> str:
    return type(value).__name__.lstrip("_").lower()


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"the pickle has a {kind_of(value)} in the wrong place")
    return value


def _allowed(module: str, name: str, path: Path) -> _Global:
    full = f"{module}.{name}"
    storage = module in ("torch", "torch.storage", "torch.cuda") and name in (*_STORAGES, _UNTYPED)
    if full in _CALLABLE or storage or (module == "torch" and name in DTYPES):
        return _Global(full)
    raise CheckpointError(
        f"{path}: its pickle asks for {full!r}, which is not a tensor of a kind that is read here; "
        f"nothing was executed. {_RESAVE}"
    )


def _storage(identity: Any) -> Storage:
    kind, storage, key, _, length = _of(tuple, identity)[:5]
    name = _of(_Global, storage).name.rsplit(".", 1)[-1]
    if kind != "storage" or (name not in _STORAGES and name != _UNTYPED):
        raise ValueError("the pickle refers to something other than a storage")
    return Storage(_STORAGES.get(name, ""), _of(str, key), _natural([length])[0])


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
            return _of(Tensor, arguments[0])
        case "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3" as function:
            storage = _of(Storage, arguments[0])
            dtype = storage.dtype
            if function == "_rebuild_tensor_v3":
                dtype = _of(_Global, arguments[6]).name.rsplit(".", 1)[-1]
            if dtype not in DTYPES or (storage.dtype and storage.dtype != dtype):
                raise ValueError(f"a tensor of {dtype!r} in a storage of {storage.dtype!r}")
            offset = _natural(arguments[1:2])[0]
            shape, strides = _natural(arguments[2]), _natural(arguments[3])
            # MLX's own limits are near; without any, an empty tensor could overflow NumPy's.
            if len(shape) > 16 or math.prod(max(n, 1) for n in shape) > 2**40:
                raise ValueError(f"a tensor of shape {shape!r:.80}")
            if len(shape) != len(strides):
                raise ValueError(f"shape {shape} with strides {strides!r:.80}")
            return Tensor(storage, dtype, offset, shape, strides)
    raise ValueError(f"{name} is called, but is no function")
