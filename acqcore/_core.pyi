"""The compiled extension: raw pointers and sizes in, row states out. Arguments are trusted."""

class Matrix:
    """A strided matrix in memory; strides in elements; dtype "float32", "bfloat16" or "float16"."""

    def __init__(
        self, pointer: int, rows: int, columns: int, row_stride: int, column_stride: int, dtype: str
    ) -> None: ...

def isas() -> list[tuple[str, str]]:
    """(name, reason why it is not available or "") of each instruction set, best last."""

def best_isa() -> str:
    """The instruction set used unless one is forced."""

class HeadArgs:
    """Hidden states and the head above them; what it points to must stay alive."""

    def __init__(
        self,
        threads: int,
        hidden: Matrix,  # [N, D]
        weight: Matrix,  # [V, D]
        bias: int,  # float32 [V], or 0
        targets: int,  # int64 [N], or 0
        softcap: float,  # 0: none
        scale: float,
        temperature: float,
        vocab_start: int,
    ) -> None: ...

def row_stats(
    isa: str,
    head: HeadArgs,
    bounds: int,  # int64 [samples, 2], begin and end of each sample with a Gram matrix, or 0
    samples: int,
    products: int,  # float32 [sum T^2], written
    state: int,  # float64 [7, N], written
    index: int,  # int64 [N], written
) -> None: ...
def delta_hash(
    isa: str,
    head: HeadArgs,
    state: int,  # float64 [7, N]
    index: int,  # int64 [N]
    places: int,  # int32 [V]
    columns: int,
    out: int,  # float32 [N, columns], written
) -> None: ...
def hash_columns(
    isa: str,
    threads: int,
    values: int,  # float32 [rows, columns]
    rows: int,
    columns: int,
    places: int,  # int32 [columns]
    dim: int,
    out: int,  # float32 [rows, dim], written
) -> None: ...
def fisher_sums(
    isa: str,
    head: HeadArgs,
    state: int,  # float64 [7, N], written
    index: int,  # int64 [N], written
    probes: int,
    seed: int,
    samples: int,  # int64 [N]
    positions: int,  # int64 [N]
    sums: int,  # float32 [P + 1, N, D], written
    signed_sums: int,  # float64 [P, N], written
    squares: int,  # float64 [N], written
) -> None: ...
def delta_sums(
    isa: str,
    head: HeadArgs,
    bounds: int,  # as in row_stats
    samples: int,
    products: int,
    state: int,  # float64 [7, N], written
    index: int,  # int64 [N], written
    values: int,  # float32 [N, D], written, or 0
    places: int,  # int32 [V], or 0
    columns: int,
    hashed: int,  # float32 [N, columns], written, or 0
) -> None: ...
def gram_norm(
    isa: str,
    head: HeadArgs,
    state: int,  # float64 [7, N], over the whole vocabulary
    index: int,  # int64 [N], likewise
    bounds: int,  # int64 [samples, 2], begin and end
    samples: int,
    products: int,  # float32 [sum T^2]
    local_max: int,  # float64 [N], what the products are relative to
    weights: int,  # float64 [N]
    squared: int,  # float64 [samples], written
) -> None: ...
def head_grad_norm(
    isa: str,
    head: HeadArgs,
    state: int,  # float64 [7, N]
    index: int,  # int64 [N]
    bounds: int,  # int64 [samples, 2], begin and end
    samples: int,
    weights: int,  # float64 [N]
    squared: int,  # float64 [samples], written
) -> None: ...

class Dropout:
    """Dropout that makes draws; what it points to must stay alive."""

    def __init__(
        self,
        form: str,  # "element" or "block"
        block: int,
        threshold: int,  # floor(p 2^32)
        inverse_keep: float,
        seed: int,
        samples: int,  # int64 [N]
        positions: int,  # int64 [N]
    ) -> None: ...

def dropout_mask(
    isa: str,
    threads: int,
    dropout: Dropout,
    site: int,
    rows: int,
    draws: int,
    units: int,
    keep: int,  # bool [draws, rows, units], written
) -> None: ...
def mixture_stats(
    isa: str,
    head: HeadArgs,  # hidden [N, D], or [draws * N, D] without dropout
    rows: int,
    draws: int,
    dropout: Dropout | None,
    weights: list[Matrix],  # one, or one a draw: [V, D]
    biases: list[int],  # likewise, float32 [V], or 0
    state: int,  # float64 [6, N], written
    votes: int,  # int64 [draws, N], written
    bounds: int,  # of a Gram as in row_stats, block form only
    samples: int,
    products: int,
    row_state: int,  # block form: float64 [7, N], statistics without dropout, written, or 0
    row_index: int,  # int64 [N] with row_state
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

#: Whether nvcc was there at build time; without it, cuda_unavailable and the functions that run on a device are absent.
cuda_built: bool

class CudaLogitStatsArgs:
    """Logits and the memory for their state; what it points to must stay alive."""

    def __init__(
        self,
        logits: Matrix,  # [N, V]
        targets: int,  # int64 [N], or 0
        temperature: float,
        vocab_start: int,
        accumulate: bool,  # merge into state and index, which hold those of earlier columns
        state: int,  # float64 [7, N], written
        index: int,  # int64 [N], written
    ) -> None: ...

def cuda_unavailable() -> str:
    """The reason why no device here can run the kernels, or ""."""

def cuda_logit_stats_scratch(device: int, rows: int, columns: int) -> int:
    """Bytes of device memory that cuda_logit_stats needs as scratch."""

def cuda_logit_stats(
    args: CudaLogitStatsArgs,  # pointers to device memory
    device: int,
    stream: int,  # cudaStream_t
    scratch: int,
    scratch_bytes: int,
) -> None: ...
def cuda_logit_stats_on_host(
    args: CudaLogitStatsArgs,  # pointers to host memory
    multiprocessors: int,
) -> None:
    """Run the kernel's arithmetic on the CPU, with the work split as on a device with ``multiprocessors``."""

class CudaRowStatsArgs:
    """A head's rows for the fused kernel and the memory for their state; what it points to must stay alive."""

    def __init__(
        self,
        hidden: Matrix,  # [N, D] bfloat16 or float16
        weight: Matrix,  # [V, D] of the same dtype, rows contiguous and aligned to 16 bytes
        bias: int,  # float32 [V], or 0
        targets: int,  # int64 [N], or 0
        softcap: float,  # 0: none
        scale: float,
        temperature: float,
        vocab_start: int,
        state: int,  # float64 [7, N], written
        index: int,  # int64 [N], written
        slots: int = 0,  # int32 [slot_count, 4] of backends/cuda.py, or 0: no Gram matrices
        slot_count: int = 0,
        products: int = 0,  # float32, the Gram matrices, written
    ) -> None: ...

def cuda_row_stats_sm90_scratch(args: CudaRowStatsArgs) -> int:
    """Bytes of device memory that cuda_row_stats_sm90 needs as scratch."""

def cuda_row_stats_sm90(
    args: CudaRowStatsArgs,  # pointers to device memory
    device: int,  # of compute capability 9.0
    stream: int,  # cudaStream_t
    scratch: int,
    scratch_bytes: int,
) -> None: ...
def cuda_fold_tiles_on_host(
    products: Matrix,  # float32 [N, V]
    args: CudaRowStatsArgs,  # pointers to host memory; hidden, weight and targets are not read
    splits: int,
) -> None:
    """Run the fused kernel's fold of ``products`` on the CPU; the target's logit is -inf."""
