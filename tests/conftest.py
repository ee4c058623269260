"""Fixtures shared by all tests: tiny checkpoints, made once per session."""

import os
from pathlib import Path

import numpy as np
import pytest

from fastvlm_mlx.blas import load_openblas

load_openblas()
os.environ["MLX_ENABLE_TF32"] = "0"  # float32 results are compared as such, also on an M5

import fastvlm_mlx as fv  # noqa: E402
from fastvlm_mlx.testing import random_checkpoint  # noqa: E402
from tests.notes import NOTES  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in Apple's form; tests must not write into it."""
    return random_checkpoint(tmp_path_factory.mktemp("tiny") / "apple", size="tiny")


@pytest.fixture(scope="session")
def vlm(tiny: Path) -> fv.FastVLM:
    """The tiny checkpoint, loaded in float32; every picture is encoded anew."""
    return fv.load(tiny, dtype="float32", feature_cache=None)


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """A landscape picture with no two equal rows or columns, (90, 160, 3) uint8."""
    return np.random.default_rng(7).integers(0, 256, (90, 160, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def qwen2_tokenizer() -> Path:
    """Directory of the genuine Qwen2 tokenizer files."""
    folder = NOTES / "qwen2_tokenizer"
    if not folder.is_dir():
        pytest.skip("needs the genuine Qwen2 tokenizer files, which the package does not ship")
    return folder
