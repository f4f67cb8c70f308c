"""Extrapolates measurements of small models, or a device's rates, to the whole model, all rows and N devices."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from acqcore.costs.measure import Run
from acqcore.costs.shape import Shape
from acqcore.costs.work import Work, activation_bytes, batch_seconds, passes

MEASURED, EXTENDED, COMPUTED, GIVEN = "measured", "measured, extended", "computed", "computed from given rates"


@dataclass(frozen=True)
class Figure:
    """A quantity and its origin."""

    name: str
    value: float | None  # None if unknown
    unit: str  # bytes or s
    source: str  # MEASURED, EXTENDED linearly in blocks and rows, COMPUTED from sizes, or GIVEN
    note: str = ""  # how it was obtained


@dataclass(frozen=True)
class Layout:
    """A way of using N devices, and the time and memory of each."""

    name: str
    seconds: float
    bytes_per_device: float
    note: str


@dataclass(frozen=True)
class Estimate:
    """Memory and time of scoring, and their parts."""

    peak_bytes: float  # while scoring: of the process, or allocated by torch on a GPU
    scoring_seconds: float  # of all rows on one device, without loading
    memory: tuple[Figure, ...]
    time: tuple[Figure, ...]
    layouts: tuple[Layout, ...]


def from_runs(shape: Shape, work: Work, runs: Sequence[Run], devices: int, on_cpu: bool = True) -> Estimate:
    """Extrapolate linearly in blocks from the one or two measured models, and in rows to a full batch.

    Without a backward pass, memory does not grow with blocks, because each frees its activations: the deeper model's
    peak is used for the whole model. The small growth between the two comes from the allocator and soon saturates;
    extrapolating it to the 30 blocks of SmolLM2-135M overestimated by 300 MiB.
    """
    depths = [run.blocks for run in runs]
    keeps = passes(shape, work).kept_blocks > 0
    beyond_each = _beyond(runs, work.batch_rows, keeps)
    beyond = _at(depths, shape.blocks, beyond_each) if keeps else beyond_each[-1]
    libraries = statistics.median(run.libraries for run in runs)
    measured = f"{' and '.join(map(str, depths))} blocks, {runs[0].rows} of {work.batch_rows} rows of a batch"
    full = [str(run.blocks) for run in runs if run.full_peak is not None and run.rows < work.batch_rows]
    of_memory = measured + (f", a full batch with {' and '.join(full)}" if full else "")
    exact = depths[-1] == shape.blocks and runs[-1].rows == work.batch_rows
    source = MEASURED if exact else EXTENDED
    peak = shape.weight_bytes + beyond
    memory = [
        _weights(shape),
        *([Figure("interpreter and libraries", libraries, "bytes", MEASURED)] if on_cpu else []),
        Figure("scoring a batch", max(0.0, beyond - libraries), "bytes", source, of_memory),
        Figure("peak while scoring", peak, "bytes", source, "their sum"),
        _by_formula(shape, work, on_cpu),
        *([_while_loading(shape, libraries)] if on_cpu else []),
    ]
    blocks, rest = _row_seconds(runs, shape.blocks)
    start, loads = runs[0].start_seconds, [run.load_seconds for run in runs if run.load_seconds is not None]
    load = _at(depths, shape.blocks, loads) if loads else None
    of_loading = (source, measured.split(",")[0]) if loads else ("not known", "no local weights")
    time = [
        Figure("start", start, "s", MEASURED, "Python and the libraries"),
        Figure("loading", load, "s", *of_loading),
        Figure("a batch, in the blocks", blocks * work.batch_rows, "s", source, measured),
        Figure("a batch, in embedding and head", rest * work.batch_rows, "s", source, measured),
    ]
    until_loaded = None if load is None else start + load
    return _estimate(shape, work, devices, peak, (blocks, rest), until_loaded, memory, time, source)


def from_rates(shape: Shape, work: Work, flops: float, bandwidth: float, devices: int, on_cpu: bool) -> Estimate:
    """Estimate from sizes and a device's given rates; libraries are not counted."""
    activations = activation_bytes(shape, work, on_cpu)
    peak = shape.weight_bytes + activations
    memory = [
        _weights(shape),
        _by_formula(shape, work, on_cpu),
        Figure("peak while scoring", peak, "bytes", COMPUTED, "their sum, without libraries and the device's context"),
    ]
    trunk, head = batch_seconds(shape, work, flops, bandwidth, on_cpu)
    rates = f"{flops:.3g} FLOP/s and {bandwidth:.3g} B/s given"
    time = [
        Figure("a batch, in the blocks", trunk, "s", GIVEN, rates),
        Figure("a batch, in the head", head, "s", GIVEN, rates),
    ]
    per_row = (trunk / work.batch_rows, head / work.batch_rows)
    return _estimate(shape, work, devices, peak, per_row, None, memory, time, GIVEN)


def _estimate(
    shape: Shape,
    work: Work,
    devices: int,
    peak: float,
    per_row: tuple[float, float],
    load: float | None,
    memory: list[Figure],
    time: list[Figure],
    source: str,
) -> Estimate:
    """The parts common to both estimates: the time of all rows, and the layouts."""
    blocks, rest = (seconds * work.rows for seconds in per_row)
    whole = blocks + rest
    batches = math.ceil(work.rows / work.batch_rows)
    time.append(Figure("all rows", whole, "s", source, f"{work.rows} rows of {work.tokens} tokens, {batches} batches"))
    layouts = []
    if devices > 1:
        # If batches do not divide evenly, the slowest device gets one more than the others.
        share = math.ceil(batches / devices) / batches
        each = whole * share
        unsharded = peak - (0 if shape.tied else shape.head_bytes * (1 - 1 / devices))
        layouts = [
            Layout(
                "rows shared out, one process each",
                each + (load or 0),
                peak,
                "start and loading included" if load is not None else "start and loading not included",
            ),
            Layout("rows shared out, one service each", each, peak, "loaded beforehand; HTTP not included"),
            Layout(
                "head by vocabulary, trunk whole",
                blocks + rest / devices,
                unsharded,
                "a tied head stays whole as the embedding" if shape.tied else "all-reduce of row states not included",
            ),
            Layout(
                "head by vocabulary, trunk tensor-parallel",
                whole / devices,
                peak - shape.weight_bytes * (1 - 1 / devices),
                "a lower bound: communication not included",
            ),
        ]
    return Estimate(peak, whole, tuple(memory), tuple(time), tuple(layouts))


def _at(depths: Sequence[int], blocks: int, values: Sequence[float]) -> float:
    """The line through the values at ``depths`` (one or two), evaluated at ``blocks``; it never falls."""
    if len(depths) == 1:
        return values[0]
    slope = max(0.0, (values[1] - values[0]) / (depths[1] - depths[0]))
    return values[0] + slope * (blocks - depths[0])


def _beyond(runs: Sequence[Run], rows: int, keeps: bool) -> list[float]:
    """Bytes that each model needs beyond its weights to score ``rows``, a full batch, at once."""
    low = runs[0]
    more = low.rows - low.fewer_rows
    per_row = max(0, low.peak - low.fewer_peak) / more if more else 0.0
    full = low.peak + per_row * (rows - low.rows) if low.full_peak is None else low.full_peak
    found = [full - low.weight_bytes]
    for run in runs[1:]:
        if run.full_peak is not None:
            found.append(run.full_peak - run.weight_bytes)
        else:
            deeper = (run.peak - run.weight_bytes) - (low.peak - low.weight_bytes)
            found.append(found[0] + max(0, deeper) * (rows / low.rows if keeps else 1))
    return found


def _row_seconds(runs: Sequence[Run], blocks: int) -> tuple[float, float]:
    """Seconds per row in the blocks and in the rest, as medians over turns. Each turn runs all models, so that a slow
    spell of the machine affects both."""
    depths = [run.blocks for run in runs]
    whole, rest = [], []
    for turn in zip(*(run.seconds for run in runs), strict=True):
        row = [seconds / run.rows for seconds, run in zip(turn, runs, strict=True)]
        whole.append(_at(depths, blocks, row))
        rest.append(max(0.0, _at(depths, 0, row)))
    outside = statistics.median(rest)
    return statistics.median(whole) - outside, outside


def _by_formula(shape: Shape, work: Work, on_cpu: bool) -> Figure:
    return Figure(
        "scoring a batch, by formula", activation_bytes(shape, work, on_cpu), "bytes", COMPUTED, "docs/placement.md"
    )


def _while_loading(shape: Shape, libraries: float) -> Figure:
    """On the CPU the weights are the mapped file, unless they are converted. Afterwards the student's probe multiplies
    with the head in float32, which copies a half-precision head."""
    converted = shape.dtype != shape.stored_dtype
    files = shape.stored_bytes + (shape.weight_bytes if converted else 0)
    probed = shape.weight_bytes + (0 if shape.dtype == "float32" else 4 * shape.vocabulary * shape.hidden)
    if probed > files:
        note = "with a float32 copy of the head for the probe"
    else:
        note = f"in {shape.stored_dtype} and in {shape.dtype}" if converted else "the weights are the mapped file"
    return Figure("peak while loading", libraries + max(files, probed), "bytes", COMPUTED, note)


def _weights(shape: Shape) -> Figure:
    tied = "head and embedding tied" if shape.tied else "head and embedding separate"
    note = f"{shape.parameters / 1e6:,.0f} M parameters, {shape.dtype}, {tied}"
    return Figure("weights", shape.weight_bytes, "bytes", COMPUTED, note)
