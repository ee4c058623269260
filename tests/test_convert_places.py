"""Where conversions come from and go to: PyTorch files, places that refuse, disks that fill up."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.convert import conversion
from fastvlm_mlx.convert.conversion import Options, convert_checkpoint
from tests.test_convert_command import _hash, _run
from tests.test_torch_file import Storage, save, tensor


def _as_torch_file(source: Path, target: Path) -> Path:
    """The same checkpoint with its weights in pytorch_model.bin."""
    shutil.copytree(source, target)
    loaded: Any = mx.load(str(source / "model.safetensors"))
    (target / "model.safetensors").unlink()
    state = {
        name: tensor(
            Storage("FloatStorage", np.array(array.astype(mx.float32)).reshape(-1)),
            tuple(array.shape),
        )
        for name, array in loaded.items()
    }
    save(target / "pytorch_model.bin", state)
    return target


def _tensors(folder: Path) -> dict[str, mx.array]:
    loaded: Any = mx.load(str(folder / "model.safetensors"))
    return dict(loaded)


def test_pytorch_files_become_safetensors(tiny: Path, tmp_path: Path) -> None:
    source = _as_torch_file(tiny, tmp_path / "source")
    before = _hash(source)
    done = convert_checkpoint(str(source), tmp_path / "bin", Options(bits=4, samples=1))
    assert done.report["verification"]["passed"]
    convert_checkpoint(str(tiny), tmp_path / "safe", Options(bits=4, verify=False))
    ours, expected = _tensors(tmp_path / "bin"), _tensors(tmp_path / "safe")
    assert ours.keys() == expected.keys()
    assert all(mx.array_equal(ours[name], expected[name]) for name in expected)
    assert _hash(source) == before
    options = Options(layout="apple", dtype="bfloat16", verify=False)
    convert_checkpoint(str(source), tmp_path / "apple", options)
    names = _tensors(tmp_path / "apple")
    genuine = _tensors(tiny)
    assert all(mx.array_equal(names[n], genuine[n]) for n in names if "head.proj" not in n)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_place_that_cannot_be_written_is_one_line(tiny: Path) -> None:
    done = _run(str(tiny), "/proc/fastvlm/out", "--no-verify")
    assert done.returncode == 1
    assert done.stderr.startswith("fastvlm: Cannot write to /proc/fastvlm (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["absent", "out"], 1, "No checkpoint at 'absent'"),
        (["SRC", "out", "--bits", "7"], 2, "bits is 7; expected one of 2, 3, 4, 5, 6, 8"),
        (["SRC", "out", "--bits", "4", "--group-size", "128"], 2, "does not divide the 64 inputs"),
        (["SRC", "out", "--recipe", "best"], 2, "expected uniform, mixed, auto or a .toml file"),
        (["SRC", "out", "--recipe", "wrong.toml"], 2, "unknown keys bitz, grups"),
        (["SRC", "out", "--upload", "nowhere"], 2, "expected a Hub id such as"),
        (["SRC", "SRC", "--force"], 1, "the source is never modified"),
    ],
)
def test_bad_input_is_one_line(
    tiny: Path, tmp_path: Path, args: list[str], code: int, said: str
) -> None:
    (tmp_path / "wrong.toml").write_text("bitz = 4\ngrups = 64\n")
    done = _run(*[str(tiny) if a == "SRC" else a for a in args], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("fastvlm: ")
    assert [p.name for p in tmp_path.iterdir()] == ["wrong.toml"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if (
        not sys.platform.startswith("linux")
        or os.geteuid() != 0
        or not shutil.which("mount")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_changes_nothing(
    tiny: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", small_disk / "out"
    shutil.copytree(tiny, source)
    (small_disk / "out").mkdir()
    (target / "config.json").write_text("the old state")
    before = _hash(source), _hash(target)
    force = Options(bits=4, verify=False, overwrite=True)
    with pytest.raises(fv.CheckpointError, match=r"has 1 MB free, but 70 MB are needed"):
        convert_checkpoint(str(source), target, force)
    # What another program takes after that check is found while writing.
    monkeypatch.setattr(conversion, "_check_space", lambda *_: None)
    for filled in (0, 200_000, 700_000, 1_000_000):
        (small_disk / "other").write_bytes(b"x" * filled)
        with pytest.raises(fv.CheckpointError, match=r"disk is full|could not be completed"):
            convert_checkpoint(str(source), target, force)
        assert (_hash(source), _hash(target)) == before
        assert sorted(p.name for p in small_disk.iterdir()) == ["other", "out"]
