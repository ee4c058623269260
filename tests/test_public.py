"""The public surface, what importing costs, and the direction of imports."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fastvlm_mlx as fv

ROOT = Path(__file__).resolve().parents[1]

# Each module may import from its own line and the lines above. See CONTRIBUTING.md.
FLOORS = [
    {"errors", "blas", "memory"},
    {"config", "saved", "images", "colour", "fetching", "listing", "tokenizer", "ops"},
    {"prompt", "tiling", "constraint"},
    {"vision"},
    {"model"},
    {"checkpoint", "features", "generation", "scoring"},
    {"batching"},
    {"chat", "many", "vlm"},  # a conversation names the type of what it talks to
    {
        "opening",
        "records",
        "sidecars",
        "encoder_check",
        "report",
        "testing",
        "testing_files",
        "testing_names",
    },
    {"cli"},
]


def test_all_names_resolve_and_nothing_else_is_promised() -> None:
    assert sorted(fv.__all__) == sorted(set(fv.__all__))
    for name in fv.__all__:
        assert getattr(fv, name) is not None
    assert set(fv._HOME) | {"__version__"} == set(fv.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        fv.lod  # noqa: B018


def test_import_is_light() -> None:
    code = (
        "import sys, fastvlm_mlx, fastvlm_mlx.cli;"
        "heavy = {'mlx', 'mlx_lm', 'numpy', 'PIL', 'torch', 'transformers', 'huggingface_hub'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_loading_a_model_imports_no_transformers(tiny: Path) -> None:
    code = (
        f"import sys, fastvlm_mlx as fv; fv.load({str(tiny)!r});"
        "print(sorted({'torch', 'transformers', 'mlx_lm.generate'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_mlx_lm_still_works_after_us() -> None:
    from fastvlm_mlx.model import mlx_lm_module

    cache = mlx_lm_module("models.cache")
    mlx_lm = importlib.import_module("mlx_lm")
    assert callable(mlx_lm.stream_generate)
    assert importlib.import_module("mlx_lm.models.cache") is cache


def _module_of(path: Path) -> str:
    return path.relative_to(ROOT / "fastvlm_mlx").parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """First-level modules of the package that a file imports, wherever in it."""
    package = ("fastvlm_mlx", *path.relative_to(ROOT / "fastvlm_mlx").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        parts = (*base, *(node.module.split(".") if node.module else ()))
        if parts[:1] != ("fastvlm_mlx",):
            continue
        found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "fastvlm_mlx").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_never_go_upward(path: Path) -> None:
    module = _module_of(path)
    if module in ("__init__", "nano"):
        return
    floor = next((n for n, names in enumerate(FLOORS) if module in names), None)
    assert floor is not None, f"{module} has no floor; add it to FLOORS and to CONTRIBUTING.md"
    allowed = {"__init__", module}.union(*FLOORS[: floor + 1])
    assert _imports(path) <= allowed, f"{module} imports upward: {_imports(path) - allowed}"


def test_the_package_never_imports_the_converters_or_benchmarks() -> None:
    for path in (ROOT / "fastvlm_mlx").rglob("*.py"):
        assert not _imports(path) & {"convert", "benchmarks"}, path


def test_a_function_never_has_the_name_of_a_module() -> None:
    modules = {p.stem for p in (ROOT / "fastvlm_mlx").rglob("*.py")}
    for path in (ROOT / "fastvlm_mlx").rglob("*.py"):
        names = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
        # `mlx_lm`'s entry points apart, a shadowed module cannot be imported any more.
        assert not names & modules - {"main"}, f"{path}: {names & modules}"
