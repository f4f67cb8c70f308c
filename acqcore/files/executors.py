"""Runs the blocks of a file in this process, in the processes of ``accelerate launch``, or in Ray actors.

In each of them a :class:`acqcore.files.worker.BlockScorer` scores and writes blocks; only row counts are sent back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch

from acqcore import checks
from acqcore.files.data import Block
from acqcore.files.parts import Parts
from acqcore.files.worker import BlockScorer, Job

_RAY_OBJECT_STORE_BYTES = 1 << 27  # a cluster started here stores only block descriptions


class Local:
    """Completes the blocks in this process."""

    #: Whether this process prepares the run, joins the parts and prints the report.
    reports = True

    def run(self, job: Job, blocks: Sequence[Block], on_rows: Callable[[int], None]) -> None:
        """Complete the blocks; ``on_rows`` is called with the number of newly completed rows."""
        if blocks:
            scorer = BlockScorer(job)
            for block in blocks:
                scorer.complete(block, on_rows)


class Accelerate:
    """Uses the processes of ``accelerate launch``, one device each; block i goes to process i modulo their number.

    Args:
        device: as in ``Job``; with ``"cpu"``, or without a GPU, the processes communicate over gloo.
    """

    def __init__(self, device: str | None) -> None:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        on_cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        # Processes synchronize only at the end, and the slowest may be hours behind.
        self._state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))

    @property
    def reports(self) -> bool:
        return bool(self._state.is_main_process)

    def run(self, job: Job, blocks: Sequence[Block], on_rows: Callable[[int], None]) -> None:
        from accelerate.utils import broadcast_object_list

        # The reporting process decides which blocks are left: others may check after it has started scoring.
        [blocks] = broadcast_object_list([list(blocks)])
        rank, n_processes = self._state.process_index, self._state.num_processes
        own = blocks[rank::n_processes]
        others = [block for i, block in enumerate(blocks) if i % n_processes != rank]
        scorer = BlockScorer(dataclasses.replace(job, device=job.device or str(self._state.device)))
        for block in own:
            scorer.complete(block, on_rows)
            if self.reports:  # count the blocks that other processes have finished
                left = [block for block in others if not scorer.parts.finished(block.index)]
                on_rows(sum(block.rows for block in others) - sum(block.rows for block in left))
                others = left
        self._state.wait_for_everyone()
        on_rows(sum(block.rows for block in others))
        self._state.destroy_process_group()


class Ray:
    """A pool of Ray actors with a student each, and a GPU each if the cluster has any and the device is not the CPU.

    Actors read and write their blocks directly, so data, output and a local student must be on shared storage. A dead
    actor is restarted, and its block resumes after the last finished batch. The default is one actor per GPU or,
    without GPUs, cores divided by this process's threads; a cluster is started unless ``RAY_ADDRESS`` names one.
    """

    reports = True

    def __init__(self, workers: int | None, address: str | None) -> None:
        self.workers = workers
        self.address = address

    def run(self, job: Job, blocks: Sequence[Block], on_rows: Callable[[int], None]) -> None:
        if not blocks:
            return
        import ray
        import ray.data

        with _connected(self.address or os.environ.get("RAY_ADDRESS"), Parts(job.out).folder):
            total = ray.cluster_resources()
            cores, gpus = max(1, int(total.get("CPU", 1))), int(total.get("GPU", 0))
            on_gpu = gpus > 0 and job.device in (None, "cuda")
            threads = min(torch.get_num_threads(), max(1, cores // (self.workers or 1)))
            workers = min(self.workers or (gpus if on_gpu else cores // threads), len(blocks))
            if on_gpu:
                threads = 1
                job = dataclasses.replace(job, device="cuda")
            ray.data.DataContext.get_current().enable_progress_bars = False
            results = ray.data.from_items(
                [dataclasses.asdict(block) for block in blocks], override_num_blocks=len(blocks)
            ).map_batches(
                _Actor,
                fn_constructor_kwargs={"job": job, "threads": threads},
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
                num_cpus=threads,
                num_gpus=1 if on_gpu else None,
            )
            for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
                for rows, failure in zip(batch["rows"].tolist(), batch["failure"].tolist(), strict=True):
                    if failure:
                        raise RuntimeError(failure)
                    on_rows(rows)


class _Actor:
    """A scorer in a Ray process. If its creation fails, its blocks report the reason; Ray itself would print pages."""

    def __init__(self, job: Job, threads: int) -> None:
        torch.set_num_threads(threads)
        self.failure = ""
        try:
            self.scorer = BlockScorer(job)
        except Exception as error:
            self.failure = str(error).strip() or type(error).__name__

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        block = Block(**{name: int(column[0]) for name, column in batch.items()})
        if not self.failure:
            self.scorer.complete(block)
        return {"rows": [block.rows], "failure": [self.failure]}


@contextlib.contextmanager
def _connected(address: str | None, folder: Path) -> Iterator[None]:
    """Context with a Ray connection: an existing one, one to ``address``, or one to a temporary cluster. Starts Ray in
    ``folder``, which has no Python modules, because Ray puts the current folder first on its workers' paths."""
    import ray
    import ray.data

    if address:
        _check_answers(address)
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {} if address else {"include_dashboard": False, "object_store_memory": _RAY_OBJECT_STORE_BYTES}
    with contextlib.chdir(folder):
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that its bars are off
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Fail fast if nothing answers: Ray itself would retry for a quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise OSError(f"ray-address: nothing answers at {address} ({error})") from error


Executor: TypeAlias = Local | Accelerate | Ray


def executor_of(name: str, workers: int | None, address: str | None, device: str | None) -> Executor:
    """The executor that ``--engine`` names."""
    if name == "accelerate":
        checks.installed("accelerate", "--engine accelerate", "train")
        return Accelerate(device)
    if name == "ray":
        checks.installed("ray", "--engine ray", "ray")
        return Ray(workers, address)
    return Local()
