"""``acqcore plan``: options, tables and JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from acqcore import checks
from acqcore.costs.estimate import Figure, from_rates, from_runs
from acqcore.costs.measure import measure
from acqcore.costs.shape import Shape, read_config, shape_of, stored_dtype
from acqcore.costs.work import Work
from acqcore.options import at_least, json_value
from acqcore.progress import print_table
from acqcore.students.loading import DTYPES

#: Load average above which a note warns that other work slowed the measurement.
BUSY = 0.5
ARGUMENTS_HELP = (
    'arguments per acquisition, as in {"grad_norm": {"parameters": "all"}}; influence takes a file written by '
    'acqcore reference: {"influence": {"reference": "reference.pt"}}'
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``acqcore plan``."""
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--student", metavar="M", help="hub id or local path to read the configuration from")
    source.add_argument("--config", metavar="F", help="the config.json of a transformers model; needs no weights")
    add("--rows", type=at_least(1), required=True, metavar="N", help="rows to score")
    add("--tokens", type=at_least(1), required=True, metavar="T", help="tokens per row (their mean, if rows differ)")
    add("--scored", type=at_least(1), metavar="N", help="scored tokens per row (default: all but the first)")
    add("--acquisitions", default="entropy", metavar="A,B", help="as for 'acqcore score' (default: entropy)")
    add("--acquisition-args", type=json_value, metavar="JSON", help=ARGUMENTS_HELP)
    add("--batch-tokens", type=int, default=8192, metavar="N", help="maximum padded tokens per forward (default: 8192)")
    add("--dtype", choices=list(DTYPES), help="dtype of the weights (default: as stored)")
    add("--device", default="cpu", metavar="D", help="device (default: cpu)")
    add("--threads", type=at_least(1), metavar="N", help="CPU threads (default: torch's current setting)")
    add("--devices", type=at_least(1), default=1, metavar="N", help="extrapolate to N devices (default: 1)")
    add("--flops", type=float, metavar="F", help="FLOP/s achieved by a device not present here")
    add("--bandwidth", type=float, metavar="B", help="bytes/s achieved by a device not present here")
    add("--json", action="store_true", help="print JSON instead of tables")


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    if (options.flops is None) != (options.bandwidth is None):
        raise ValueError("--flops and --bandwidth: expected both or neither")
    if options.flops is not None:
        checks.positive("flops", options.flops)
        checks.positive("bandwidth", options.bandwidth)
    source = os.path.expanduser(options.student or options.config)
    if not Path(source).exists() and (options.config or source.startswith(("/", "."))):
        raise ValueError(f"{'config' if options.config else 'student'}: no file or folder {source}")
    config = read_config(source)
    dtype = DTYPES[options.dtype] if options.dtype else stored_dtype(config)
    shape = shape_of(config, dtype)
    names = [name.strip() for name in options.acquisitions.split(",")]
    work = Work.checked(
        shape, options.rows, options.tokens, options.scored, options.batch_tokens, names, options.acquisition_args
    )
    on_cpu = options.device == "cpu"
    busy = 0.0
    if options.flops is not None:
        estimate = from_rates(shape, work, options.flops, options.bandwidth, options.devices, on_cpu)
    else:
        if not (on_cpu or (options.device.startswith("cuda") and torch.cuda.is_available())):
            raise ValueError(
                f"device: {options.device!r} is not on this machine and cannot be measured; give its rates with "
                "--flops and --bandwidth"
            )
        if sys.stderr.isatty():
            print("measuring models of a few blocks; this takes about half a minute", file=sys.stderr)
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        runs = measure(source, config, shape, work, options.device, options.threads)
        estimate = from_runs(shape, work, runs, options.devices, on_cpu)
    notes = _notes(shape, work, busy)
    if options.json:
        document = {"model": asdict(shape), "work": asdict(work), "device": options.device, **asdict(estimate)}
        print(json.dumps({**document, "notes": notes}, indent=1))
        return 0
    title = f"{shape.name}, {shape.blocks} blocks, {options.device}, {', '.join(names)}"
    print_table(f"memory of {title}", ("", "", "source", ""), [_cells(figure) for figure in estimate.memory])
    print_table(f"time of {title}", ("", "", "source", ""), [_cells(figure) for figure in estimate.time])
    if estimate.layouts:
        print_table(
            f"{options.devices} devices like this one, computed",
            ("", "time", "memory of each", ""),
            [(r.name, seconds(r.seconds), size(r.bytes_per_device), r.note) for r in estimate.layouts],
        )
    for note in notes:
        print(note)
    return 0


def _notes(shape: Shape, work: Work, busy: float) -> list[str]:
    """Caveats of the estimate; ``busy`` is the machine's load before measuring."""
    notes = []
    if busy > BUSY:
        notes.append(f"Other work (load {busy:.1f} on {os.cpu_count()} cores) slowed down the measurement.")
    if shape.kinds > 1:
        notes.append(
            f"The {shape.blocks} blocks are of {shape.kinds} kinds, but only the first ones were measured: "
            "expect a larger error."
        )
    if work.tokens > work.batch_tokens:
        notes.append(f"A row is longer than --batch-tokens {work.batch_tokens}: each gets its own batch.")
    return notes


def _cells(figure: Figure) -> tuple[str, str, str, str]:
    shown = "" if figure.value is None else (size if figure.unit == "bytes" else seconds)(figure.value)
    return figure.name, shown, figure.source, figure.note


def size(value: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{value / 2**20:.0f} MiB" if value < 2**30 else f"{value / 2**30:.2f} GiB"


def seconds(value: float) -> str:
    """Seconds in the largest unit that keeps two digits."""
    if value >= 7200:
        return f"{value / 3600:.1f} h"
    if value >= 120:
        return f"{value / 60:.1f} min"
    if value >= 0.1 or value == 0:
        return f"{value:.{max(0, 1 - math.floor(math.log10(value))) if 0 < value < 10 else 1}f} s"
    return f"{float(f'{value * 1e3:.2g}'):g} ms"
