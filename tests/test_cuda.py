"""The cuda backend: its arithmetic on the CPU, its errors without a device, and its behaviour on a device."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import acqcore
from acqcore import _core
from acqcore.backends import PREFERENCE, HeadRows, LogitRows, cuda, select as select_backend
from acqcore.backends.chunked import Chunked
from acqcore.backends.cuda import Cuda
from acqcore.backends.extension import matrix, pointer
from acqcore.backends.triton import Triton
from acqcore.testing import assert_close_to_oracle, assert_logits_match, random_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REASON = Cuda().unavailable()
needs_device = pytest.mark.skipif(REASON is not None, reason=f"cuda: {REASON}")
needs_no_driver = pytest.mark.skipif(
    not _core.cuda_built or not _core.cuda_unavailable(), reason="needs a build with CUDA on a machine without a GPU"
)


def on_host(
    logits: torch.Tensor,  # [N, V]
    targets: torch.Tensor | None = None,  # [N]
    multiprocessors: int = 132,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``state [7, N]`` and ``index [N]`` as the kernel computes them, split over ``multiprocessors``."""
    state = torch.empty(7, len(logits), dtype=torch.float64)
    index = torch.empty(len(logits), dtype=torch.int64)
    args = _core.CudaLogitStatsArgs(
        matrix(logits), pointer(targets), temperature, 0, False, state.data_ptr(), index.data_ptr()
    )
    _core.cuda_logit_stats_on_host(args, multiprocessors)
    return state, index


def _gaussian(n: int, v: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(n, v, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_how_rows_are_shared_out(dtype):
    """One block per row (1 multiprocessor), several blocks per row (20), single warps (5000)."""
    logits = _gaussian(7, 33333, dtype)
    expected, where = on_host(logits, multiprocessors=1)
    for multiprocessors in (20, 5000):
        state, index = on_host(logits, multiprocessors=multiprocessors)
        assert torch.equal(state, expected)
        assert torch.equal(index, where)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [33333, 40960])
def test_bits_do_not_depend_on_batch_strides_or_alignment(v, dtype):
    """Rows that do not allow 16-byte loads take another path to the same result."""
    logits = _gaussian(5, v, dtype)
    expected, _ = on_host(logits)
    apart = torch.zeros(5, v + 7, dtype=dtype)[:, 3 : v + 3].copy_(logits)
    transposed = logits.T.contiguous().T
    for view in (apart, transposed):
        assert torch.equal(on_host(view)[0], expected)
    assert torch.equal(on_host(logits[2:3])[0], expected[:, 2:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "columns", [[0], [9001], [4095, 4096], [4096, 8191], [8, 9], [1, 0], [1023, 1024], [700, 8900], [260, 5, 4100]]
)
def test_the_lowest_of_equal_maxima(columns, dtype):
    """Equal maxima in one word, one lane, two lanes, two chunks, two groups, and at the end of the row."""
    logits = _gaussian(1, 9002).clamp(max=4).to(dtype)
    logits[0, columns] = 5.0
    state, index = on_host(logits)
    assert index.item() == min(columns)
    assert state[0].item() == 5.0
    assert state[1].item() == (5.0 if len(columns) > 1 else logits.float().topk(2).values[0, 1].item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, 1, 4095, 4096, 8999, 9000])
def test_a_nan_anywhere_spoils_only_its_row(position, dtype):
    logits = _gaussian(3, 9001, dtype)
    logits[1, position] = torch.nan
    state, _ = on_host(logits)
    assert state[2].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype):
    lowest = torch.finfo(dtype).min
    logits = torch.full((5, 5000), -torch.inf, dtype=dtype)
    logits[1, 4999] = lowest  # a single possible token, at the lowest finite value
    logits[2, [100, 4500]] = lowest
    logits[3, 7], logits[3, 4500] = lowest, 1.0
    logits[4, 3] = torch.inf
    state, index = on_host(logits)
    assert state[0].tolist() == [-torch.inf, lowest, lowest, 1.0, torch.inf]
    assert state[2, :4].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert index.tolist() == [-1, 4999, 100, 4500, 3]
    stats = acqcore.RowStats(state, index)
    assert stats.valid.tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("temperature", [1e-3, 0.25, 7.0, 1e6])
def test_temperature(temperature):
    logits, targets = _gaussian(4, 9000) * min(temperature, 10.0), torch.tensor([3, -100, 8999, 4096])
    state, index = on_host(logits, targets, temperature=temperature)
    oracle = acqcore.logit_stats(logits.double(), targets, temperature=temperature, backend="eager")
    assert_close_to_oracle(acqcore.RowStats(state, index, targets), oracle)
    assert state[:, 1].isnan().all()
    assert index[1] == -1


def test_too_many_columns():
    wide = torch.zeros(1, 1).expand(1, 2**30)
    with pytest.raises(ValueError, match="logits: expected fewer than 2\\^30 columns"):
        on_host(wide)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("d", [1, 896, 4096, 16384])
def test_blocks_are_bounded(d, mixed):
    """Logits, a copy of the hidden states and a widened weight tile take at most 64 MiB."""
    rows, columns = cuda._block(d, mixed)
    assert min(rows, columns) >= 128
    assert 4 * (rows * columns + rows * d + (columns * d if mixed else 0)) <= 64 << 20


def test_tf32_is_off_inside_and_back_after_an_error(monkeypatch):
    settings = torch.backends.cuda.matmul
    before, seen = settings.fp32_precision, []

    def failing(*_):
        seen.append(settings.fp32_precision)
        raise ArithmeticError

    case = random_case(2, 4, 8)
    state, index = torch.empty(7, 2, dtype=torch.float64), torch.empty(2, dtype=torch.int64)
    monkeypatch.setattr(Cuda, "_product", failing)
    settings.fp32_precision = "tf32"
    try:
        with pytest.raises(ArithmeticError):
            Cuda().row_stats(HeadRows(case.hidden, case.head, case.targets, 1.0, state, index))
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = before
    assert seen == ["ieee"]


def test_out_of_memory_is_one_sentence(monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 MiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(Cuda, "_fold", exhausted)
    with pytest.raises(torch.OutOfMemoryError, match=r"^cuda logit_stats: .* space: CUDA out of memory$"):
        Cuda().logit_stats(LogitRows(torch.zeros(1, 2), None, 1.0, torch.zeros(7, 1), torch.zeros(1)))


@pytest.mark.parametrize("operation", sorted(n for n in {*vars(Chunked), "gram_norm"} & {*vars(Triton)} if n[0] != "_"))
def test_operations_without_a_cuda_kernel_run_in_tritons(operation, monkeypatch):
    monkeypatch.setattr(Triton, "unavailable", lambda _: None)
    monkeypatch.setattr(Triton, operation, lambda _, *arguments: arguments)
    assert getattr(Cuda(), operation)(1, 2) == (1, 2)
    monkeypatch.setattr(Triton, "unavailable", lambda _: "not here")
    monkeypatch.setattr(Chunked, operation, lambda _, *arguments: ("chunked", *arguments))
    assert getattr(Cuda(), operation)(1, 2) == ("chunked", 1, 2)


@needs_no_driver
def test_without_a_driver_the_call_says_so_and_the_cpu_goes_on():
    logits = _gaussian(2, 50)
    state, index = torch.empty(7, 2, dtype=torch.float64), torch.empty(2, dtype=torch.int64)
    args = _core.CudaLogitStatsArgs(matrix(logits), 0, 1.0, 0, False, state.data_ptr(), index.data_ptr())
    with pytest.raises(RuntimeError, match=r"cuda logit_stats: cudaDeviceGetAttribute: .*(driver|device)"):
        _core.cuda_logit_stats_scratch(0, 2, 50)
    with pytest.raises(RuntimeError, match=r"cuda logit_stats: cudaSetDevice: .*(driver|device)"):
        _core.cuda_logit_stats(args, 0, 0, 0, 0)
    assert_logits_match(logits, None, 1.0, "cpu")


@needs_no_driver
def test_why_it_is_not_available():
    assert "driver" in _core.cuda_unavailable() or "device" in _core.cuda_unavailable()
    with pytest.raises(RuntimeError, match=r"backend: 'cuda' is not available here: .*(torch|driver|device)"):
        acqcore.logit_stats(_gaussian(2, 50), backend="cuda")


@pytest.mark.parametrize(
    ("built", "version", "missing", "expected"),
    [
        (False, "13.0", "", "acqcore was built without CUDA"),
        (True, None, "", "is built without CUDA"),
        (True, "13.0", "compute capability 8.0 or later, found 7.5", "compute capability 8.0 or later, found 7.5"),
    ],
)
def test_each_cause_is_named(built, version, missing, expected, monkeypatch):
    monkeypatch.setattr(_core, "cuda_built", built)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(_core, "cuda_unavailable", lambda: missing, raising=False)
    reason = Cuda().unavailable()
    assert expected in reason
    monkeypatch.setattr(_core, "cuda_built", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_core, "cuda_unavailable", lambda: "")
    assert Cuda().unavailable() is None


def test_a_cpu_tensor_does_not_fit():
    assert Cuda().misfit(torch.device("cpu"), (torch.float32,)) == "backend 'cuda' supports cuda tensors, got cpu"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_extension_loads_no_cuda_library():
    """Imported alone, without torch, the extension brings only the C and C++ libraries."""
    code = (
        "from importlib import util\n"
        f"spec = util.spec_from_file_location('_core', {_core.__file__!r})\n"
        "core = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(core)\n"
        "assert core.best_isa()\n"
        "print(any('libcuda' in line for line in open('/proc/self/maps')))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "False\n", result.stderr


class _Fake:
    """A GPU backend that is available and accepts everything."""

    automatic = True

    def __init__(self, name: str) -> None:
        self.name = name

    def misfit(self, *_: object) -> None:
        return None

    def unavailable(self) -> None:
        return None


def test_choice_among_gpu_backends(monkeypatch):
    """Triton gets hidden states and cuda gets logits, unless a measurement says otherwise; an explicit name wins."""
    fakes = {name: _Fake(name) for name in ("triton", "cuda")}
    monkeypatch.setattr(sys.modules["acqcore.backends"], "_BACKENDS", fakes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    device = torch.device("cuda", 0)

    def chosen(op, rows, vocab, name=None):
        return select_backend(name, device, (torch.bfloat16,), op, (rows, vocab)).name

    assert chosen("row_stats", 4096, 151936) == "cuda"  # as measured on an H100
    monkeypatch.setitem(PREFERENCE, "measured", [])
    assert chosen("row_stats", 4096, 151936) == "triton"
    assert chosen("logit_stats", 4096, 151936) == "cuda"
    assert chosen("logit_stats", 4096, 151936, "triton") == "triton"
    for op in ("dropout_mask", "mixture_stats", "head_grad_norm", "hidden_grad", "fisher_sums", "delta_hash"):
        assert chosen(op, 4096, 151936) == "triton"
    assert chosen("", 0, 0) == "triton"  # not in the table: the first backend that fits
    measured: dict[str, Any] = {"op": "row_stats", "capability": "9.0", "dtype": "bfloat16", "rows": "few"}
    rows = [measured | {"vocab": "large", "order": ["cuda", "triton"]}]
    monkeypatch.setitem(PREFERENCE, "measured", rows)
    assert chosen("row_stats", 8, 151936) == "cuda"
    assert chosen("row_stats", 8, 1000) == "triton"
    assert chosen("row_stats", 4096, 151936) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert chosen("row_stats", 8, 151936) == "triton"


def test_the_choice_does_not_break_a_graph(monkeypatch):
    """Properties of the machine are queried once, while the graph is traced."""
    fakes = {name: _Fake(name) for name in ("triton", "cuda")}
    monkeypatch.setattr(sys.modules["acqcore.backends"], "_BACKENDS", fakes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    device = torch.device("cuda", 0)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(x):
        n, v = x.shape
        chosen = select_backend(None, device, (x.dtype,), "logit_stats", (n, v))
        return x + (1 if chosen.name == "cuda" and cuda._no_device() else 0)

    monkeypatch.setattr(_core, "cuda_built", False)  # gives a reason on every machine
    assert compiled(torch.zeros(2, 3)).sum() == 6
    assert compiled(torch.zeros(4, 5)).sum() == 20


@needs_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 8, 700])
def test_on_device_large_vocabulary(n, dtype):
    """A row split over blocks and a row in one block give the same bits."""
    logits = _gaussian(n, 151936, dtype).cuda()
    targets = torch.arange(n, device="cuda") * 211
    stats = acqcore.logit_stats(logits, targets, backend="cuda")
    some = slice(0, 8)
    oracle = acqcore.logit_stats(logits[some].double(), targets[some], backend="eager")
    part = acqcore.logit_stats(logits[some], targets[some], backend="cuda")
    assert_close_to_oracle(part, oracle)
    assert torch.equal(part.state, stats.state[:, some])
    assert torch.equal(part.max_index, stats.max_index[some])
    host, where = on_host(logits[some].cpu(), targets[some].cpu())
    torch.testing.assert_close(part.state.cpu(), host, rtol=1e-5, atol=1e-5)
    assert torch.equal(part.max_index.cpu(), where)


@needs_device
def test_on_device_the_bits_stay_over_many_rows_and_runs():
    logits = _gaussian(64, 33333, torch.bfloat16).cuda()
    once = acqcore.logit_stats(logits, backend="cuda").state
    many = acqcore.logit_stats(logits.repeat(200, 1), backend="cuda").state
    for begin in range(0, 12800, 64):
        assert torch.equal(many[:, begin : begin + 64], once)


@needs_device
def test_on_device_another_stream():
    logits = torch.zeros(512, 131072, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            logits += 1.0
        stats = acqcore.logit_stats(logits, backend="cuda")
    stream.synchronize()
    assert (stats.state[0] == 20.0).all()


@needs_device
def test_on_device_wrong_devices_are_one_sentence():
    case = random_case(3, 8, 20)
    with pytest.raises(ValueError, match="backend: backend 'cuda' supports cuda tensors, got cpu"):
        case.run("cuda")
    with pytest.raises(ValueError, match=r"hidden: is on cpu but head\.weight is on cuda:0"):
        acqcore.row_stats(case.hidden, acqcore.Head(case.head.weight.cuda()), backend="cuda")
    with pytest.raises(ValueError, match="targets: is on cpu but logits is on cuda:0"):
        acqcore.logit_stats(torch.zeros(3, 5, device="cuda"), torch.zeros(3, dtype=torch.int64), backend="cuda")
    assert_close_to_oracle(case.run("cpu"), case.oracle())


@needs_device
def test_on_device_out_of_memory_says_so_and_the_cpu_goes_on():
    torch.cuda.empty_cache()
    logits = torch.zeros(8, 151936, device="cuda")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1024) / total)
    try:
        hidden, weight = logits[:, :64], logits.view(-1, 64)
        with pytest.raises(torch.OutOfMemoryError, match="cuda row_stats: not enough device memory"):
            acqcore.row_stats(hidden, acqcore.Head(weight), backend="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert acqcore.logit_stats(logits, backend="cuda").valid.all()
    assert_close_to_oracle(random_case(3, 8, 20).run("cpu"), random_case(3, 8, 20).oracle())


@needs_device
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_device_memory_is_bounded(weight_dtype):
    """At most 64 MiB beyond inputs and outputs, where the logits would take 1.2 GiB."""
    hidden = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16)
    head = acqcore.Head(torch.randn(151936, 1024, device="cuda", dtype=weight_dtype))
    targets = torch.arange(2048, device="cuda")
    targets[::5] = -100
    acqcore.row_stats(hidden[:8], head, targets[:8], backend="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    acqcore.row_stats(hidden, head, targets, backend="cuda")
    assert torch.cuda.max_memory_allocated() - before <= 64 << 20
