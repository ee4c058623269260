"""The torch-free reader: what torch.save writes is read, and nothing a pickle asks for is done."""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx.checkpoint.torch_file import read_torch_file
from fastvlm_mlx.errors import CheckpointError

# --- a small torch.save: fake modules give the pickle the names that torch's own would have ---

STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "<u2",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "<i1",
    "ByteStorage": "<u1", "BoolStorage": "<u1", "UntypedStorage": "<u1",
    "ComplexFloatStorage": "<c8",
}  # fmt: skip


def fake_modules() -> dict[str, types.ModuleType]:
    fake = {name: types.ModuleType(name) for name in ("torch", "torch._utils", "torch.storage")}
    for name in (*STORAGES, "Size", "float8_e4m3fn", "uint16"):
        module = "torch.storage" if name == "UntypedStorage" else "torch"
        setattr(fake[module], name, type(name, (), {"__module__": module}))
    for name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"):
        function = types.FunctionType((lambda *_: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(fake["torch._utils"], name, function)
    return fake


FAKE = fake_modules()
TORCH: Any = FAKE["torch"]


@contextlib.contextmanager
def fake_torch() -> Iterator[None]:
    """Only while pickling: one test below uses the real torch where it is installed."""
    real = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torch"}
    for name in real:
        del sys.modules[name]
    sys.modules.update(FAKE)
    try:
        yield
    finally:
        for name in FAKE:
            del sys.modules[name]
        sys.modules.update(real)


class Storage:
    def __init__(self, kind: str, values: Any, length: int | None = None) -> None:
        self.kind, self.data = kind, np.asarray(values, STORAGES[kind])
        self.length = self.data.size if length is None else length


@dataclass(eq=False)
class Call:
    """Pickles as a call of a function by name."""

    name: str
    args: tuple[Any, ...]
    state: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        module, _, name = self.name.rpartition(".")
        __import__(module)
        call = (getattr(sys.modules[module], name), self.args)
        return call if self.state is None else (*call, self.state)


def tensor(
    storage: Any, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, offset: int = 0
) -> Call:
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :], dtype=int)) for i in range(len(shape)))
    args = (storage, offset, shape, strides, False, OrderedDict())
    return Call("torch._utils._rebuild_tensor_v2", args)


def floats(*shape: int, kind: str = "FloatStorage") -> Call:
    return tensor(Storage(kind, np.arange(int(np.prod(shape, dtype=int)))), shape)


class Pickler(pickle.Pickler):
    def __init__(self, file: Any, protocol: int) -> None:
        super().__init__(file, protocol)
        self.storages: dict[int, tuple[str, Storage]] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Storage):
            return None
        key, _ = self.storages.setdefault(id(value), (str(len(self.storages)), value))
        home = FAKE["torch.storage" if value.kind == "UntypedStorage" else "torch"]
        return ("storage", getattr(home, value.kind), key, "cpu", value.length)


def dumped(value: Any, protocol: int = 2) -> tuple[bytes, dict[str, bytes]]:
    buffer = io.BytesIO()
    pickler = Pickler(buffer, protocol)
    with fake_torch():
        pickler.dump(value)
    data = {key: storage.data.tobytes() for key, storage in pickler.storages.values()}
    return buffer.getvalue(), data


def write_zip(
    path: Path,
    pickled: bytes,
    storages: dict[str, bytes],
    name: str = "archive",
    compression: int = zipfile.ZIP_STORED,
    **extra: bytes,
) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        entries = {"data.pkl": pickled, "byteorder": b"little", **extra}
        entries |= {f"data/{key}": data for key, data in storages.items()} | {"version": b"3\n"}
        for entry, data in entries.items():
            info = zipfile.ZipInfo(f"{name}/{entry}")
            info.extra = b"FB\x05\x00ZZZZZ" if entry.startswith("data/") else b""  # torch pads so
            file.writestr(info, data, compression)
    return path


def save(path: Path, value: Any, protocol: int = 2, **options: Any) -> Path:
    pickled, storages = dumped(value, protocol)
    return write_zip(path, pickled, storages, **options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- reading ---


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_state_dict_is_read(file: Path, protocol: int) -> None:
    weight, bias = floats(3, 4), floats(5, kind="LongStorage")
    state = OrderedDict(weight=weight, bias=bias)
    for name in ("version", "note", "nothing"):
        state[name] = {"version": 3, "note": "hello", "nothing": None}[name]  # type: ignore[assignment]
    refs = read_torch_file(save(file, state, protocol))
    assert list(refs) == ["weight", "bias"]
    assert (refs["weight"].dtype, refs["weight"].shape) == ("F32", (3, 4))
    assert (refs["bias"].dtype, refs["bias"].shape) == ("I64", (5,))
    loaded = refs["weight"].load()
    assert loaded.dtype == mx.float32
    np.testing.assert_array_equal(np.array(loaded), np.arange(12, dtype="f4").reshape(3, 4))
    np.testing.assert_array_equal(np.array(refs["bias"].load()), np.arange(5))


@pytest.mark.parametrize(
    ("kind", "dtype", "loaded"),
    [
        ("DoubleStorage", "F64", mx.float32),
        ("FloatStorage", "F32", mx.float32),
        ("HalfStorage", "F16", mx.float16),
        ("LongStorage", "I64", mx.int64),
        ("IntStorage", "I32", mx.int32),
        ("ShortStorage", "I16", mx.int16),
        ("CharStorage", "I8", mx.int8),
        ("ByteStorage", "U8", mx.uint8),
    ],
)
def test_number_types(file: Path, kind: str, dtype: str, loaded: mx.Dtype) -> None:
    values = np.array([1, 0, 100, 3], STORAGES[kind])
    ref = read_torch_file(save(file, {"x": tensor(Storage(kind, values), (2, 2))}))["x"]
    assert ref.dtype == dtype and ref.load().dtype == loaded
    assert ref.load().tolist() == [[1, 0], [100, 3]]


def test_bfloat16_and_bool(file: Path) -> None:
    exact = np.array([1.0, -2.5, 3.140625, 0.0], np.float32)
    storage = Storage("BFloat16Storage", exact.view(np.uint32) >> 16)
    flags = Storage("BoolStorage", [1, 0, 2])
    refs = read_torch_file(
        save(file, {"b": tensor(storage, (4,)), "s": tensor(storage, (), offset=1),
                    "f": tensor(flags, (3,))})
    )  # fmt: skip
    assert refs["b"].dtype == "BF16" and refs["b"].load().dtype == mx.bfloat16
    assert refs["b"].load().tolist() == exact.tolist()
    assert refs["s"].shape == () and refs["s"].load().item() == -2.5
    assert refs["f"].dtype == "BOOL" and refs["f"].load().tolist() == [True, False, True]


def test_views_share_storage_with_strides_and_offsets(file: Path) -> None:
    base = np.arange(24, dtype=np.float32)
    storage = Storage("FloatStorage", base)
    path = save(
        file,
        {
            "whole": tensor(storage, (4, 6)),
            "transposed": tensor(storage, (6, 4), (1, 6)),
            "window": tensor(storage, (2, 3), (6, 1), offset=8),
            "every_second": tensor(storage, (3, 2), (8, 2), offset=1),
            "last": tensor(storage, (1,), (10**30,), offset=23),
            "one_by": tensor(storage, (4, 1, 6), (6, 99, 1)),
        },
    )
    with zipfile.ZipFile(path) as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 1
    refs = read_torch_file(path)
    grid = base.reshape(4, 6)
    expected = {
        "whole": grid,
        "transposed": grid.T,
        "window": grid[1:3, 2:5],
        "every_second": [[1, 3], [9, 11], [17, 19]],
        "last": [23],
        "one_by": grid[:, None],
    }
    for name, ref in refs.items():
        np.testing.assert_array_equal(np.array(ref.load()), expected[name], err_msg=name)


def test_the_file_stays_readable_after_it_is_gone(file: Path) -> None:
    refs = read_torch_file(save(file, {"x": floats(3)}))
    file.unlink()
    first = refs["x"].load()
    assert first.tolist() == [0, 1, 2] and refs["x"].load().tolist() == [0, 1, 2]


def test_values_are_not_read_before_they_are_asked_for(file: Path) -> None:
    # A storage whose bytes are changed after opening shows which bytes load() looks at.
    path = save(file, {"x": tensor(Storage("ByteStorage", [7] * 64), (64,))})
    ref = read_torch_file(path)["x"]
    data = path.read_bytes()
    with path.open("r+b") as raw:
        raw.seek(data.index(b"\x07" * 64))
        raw.write(b"\x09" * 64)
    assert set(ref.load().tolist()) == {9}


def test_empty_tensors(file: Path) -> None:
    refs = read_torch_file(
        save(file, {"x": tensor(Storage("HalfStorage", []), (0, 4)), "y": floats(2)})
    )
    assert refs["x"].load().shape == (0, 4) and refs["x"].load().dtype == mx.float16


def test_parameters_and_attributes(file: Path) -> None:
    parameter = Call("torch._utils._rebuild_parameter", (floats(2), True, OrderedDict()))
    assert read_torch_file(save(file, {"p": parameter}))["p"].shape == (2,)
    # A module's state dict carries attributes, which must leave the items alone.
    state_dict = OrderedDict(p=parameter)
    state_dict._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    pickled, storages = dumped(state_dict)
    assert b"_metadata" in pickled
    assert list(read_torch_file(write_zip(file, pickled, storages))) == ["p"]


def test_untyped_storages(file: Path) -> None:
    storage = Storage("UntypedStorage", np.array([1, 2, 65535], "<u2").view(np.uint8))
    args = (storage, 1, (2,), (1,), False, OrderedDict(), TORCH.uint16)
    ref = read_torch_file(save(file, {"x": Call("torch._utils._rebuild_tensor_v3", args)}))["x"]
    assert ref.dtype == "U16" and ref.load().tolist() == [2, 65535]
    beyond = (storage, 2, (2,), (1,), False, OrderedDict(), TORCH.uint16)
    save(file, {"x": Call("torch._utils._rebuild_tensor_v3", beyond)})
    assert "reaches element 3 of a storage of 3" in refusal(file)


@pytest.mark.parametrize("name", ["archive", "pytorch_model", "a/b", "../../../tmp", "ünï"])
def test_any_archive_name(file: Path, name: str) -> None:
    # Nothing is ever extracted, so a name that points elsewhere is only a name.
    before = sorted(file.parent.iterdir())
    assert read_torch_file(save(file, {"x": floats(2)}, name=name))["x"].load().tolist() == [0, 1]
    assert sorted(file.parent.iterdir()) == [*before, file]


# --- which dict ---


@pytest.mark.parametrize("key", ["state_dict", "model", "anything"])
def test_wrapped_state_dicts(file: Path, key: str) -> None:
    inner = OrderedDict(x=floats(2))
    wrapped = {"epoch": 3, "best": 0.5, "none": None, "list": [1, (2,)], "options": {"lr": 0.1},
               "optimizer": {"state": {0: {"exp_avg": floats(2)}}}, key: inner}  # fmt: skip
    assert list(read_torch_file(save(file, wrapped))) == ["x"]


def test_ambiguous_wrappers_are_errors(file: Path) -> None:
    inner = {"x": floats(2)}
    assert "'model' and 'ema', expected one" in refusal(save(file, {"model": inner, "ema": inner}))
    assert "'model' and the top level" in refusal(save(file, {"model": inner, "x": floats(1)}))


def test_files_without_a_state_dict(file: Path) -> None:
    assert "no tensors; its first entries are ['epoch']" in refusal(save(file, {"epoch": 1}))
    assert "holds a list" in refusal(save(file, [floats(2)]))
    assert "holds a tensor" in refusal(save(file, floats(2)))


@pytest.mark.parametrize("value", [[1], (1,), {}, b"bytes"])
def test_other_entries_beside_tensors_are_named(file: Path, value: Any) -> None:
    message = refusal(save(file, {"x": floats(2), "extra": value}, protocol=3))
    assert f"entry 'extra' is a {type(value).__name__}" in message


def test_names_must_be_strings(file: Path) -> None:
    assert "entry 7 is a tensor" in refusal(save(file, {7: floats(2)}))


# --- damage ---


def test_other_formats_are_named(file: Path) -> None:
    cases = {
        b"": "is empty",
        b"version https://git-lfs.github.com/spec/v1\n": "Git LFS pointer",
        struct.pack("<Q", 2) + b"{}": "is a safetensors file",
        pickle.dumps(0x1950A86A20F9469CFC6C, 2): "before 1.6",
        bytes(257) + b"ustar" + bytes(250): "tar format",
        b"<html>not found</html>": "starts with b'<html>no'",
    }
    for data, message in cases.items():
        file.write_bytes(data)
        assert message in refusal(file)
    for old in (list(cases)[3], list(cases)[4]):
        file.write_bytes(old)
        assert "safetensors.torch.save_file" in refusal(file)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.bin")
    assert "directory" in refusal(tmp_path)


def test_other_zips(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("config.json", "{}")
    assert "0 entries named data.pkl" in refusal(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("b/data.pkl", b"")
    assert "2 entries" in refusal(file)
    assert "TorchScript" in refusal(save(file, {"x": floats(2)}, **{"constants.pkl": b""}))
    assert "big-endian" in refusal(save(file, {"x": floats(2)}, **{"byteorder": b"big"}))
    assert "compressed" in refusal(save(file, {"x": floats(200)}, compression=zipfile.ZIP_DEFLATED))


def test_a_missing_or_short_storage(file: Path) -> None:
    pickled, storages = dumped({"x": floats(4)})
    assert "storage '0' is missing" in refusal(write_zip(file, pickled, {}))
    short = {"0": storages["0"][:-1]}
    assert "has 15 bytes" in refusal(write_zip(file, pickled, short))


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.99])
def test_truncated_files(file: Path, kept: float) -> None:
    data = save(file, {"x": floats(500)}).read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    assert "damaged or incomplete" in refusal(file)


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "message"),
    [
        ((5,), (1,), 0, "reaches element 4 of a storage of 4"),
        ((2,), (1,), 3, "reaches element 4"),
        ((2, 2), (4, 1), 0, "reaches element 5"),
        ((1,), (1,), 2**62, "reaches element"),
        ((10**6, 10**6), (0, 0), 0, "repeats a storage of 4 elements"),
        ((2,), (-1,), 1, "not negative"),
        ((-2,), (1,), 0, "not negative"),
        ((2,), (1,), -1, "not negative"),
        ((2.0,), (1,), 0, "whole numbers"),
        ((True,), (1,), 0, "whole numbers"),
        ((2,), (1, 1), 0, "with strides"),
        ((0, 10**9, 10**9), (1, 1, 1), 0, "tensor of shape"),
        ((1,) * 40, (1,) * 40, 0, "tensor of shape"),
        ("ab", (1, 1), 0, "whole numbers"),
    ],
)
def test_bounds(file: Path, shape: Any, strides: Any, offset: int, message: str) -> None:
    args = (Storage("FloatStorage", [1, 2, 3, 4]), offset, shape, strides, False, OrderedDict())
    path = save(file, {"x": Call("torch._utils._rebuild_tensor_v2", args)})
    assert message in refusal(path)


def test_a_storage_that_claims_more_than_it_has(file: Path) -> None:
    storage = Storage("FloatStorage", [1, 2], length=10**12)
    assert "expected 4000000000000" in refusal(save(file, {"x": tensor(storage, (10**12,))}))


def test_an_oversized_pickle(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(file, {"x": floats(2)})
    monkeypatch.setattr("fastvlm_mlx.checkpoint.torch_file._MAX_PICKLE", 10)
    assert "data.pkl is larger" in refusal(file)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_pickle_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    state = OrderedDict(x=floats(2, 3), y=floats(2, kind="HalfStorage"))
    pickled, storages = dumped({"state_dict": state}, data.draw(st.sampled_from([2, 4])))
    damaged = bytearray(pickled)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        refs = read_torch_file(write_zip(file, bytes(damaged), storages))
    except CheckpointError:
        return
    for ref in refs.values():
        assert ref.load().shape == ref.shape


# --- malice ---


def touch(marker: Path) -> str:
    return f"touch {marker}"


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that every attack tries to create; the fixture checks that none did."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def test_the_attacks_would_work_on_pickle(tmp_path: Path) -> None:
    marker = tmp_path / "made"
    pickle.loads(pickle.dumps(Call("os.system", (touch(marker),))))
    assert marker.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: {"x": e}, lambda e: {"x": [(e, {1: e})]}])
def test_system_is_not_called(file: Path, marker: Path, wrap: Any, protocol: int) -> None:
    attack = wrap(Call("os.system", (touch(marker),)))
    message = refusal(save(file, attack, protocol))
    assert "nothing was executed" in message
    if protocol >= 2:
        assert f"'{os.system.__module__}.system'" in message


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("builtins.eval", ("open(MARKER, 'w')",)),
        ("builtins.exec", ("open(MARKER, 'w')",)),
        ("builtins.getattr", (types, "FunctionType")),
        ("builtins.open", ("MARKER", "w")),
        ("subprocess.Popen", (["touch", "MARKER"],)),
        ("argparse.Namespace", ()),
        ("functools.partial", (print,)),
        ("pickle.loads", (b"",)),
        ("importlib.import_module", ("antigravity",)),
    ],
)
def test_other_globals_are_refused_by_name(
    file: Path, marker: Path, function: str, args: tuple[Any, ...]
) -> None:
    values = tuple(a.replace("MARKER", str(marker)) if isinstance(a, str) else "x" for a in args)
    message = refusal(save(file, {"x": floats(2), "args": Call(function, values)}, protocol=4))
    assert function.split(".")[1] in message and "nothing was executed" in message


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__.get"),
        ("torch", "os.system"),
        ("torch._utils._rebuild_tensor_v2", "__call__"),
        ("collections", "OrderedDict.__init__"),
        ("", "torch.Size"),
        ("torch.cuda", "FloatTensor"),
        ("torch.jit", "load"),
        ("torch", "load"),
        ("fastvlm_mlx.checkpoint.torch_file", "read_torch_file"),
        ("torch.storage", "_load_from_bytes"),
        ("evil\nmodule", "a\x1b[2Jb"),
    ],
)
def test_dotted_names_are_refused(file: Path, marker: Path, module: str, name: str) -> None:
    attack = b"\x80\x04" + stack_global(module, name) + text(touch(marker)) + b"\x85R."
    message = refusal(write_zip(file, attack, {}))
    assert "its pickle asks for" in message
    assert "\x1b" not in message


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"\x80\x02(cos\nsystem\n.", "os.system"),
        (b"\x80\x02(S'true'\nios\nsystem\n.", "STRING"),
        (b"\x80\x02(ios\nsystem\n.", "uses INST"),
        (b"\x80\x02(ccollections\nOrderedDict\no.", "uses OBJ"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "uses NEWOBJ"),
        (b"\x80\x04" + stack_global("collections", "OrderedDict") + b")}\x92.", "uses NEWOBJ_EX"),
        (b"\x80\x02\x82\x01.", "uses EXT1"),
        (b"\x80\x02ctorch\nSize\n}b.", "damaged"),  # attributes on a function
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "damaged"),
        (b"\x80\x02ctorch\nfloat32\n)R.", "damaged"),
        (b"\x80\x02X\x01\x00\x00\x00x)R.", "damaged"),  # calling a string
        (b"\x80\x02}q\x00h\x01.", "damaged"),  # a memo that was never made
        (b"\x80\x02].", "holds a list"),
        (b"\x80\x02}}.", "damaged"),
        (b"\x80\x02}(.", "damaged"),  # a mark that nothing has used
        (b"\x80\x02}", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02K\x01Q.", "damaged"),  # a storage that is a number
        (b"\x80\x02}]K\x01s.", "damaged"),  # a list as a key
    ],
)
def test_pickles_by_hand(file: Path, opcodes: bytes, message: str) -> None:
    assert message in refusal(write_zip(file, opcodes, {}))


def test_a_registered_extension_is_no_way_in(file: Path, marker: Path) -> None:
    copyreg.add_extension(os.system.__module__, "system", 200)
    try:
        attack = b"\x80\x02\x82\xc8" + text(touch(marker)) + b"\x85R."
        assert "EXT1" in refusal(write_zip(file, attack, {}))
    finally:
        copyreg.remove_extension(os.system.__module__, "system", 200)


def test_a_list_inside_itself_is_only_odd(file: Path) -> None:
    assert "holds a list" in refusal(write_zip(file, b"\x80\x02]q\x00h\x00a.", {}))


def test_unsupported_types_are_named(file: Path) -> None:
    assert "torch.ComplexFloatStorage" in refusal(
        save(file, {"x": floats(2, kind="ComplexFloatStorage")})
    )
    storage = Storage("UntypedStorage", [0, 0])
    args = (storage, 0, (2,), (1,), False, OrderedDict(), TORCH.float8_e4m3fn)
    path = save(file, {"x": Call("torch._utils._rebuild_tensor_v3", args)})
    assert "torch.float8_e4m3fn" in refusal(path)


# --- the real thing ---


def test_a_file_written_by_torch(file: Path) -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = layer.state_dict()
    state["half"] = torch.randn(5, 6).to(torch.float16).t()
    state["brain"] = torch.randn(5, 6).to(torch.bfloat16)[1:, ::2]
    state["double"] = torch.randn(2, dtype=torch.float64)
    state["flags"] = torch.tensor([True, False])
    state["wide"] = torch.tensor([1, 65535], dtype=torch.uint16)
    state["parameter"] = torch.nn.Parameter(torch.randn(3))
    state["last_channels"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state["empty"] = torch.zeros(0, 3)
    state["scalar"] = torch.tensor(3.5)
    for value, protocol in ((state, 2), ({"epoch": 1, "state_dict": state}, 4)):
        torch.save(value, file, pickle_protocol=protocol)
        refs = read_torch_file(file)
        assert refs.keys() == state.keys()
        for name, ref in refs.items():
            assert ref.shape == tuple(state[name].shape), name
            expected = state[name].detach().to(torch.float32).numpy()
            loaded = np.array(ref.load().astype(mx.float32))
            np.testing.assert_array_equal(loaded, expected, err_msg=name)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(file)
    torch.save({"x": torch.ones(1), "module": layer}, file)
    assert "torch.nn.modules.container.Sequential" in refusal(file)
