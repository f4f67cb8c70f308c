"""The random-cotangent kernel compiled ahead of time, as its launcher would launch it on a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from acqcore.kernels import cotangents
from acqcore.kernels.config import ARCHITECTURES, tiles_for
from acqcore.kernels.factors import Factors
from benchmarks.ahead_of_time import MAJORS, SHARED_BYTES, THINNED, Launch, compiled, recorded

MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def _empty(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=of, device="meta")


def _launched(arch: int, dtype: torch.dtype, vocab: int, depth: int, plain: bool) -> dict[str, Launch]:
    """The last launch of each kernel for 1000 rows and four probes, by kernel name."""
    major = MAJORS[arch]
    tiles = tiles_for(ARCHITECTURES[major], major, "ieee" if dtype == torch.float32 else "half", vocab, depth)
    bias = None if plain else _empty(vocab)
    how = Factors(_empty(vocab, depth, of=dtype), bias, None if plain else 30.0, 1.0, 1.0, 0, tiles, "ieee", False, 132)
    index, of_rows = _empty(1000, of=torch.int64), _empty(1000, of=torch.float64)
    with recorded([]) as launches:
        cotangents.fisher_sums(
            how, _empty(1000, depth, of=dtype), index, _empty(1000), index, index, of_rows, 1 << 40,
            _empty(5, 1000, depth), _empty(4, 1000, of=torch.float64), of_rows,
        )  # fmt: skip
    return {launch.name: launch for launch in launches}


def _stack(found: Any, folder: Path) -> int:
    """Stack bytes per thread; 0 if nothing spills."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(found.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


@pytest.mark.parametrize(("arch", "dtype", "plain"), THINNED)
def test_compiles(plain, dtype, arch, tmp_path):
    """Half precision uses the matrix units, also with a bias, a cap, and a vocabulary and depth no tile divides."""
    launches = _launched(arch, dtype, *((131072, 4096) if plain else (50257, 2001)), plain)
    for name in ("write_cotangents", "add_product"):
        found = compiled(launches[name], arch)
        assert found.metadata.shared <= SHARED_BYTES[arch], name
        if arch == 90 and plain and dtype == torch.bfloat16 and name == "write_cotangents":
            assert _stack(found, tmp_path) == 0
        if dtype != torch.float32:
            assert MATRIX[arch] in found.asm["ptx"] or "mma.sync" in found.asm["ptx"], name
