"""Listing, choosing and forcing backends and instruction sets."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import acqcore
from acqcore import _core
from acqcore.testing import random_case


def test_listing():
    rows = {row.name: row for row in acqcore.backends()}
    assert list(rows) == ["cpu", "cuda", "triton", "eager"]
    assert rows["cpu"].available
    assert rows["cpu"].reason is None
    assert rows["cpu"].instruction_set == _core.best_isa()
    assert rows["eager"].instruction_set is None
    assert all(row.description for row in rows.values())


def test_isas_are_ordered_and_the_best_is_the_last_present():
    present = [name for name, missing in _core.isas() if not missing]
    assert present[-1] == _core.best_isa()


def test_unknown_backend():
    case = random_case(2, 4, 8)
    with pytest.raises(
        ValueError, match=r"backend: unknown 'cpuu', expected one of cpu, cuda, triton, eager; did you mean 'cpu'"
    ):
        case.run("cpuu")


def test_environment_forces_a_backend(monkeypatch):
    case = random_case(2, 4, 8)
    monkeypatch.setenv("ACQCORE_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="ACQCORE_BACKEND: unknown 'nonsense'"):
        acqcore.row_stats(case.hidden, case.head)
    # only eager supports float64, so success shows that eager ran
    monkeypatch.setenv("ACQCORE_BACKEND", "eager")
    assert acqcore.row_stats(case.hidden.double(), case.head).entropy.dtype == torch.float64
    monkeypatch.setenv("ACQCORE_BACKEND", "cpu")
    with pytest.raises(
        ValueError, match="ACQCORE_BACKEND: backend 'cpu' supports float32, bfloat16, float16, got float64"
    ):
        acqcore.row_stats(case.hidden.double(), case.head)


def test_nothing_falls_back_to_eager():
    case = random_case(2, 4, 8)
    with pytest.raises(RuntimeError, match="Pass backend='eager' to use plain torch"):
        acqcore.row_stats(case.hidden.double(), case.head)


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("ACQCORE_ISA", "avx1024")
    with pytest.raises(ValueError, match="ACQCORE_ISA: unknown 'avx1024'"):
        random_case(2, 4, 8).run("cpu")
    with pytest.raises(ValueError, match="ACQCORE_ISA"):
        acqcore.backends()


def test_the_forced_instruction_set_ran(monkeypatch):
    """Last bits differ between sets: x86-64-v2 lacks fused multiply-add; bfloat16 pairs are summed in another order."""
    present = [name for name, missing in _core.isas() if not missing]
    case = random_case(50, 576, 700)
    states = {}
    for isa in present:
        monkeypatch.setenv("ACQCORE_ISA", isa)
        states[isa] = case.run("cpu").state, case.to(torch.bfloat16).run("cpu").state
        assert acqcore.backends()[0].instruction_set == isa
    if "x86-64-v3" in states:
        assert not torch.equal(states["x86-64-v2"][0], states["x86-64-v3"][0])
    if "x86-64-v4-bf16" in states:
        assert torch.equal(states["x86-64-v4"][0], states["x86-64-v4-bf16"][0])
        assert not torch.equal(states["x86-64-v4"][1], states["x86-64-v4-bf16"][1])
    if "x86-64-v4-amx" in states:
        assert torch.equal(states["x86-64-v4-bf16"][0], states["x86-64-v4-amx"][0])
        assert not torch.equal(states["x86-64-v4-bf16"][1], states["x86-64-v4-amx"][1])


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_without_the_extension_import_warns_and_eager_serves():
    result = _python(
        "import sys; sys.modules['acqcore._core'] = None\n"
        "import torch, acqcore\n"
        "assert not acqcore.backends()[0].available\n"
        "print(acqcore.row_stats(torch.ones(1, 2), acqcore.Head(torch.ones(3, 2))).entropy.item())\n"
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(math.log(3))
    assert "RuntimeWarning: acqcore has no compiled extension here: the backend 'eager'" in result.stderr


def test_an_extension_that_does_not_load_says_what_to_run(tmp_path):
    """An extension built for another system raises; plain torch replaces only a missing extension."""
    (tmp_path / "broken.py").write_text("raise ImportError('GLIBC_9.9 not found')")
    result = _python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import importlib.abc, importlib.util\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'acqcore._core':\n"
        f"            return importlib.util.spec_from_file_location(name, {str(tmp_path / 'broken.py')!r})\n"
        "sys.meta_path.insert(0, Broken())\n"
        "import torch, acqcore\n"
        "try: acqcore.row_stats(torch.ones(1, 2), acqcore.Head(torch.ones(3, 2)))\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert "GLIBC_9.9 not found" in result.stdout
    assert "pip install ." in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(("n", "d", "v"), [(4096, 64, 49152), (2048, 64, 262144), (1024, 2048, 30000)])
def test_extra_memory_is_bounded(n, d, v, extra_mib):
    """At most 64 MiB beyond inputs and outputs; the logits would take 120 MiB to 2 GiB."""
    setup = (
        f"h, head, y = torch.randn({n}, {d}), acqcore.Head(torch.randn({v}, {d})), torch.zeros({n}, dtype=torch.long)\n"
        "acqcore.row_stats(h[:4], head, y[:4])"
    )
    assert extra_mib(setup, "acqcore.row_stats(h, head, y, backend='cpu')") <= 64


@pytest.mark.parametrize(
    "call",
    [
        "acqcore.head_grad_norm(h, head, y, o, form='gram', backend='cpu')",
        "acqcore.head_grad_norm(h, head, y, o, form='direct', backend='cpu')",
        "acqcore.hidden_grad(h, head, y, backend='cpu')",
        "acqcore.grad_sketch(h, head, y, o, dim=256, backend='cpu')",
    ],
)
def test_gradients_never_hold_the_logits(call, extra_mib):
    """At most 64 MiB where the logits alone would take 512; fails if the reference runs instead of the kernel."""
    setup = (
        "h, head, y = torch.randn(1024, 32), acqcore.Head(torch.randn(131072, 32)), torch.arange(1024)\n"
        "o = torch.arange(9) * 128\n"
        "acqcore.row_stats(h[:4], head, y[:4])"
    )
    assert extra_mib(setup, call) <= 64
