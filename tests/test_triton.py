"""The Triton backend's adapter; kernels are tested in ``tests/kernels``, values in the tests of all backends."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable

import pytest
import torch

import acqcore
from acqcore.backends.triton import INTERPRETED, Triton
from acqcore.fisher import fisher_grad
from acqcore.testing import random_case

WITHOUT_GPU = not INTERPRETED and not torch.cuda.is_available()


#: hidden states, head, targets, offsets, backend -> a tensor with a row for each token or sample
OPERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "row_stats": lambda h, head, y, _, b: acqcore.row_stats(h, head, y, backend=b).entropy,
    "logit_stats": lambda h, head, y, _, b: acqcore.logit_stats(head.logits(h), y, backend=b).entropy,
    "hidden_grad": lambda h, head, y, _, b: acqcore.hidden_grad(h, head, y, backend=b),
    "head_grad_norm": lambda h, head, y, o, b: acqcore.head_grad_norm(h, head, y, o, backend=b),
    "grad_sketch": lambda h, head, y, o, b: acqcore.grad_sketch(h, head, y, o, dim=16, backend=b),
    "fisher_grad": lambda h, head, y, o, b: fisher_grad(h, head, y, probes=2, offsets=o, backend=b)[0],
    "mutual_information, element": lambda h, head, y, _, b: (
        acqcore.mutual_information(h, head, targets=y, draws=2, form="element", backend=b).mutual_information
    ),
    "mutual_information, block": lambda h, head, y, _, b: (
        acqcore.mutual_information(h, head, targets=y, draws=2, form="block", block=16, backend=b).mutual_information
    ),
}


def test_listed_before_eager_and_after_cpu():
    names = [row.name for row in acqcore.backends()]
    assert names.index("cpu") < names.index("triton") < names.index("eager")


def test_description_says_what_serves_a_call():
    row = next(row for row in acqcore.backends() if row.name == "triton")
    assert ("interpreter" in row.description) is INTERPRETED
    if INTERPRETED:
        assert row.available
        assert row.instruction_set == "interpreter"
    else:
        assert "head gradients" in row.description


def test_a_missing_package_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    with pytest.raises(RuntimeError, match=r"'triton' is not available here: .* pip install \"acqcore\[triton\]\""):
        random_case(2, 4, 8).run("triton")


if not INTERPRETED:

    @pytest.mark.skipif(not WITHOUT_GPU, reason="has a GPU")
    def test_without_a_gpu():
        reason = "built without CUDA" if torch.version.cuda is None else "no CUDA device or driver"
        with pytest.raises(RuntimeError, match=f"backend: 'triton' is not available here: torch .*{reason}"):
            random_case(2, 4, 8).run("triton")

    def test_reasons_of_the_device(monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert Triton().unavailable() == "torch finds no CUDA device or driver"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
        assert Triton().unavailable() == "Tesla V100 has compute capability 7.0, at least 8.0 is required"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        assert Triton().unavailable() is None
        assert Triton().instruction_set() == "sm_90"

    def test_tensors_of_another_device():
        assert Triton().misfit(torch.device("cpu"), ()) == "backend 'triton' supports cuda tensors, got cpu"

    @pytest.mark.parametrize(
        ("capability", "dtype", "message"),
        [
            ((7, 0), torch.float32, "backend: 'triton' is not available here: Tesla V100 has compute capability 7.0"),
            ((9, 0), torch.float32, "backend: backend 'triton' supports cuda tensors, got cpu"),
            ((9, 0), torch.float64, "backend: backend 'triton' supports cuda tensors, got cpu"),
        ],
        ids=["capability", "device", "device and dtype"],
    )
    @pytest.mark.parametrize("op", OPERATIONS)
    def test_after_a_refusal_the_cpu_serves(op, capability, dtype, message, monkeypatch):
        """The refusal is one sentence for every operation; without a named backend, the cpu backend serves the call."""
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        case, offsets = random_case(3, 16, 20), torch.tensor([0, 1, 3])
        hidden, head = case.hidden.to(dtype), acqcore.Head(case.head.weight.to(dtype))
        with pytest.raises((RuntimeError, ValueError), match="^" + re.escape(message)) as refusal:
            OPERATIONS[op](hidden, head, case.targets, offsets, "triton")
        assert "\n" not in str(refusal.value)
        got = OPERATIONS[op](hidden.float(), acqcore.Head(head.weight.float()), case.targets, offsets, None)
        expected = OPERATIONS[op](hidden.double(), acqcore.Head(head.weight.double()), case.targets, offsets, "eager")
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(INTERPRETED or WITHOUT_GPU, reason="no GPU that Triton serves")
class TestOnDevice:
    """Behaviour that only a GPU shows; values are compared in the tests of all backends."""

    N, D, V = 300, 256, 5000

    def inputs(self) -> tuple[torch.Tensor, acqcore.Head, torch.Tensor]:
        case = random_case(self.N, self.D, self.V).to(torch.bfloat16, "cuda")
        case.targets[::3] = -100
        return case.hidden, case.head, case.targets

    def test_the_host_never_waits(self):
        hidden, head, targets = self.inputs()
        acqcore.row_stats(hidden, head, targets, backend="triton")  # compiles
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            stats = acqcore.row_stats(hidden, head, targets, backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert stats.valid.sum() == 200

    def test_a_cuda_graph_replays_it(self):
        hidden, head, targets = self.inputs()
        acqcore.row_stats(hidden, head, targets, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stats = acqcore.row_stats(hidden, head, targets, backend="triton")
        hidden.copy_(hidden.flip(0))
        targets.copy_(targets.flip(0))
        graph.replay()
        expected = acqcore.row_stats(hidden, head, targets, backend="triton")
        assert torch.equal(stats.state.nan_to_num(7.0), expected.state.nan_to_num(7.0))
        assert torch.equal(stats.max_index, expected.max_index)

    def test_a_target_outside_the_vocabulary_makes_its_row_nan(self):
        hidden, head, targets = self.inputs()
        targets[1] = self.V
        stats = acqcore.row_stats(hidden, head, targets, backend="triton")
        assert stats.valid[:5].tolist() == [False, False, True, False, True]

    @pytest.mark.parametrize(("n", "d", "v"), [(4096, 4096, 131072), (16384, 1024, 50257)])
    def test_extra_memory_is_bounded(self, n, d, v):
        """A call allocates at most 64 MiB beyond inputs and outputs."""
        hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16)
        head = acqcore.Head(torch.randn(v, d, device="cuda", dtype=torch.bfloat16) * 0.05)
        targets = torch.randint(v, (n,), device="cuda")
        acqcore.row_stats(hidden[:4], head, targets[:4], backend="triton")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        acqcore.row_stats(hidden, head, targets, backend="triton")
        assert torch.cuda.max_memory_allocated() - before <= 64 << 20


if INTERPRETED:

    def test_it_serves_the_cpu_only_when_named():
        assert not Triton().automatic
        assert Triton().misfit(torch.device("cpu"), (torch.float32,)) is None
        assert Triton().misfit(torch.device("cuda"), ()) == "backend 'triton' supports cpu tensors, got cuda"

    def test_its_kernels_run(monkeypatch):
        """Without the kernel's launcher, a call that names the backend fails."""
        from acqcore.kernels import row_stats

        monkeypatch.setattr(row_stats, "row_stats", None)
        with pytest.raises(TypeError, match="not callable"):
            random_case(2, 4, 8).run("triton")

    def test_tf32_only_on_request(monkeypatch):
        from acqcore.kernels import row_stats

        asked = []
        monkeypatch.setattr(row_stats, "row_stats", lambda product, *_: asked.append(product.precision))
        case = random_case(2, 4, 8)
        case.run("triton")
        monkeypatch.setenv("ACQCORE_TF32", "1")
        case.run("triton")
        case.to(torch.bfloat16).run("triton")
        assert asked == ["ieee", "tf32", "ieee"]
        monkeypatch.setenv("ACQCORE_TF32", "yes")
        with pytest.raises(ValueError, match="ACQCORE_TF32: unknown 'yes', expected one of 0, 1"):
            case.run("triton")

    def test_mixed_dtypes_where_triton_would_round(monkeypatch):
        from acqcore.backends import triton
        from acqcore.kernels import row_stats

        asked = []
        monkeypatch.setattr(row_stats, "row_stats", lambda product, *_: asked.append(product.precision))
        monkeypatch.setattr(triton, "_device", lambda _: ("interpreter", 10))
        case = random_case(2, 4, 8)
        half = acqcore.Head(case.head.weight.half())
        for hidden, head in ((case.hidden, case.head), (case.hidden, half), (case.hidden.half(), case.head)):
            acqcore.row_stats(hidden, head, backend="triton")
        assert asked == ["ieee", "tf32x3", "ieee"]

    def test_float64_is_not_served():
        with pytest.raises(ValueError, match="backend 'triton' supports float32, bfloat16, float16, got float64"):
            random_case(2, 4, 8).to(torch.float64).run("triton")

    @pytest.mark.parametrize("backend", ["triton", "cpu", "eager"])
    @pytest.mark.parametrize("op", OPERATIONS)
    def test_an_empty_batch(op, backend):
        head, none = random_case(2, 4, 8).head, torch.empty(0, dtype=torch.int64)
        got = OPERATIONS[op](torch.empty(0, 4), head, none, torch.zeros(1, dtype=torch.int64), backend)
        assert len(got) == 0

    @pytest.mark.parametrize("op", OPERATIONS)
    def test_rows_not_aligned_to_16_bytes(op):
        """Views that a copy engine cannot address give the values of their copies."""
        hidden, weight = torch.randn(5, 37).bfloat16(), torch.randn(40, 37).bfloat16()
        targets, offsets = torch.tensor([3, -100, 0, 39, 7]), torch.tensor([0, 2, 5])
        views = hidden[:, 1:33], acqcore.Head(weight[:, 2:34])
        copies = views[0].contiguous(), acqcore.Head(weight[:, 2:34].contiguous())
        got, expected = (OPERATIONS[op](h, head, targets, offsets, "triton") for h, head in (views, copies))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
