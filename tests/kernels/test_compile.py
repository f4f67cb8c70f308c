"""Every kernel compiled ahead of time for sm_80, sm_90 and sm_100, as its launcher would launch it there.

No GPU takes part: launchers run on tensors without storage, and what they would launch is compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from acqcore.backends.triton import MIXED_SPLIT_FROM
from acqcore.kernels import block_mixture, logit_stats, mixture, philox, row_stats, sketch
from acqcore.kernels.config import ARCHITECTURES, FOLDER, Strips, Tiles, table

MAJORS = {80: 8, 90: 9, 100: 10}
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # what a block may have
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
ANY_MATRIX = r"\b(mma\.sync|wgmma\.|tcgen05\.mma|cvt\.rna\.tf32)"
NAMES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Kernel name -> (kernel, arguments, named arguments) of its last launch; nothing runs."""
    found: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        assert all(isinstance(size, int) and 0 < size < 2**31 for size in grid)
        found[kernel.__name__] = kernel, arguments, named

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", record)
    return found


def _compile(launch: tuple[Any, tuple[Any, ...], dict[str, Any]], arch: int) -> Any:
    """What Triton would compile for a launch: arguments specialised on as at run time."""
    kernel, arguments, named = launch
    options = {key: value for key, value in named.items() if key in OPTIONS}
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {key: value for key, value in named.items() if key not in OPTIONS}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for parameter in kernel.params:
        value, place = values[parameter.name], (parameter.num,)
        specialised, aligned = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
            signature[parameter.name], constants[place] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{NAMES[value.dtype]}"
            if value.data_ptr() % 16 == 0 and aligned:
                attributes[place] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64" if value < 2**63 else "u64"
            if value % 16 == 0 and aligned and specialised:
                attributes[place] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", arch, 32), options=options
    )


def _row_stats(tiles: Tiles, dtype: torch.dtype, vocab: int, depth: int, **options: Any) -> None:
    """Launches ``row_stats`` of 1000 rows with targets on tensors without storage."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    arguments: dict[str, Any] = {"softcap": None, "scale": 1.0, "temperature": 1.0, "vocab_start": 0, **options}
    bias = empty(vocab) if arguments.pop("bias", False) else None
    row_stats.row_stats(
        empty(1000, depth), empty(vocab, depth), bias, empty(1000, of=torch.int64),
        state=empty(7, 1000, of=torch.float64), index=empty(1000, of=torch.int64), tiles=tiles, **arguments,
    )  # fmt: skip


def _committed(arch: int, product: str, kernel: str = "row_stats") -> list[tuple[int, int, Tiles]]:
    """(vocab, depth, tiles) of every entry that the repository has for an architecture, kernel and kind of product."""
    entries = []
    for path in sorted(FOLDER.glob("*.json")):
        tables = json.loads(path.read_text())
        if tables["architecture"] == ARCHITECTURES[MAJORS[arch]]:
            for entry in tables[kernel][product]:
                tiles = {key: value for key, value in entry.items() if key not in ("vocab", "depth")}
                entries.append((entry["vocab"], entry["depth"], Tiles(**tiles)))
    return entries


@pytest.mark.parametrize("arch", MAJORS)
@pytest.mark.parametrize(
    ("dtype", "tf32"),
    [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False)],
    ids=["bfloat16", "float16", "tf32", "float32"],
)
def test_product_with_committed_tiles(dtype: torch.dtype, tf32: bool, arch: int, launches: dict) -> None:
    product = "tf32" if tf32 else "ieee" if dtype == torch.float32 else "half"
    entries = _committed(arch, product)
    assert entries
    for vocab, depth, tiles in entries:
        _row_stats(tiles, dtype, vocab, depth, precision="tf32" if tf32 else "ieee")
        compiled = _compile(launches["product_fold"], arch)
        assert compiled.metadata.shared <= SHARED_BYTES[arch]
        ptx = compiled.asm["ptx"]
        if product == "ieee":  # float32 products are float32: no matrix unit has them
            assert not re.search(ANY_MATRIX, ptx)
            assert "fma.rn.f32" in ptx
        else:
            assert MATRIX[arch] in ptx
        if tiles.descriptors:
            assert "cp.async.bulk.tensor" in ptx
        elif arch == 80:
            assert re.search(r"cp\.async\.cg\.shared\.global.*, 0x10", ptx)  # 16 bytes at a time


def test_product_on_sm_90_keeps_its_accumulators_in_registers(launches: dict, tmp_path: Path) -> None:
    """Spilled, the 128 of a thread would cost the product its speed; a few bytes outside the inner loop would not."""
    for vocab, depth, tiles in _committed(90, "half"):
        _row_stats(tiles, torch.bfloat16, vocab, depth)
        cubin = tmp_path / "product_fold.cubin"
        cubin.write_bytes(_compile(launches["product_fold"], 90).asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (stack,) = re.findall(r"STACK:(\d+)", usage)
        assert int(stack) <= 128


@pytest.mark.parametrize("arch", MAJORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_product_with_all_that_a_head_has(dtype: torch.dtype, arch: int, launches: dict) -> None:
    """A bias, a cap, a scale, a vocabulary and a depth that divide no tile."""
    _, _, tiles = _committed(arch, "half" if dtype != torch.float32 else "ieee")[0]
    _row_stats(tiles, dtype, 50257, 2001, bias=True, softcap=30.0, scale=0.5, temperature=0.7)
    compiled = _compile(launches["product_fold"], arch)
    assert compiled.metadata.shared <= SHARED_BYTES[arch]
    assert "cp.async.bulk.tensor" not in compiled.asm["ptx"]  # rows of 2001 are not 16-byte aligned
    assert "tanh.approx" not in compiled.asm["ptx"]


@pytest.mark.parametrize("arch", MAJORS)
def test_product_of_mixed_dtypes_is_not_rounded(arch: int, launches: dict) -> None:
    """In float32, or where that ends in TF32 whatever is asked, in three products of split operands."""
    _, _, tiles = _committed(arch, "ieee")[0]
    split = MAJORS[arch] >= MIXED_SPLIT_FROM
    hidden = torch.empty(100, 512, device="meta")
    weight = torch.empty(32000, 512, dtype=torch.bfloat16, device="meta")
    row_stats.row_stats(
        hidden, weight, None, None, softcap=None, scale=1.0, temperature=1.0, vocab_start=0,
        state=torch.empty(7, 100, dtype=torch.float64, device="meta"),
        index=torch.empty(100, dtype=torch.int64, device="meta"), tiles=tiles, precision="tf32x3" if split else "ieee",
    )  # fmt: skip
    assert "gather_scored" not in launches  # every row is scored and laid out well: nothing to pack
    compiled = _compile(launches["product_fold"], arch)
    if split:
        assert len(set(re.findall(r"ttng\.tc_gen5_mma (%\w+, %\w+)", compiled.asm["ttgir"]))) % 3 == 0
        assert "kind::tf32" in compiled.asm["ptx"]
    else:
        assert not re.search(ANY_MATRIX, compiled.asm["ptx"])


@pytest.mark.parametrize("arch", MAJORS)
def test_gather_and_merge(arch: int, launches: dict) -> None:
    _, _, tiles = _committed(arch, "half")[0]
    _row_stats(tiles, torch.bfloat16, 131072, 4096)
    for name in ("gather_scored", "merge_splits"):
        assert _compile(launches[name], arch).metadata.shared <= SHARED_BYTES[arch]
    assert "ld.global.v4" in _compile(launches["gather_scored"], arch).asm["ptx"]


@pytest.mark.parametrize("arch", MAJORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logit_stats(dtype: torch.dtype, arch: int, launches: dict) -> None:
    entries = table(ARCHITECTURES[MAJORS[arch]], MAJORS[arch])["logit_stats"]
    for entry in entries:
        strips = Strips(**{key: value for key, value in entry.items() if key != "vocab"})
        logits = torch.empty(1000, entry["vocab"], dtype=dtype, device="meta")
        state, index = torch.empty(7, 1000, dtype=torch.float64, device="meta"), torch.empty(1000, dtype=torch.int64)
        logit_stats.logit_stats(logits, None, 1.0, state, index, strips)
        compiled = _compile(launches["logit_fold"], arch)
        assert re.search(r"ld\.global.*\.v4\.b32", compiled.asm["ptx"])  # 16-byte loads


def _stack(compiled: Any, folder: Path) -> int:
    """Bytes of local memory of a thread: registers that were spilled."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    (stack,) = re.findall(r"STACK:(\d+)", subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return int(stack)


def _empty(*shape: int, of: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=of, device="meta")


@pytest.mark.parametrize("arch", MAJORS)
@pytest.mark.parametrize("form", ["element", "block"])
def test_mixture_with_committed_tiles(form: str, arch: int, launches: dict, tmp_path: Path) -> None:
    """Eight draws of a token meet in the registers of one thread; a few bytes wait outside the product's loop."""
    kernel = {"element": "mixture", "block": "block_mixture"}[form]
    for vocab, depth, tiles in _committed(arch, "half", kernel):
        places = _empty(512, of=torch.int64)
        masks = mixture.Masks(places, places, 64 if form == "block" else 1, 3, 2**28, 0.9)
        options = {
            "draws": 8, "masks": masks, "softcap": None, "scale": 1.0, "vocab_start": 0,
            "state": _empty(6, 512, of=torch.float64), "votes": _empty(8, 512, of=torch.int64),
        }  # fmt: skip
        inputs = _empty(512, depth), _empty(vocab, depth), None, _empty(512, of=torch.int64)
        if form == "element":
            mixture.mixture_stats(*inputs, fold_tiles=tiles, tiles=tiles, **options)
            names = {"mixture_fold": 0, "gather_draws": 0, "finish_draws": 0, "finish_mixture": 0}
        else:
            block_mixture.block_mixture_stats(*inputs, tiles=tiles, **options)
            names = {"block_fold": 32, "block_mixture": 16, "write_block_masks": 0}
        for name, most in names.items():
            compiled = _compile(launches[name], arch)
            assert compiled.metadata.shared <= SHARED_BYTES[arch]
            assert _stack(compiled, tmp_path) <= most, name
            if "fold" in name or name == "block_mixture":
                assert MATRIX[arch] in compiled.asm["ptx"]


@pytest.mark.parametrize("arch", MAJORS)
def test_sketch_with_committed_tiles(arch: int, launches: dict, tmp_path: Path) -> None:
    for vocab, depth, tiles in _committed(arch, "half", "sketch"):
        sketch.hashed_delta(
            _empty(512, depth), _empty(vocab, depth), None, _empty(512, of=torch.int64),
            _empty(vocab, of=torch.int32), softcap=None, scale=1.0, temperature=1.0, vocab_start=0,
            state=_empty(7, 512, of=torch.float64), index=_empty(512, of=torch.int64), fill=True,
            out=_empty(512, 4096, of=torch.float32), tiles=tiles,
        )  # fmt: skip
        compiled = _compile(launches["sketch_fold"], arch)
        assert compiled.metadata.shared <= SHARED_BYTES[arch]
        assert _stack(compiled, tmp_path) <= 64
        assert MATRIX[arch] in compiled.asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])  # sums have one order


@pytest.mark.parametrize("arch", MAJORS)
def test_keep_mask(arch: int, launches: dict) -> None:
    rows = torch.empty(40, dtype=torch.int64, device="meta")
    philox.dropout_mask(rows, rows, 3, 2**63, 2**31, torch.empty(8, 40, 1000, dtype=torch.bool, device="meta"))
    assert "mul.hi.u32" in _compile(launches["write_keep_mask"], arch).asm["ptx"]
