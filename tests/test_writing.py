"""Files and directories as they are written: complete or not at all."""

import dataclasses
import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from safetensors import safe_open

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint import writing
from fastvlm_mlx.checkpoint.writing import (
    PlannedTensor,
    ShardedWriter,
    config_to_dict,
    new_directory,
)
from fastvlm_mlx.config import parse_config

PLANNED = [
    PlannedTensor("a.weight", "BF16", (5, 3)),
    PlannedTensor("b.weight", "U32", (2, 4)),
    PlannedTensor("b.scales", "F16", (2, 1)),
    PlannedTensor("c", "F32", (7,)),
    PlannedTensor("d", "U8", (3,)),
]


def test_config_survives_the_round_trip(vlm: fv.FastVLM) -> None:
    assert parse_config(config_to_dict(vlm.config)) == vlm.config
    scaled = dataclasses.replace(
        vlm.config,
        vision=dataclasses.replace(vlm.config.vision, residual_scales=(1, 1, 1, 0.5, 0.25)),
    )
    assert parse_config(config_to_dict(scaled)) == scaled


def _arrays() -> dict[str, mx.array]:
    return {
        "a.weight": mx.arange(15).reshape(5, 3).astype(mx.bfloat16),
        "b.weight": mx.arange(8).reshape(2, 4).astype(mx.uint32),
        "b.scales": mx.array([[0.5], [2.0]], dtype=mx.float16),
        "c": mx.arange(7).astype(mx.float32),
        "d": mx.array([1, 2, 255], dtype=mx.uint8),
    }


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (60, 3), (1, 4)])
def test_tensors_in_pieces_and_shards(tmp_path: Path, limit: int, files: int) -> None:
    seen: list[tuple[int, int]] = []
    arrays = _arrays()
    with ShardedWriter(
        tmp_path,
        PLANNED,
        {"format": "test"},
        shard_bytes=limit,
        progress=lambda done, total: seen.append((done, total)),
    ) as writer:
        for name in reversed(arrays):
            for start in range(0, arrays[name].shape[0], 2):
                writer.write(name, arrays[name][start : start + 2])
    names = sorted(tmp_path.glob("*.safetensors"))
    assert len(names) == files
    found: dict[str, mx.array] = {}
    for name in names:
        with safe_open(name, framework="numpy") as file:
            assert file.metadata() == {"format": "test"}
        loaded: Any = mx.load(str(name))
        found |= loaded
    assert found.keys() == arrays.keys()
    assert all(mx.array_equal(found[name], arrays[name]) for name in arrays)
    assert all(found[name].dtype == arrays[name].dtype for name in arrays)
    assert seen[-1] == (30 + 32 + 4 + 28 + 3,) * 2
    if files > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == arrays.keys()
        assert index["weight_map"]["b.weight"] == index["weight_map"]["b.scales"]


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    """Readers map the file into memory and look at it as numbers of that size."""
    arrays = _arrays()
    for n in range(8):  # headers of every length
        with ShardedWriter(tmp_path, PLANNED, {"format": "x" * n}) as writer:
            for name, array in arrays.items():
                writer.write(name, array)
        data = (tmp_path / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name, array in arrays.items():
            assert (8 + length + header[name]["data_offsets"][0]) % array.dtype.size == 0
        assert length % 8 == 0


def test_two_directories_change_places(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not writing._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two directories")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()


def test_a_forgotten_tensor_is_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="never written"),
        ShardedWriter(tmp_path, PLANNED, {}) as writer,
    ):
        writer.write("c", _arrays()["c"])


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(fv.CheckpointError, match="disk is full; 0 MB are needed"),
        new_directory(tmp_path / "out") as folder,
        ShardedWriter(folder, PLANNED, {}) as writer,
    ):
        _, at = writer._where["c"]

        class Full:
            def seek(self, at: int) -> None: ...

            def write(self, data: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setitem(writer._where, "c", (Full(), at))
        writer.write("c", _arrays()["c"])
    assert list(tmp_path.iterdir()) == []


def test_other_files_may_fill_the_disk_too(tmp_path: Path) -> None:
    with (
        pytest.raises(fv.CheckpointError, match=r"out could not be completed .*No space left"),
        new_directory(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_half_written(tmp_path: Path) -> None:
    target = tmp_path / "new" / "target"
    with pytest.raises(ZeroDivisionError), new_directory(target) as temporary:
        (temporary / "half").write_text("")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    with new_directory(target) as temporary:
        (temporary / "config.json").write_text("old")
    with pytest.raises(fv.CheckpointError, match="already exists"), new_directory(target):
        pass
    with pytest.raises(KeyboardInterrupt), new_directory(target, overwrite=True) as temporary:
        (temporary / "half").write_text("")
        raise KeyboardInterrupt
    assert [p.name for p in target.iterdir()] == ["config.json"]
    assert [p.name for p in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(writing, "_exchange", lambda a, b: False)
    target = tmp_path / "target"
    for text in ("old", "new"):
        with new_directory(target, overwrite=True) as temporary:
            (temporary / "config.json").write_text(text)
            (temporary / text).write_text("")
        assert (target / "config.json").read_text() == text
        assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert not (target / "old").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_that_finder_has_looked_at_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(writing, "_exchange", lambda a, b: False)
    target = tmp_path / "new folder"
    target.mkdir()
    (target / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    with new_directory(target) as temporary:
        (temporary / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["new folder"]


def test_a_volume_without_locks_and_flushes_of_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network volume may be: only files can be flushed, nothing can be locked."""
    flushed = []

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.ENOTSUP, "Operation not supported")
        flushed.append(handle)

    def flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("fcntl.flock", flock)
    target = tmp_path / "target"
    with new_directory(target) as temporary:
        (temporary / "config.json").write_text("new")
    assert len(flushed) == 1 and [p.name for p in target.iterdir()] == ["config.json"]

    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", broken)
    with (
        pytest.raises(fv.CheckpointError, match="Input/output error"),
        new_directory(tmp_path / "b"),
    ):
        pass


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    with (
        pytest.raises(fv.CheckpointError, match="holds no checkpoint"),
        new_directory(target, overwrite=True),
    ):
        pass
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with (
            pytest.raises(fv.CheckpointError, match=r"not a directory|Cannot write"),
            new_directory(place, overwrite=True),
        ):
            pass
    assert (target / "precious.txt").read_text() == "mine"


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    code = (
        "import os, signal, sys, pathlib\n"
        "from fastvlm_mlx.checkpoint.writing import new_directory\n"
        "with new_directory(pathlib.Path(sys.argv[1])) as t:\n"
        "    (t / 'model.safetensors').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.fastvlm-partial-")
    (tmp_path / ".out.other").mkdir()
    with new_directory(target) as mine:
        assert not left.exists()
        # A second run beside this one leaves the living one's directory alone.
        writing.remove_stale(target)
        assert mine.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.other", "out"]


def test_a_state_set_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.fastvlm-old-0123abcd"
    aside.mkdir()
    (aside / "config.json").write_text("old")
    writing.remove_stale(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with (
        pytest.raises(fv.CheckpointError, match=r"Cannot write to .*Permission denied"),
        new_directory(tmp_path / "locked" / "out"),
    ):
        pass
