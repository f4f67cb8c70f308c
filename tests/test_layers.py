"""The folders of acqcore import each other in one direction, and every module can be reached by its name."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import acqcore

ACQCORE = Path(acqcore.__file__).parent
_SYNTH = importlib.util.find_spec("acqsynth")
ACQSYNTH = Path(_SYNTH.origin).parent

#: folder or module of acqcore -> those it may import
ALLOWED: dict[str, set[str]] = {
    "acquisitions": {
        "bayes", "checks", "gradients", "head", "head_grad", "literals", "row_stats", "selection", "students",
    },
    "backends": {"_core", "checks", "defaults", "head", "kept", "kernels", "philox", "slots", "vocab_parallel"},
    "bayes": {"backends", "checks", "defaults", "head", "head_grad", "kept", "literals", "vocab_parallel"},
    "checks": set(),
    "costs": {
        "acquisitions", "checks", "gradients", "head_grad", "literals", "options", "progress", "scoring", "selection",
        "students",
    },
    "files": {"acquisitions", "checks", "literals", "options", "progress", "scoring", "selection", "students"},
    "defaults": set(),
    "fisher": {"backends", "bayes", "checks", "defaults", "head", "philox", "row_stats"},
    "gradients": {
        "backends", "checks", "defaults", "fisher", "head", "head_grad", "head_visit", "kept", "literals",
        "row_stats", "signs", "students",
    },
    "head": {"checks"},
    "head_grad": {
        "backends", "checks", "defaults", "head", "head_visit", "kept", "literals", "row_stats", "signs",
        "vocab_parallel",
    },
    "head_visit": {"backends", "head", "kept", "row_stats", "vocab_parallel"},
    "kept": set(),
    "kernels": {"kept", "slots"},
    "literals": set(),
    "options": {"checks"},
    "philox": set(),
    "progress": set(),
    "row_stats": {"backends", "checks", "head", "vocab_parallel"},
    "scores": {"checks"},
    "scoring": {
        "acquisitions", "backends", "bayes", "checks", "defaults", "fisher", "gradients", "head", "head_grad",
        "head_visit", "literals", "progress", "row_stats", "scores", "students",
    },
    "selection": {"checks", "defaults", "literals", "scores"},
    "signs": {"backends", "kept"},
    "slots": set(),
    "students": {"backends", "checks", "defaults", "head", "literals", "vocab_parallel"},
    "testing": {"head", "row_stats"},
    "vocab_parallel": {"checks", "head"},
}  # fmt: skip
FRONT = {"__init__", "__main__", "cli"}  # may import anything


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Dotted names of the import statements among ``nodes``."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _imported(path: Path, package: str) -> set[str]:
    """Names below ``package`` that a file imports, also inside functions."""
    return {name.split(".")[1] for name in _imports(ast.walk(_tree(path))) if name.startswith(f"{package}.")}


def _files(folder: Path) -> list[Path]:
    folders = os.walk(folder, followlinks=True)
    return sorted(Path(root) / name for root, _, names in folders for name in names if name.endswith(".py"))


def test_every_folder_is_in_the_table():
    present = {p.relative_to(ACQCORE).parts[0].removesuffix(".py") for p in _files(ACQCORE)}
    assert present - FRONT == set(ALLOWED)


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_run_one_way(name):
    folder = ACQCORE / name
    for path in _files(folder) if folder.is_dir() else [ACQCORE / f"{name}.py"]:
        assert _imported(path, "acqcore") <= ALLOWED[name] | {name}, path


@pytest.mark.parametrize("package", [ACQCORE, ACQSYNTH], ids=lambda package: package.name)
def test_there_are_no_circles(package):
    """Neither folders nor modules import each other in a cycle, even inside functions; CycleError names one."""
    TopologicalSorter(ALLOWED).prepare()
    paths = {_module(path): path for path in _files(package) if path.stem not in FRONT}
    graph = {}
    for module, path in paths.items():
        names = set(_imports(ast.walk(_tree(path))))
        graph[module] = {name for name in names | {n.rpartition(".")[0] for n in names} if name in paths}
    TopologicalSorter(graph).prepare()


def test_no_module_is_hidden_by_a_function():
    for path in _files(ACQCORE):
        if path.stem in FRONT or "kernels" in path.parts:
            continue
        name = _module(path)
        module = importlib.import_module(name)
        parent, _, child = name.rpartition(".")
        if name != "acqcore.row_stats":
            assert getattr(sys.modules[parent], child) is module, name


def _module(path: Path) -> str:
    package = ACQCORE if path.is_relative_to(ACQCORE) else ACQSYNTH
    return ".".join((package.name, *path.relative_to(package).with_suffix("").parts))


def test_acqcore_never_imports_acqsynth():
    for path in _files(ACQCORE):
        assert not any(name.split(".")[0] == "acqsynth" for name in _imports(ast.walk(_tree(path)))), path


def test_acqsynth_uses_public_names_alone():
    """Besides these the tests' helpers and the table of the kinds of samples, in ``students``."""
    for path in _files(ACQSYNTH):
        assert _imported(path, "acqcore") <= set(acqcore.__all__) | {"students", "testing"}, path


def test_top_level_imports_are_torch_and_numpy_alone():
    """Heavier packages are imported inside the functions that need them."""
    for path in _files(ACQCORE):
        roots = {name.split(".")[0] for name in _imports(_tree(path).body)}
        outside = roots - set(sys.stdlib_module_names) - {"acqcore", "torch", "numpy"}
        if "kernels" in path.parts:
            outside -= {"triton"}
        assert not outside, path
