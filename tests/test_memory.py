"""Memory that a model may take."""

from pathlib import Path

import mlx.core as mx
import pytest

from fastvlm_mlx import memory


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU tells of its own memory")
def test_what_linux_says_is_available_and_else_most_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:  8000 kB\nMemFree:  10 kB\nMemAvailable:  5000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", told)
    assert memory.available_memory() == 5000 * 1024
    told.unlink()
    whole = memory.physical_memory()
    assert whole is not None and memory.available_memory() == whole * 3 // 4
    monkeypatch.setattr(memory, "physical_memory", lambda: None)
    assert memory.available_memory() is None
