"""Imports run one way, acqsynth -> score -> acquisitions -> row_stats -> backends -> kernels, _core."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.find_spec("acqcore")
assert _SPEC is not None
assert _SPEC.origin is not None
ACQCORE = Path(_SPEC.origin).parent
_SYNTH = importlib.util.find_spec("acqsynth")
assert _SYNTH is not None
assert _SYNTH.origin is not None
ACQSYNTH = Path(_SYNTH.origin).parent

#: module or package of acqcore -> what of acqcore it may import
ALLOWED: dict[str, set[str]] = {
    "acquisitions": {"bayes", "checks", "diversity", "gradients", "head", "literals", "row_stats", "student"},
    "backends": {"_core", "checks", "head", "kernels", "philox", "vocab_parallel"},
    "bayes": {"backends", "checks", "head", "vocab_parallel"},
    "checks": set(),
    "data_files": {"checks"},
    "diversity": {"checks", "select"},
    "engines": {"checks", "data_files", "parts", "scorer"},
    "gradients": {"backends", "checks", "head", "head_grad", "literals", "row_stats", "signs", "student"},
    "head": {"checks"},
    "head_grad": {"backends", "checks", "head", "row_stats", "signs", "vocab_parallel"},
    "kernels": set(),
    "literals": set(),
    "packing": {"checks", "samples"},
    "parts": {"checks"},
    "philox": set(),
    "progress": set(),
    "row_stats": {"backends", "checks", "head", "vocab_parallel"},
    "run_summary": {"scorer"},
    "samples": {"checks"},
    "scorer": {"checks", "data_files", "parts", "samples", "scoring", "student"},
    "scores": {"checks"},
    "scoring": {
        "acquisitions",
        "backends",
        "bayes",
        "checks",
        "gradients",
        "head",
        "head_grad",
        "literals",
        "packing",
        "progress",
        "row_stats",
        "samples",
        "scores",
        "student",
        "trunk_draws",
    },
    "select": {"checks", "scores"},
    "sharding": set(),
    "signs": set(),
    "student": {"checks", "head", "sharding", "vocab_parallel"},
    "testing": {"head", "row_stats"},
    "trunk_draws": {"backends", "checks", "sharding", "student"},
    "vocab_parallel": {"checks", "head"},
}
ABOVE_SCORE = {"__init__", "__main__", "cli", "plan"}  # may import anything of acqcore


def _imported(path: Path, package: str) -> set[str]:
    """Names below ``package`` that a file imports, function-level imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1:
                found.add(parts[1])
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def test_every_module_is_in_the_table() -> None:
    present = {p.relative_to(ACQCORE).parts[0].removesuffix(".py") for p in _files(ACQCORE)} | {"kernels"}
    assert present - ABOVE_SCORE <= set(ALLOWED)


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_run_one_way(name: str) -> None:
    folder = ACQCORE / name
    files = _files(folder) if folder.is_dir() else [ACQCORE / f"{name}.py"]
    for path in files:
        if not path.exists():
            assert name == "kernels", f"{path} is in the table but not in the package"
            continue
        assert _imported(path, "acqcore") <= ALLOWED[name] | {name}, path


def test_acqcore_never_imports_acqsynth() -> None:
    for path in _files(ACQCORE):
        assert not _imported(path, "acqsynth") | ({"acqsynth"} & _roots(path)), path


def test_acqsynth_uses_public_names_alone() -> None:
    import acqcore

    for path in _files(ACQSYNTH):
        assert _imported(path, "acqcore") <= set(acqcore.__all__) | {"testing"}, path


@pytest.mark.parametrize("folder", [ACQCORE], ids=["acqcore"])
def test_top_level_imports_are_torch_and_numpy_alone(folder: Path) -> None:
    """Everything heavier is imported inside the function that needs it."""
    import sys

    for path in _files(folder):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                roots = {(node.module or "").split(".")[0]}
            elif isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            else:
                continue
            outside = roots - set(sys.stdlib_module_names) - {"acqcore", "torch", "numpy"}
            if "kernels" in path.parts:
                outside -= {"triton"}
            assert not outside, path


def _roots(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found
