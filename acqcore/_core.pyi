"""The compiled extension: raw pointers and sizes in, row states out. Arguments are trusted."""

class Matrix:
    """A strided matrix in memory; strides in elements; dtype "float32", "bfloat16" or "float16"."""

    def __init__(
        self, pointer: int, rows: int, columns: int, row_stride: int, column_stride: int, dtype: str
    ) -> None: ...

def isas() -> list[tuple[str, str]]:
    """(name, why it is not available or ""), best last."""

def best_isa() -> str:
    """The instruction set used unless one is forced."""

def row_stats(
    isa: str,
    threads: int,
    hidden: Matrix,  # [N, D]
    weight: Matrix,  # [V, D]
    bias: int,  # float32 [V], or 0
    targets: int,  # int64 [N], or 0
    softcap: float,  # 0: none
    scale: float,
    temperature: float,
    vocab_start: int,
    state: int,  # float64 [7, N], written
    index: int,  # int64 [N], written
) -> None: ...
def logit_stats(
    isa: str,
    threads: int,
    logits: Matrix,  # [N, V]
    targets: int,  # int64 [N], or 0
    temperature: float,
    state: int,  # float64 [7, N], written
    index: int,  # int64 [N], written
) -> None: ...
