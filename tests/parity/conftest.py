"""Parity with the reference implementations: PyTorch, timm and transformers, all in float32.

Run in the environment that `.ci/parity-env DIR` makes: `DIR/bin/python -m pytest tests/parity`.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before timm is imported: its attention is then written out, as Apple's is.
os.environ["TIMM_FUSED_ATTN"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MLX_ENABLE_TF32"] = "0"

from fastvlm_mlx.blas import load_openblas

load_openblas()

import pytest
import torch


def _import_torchvision() -> None:
    """Import torchvision although its compiled operators do not load beside a CPU build of torch.

    timm and transformers import it and use nothing of it here; what breaks is that it describes
    its missing operators (`torchvision::nms`) to torch's compiler.
    """
    register_fake = torch.library.register_fake

    def tolerant(op, func=None, /, **kwargs):
        def register(function):
            try:
                return register_fake(op, function, **kwargs)
            except RuntimeError as error:
                if "does not exist" not in str(error):
                    raise
                return function

        return register if func is None else register(func)

    torch.library.register_fake = tolerant
    try:
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = register_fake


_import_torchvision()

SHARED = Path(__file__).parents[3] / "shared" / "data"

Figure = Callable[..., None]
_figures: list[tuple[str, float, float]] = []


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Figure:
    """State a measured figure, in the report and at the end of the run, and hold it to a limit."""

    def state(name: str, value: float, at_most: float) -> None:
        _figures.append((name, value, at_most))
        record_property(name, value)
        assert value <= at_most, f"{name}: {value:.3g}, at most {at_most:.3g} allowed"

    return state


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print every measured figure."""
    if _figures:
        terminalreporter.section("figures (relative error unless said otherwise)")
    for name, value, limit in _figures:
        mark = "" if value <= limit else "   <-- above the limit"
        terminalreporter.write_line(f"{name:<64} {value:10.3g}  (limit {limit:.3g}){mark}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Facts about the genuine files, where this machine has them."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: the genuine files' names, shapes and tokenizer")
    return SHARED


@pytest.fixture(scope="session")
def qwen2_tokenizer(shared: Path) -> Path:
    """The real tokenizer of FastVLM-0.5B."""
    folder = shared / "qwen2_tokenizer"
    if not (folder / "merges.txt").is_file():
        pytest.skip(f"{folder} is not there: the real Qwen2 tokenizer")
    return folder


@pytest.fixture(scope="session")
def workspace() -> Iterator[Path]:
    """A folder for checkpoints of hundreds of megabytes; gone after the run, unlike tmp_path."""
    with tempfile.TemporaryDirectory(prefix="fastvlm-parity-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def small_tokenizer(workspace: Path) -> Path:
    """A byte-level BPE of a few hundred tokens in Qwen2's file form (vocab.json, merges.txt)."""
    import checkpoints

    folder = workspace / "tokenizer"
    checkpoints.write_small_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
