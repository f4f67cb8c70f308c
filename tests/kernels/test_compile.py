"""Every kernel compiled ahead of time for sm_80, sm_90 and sm_100, as its launcher would launch it there.

No GPU is needed: launchers run on tensors without storage, and their recorded launches are compiled.
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

from acqcore.backends.triton import MIXED_SPLIT_FROM
from acqcore.kernels import (
    block_mixture,
    cotangents,
    factors,
    gram,
    gram_norm,
    logit_stats,
    mixture,
    philox,
    row_stats,
    sketch,
)
from acqcore.kernels.config import ARCHITECTURES, FOLDER, GramTiles, Strips, Tiles, table, tiles_for
from acqcore.kernels.product import Product
from benchmarks.ahead_of_time import MAJORS, SHARED_BYTES, THINNED, Launch, compiled as _compile, recorded

MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
ANY_MATRIX = r"\b(mma\.sync|wgmma\.|tcgen05\.mma|cvt\.rna\.tf32)"


class ByName(list[Launch]):
    """Launches, indexed by kernel name; a name gives the kernel's last launch."""

    def __getitem__(self, name: Any) -> Any:
        return [launch for launch in self if launch.name == name][-1]

    def __contains__(self, name: object) -> bool:
        return any(launch.name == name for launch in self)


@pytest.fixture
def launches():
    """Records a test's launches without running them."""
    with recorded(ByName()) as found:
        yield found


def _empty(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=of, device="meta")


def _product(tiles: Tiles, dtype: torch.dtype, vocab: int, depth: int, **options: Any) -> Product:
    """The product with a weight without storage."""
    given = {
        "bias": None, "softcap": None, "scale": 1.0, "temperature": 1.0, "vocab_start": 0, "precision": "ieee",
        "upcast": False, **options,
    }  # fmt: skip
    return Product(_empty(vocab, depth, of=dtype), tiles=tiles, **given)


def _row_stats(tiles: Tiles, dtype: torch.dtype, vocab: int, depth: int, **options: Any) -> None:
    """Launches ``row_stats`` of 1000 rows with targets on tensors without storage."""
    index = _empty(1000, of=torch.int64)
    row_stats.row_stats(
        _product(tiles, dtype, vocab, depth, **options), _empty(1000, depth, of=dtype), index,
        _empty(7, 1000, of=torch.float64), index,
    )  # fmt: skip


def _committed(arch: int, product: str, kernel: str = "row_stats") -> list[tuple[int, int, Any]]:
    """(vocab, depth, tiles) of every committed entry for an architecture, kernel and kind of product."""
    kind = GramTiles if kernel == "gram" else Tiles
    entries = []
    for path in sorted(FOLDER.glob("*.json")):
        tables = json.loads(path.read_text())
        if tables["architecture"] == ARCHITECTURES[MAJORS[arch]]:
            for entry in tables[kernel][product]:
                tiles = {key: value for key, value in entry.items() if key not in ("vocab", "depth")}
                entries.append((entry["vocab"], entry["depth"], kind(**tiles)))
    return entries


def _gram(tiles: GramTiles, dtype: torch.dtype, vocab: int, depth: int, **options: Any) -> None:
    """Launches ``row_stats_and_grams`` and ``gram_norm`` of samples of 8, 32 and 128 rows."""
    bounds, starts = ((0, 8), (8, 40), (40, 168)), (0, 64, 1088)
    index, of_rows = _empty(168, of=torch.int64), _empty(168, of=torch.float64)
    arguments = (
        _product(tiles, dtype, vocab, depth, **options), _empty(168, depth, of=dtype), index, bounds, starts,
        _empty(7, 168, of=torch.float64), index, _empty(17472),
    )  # fmt: skip
    gram.row_stats_and_grams(*arguments)
    gram_norm.gram_norm(*arguments, of_rows, of_rows, _empty(3, of=torch.float64))


def _factors(tiles: Tiles, dtype: torch.dtype, vocab: int, depth: int, plain: bool) -> factors.Factors:
    options = {} if plain else {"bias": _empty(vocab), "softcap": 30.0}
    return factors.Factors(**vars(_product(tiles, dtype, vocab, depth, **options)), multiprocessors=132)


def _second_visit(how: factors.Factors, dtype: torch.dtype, depth: int) -> None:
    """Launches the kernels of ``factors`` for 1024 rows."""
    hidden, targets, of_rows = _empty(1024, depth, of=dtype), _empty(1024, of=torch.int64), _empty(1024)
    factors.hidden_sums(how, hidden, targets, of_rows, of_rows, _empty(1024, depth))
    factors.grams(how, hidden, targets, of_rows, (512, 512), (0, 1 << 18), _empty(1 << 19))


def _stack(compiled: Any, folder: Path) -> int:
    """Stack bytes per thread; 0 if nothing spills."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


@pytest.mark.parametrize("arch", MAJORS)
@pytest.mark.parametrize(
    ("dtype", "tf32"),
    [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False)],
    ids=["bfloat16", "float16", "tf32", "float32"],
)
def test_product_with_committed_tiles(dtype, tf32, arch, launches):
    product = "tf32" if tf32 else "ieee" if dtype == torch.float32 else "half"
    entries = _committed(arch, product)
    assert entries
    for vocab, depth, tiles in entries:
        _row_stats(tiles, dtype, vocab, depth, precision="tf32" if tf32 else "ieee")
        compiled = _compile(launches["product_fold"], arch)
        assert compiled.metadata.shared <= SHARED_BYTES[arch]
        ptx = compiled.asm["ptx"]
        if product == "ieee":  # exact float32 products, which no matrix unit has
            assert not re.search(ANY_MATRIX, ptx)
            assert "fma.rn.f32" in ptx
        else:
            assert MATRIX[arch] in ptx
        if tiles.descriptors:
            assert "cp.async.bulk.tensor" in ptx
        elif arch == 80:
            assert re.search(r"cp\.async\.cg\.shared\.global.*, 0x10", ptx)  # 16 bytes at a time


def test_product_on_sm_90_keeps_its_accumulators_in_registers(launches, tmp_path):
    """Spilling a thread's 128 accumulators would slow the product; a few bytes outside the inner loop would not."""
    for vocab, depth, tiles in _committed(90, "half"):
        _row_stats(tiles, torch.bfloat16, vocab, depth)
        assert _stack(_compile(launches["product_fold"], 90), tmp_path) <= 128


#: Kernels of the norm and of dL/dh, and whether they multiply matrices.
GRADIENTS = {
    "gather_slots": False, "gram_fold": True, "merge_grams": False, "target_delta": True, "contract": False,
    "sum_tiles": False, "write_factors": True, "zero_targets": False, "add_product": True, "add_grams": True,
}  # fmt: skip


@pytest.mark.parametrize(("arch", "dtype", "plain"), THINNED)
def test_gradients(plain, dtype, arch, launches, tmp_path):
    """With committed tiles, and with a bias, a cap, and a vocabulary and depth that no tile divides."""
    product = "ieee" if dtype == torch.float32 else "half"
    (vocab, depth, tiles), *_ = _committed(arch, product, "gram")
    _, _, plain_tiles = _committed(arch, product)[0]
    if not plain:
        vocab, depth = 50257, 2001
    _gram(tiles, dtype, vocab, depth, **({} if plain else {"bias": _empty(vocab), "softcap": 30.0}))
    _second_visit(_factors(plain_tiles, dtype, vocab, depth, plain), dtype, depth)
    for name, multiplies in GRADIENTS.items():
        compiled = _compile(launches[name], arch)
        ptx = compiled.asm["ptx"]
        assert compiled.metadata.shared <= SHARED_BYTES[arch], name
        if multiplies and dtype != torch.float32:
            assert MATRIX[arch] in ptx or "mma.sync" in ptx, name
            if plain and name in ("gram_fold", "write_factors", "add_product"):
                assert ("cp.async.bulk.tensor" in ptx) == (tiles if name == "gram_fold" else plain_tiles).descriptors
        if arch == 90 and plain and dtype == torch.bfloat16:
            # Values live across the product of a tile, none within it: 96 bytes with Triton 3.6, 512 with 3.9.
            assert _stack(compiled, tmp_path) <= (512 if name == "gram_fold" else 0), name


@pytest.mark.parametrize(("arch", "dtype", "plain"), THINNED)
def test_random_cotangents(plain, dtype, arch, launches, tmp_path):
    """Half precision uses the matrix units, also with a bias, a cap, and a vocabulary and depth no tile divides."""
    major, product = MAJORS[arch], "ieee" if dtype == torch.float32 else "half"
    vocab, depth = (131072, 4096) if plain else (50257, 2001)
    how = _factors(tiles_for(ARCHITECTURES[major], major, product, vocab, depth), dtype, vocab, depth, plain)
    index, of_rows = _empty(1000, of=torch.int64), _empty(1000, of=torch.float64)
    cotangents.fisher_sums(
        how, _empty(1000, depth, of=dtype), index, _empty(1000), index, index, of_rows, 1 << 40,
        _empty(5, 1000, depth), _empty(4, 1000, of=torch.float64), of_rows,
    )  # fmt: skip
    for name in ("write_cotangents", "add_product"):
        compiled = _compile(launches[name], arch)
        assert compiled.metadata.shared <= SHARED_BYTES[arch], name
        if arch == 90 and plain and dtype == torch.bfloat16 and name == "write_cotangents":
            assert _stack(compiled, tmp_path) == 0
        if dtype != torch.float32:
            assert MATRIX[arch] in compiled.asm["ptx"] or "mma.sync" in compiled.asm["ptx"], name


@pytest.mark.parametrize("arch", MAJORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_product_with_all_that_a_head_has(dtype, arch, launches):
    """With a bias, a cap, a scale, and a vocabulary and depth that no tile divides."""
    _, _, tiles = _committed(arch, "half" if dtype != torch.float32 else "ieee")[0]
    _row_stats(tiles, dtype, 50257, 2001, bias=_empty(50257), softcap=30.0, scale=0.5, temperature=0.7)
    compiled = _compile(launches["product_fold"], arch)
    assert compiled.metadata.shared <= SHARED_BYTES[arch]
    assert "cp.async.bulk.tensor" not in compiled.asm["ptx"]  # rows of 2001 are not 16-byte aligned
    assert "tanh.approx" not in compiled.asm["ptx"]


@pytest.mark.parametrize("arch", MAJORS)
def test_product_of_mixed_dtypes_is_not_rounded(arch, launches):
    """Products run in float32 or, where Triton would use TF32 regardless, as three products of split operands."""
    _, _, tiles = _committed(arch, "ieee")[0]
    split = MAJORS[arch] >= MIXED_SPLIT_FROM
    how = _product(tiles, torch.bfloat16, 32000, 512, precision="tf32x3" if split else "ieee")
    row_stats.row_stats(how, _empty(100, 512), None, _empty(7, 100, of=torch.float64), _empty(100, of=torch.int64))
    assert "gather_scored" not in launches  # every row is scored and well laid out: nothing to pack
    compiled = _compile(launches["product_fold"], arch)
    if split:
        assert len(set(re.findall(r"ttng\.tc_gen5_mma (%\w+, %\w+)", compiled.asm["ttgir"]))) % 3 == 0
        assert "kind::tf32" in compiled.asm["ptx"]
    else:
        assert not re.search(ANY_MATRIX, compiled.asm["ptx"])


@pytest.mark.parametrize("arch", MAJORS)
def test_gather_and_merge(arch, launches):
    _, _, tiles = _committed(arch, "half")[0]
    _row_stats(tiles, torch.bfloat16, 131072, 4096)
    for name in ("gather_scored", "merge_splits"):
        assert _compile(launches[name], arch).metadata.shared <= SHARED_BYTES[arch]
    assert "ld.global.v4" in _compile(launches["gather_scored"], arch).asm["ptx"]


@pytest.mark.parametrize("arch", MAJORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logit_stats(dtype, arch, launches):
    entries = table(ARCHITECTURES[MAJORS[arch]], MAJORS[arch])["logit_stats"]
    for entry in entries:
        strips = Strips(**{key: value for key, value in entry.items() if key != "vocab"})
        logits, state = _empty(1000, entry["vocab"], of=dtype), _empty(7, 1000, of=torch.float64)
        logit_stats.logit_stats(logits, None, 1.0, state, _empty(1000, of=torch.int64), strips)
        compiled = _compile(launches["logit_fold"], arch)
        assert re.search(r"ld\.global.*\.v4\.b32", compiled.asm["ptx"])  # 16-byte loads


@pytest.mark.parametrize("arch", MAJORS)
@pytest.mark.parametrize("form", ["element", "block"])
def test_mixture_with_committed_tiles(form, arch, launches, tmp_path):
    """Eight draws of a token meet in one thread's registers. Values spill only outside the loop over depth, which does
    not access local memory on sm_90: 440 bytes of ``block_fold`` with Triton 3.9, 392 with 3.6;
    112 of ``block_mixture`` on sm_80 with 3.6."""
    kernel = {"element": "mixture", "block": "block_mixture"}[form]
    for vocab, depth, tiles in _committed(arch, "half", kernel):
        places = _empty(512, of=torch.int64)
        masks = mixture.Masks(places, places, 64 if form == "block" else 1, 3, 2**28)
        how = _product(tiles, torch.bfloat16, vocab, depth, scale=1 / 0.9)
        state, votes = _empty(6, 512, of=torch.float64), _empty(8, 512, of=torch.int64)
        inputs = _empty(512, depth, of=torch.bfloat16), places, 8, masks, state, votes
        if form == "element":
            mixture.mixture_stats(how, how, *inputs)
            names = {"mixture_fold": 8, "gather_draws": 0, "finish_draws": 0, "finish_mixture": 0}
        else:
            block_mixture.block_mixture_stats(how, *inputs)
            names = {"block_fold": 440, "block_mixture": 112 if arch == 80 else 32, "write_block_masks": 0}
        for name, most in names.items():
            compiled = _compile(launches[name], arch)
            assert compiled.metadata.shared <= SHARED_BYTES[arch]
            assert _stack(compiled, tmp_path) <= most, name
            if "fold" in name or name == "block_mixture":
                assert MATRIX[arch] in compiled.asm["ptx"]


@pytest.mark.parametrize("arch", MAJORS)
def test_sketch_with_committed_tiles(arch, launches, tmp_path):
    for vocab, depth, tiles in _committed(arch, "half", "sketch"):
        sketch.hashed_delta(
            _product(tiles, torch.bfloat16, vocab, depth), _empty(512, depth, of=torch.bfloat16),
            _empty(512, of=torch.int64), _empty(vocab, of=torch.int32), _empty(7, 512, of=torch.float64),
            _empty(512, of=torch.int64), True, _empty(512, 4096),
        )  # fmt: skip
        compiled = _compile(launches["sketch_fold"], arch)
        assert compiled.metadata.shared <= SHARED_BYTES[arch]
        assert _stack(compiled, tmp_path) <= (264 if arch == 100 else 144)
        assert MATRIX[arch] in compiled.asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])  # the order of sums is fixed


@pytest.mark.parametrize("arch", MAJORS)
def test_keep_mask(arch, launches):
    rows = _empty(40, of=torch.int64)
    philox.dropout_mask(rows, rows, 3, 2**63, 2**31, _empty(8, 40, 1000, of=torch.bool))
    assert "mul.hi.u32" in _compile(launches["write_keep_mask"], arch).asm["ptx"]
