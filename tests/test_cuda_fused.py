"""The fused kernel for Hopper: its fold on the CPU, its machine code, and its behaviour on a device."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import acqcore
from acqcore import _core
from acqcore.backends.cuda import fits_hopper
from acqcore.backends.extension import matrix, pointer
from acqcore.testing import assert_close_to_oracle

SOURCE = Path(__file__).parents[1] / "csrc/cuda/row_stats_sm90.cu"
SPLITS = 66
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(
    not (ON_HOPPER and _core.cuda_built), reason="needs a device of compute capability 9.0 and a build with CUDA"
)


def folded(
    products: torch.Tensor,  # [N, V] float32
    bias: torch.Tensor | None = None,  # [V]
    softcap: float = 0.0,
    scale: float = 1.0,
    temperature: float = 1.0,
    vocab_start: int = 0,
    splits: int = SPLITS,
) -> acqcore.RowStats:
    """Folds ``products`` as the kernel does, tile by tile and split by split."""
    n = len(products)
    state, index = torch.empty(7, n, dtype=torch.float64), torch.empty(n, dtype=torch.int64)
    nothing = matrix(torch.empty(0, 1, dtype=torch.bfloat16))
    args = _core.CudaRowStatsArgs(
        nothing, nothing, pointer(bias), 0, softcap, scale, temperature, vocab_start, state.data_ptr(), index.data_ptr()
    )
    _core.cuda_fold_tiles_on_host(matrix(products), args, splits)
    return acqcore.RowStats(state, index)


def _gaussian(n: int, v: int, seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed))


def _oracle(logits: torch.Tensor) -> acqcore.RowStats:
    return acqcore.logit_stats(logits.double(), backend="eager")


@pytest.mark.parametrize("splits", [1, 7, SPLITS])
@pytest.mark.parametrize("v", [1, 2, 255, 256, 257, 1000, 70001])
@pytest.mark.parametrize("n", [1, 17])
def test_fold(n, v, splits):
    """One column, part of a tile, a tile, a tail of one column; fewer tiles than splits; a short block of rows."""
    logits = _gaussian(n, v)
    assert_close_to_oracle(folded(logits, splits=splits), _oracle(logits))


@pytest.mark.parametrize("peak", [0, 255, 256, 4999])
def test_fold_of_confident_rows(peak):
    """Rows with 1 - p_max near 1e-12, for any position of the maximum."""
    logits = _gaussian(5, 5000) / 4
    logits[:, peak] = 38.0
    stats, oracle = folded(logits), _oracle(logits)
    torch.testing.assert_close(stats.state[2:6], oracle.state[2:6], rtol=2e-5, atol=0)
    assert stats.top1_index.tolist() == [peak] * 5


def test_fold_where_every_tile_raises_the_maximum():
    logits = torch.arange(5000.0).repeat(3, 1) / 100
    assert_close_to_oracle(folded(logits, splits=3), _oracle(logits))
    assert_close_to_oracle(folded(logits.flip(1).contiguous(), splits=3), _oracle(logits.flip(1)))


@pytest.mark.parametrize(
    "columns",
    [
        [0],
        [0, 1],
        [1, 0],
        [2, 9],
        [7, 8],
        [31, 32],
        [255, 256],
        [4, 260, 898],
        [700, 703, 701],
        [40, 44, 42, 46],
        [899],
    ],
)
def test_the_lowest_of_equal_maxima(columns):
    """Ties in a lane and across a row's lanes, column groups, tiles and splits; the others are ordinary terms."""
    logits = _gaussian(9, 900).clamp(max=4)
    logits[:, columns] = 5.0
    stats = folded(logits)
    assert stats.top1_index.tolist() == [min(columns)] * 9
    assert_close_to_oracle(stats, _oracle(logits))
    expected = 5.0 if len(columns) > 1 else float(logits[0].topk(2).values[1])
    assert stats.state[1, 0].item() == expected


def test_absent_columns():
    """-inf marks an absent token: in whole tiles and splits, in a whole row, and in all columns but one."""
    logits = _gaussian(4, 2000)
    logits[0, :600] = -torch.inf
    logits[1] = -torch.inf
    logits[2] = -torch.inf
    logits[2, 1999] = -3.0e38
    stats = folded(logits)
    assert stats.valid.tolist() == [True, False, True, True]
    assert stats.state[:, 1].tolist() == [-torch.inf, -torch.inf, 0, 0, 0, 0, -torch.inf]
    assert stats.top1_index[2] == 1999
    assert stats.state[2, 2] == 0
    kept = torch.tensor([0, 3])
    assert_close_to_oracle(folded(logits[kept]), _oracle(logits[kept]))


@pytest.mark.parametrize("position", [0, 256, 1999])
def test_a_nan_spoils_only_its_row(position):
    logits = _gaussian(20, 2000)
    logits[9, position] = torch.nan
    assert folded(logits).state[2].isnan().nonzero()[:, 0].tolist() == [9]


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("absent", [False, True])
def test_bias_scale_temperature_softcap(absent, softcap):
    products, bias = _gaussian(7, 3000), _gaussian(1, 3000, seed=1)[0]
    if absent and not softcap:  # tanh maps -inf to a finite number
        bias[: 2 * 256] = -torch.inf
        bias[::3] = -torch.inf
    logits = (products.double() + bias.double()) * 0.7
    logits = softcap * (logits / softcap).tanh() if softcap else logits
    stats = folded(products, bias, softcap, 0.7, 1.3, vocab_start=11)
    oracle = _oracle(logits / 1.3)
    assert torch.equal(stats.top1_index, oracle.top1_index + 11)
    torch.testing.assert_close(stats.state[:6], oracle.state[:6], rtol=1e-4, atol=1e-5)


def test_where_the_kernel_fits():
    def fits(hidden=torch.bfloat16, weight=torch.bfloat16, pitch=64, first=0, capability=(9, 0)):
        head = torch.zeros(9, pitch + 8, dtype=weight)[:, : pitch + 8].flatten()[first:][: 8 * pitch].view(8, pitch)
        return fits_hopper(torch.zeros(2, pitch, dtype=hidden), head, capability)

    assert fits()
    assert fits(torch.float16, torch.float16)
    assert not fits(torch.float32, torch.float32)
    assert not fits(torch.float16)
    assert not fits(pitch=60)  # rows of 120 bytes
    assert not fits(first=4)  # aligned to 8 bytes
    assert not fits(capability=(10, 0))
    assert not fits(capability=None)
    weight = torch.zeros(64, 8, dtype=torch.bfloat16)
    assert not fits_hopper(torch.zeros(2, 64, dtype=torch.bfloat16), weight.T, (9, 0))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
def test_machine_code(tmp_path):
    """Products use Hopper's instructions, none serialised; a copy is multicast; registers do not spill in a tile."""
    command = ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-cubin"]
    kept = ["--keep", "--keep-dir", str(tmp_path), "-o", str(tmp_path / "code")]
    run = subprocess.run([*command, *kept, str(SOURCE)], capture_output=True, text=True, timeout=300, check=True)
    report = run.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == 14  # five variants of the product and the packing for two dtypes, and two merges
    # With a Gram matrix, one integer (the unit's number) is kept in memory while the unit is processed.
    assert sorted(spills) == [("0", "0", "0")] * 10 + [("8", "8", "8")] * 4
    assert "serialized" not in report
    ptx = (tmp_path / f"{SOURCE.stem}.ptx").read_text()
    assert "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16" in ptx
    assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16" in ptx  # for the Gram matrix
    assert "multicast::cluster" in ptx
    assert "setmaxnreg.inc" in ptx


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "d", "v"), [(1, 64, 7), (129, 100, 256), (300, 576, 50257), (2500, 256, 9001), (24000, 4096, 600)]
)
def test_on_device(n, d, v, dtype):
    """One row and a short tile; a lone second block; odd V; many units; several chunks of rows."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, d, device="cuda", generator=generator).to(dtype)
    weight = torch.zeros(v, -(-d // 8) * 8, device="cuda", dtype=dtype)[:, :d]
    weight.copy_(torch.randn(v, d, device="cuda", generator=generator) * (3 / d**0.5))
    targets = torch.randint(0, v, (n,), device="cuda", generator=generator)
    targets[1::3] = -100
    head = acqcore.Head(weight)
    stats = acqcore.row_stats(hidden, head, targets, backend="cuda")
    some = torch.arange(0, n, max(1, n // 200), device="cuda")
    oracle = acqcore.row_stats(hidden[some].double(), acqcore.Head(weight.double()), targets[some], backend="eager")
    part = acqcore.row_stats(hidden[some], head, targets[some], backend="cuda")
    assert_close_to_oracle(part, oracle)
    scored = targets[some] != -100
    assert torch.equal(part.state[:, scored], stats.state[:, some][:, scored])
    assert torch.equal(part.max_index, stats.max_index[some])
    assert stats.state[:, 1::3].isnan().all()


@needs_hopper
def test_on_device_in_a_graph():
    """Nothing is read back, so the call can be captured; a replay uses the targets present at that time."""
    hidden = torch.randn(300, 128, device="cuda", dtype=torch.bfloat16)
    head = acqcore.Head(torch.randn(3000, 128, device="cuda", dtype=torch.bfloat16))
    targets = torch.arange(300, device="cuda")
    acqcore.row_stats(hidden, head, targets, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = acqcore.row_stats(hidden, head, targets, backend="cuda")
    targets[::2] = -100
    graph.replay()
    expected = acqcore.row_stats(hidden, head, targets, backend="cuda")
    assert torch.equal(stats.max_index, expected.max_index)
    assert torch.equal(stats.state.nan_to_num(), expected.state.nan_to_num())
