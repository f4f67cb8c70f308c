"""Compiles kernels for an absent GPU: records launches without running them and inspects the machine code.

``recorded`` runs launchers, or whole operations of the package, on CPU tensors and records the launches they would
make; ``compiled`` gives the kernel that Triton would compile for such a launch; ``measured`` reads its registers,
stack, shared memory and instructions of the fold.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

MAJORS = {80: 8, 90: 9, 100: 10}
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # maximum per block
NAMES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.int8: "i8", torch.uint32: "u32",
}  # fmt: skip
#: (architecture, dtype, plain head) that tests compile: each value at least twice. ``gpu_static`` compiles them all.
THINNED = [
    *((arch, torch.bfloat16, True) for arch in MAJORS), *((arch, torch.float32, False) for arch in MAJORS),
    (90, torch.float16, True), (90, torch.bfloat16, False), (100, torch.float16, False),
]  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")

#: SASS instructions of the matrix units.
MATRIX = r"HGMMA|QGMMA|IGMMA|UTCHMMA|UTCQMMA|UTC\w*MMA|HMMA|IMMA"


@dataclass(frozen=True)
class Argument:
    """A tensor or tensor descriptor passed to a launch; its memory is not kept alive."""

    dtype: torch.dtype
    address: int
    bytes: int
    block: tuple[int, ...] | None  #: block shape of a descriptor

    @classmethod
    def of(cls, value: Any) -> Any:
        """Records an argument; values other than tensors are returned unchanged."""
        tensor = value.base if isinstance(value, TensorDescriptor) else value
        if not isinstance(tensor, torch.Tensor):
            return value
        block = tuple(value.block_shape) if isinstance(value, TensorDescriptor) else None
        return cls(tensor.dtype, tensor.data_ptr(), tensor.numel() * tensor.element_size(), block)


@dataclass(frozen=True)
class Launch:
    """A recorded launch, not run."""

    kernel: Any
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def values(self) -> dict[str, Any]:
        """Parameter -> argument, without compile options."""
        found = dict(zip(self.kernel.arg_names, self.arguments, strict=False))
        return found | {key: value for key, value in self.named.items() if key not in OPTIONS}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors that it reads or writes, each counted once."""
        return sum(value.bytes for value in self.values.values() if isinstance(value, Argument))


Launches = TypeVar("Launches", bound=list[Launch])


@contextlib.contextmanager
def recorded(launches: Launches) -> Iterator[Launches]:
    """Records the launches made inside the context; no kernel runs, so outputs stay unchanged."""

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        if callable(grid):
            grid = grid(dict(zip(kernel.arg_names, arguments, strict=False)) | named)
        assert all(isinstance(size, int) and 0 < size < 2**31 for size in grid)
        kept = {key: Argument.of(value) for key, value in named.items()}
        launches.append(Launch(kernel, tuple(map(Argument.of, arguments)), kept, tuple(grid)))

    with mock.patch.object(triton.runtime.jit.JITFunction, "run", record):
        yield launches


def compiled(launch: Launch, arch: int) -> Any:
    """The kernel that Triton would compile for a launch, with arguments specialized as at run time."""
    values = launch.values
    options = {key: value for key, value in launch.named.items() if key in OPTIONS}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for parameter in launch.kernel.params:
        value, place = values[parameter.name], (parameter.num,)
        specialised, aligned = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
            signature[parameter.name], constants[place] = "constexpr", value
        elif isinstance(value, Argument) and value.block is not None:
            signature[parameter.name] = f"tensordesc<{NAMES[value.dtype]}{list(value.block)}>"
        elif isinstance(value, Argument):
            signature[parameter.name] = f"*{NAMES[value.dtype]}"
            if value.address % 16 == 0 and aligned:
                attributes[place] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[parameter.name] = "i1"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64" if value < 2**63 else "u64"
            if value % 16 == 0 and aligned and specialised:
                attributes[place] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def measured(launch: Launch, arch: int) -> dict[str, Any]:
    """Registers, stack, shared memory and instruction counts of a launch's kernel."""
    code = compiled(launch, arch)
    usage = _cuobjdump(code, "--dump-resource-usage")
    instructions = parse(_cuobjdump(code, "-sass"))
    names = [instruction.name for instruction in instructions]
    threads = 32 * code.metadata.num_warps
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "stack_bytes": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "spill_instructions": sum(name.startswith(("STL", "LDL")) for name in names),
        "shared_bytes": code.metadata.shared,
        "warps": code.metadata.num_warps,
        "matrix_instructions": sum(bool(re.match(MATRIX, name)) for name in names),
        "sass_per_logit": fold_instructions(launch, instructions, threads),
    }


def fold_instructions(launch: Launch, instructions: list[Instruction], threads: int) -> float | None:
    """Instructions per thread and folded logit in the loop over the vocabulary, excluding the inner loop over depth.

    None if the kernel folds no logits or if both loops are one.
    """
    values = launch.values
    if "BLOCK_N" in values and "BLOCK_M" in values:
        logits = values["BLOCK_M"] * values["BLOCK_N"] / threads
    elif "COLUMNS" in values and "ROWS" in values and "logits" in values:
        logits = values["ROWS"] * values["COLUMNS"] / threads
    else:
        return None
    products = [i.address for i in instructions if re.match(MATRIX, i.name)]
    found = loops(instructions)
    if not products and "logits" not in values:
        # A float32 product has no matrix instructions, only multiply-adds.
        products = [i.address for i in instructions if i.name.startswith("FFMA")]
    if "logits" in values:
        inner, outer = [], [loop for loop in found if _inside(instructions, loop, "MUFU")]
    else:
        inner = [loop for loop in found if any(loop[0] <= address <= loop[1] for address in products)]
        inner = [loop for loop in inner if not any(_within(other, loop) for other in inner)]
        outer = [loop for loop in found if any(_within(own, loop) for own in inner)]
        outer = [loop for loop in outer if _inside(instructions, loop, "MUFU")]
    if not outer:
        return None
    begin, end = min(outer, key=lambda loop: loop[1] - loop[0])
    count = sum(begin <= i.address <= end for i in instructions)
    for first, last in (loop for loop in inner if begin <= loop[0] and loop[1] <= end):
        count -= sum(first <= i.address <= last for i in instructions)
    return round(count / logits, 2)


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _inside(instructions: list[Instruction], loop: tuple[int, int], name: str) -> bool:
    return any(loop[0] <= i.address <= loop[1] and i.name.startswith(name) for i in instructions)


@dataclass(frozen=True)
class Instruction:
    """One line of machine code; ``target`` is the address a branch jumps to."""

    address: int
    name: str
    target: int | None


def parse(sass: str) -> list[Instruction]:
    """The instructions of ``cuobjdump -sass``, without the padding after the last exit."""
    found = []
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass):
        words = re.sub(r"^@!?U?P\w+\s+", "", text.strip()).split()
        target = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        found.append(Instruction(int(address, 16), words[0], int(target[1], 16) if target else None))
    while found and found[-1].name in ("NOP", "BRA"):
        found.pop()
    return found


def loops(instructions: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last) address of every loop, found by backward branches."""
    return [(i.target, i.address) for i in instructions if i.target is not None and i.target <= i.address]


def _cuobjdump(code: Any, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(code.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
