"""Runs the student over batches of samples and computes each need once per batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from acqcore import checks
from acqcore.acquisitions import BatchNeed, DrawOptions, RowNeed, SampleBatch
from acqcore.acquisitions.needs import Need
from acqcore.backends import Probes
from acqcore.fisher import fisher_visit
from acqcore.gradients.capture import OneByOne
from acqcore.gradients.head_pass import HeadPass
from acqcore.gradients.need import GradientNeed, ProbeNeed
from acqcore.gradients.per_sample import SampleGradients
from acqcore.head_grad import delta_visit, loss_weights
from acqcore.head_visit import visit
from acqcore.literals import Loss
from acqcore.row_stats import checked_backend, row_stats
from acqcore.scoring.draws import Batch, Draws
from acqcore.students.packing import OVERHEAD_TOKENS, partition
from acqcore.students.samples import Row, Samples, encode
from acqcore.students.student import StudentLike, as_student

#: Maximum rows for probing a student's gradients.
PROBED_ROWS = 4

#: Maximum number of threads with which dL/dh and a sketch share a pass over the head. With this many, the
#: ``head_grad.SKETCH_ROWS`` rows of a part are divided into blocks of 64 rows; more threads get shorter blocks.
JOINED_THREADS = 8


@dataclass(frozen=True, eq=False)
class Found:
    """The results of a batch."""

    indices: list[int]  # of its samples in the rows
    counts: list[int]  # scored tokens of each sample; their sum is N
    results: Mapping[Need, Any]  # RowStats or BayesStats of the N tokens, SampleBatch, or values of the samples
    n_input_tokens: int  # of the samples, without padding


class Runner:
    """Computes needs of a student's samples, batch by batch.

    Needs share one forward without dropout, which keeps a graph only if a gradient reaches the trunk. Gradients of the
    same targets share one backward, and equal draws are computed once.

    Raises:
        TypeError, ValueError, RuntimeError: before any forward, as :func:`acqcore.score`, for a student, backend, draws
            or parameters that do not fit together.
    """

    def __init__(self, student: StudentLike, needs: Collection[Need], batch_tokens: int, backend: str | None) -> None:
        self.student = student = as_student(student)
        self.head = head = student.head
        row_stats(head.weight[:0], head, backend=backend)  # without rows, to fail before any forward
        self._needs = needs
        self._batch_tokens = batch_tokens = checks.positive_int("batch_tokens", batch_tokens)
        self._backend = backend
        self._draws = {
            need: Draws(student, head, need, batch_tokens, backend) for need in needs if isinstance(need, DrawOptions)
        }
        self._students = [student, *(member for draws in self._draws.values() for member in draws.members)]
        #: Maximum tokens per sample that the student and all members of ensembles take; None for no limit.
        self.limit = min((s.max_length for s in self._students if s.max_length is not None), default=None)
        gradients = [need for need in needs if isinstance(need, GradientNeed | ProbeNeed)]
        self._gradients = SampleGradients(student, head, gradients) if gradients else None

    def encode(
        self, samples: Samples, tokenizer: Any, max_length: int | None, errors: dict[int, str] | None = None
    ) -> list[Row]:
        """The samples as rows; ``tokenizer`` defaults to the student's. Raises as :func:`encode`."""
        tokenizer = tokenizer if tokenizer is not None else self.student.tokenizer
        return encode(
            samples, tokenizer, vocab_size=self.head.vocab_size, limit=self.limit, max_length=max_length, errors=errors
        )

    def collect(
        self,
        samples: Samples,
        tokenizer: Any,
        max_length: int | None,
        shape: tuple[int, ...],
        value: Callable[[Found], torch.Tensor],
    ) -> torch.Tensor:
        """Collect ``value [B, *shape]`` of every batch in sample order: ``[n, *shape]`` float32 on the CPU."""
        with self.student.in_step():
            rows = self.encode(samples, tokenizer, max_length)
            values = torch.zeros(len(rows), *shape)
            for found in self.batches(rows):
                values[found.indices] = value(found).float()
        return values

    def batches(self, rows: Sequence[Row], done: Collection[int] = ()) -> Iterator[Found]:
        """Yield results of batches of ``rows`` as they finish; rows with nothing to score are omitted.

        The batches depend only on the rows, ``batch_tokens`` and the device type. Batches whose rows are all in
        ``done`` are skipped.
        """
        scored = [i for i, row in enumerate(rows) if row.n_scored]
        lengths = [len(rows[i].ids) for i in scored]
        overhead = OVERHEAD_TOKENS.get(self.student.device.type, OVERHEAD_TOKENS["cuda"])
        if scored and self._gradients is not None:
            probed = (scored * 2)[: max(2, min(PROBED_ROWS, len(scored)))]
            self._gradients.prepare(Batch.of([rows[i] for i in probed]).input_ids)
        of_students = (student.length_groups(lengths, self._batch_tokens) for student in self._students)
        groups = list(zip(*of_students, strict=True))
        repeats = 0 if self._gradients is None or not scored else self._gradients.backwards_of_completions
        starts = [rows[i].first for i in scored] if repeats else None
        for picked in partition(lengths, self._batch_tokens, overhead, groups, starts, repeats):
            indices = [scored[i] for i in picked]
            if any(i not in done for i in indices):
                yield from self._batch(rows, indices)

    def _batch(self, rows: Sequence[Row], indices: list[int]) -> Iterator[Found]:
        """Results of every need for these rows, in one batch or, if gradients require it, one row at a time."""
        if len(indices) > 1 and self._gradients is not None and self._gradients.one_by_one:
            for i in indices:
                yield from self._batch(rows, [i])
            return
        batch = Batch.of([rows[i] for i in indices])
        tokens = sum(len(row.ids) for row in batch.rows)
        try:
            results = self._results(batch)
        except OneByOne:
            assert self._gradients is not None
            self._gradients.take_one_by_one()
            yield from self._batch(rows, indices)
            return
        yield Found(indices, batch.offsets.diff().tolist(), results, tokens)

    def _results(self, batch: Batch) -> dict[Need, Any]:
        # The mode is switched per batch, not around the generator: a paused generator would leave its caller without
        # gradients. Autograd cannot run in inference mode.
        results: dict[Need, Any] = {}
        with torch.inference_mode(False), torch.no_grad():
            for options, draws in self._draws.items():
                if not options.on_hidden:  # first, while no graph is held
                    results[options] = draws.of_forwards(batch)
            if any(not isinstance(need, DrawOptions) or need.on_hidden for need in self._needs):
                with self.student.scoring():
                    self._without_dropout(batch, results)
        return results

    def _without_dropout(self, batch: Batch, results: dict[Need, Any]) -> None:
        """Add the results that follow from one forward without dropout."""
        gradients, head = self._gradients, self.head
        input_ids = batch.input_ids.to(self.student.device)
        forward = nullcontext(None) if gradients is None else gradients.forward(input_ids, batch.first)
        with forward as of_graph:
            hidden = self.student.hidden(input_ids) if of_graph is None else of_graph  # [B, T, D]
            picked = hidden.detach().flatten(0, 1).index_select(0, batch.positions.to(hidden.device))  # [N, D]
            # A head in float32 over a half-precision trunk (an adapter's sum): widening hidden is exact.
            dtype = torch.promote_types(picked.dtype, head.weight.dtype)
            picked = picked.to(device=head.weight.device, dtype=dtype)
            joined = self._joined_draws
            for options, draws in self._draws.items():
                if options.on_hidden and options is not joined:
                    results[options] = draws.of_hidden(batch, picked)
            if all(isinstance(need, DrawOptions) for need in self._needs):
                return
            with torch.autocast(hidden.device.type, enabled=False):
                seen = self._visit_head(picked, batch, results)
                results[RowNeed()] = seen.stats
                results[BatchNeed()] = SampleBatch(picked, head, seen.stats, seen.bounds, self._backend)
                if gradients is not None:
                    results.update(gradients.measure(hidden, batch.positions, seen).items())

    @cached_property
    def _joined_draws(self) -> DrawOptions | None:
        """Draws of block dropout whose pass over the head's weights also gives the statistics without dropout."""
        if all(isinstance(need, DrawOptions) for need in self._needs):
            return None
        if self.head.group is not None or self.head.weight.device.type != "cpu":  # no kernel joins them there
            return None
        gradients = self._gradients
        if gradients is not None and (gradients.head_sketch or (gradients.probes and not gradients.of_head)):
            return None  # the statistics come with the sketch or the probes
        return next((options for options in self._draws if options.on_hidden and options.form == "block"), None)

    def _visit_head(
        self,
        hidden: torch.Tensor,  # [N, D]
        batch: Batch,
        results: dict[Need, Any],
    ) -> HeadPass:
        """One head pass for all needs under the written targets; adds the results of joined draws."""
        head, gradients = self.head, self._gradients
        targets = batch.targets.to(hidden.device)
        keys, places = (value.to(hidden.device) for value in batch.keys_and_places)
        loss: Loss = "mean" if gradients is None else gradients.loss
        seen = partial(HeadPass, hidden, head, batch.bounds, loss, self._backend, keys, places)
        chosen = partial(checked_backend, hidden, head, targets, self._backend)
        rows = None
        if self._joined_draws is not None:
            rows, results[self._joined_draws] = self._draws[self._joined_draws].rows_of_hidden(batch, hidden)
        with_hidden, sketch = self._sums
        if gradients is not None and (with_hidden or sketch is not None):
            weights, _ = loss_weights(targets, batch.bounds, loss)
            visited, hidden_grads, sketches = delta_visit(
                hidden, head, targets, batch.bounds, weights, 1.0, chosen("delta_hash"), norms=gradients.of_head,
                with_hidden=with_hidden, sketch=sketch,
            )  # fmt: skip
            found = {} if sketches is None else {sketch: sketches}
            return seen(visited.stats, visited=visited, hidden_grads=hidden_grads, found=found)
        if gradients is not None and gradients.of_head:
            visited = visit(hidden, head, targets, batch.bounds, 1.0, chosen("head_grad_norm"), draws=rows)
            return seen(visited.stats, visited=visited)
        if rows is not None:
            return seen(visit(hidden, head, targets, (), 1.0, chosen(), draws=rows).stats)
        if gradients is not None and gradients.probes:
            seed, count = next(iter(gradients.probes.items()))
            probes = Probes(count, seed, keys, places)
            stats, cotangents = fisher_visit(hidden, head, targets, probes, 1.0, chosen("fisher_sums"))
            return seen(stats, carried=(probes, cotangents))
        return seen(row_stats(hidden, head, targets, backend=self._backend))

    @cached_property
    def _sums(self) -> tuple[bool, tuple[int, int] | None]:
        """Further results of the pass that computes the statistics: whether dL/dh, and the dim and seed of a sketch."""
        gradients, head = self._gradients, self.head
        if gradients is None or head.group is not None:
            return False, None
        sketch = gradients.head_sketch
        elsewhere = sketch is None and (gradients.probes or self._joined_draws is not None)
        # On GPUs no kernel computes dL/dh in that pass. Sketches are computed in parts too short for many threads.
        joins = head.weight.device.type == "cpu" and (sketch is None or torch.get_num_threads() <= JOINED_THREADS)
        return joins and gradients.of_trunk and not elsewhere, sketch
