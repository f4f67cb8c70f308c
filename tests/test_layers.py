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
ALLOWED = {
    "checks": set(),
    "kernels": set(),
    "head": {"checks"},
    "vocab_parallel": {"checks", "head"},
    "sharding": set(),
    "backends": {"checks", "head", "kernels", "_core", "philox", "vocab_parallel"},
    "row_stats": {"checks", "head", "backends", "vocab_parallel"},
    "signs": set(),
    "philox": set(),
    "bayes": {"checks", "head", "backends", "vocab_parallel"},
    "trunk_draws": {"checks", "backends", "sharding", "student"},
    "draws": {"checks", "backends", "bayes", "head", "samples", "student", "trunk_draws"},
    "head_visit": {"head", "backends", "row_stats", "vocab_parallel"},
    "head_grad": {"checks", "head", "backends", "head_visit", "row_stats", "signs", "vocab_parallel"},
    "acquisitions": {"bayes", "head", "row_stats", "head_grad", "head_visit", "checks"},
    "testing": {"head", "row_stats"},
    "samples": {"checks"},
    "packing": {"checks", "samples"},
    "student": {"checks", "head", "sharding", "vocab_parallel"},
    "scores": {"checks"},
    "ghost_measures": {"backends", "head", "head_grad", "row_stats", "signs"},
    "ghost_rules": {"checks", "head", "ghost_measures"},
    "ghost_capture": {"checks", "head", "student", "ghost_measures", "ghost_rules"},
    "ghost": {
        "checks",
        "head",
        "head_grad",
        "packing",
        "row_stats",
        "samples",
        "student",
        "ghost_measures",
        "ghost_capture",
    },
    "sketch": {"ghost", "head", "head_grad", "samples", "student"},
    "select": {"checks", "scores"},
    "diversity": {"checks", "select"},
    "badge": {"student", "samples", "ghost"},
    "set_signals": {"checks", "diversity", "ghost", "samples", "student"},
    "influence": {"checks", "student", "samples", "ghost", "ghost_capture"},
    "progress": set(),
    "parts": {"checks"},
    "score": {
        "bayes",
        "checks",
        "draws",
        "ghost",
        "influence",
        "head",
        "head_visit",
        "student",
        "samples",
        "packing",
        "progress",
        "scores",
        "set_signals",
        "acquisitions",
        "row_stats",
    },
    "stream": {"acquisitions", "checks", "samples", "score", "scores", "student"},
    "data_files": {"checks"},
    "scorer": {"checks", "data_files", "parts", "samples", "score", "student"},
    "engines": {"checks", "data_files", "parts", "scorer"},
    "run_summary": {"scorer"},
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
