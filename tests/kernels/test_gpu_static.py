"""The committed table of compiled kernels and of calls' costs; this checkout must not be worse."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from acqcore.backends.base import HeadRows
from acqcore.backends.triton import Triton
from acqcore.head import Head
from acqcore.head_visit import visit
from benchmarks import ahead_of_time, gpu_static

TABLE: dict[str, Any] = json.loads(gpu_static.RESULT.read_text())

#: Maximum product-equivalents of an operation at D = 4096.
PRODUCTS = {
    "row_stats": 1.0,
    "row_stats, no targets": 1.0,
    "statistics and head_grad_norm, T=128": 1.15,
    "statistics and head_grad_norm, T=32": 1.15,
    "hidden_grad": 3.2,
    "grad_sketch, T=128": 1.2,
    "statistics and random cotangents, 4 probes": 7.0,
    "mutual_information, element, K=8": 16.3,
    "mutual_information, block, K=8": 2.5,
}
#: Maximum stack bytes per thread where not 0; a merge runs once per call, so its stack does not matter.
SPILLS = {
    "gram_fold": 104,
    "block_fold": 24,
    "block_mixture": 24,
    "sketch_fold": 24,
    "merge_splits": 704,
    "write_cotangents": 224,
}
#: Calls whose launches depend on the vocabulary, because their ring of gradients in the logits is bounded.
BY_VOCABULARY = ("hidden_grad", "statistics and random cotangents, 4 probes")


def test_products():
    assert [row for row in TABLE["products"] if "fails" in row] == []
    found = {row["op"]: row["product_equivalents"] for row in TABLE["products"]}
    assert {op: value for op, value in found.items() if value > PRODUCTS[op]} == {}


def test_every_operation_is_in_the_table():
    assert [row for row in TABLE["calls"] if "fails" in row] == []
    assert {row["op"] for row in TABLE["calls"]} == set(gpu_static.OPERATIONS)
    assert {row["op"] for row in TABLE["products"]} == set(PRODUCTS)


def test_launches_do_not_follow_from_the_vocabulary():
    counts: dict[tuple[Any, ...], set[tuple[int, int]]] = {}
    for row in TABLE["calls"]:
        if row["depth"] == 4096 and row["op"] not in BY_VOCABULARY:
            key = (row["op"], row["dtype"], row["arch"])
            counts.setdefault(key, set()).add((row["launches"], row["torch_operations"]))
    assert {key: found for key, found in counts.items() if len(found) > 1} == {}


def test_extra_memory_is_bounded():
    for row in TABLE["calls"]:
        assert row["extra_mib"] <= 64, row


def test_every_kernel_compiles_and_fits():
    assert [row for row in TABLE["kernels"] if "fails" in row] == []
    for row in TABLE["kernels"]:
        assert row["shared_bytes"] <= ahead_of_time.SHARED_BYTES[row["arch"]]


def test_kernels_at_work_do_not_spill():
    """On sm_90 in half precision, with a vocabulary that the tiles divide."""
    for row in TABLE["kernels"]:
        if (row["arch"], row["dtype"], row["vocab"]) == (90, "bfloat16", 131072):
            assert row["stack_bytes"] <= SPILLS.get(row["kernel"], 0), row


@pytest.mark.parametrize(
    "bounds",
    [
        tuple((i, i + 32) for i in range(0, 4096, 32)),
        tuple((i, i + 100) for i in range(0, 4000, 100)),
        ((0, 100), (100, 4096)),
    ],
    ids=["T=32", "T=100", "one long"],
)
def test_a_norm_reads_nothing_back(bounds):
    """Tensors have no storage, so reading a value fails. The visit launches four kernels, the norm two or three."""
    n, depth, vocab = 4096, 64, 1000
    hidden = torch.empty(n, depth, dtype=torch.bfloat16, device="meta")
    head = Head(torch.empty(vocab, depth, dtype=torch.bfloat16, device="meta"))
    targets = torch.empty(n, dtype=torch.int64, device="meta")
    weights = torch.empty(n, dtype=torch.float64, device="meta")
    launches: list[ahead_of_time.Launch] = []
    with gpu_static.serving_the_cpu(9), ahead_of_time.recorded(launches), torch.no_grad():
        norm = visit(hidden, head, targets, bounds, 1.0, Triton()).grad_norm(weights)
    assert norm.shape == (len(bounds),)
    names = [launch.name for launch in launches]
    if len(bounds) > 2:
        assert names[:4] == ["gather_slots", "gram_fold", "merge_splits", "merge_grams"]
        assert names[-3:] == ["target_delta", "contract", "sum_tiles"]


def test_gradients_from_known_statistics_run_in_kernels():
    """Chunked torch, which has the same values, would launch none."""
    n, depth, vocab = 256, 64, 1000
    state, index = (
        torch.empty(7, n, dtype=torch.float64, device="meta"),
        torch.empty(n, dtype=torch.int64, device="meta"),
    )
    hidden = torch.empty(n, depth, dtype=torch.bfloat16, device="meta")
    head = Head(torch.empty(vocab, depth, dtype=torch.bfloat16, device="meta"))
    rows = HeadRows(hidden, head, torch.empty_like(index), 1.0, state, index)
    launches: list[ahead_of_time.Launch] = []
    with gpu_static.serving_the_cpu(9), ahead_of_time.recorded(launches), torch.no_grad():
        Triton().fill_hidden_grad(rows, torch.empty(n, depth, device="meta"))
    assert {launch.name for launch in launches} == {"write_factors", "add_product"}


@pytest.mark.parametrize("op", ["row_stats", "logit_stats", "statistics and head_grad_norm, T=128"])
def test_calls_cost_what_the_table_says(op):
    vocab, depth, arch = 50257, 4096, 90
    (row,) = [
        row
        for row in TABLE["calls"]
        if (row["op"], row["vocab"], row["arch"], row["dtype"]) == (op, vocab, arch, "bfloat16")
    ]
    _, counter, launches, extra = gpu_static.call(op, gpu_static.make_inputs(vocab, depth, torch.bfloat16), arch)
    assert len(launches) <= row["launches"]
    assert counter.operations <= row["torch_operations"]
    assert extra / 2**20 <= row["extra_mib"] + 0.01


def test_the_fold_costs_what_the_table_says():
    vocab, depth, arch = 131072, 4096, 90
    rows = [r for r in TABLE["kernels"] if (r["op"], r["kernel"], r["vocab"]) == ("logit_stats", "logit_fold", vocab)]
    (row,) = [r for r in rows if (r["arch"], r["dtype"]) == (arch, "bfloat16")]
    inputs = gpu_static.make_inputs(vocab, depth, torch.bfloat16)
    launches = gpu_static.call("logit_stats", inputs, arch)[2]
    found = ahead_of_time.measured(next(launch for launch in launches if launch.name == "logit_fold"), arch)
    assert found["stack_bytes"] <= row["stack_bytes"]
    assert found["sass_per_logit"] <= 1.1 * row["sass_per_logit"]  # other versions of Triton schedule differently


def test_loops_and_instructions():
    """In a loop over the vocabulary around one over the depth, the fold is everything outside the inner loop."""
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, [R4] ;
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4] ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   MUFU.EX2 R5, R6 ;
        /*0050*/                   FADD R5, R5, R6 ;
        /*0060*/               @P1 BRA 0x10 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
        /*0090*/                   NOP ;
    """
    instructions = ahead_of_time.parse(sass)
    assert [i.name for i in instructions][-1] == "EXIT"
    assert ahead_of_time.loops(instructions) == [(0x20, 0x30), (0x10, 0x60)]

    class OfTile(ahead_of_time.Launch):
        values = {"BLOCK_M": 16, "BLOCK_N": 8}  # noqa: RUF012

    launch = OfTile(None, (), {}, (1,))
    assert ahead_of_time.fold_instructions(launch, instructions, threads=128) == 4.0
