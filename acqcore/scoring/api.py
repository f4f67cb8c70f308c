"""``acqcore.score`` and ``acqcore.score_stream``: samples in, acquisition values out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from acqcore import checks
from acqcore.backends import NAMES
from acqcore.defaults import standard_defaults
from acqcore.literals import Reduction
from acqcore.progress import progress_bar
from acqcore.scores import Scores
from acqcore.scoring.plan import AcquisitionArgs, Plan
from acqcore.students.samples import Sample, Samples, check_errors, in_chunks
from acqcore.students.student import StudentLike, as_student


@standard_defaults()
def score(
    student: StudentLike,
    samples: Samples,
    acquisitions: str | Sequence[str] = ("entropy",),
    *,
    acquisition_args: AcquisitionArgs | None = None,
    tokenizer: Any = None,
    reduction: Reduction = "mean",
    topk: int = 8,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
    keep_tokens: bool = False,
    progress: bool | None = None,
    errors: dict[int, str] | None = None,
) -> Scores:
    """Acquisition values of each sample for ``student``: how much it is worth training on (larger is better).

    The samples are tokenized once. Each batch takes one trunk forward for all acquisitions, one more for each set of
    draws, and one backward for all gradients of the same targets. Only the hidden states that predict a scored token
    reach the head. A sample's values do not depend on the other samples, except for acquisitions that compare the
    samples of a call (``gradient_diversity``).

    Args:
        student: a transformers causal language model, a PEFT model, a hub id or local path, or ``acqcore.Student``.
            Its mode, gradients, dtype and device are left unchanged. For sharded models see
            ``acqcore.Student.from_model``; other models make no collective calls.
        samples: a list of strings (scored whole), of ``{"prompt", "completion"}`` (strings or messages; the completion
            is scored), of ``{"question", "answer"}`` (the same), or of ``{"messages"}`` (the last assistant turn is
            scored, through the chat template); a table with such columns or ``"text"`` (a ``datasets.Dataset``, a
            pandas, polars or Arrow table, or a mapping of lists); tensors ``{"input_ids" [B, T], "attention_mask"
            [B, T], "labels" [B, T]}``, padded on either side, labels aligned with input_ids and -100 where not
            scored (mask and labels are optional); or rows from ``acqcore.encode``.
        acquisitions: names from ``acqcore.acquisitions()``.
        acquisition_args: name -> arguments of that acquisition, as a mapping or as its options.

            - ``grad_norm``, ``badge``: ``parameters`` and ``loss`` of :func:`acqcore.grad_norm`.
            - ``influence``: ``reference``, from :func:`acqcore.influence_reference` (required), and ``similarity``.
            - ``epig``: ``reference``, from :func:`acqcore.epig_reference` (required), ``variance`` and ``probes``.
            - ``gradient_diversity``: ``parameters``, ``dim`` and ``seed`` of :func:`acqcore.grad_sketch`, ``ridge``
              and ``ordered`` of :func:`acqcore.gradient_diversity`.
            - ``archive_novelty``: ``archive``, an ``acqcore.Archive`` (required), ``parameters``, ``dim``, ``seed``.
            - ``mutual_information``: by default its linear form, with ``posterior``, ``probes``, ``layers``,
              ``positions``, ``dropout`` or ``variance`` or ``reference``, ``seed``: see
              ``acqcore.acquisitions.LinearOptions``. This form has no token values; its standard error is in
              ``Scores.stderr``. With ``draws``, ``members``, ``block``, ``form="element"`` or ``form="block"`` it is
              computed from draws, like the next ones.
            - ``predictive_entropy`` and others computed from draws: ``layers`` (dropout in the last n blocks,
              ``"all"``, ``"own"``, or 0 for the last hidden state), ``draws``, ``dropout``, ``form``, ``block``,
              ``seed``, or ``members``, an ensemble: see ``acqcore.acquisitions.DrawOptions``. Acquisitions with
              equal arguments share the draws.
        tokenizer: the student's; defaults to the one loaded with a path. Not needed for tensors.
        reduction: of a sample's token values: ``mean``, ``sum``, ``max``, or ``topk``, the mean of the largest.
        topk: number of values that ``topk`` averages; all if there are fewer.
        batch_tokens: maximum padded tokens per trunk forward; a longer sample gets its own batch. A small student does
            not keep a large GPU busy with 8192: one of SmolLM2-135M's size was 2 to 3 times as fast with 32768.
        max_length: maximum tokens per sample. Truncation drops the oldest tokens of the prompt first, except the one
            that predicts the completion's first token, then the end of the completion; plain strings lose their end.
        backend: a name from ``acqcore.backends()``; by default the first that fits.
        keep_tokens: keep per-token values in ``Scores.tokens``.
        progress: show a progress bar on stderr; by default only on a terminal, after a few seconds.
        errors: a dict that receives ``index -> message`` for each sample that cannot be scored. Such a sample then has
            NaN values and is marked invalid instead of raising.

    Returns:
        Scores in input order, float32. If a token has no finite value, the sample's value is NaN and the sample is
        invalid.

    Raises:
        TypeError: an argument of the wrong type, samples of several kinds, a missing tokenizer.
        ValueError: an unknown name, a sample with nothing to score or too long for the student (names its index),
            a model whose logits acqcore cannot reproduce, parameters or layers that the student does not have.
        RuntimeError: the backend is unavailable; under FSDP or ZeRO-3, another rank raised.
    """
    plan = Plan.of(
        acquisitions, acquisition_args,
        reduction=reduction, topk=topk, batch_tokens=batch_tokens, backend=backend,
    )  # fmt: skip
    runner = plan.runner(student)
    with runner.student.in_step():
        rows = runner.encode(samples, tokenizer, max_length, errors)
        values = torch.full((len(plan.names), len(rows)), torch.nan)
        tokens: dict[str, list[torch.Tensor]] = {name: [torch.empty(0)] * len(rows) for name in plan.of_tokens}
        sketches = {need: torch.zeros(len(rows), *need.shape) for need in plan.set_needs}
        stderr = {name: torch.full((len(rows),), torch.nan) for name in plan.estimated}
        with progress_bar(sum(len(row.ids) for row in rows), progress) as bar:
            for batch in plan.batches(runner, rows):
                values[:, batch.indices] = batch.values
                for need, of_samples in batch.sketches.items():
                    sketches[need][batch.indices] = of_samples
                for name, of_batch in batch.stderr.items():
                    stderr[name][batch.indices] = of_batch
                if keep_tokens:
                    for i, sample in zip(batch.indices, batch.tokens, strict=True):
                        for name, column in sample.items():
                            tokens[name][i] = column.clone()  # a view would keep the whole batch
                bar.update(batch.n_input_tokens)
    for entry, options in plan.of_sets:
        column = entry.compute(options, sketches)
        checks.acquisition_values(entry.name, column, len(rows))
        values[plan.names.index(entry.name)] = column
    values[:, [i for i, row in enumerate(rows) if row.n_scored == 0]] = torch.nan
    n_tokens = torch.tensor([row.n_scored for row in rows], dtype=torch.int64)
    valid = values.isfinite().all(dim=0)
    return Scores(dict(zip(plan.names, values, strict=True)), n_tokens, valid, tokens if keep_tokens else None, stderr)


def check_request(
    acquisitions: str | Sequence[str],
    acquisition_args: AcquisitionArgs | None = None,
    *,
    reduction: Reduction = "mean",
    batch_tokens: int = 8192,
    backend: str | None = None,
    device: str | None = None,
) -> None:
    """Check arguments of :func:`score`, and the device to load the student on, before a student exists.

    Raises:
        TypeError, ValueError: an argument that :func:`score` would reject for any student; a device that this machine
            does not have.
    """
    Plan.of(acquisitions, acquisition_args, reduction=reduction, batch_tokens=batch_tokens)
    checks.device("device", device)
    if backend is not None:
        checks.one_of("backend", backend, NAMES)


def score_stream(
    student: StudentLike,
    samples: Iterable[Sample] | Samples,
    acquisitions: str | Sequence[str] = ("entropy",),
    *,
    chunk: int = 4096,
    errors: dict[int, str] | None = None,
    **options: Any,
) -> Iterator[Scores]:
    """Acquisition values of any number of samples, holding one chunk in memory at a time.

    Args:
        student: as in :func:`acqcore.score`; loaded once. Under FSDP and ZeRO-3, every rank needs the same number of
            chunks.
        samples: strings or mappings as in :func:`acqcore.score`, from any iterable such as a generator or a
            ``datasets.IterableDataset``; read one chunk at a time. Also a table or tensors.
        acquisitions: names from ``acqcore.acquisitions()``, except those that compare the samples of a call.
        chunk: samples per chunk.
        errors: as in :func:`acqcore.score`, with indices into all samples.
        options: the other arguments of :func:`acqcore.score`.

    Returns:
        An iterator of Scores in input order, for ``chunk`` samples each; the last may cover fewer.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`acqcore.score`, immediately; for invalid samples when their chunk
            is read, with the index of its first sample prefixed to the message.
    """
    chunk = checks.positive_int("chunk", chunk)
    plan = Plan.of(acquisitions, options.get("acquisition_args"))
    plan.sample_by_sample("use acqcore.score")
    check_errors(errors)
    lists = in_chunks(samples, chunk)
    loaded = as_student(student)
    score(loaded, [], plan.names, **{**options, "progress": False})  # raises now what every chunk would raise

    def chunks() -> Iterator[Scores]:
        start = 0
        for held in lists:
            found: dict[int, str] | None = None if errors is None else {}
            try:
                scores = score(loaded, held, plan.names, errors=found, **options)
            except (ValueError, TypeError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError  # a subclass may take other arguments
                raise kind(f"chunk from sample {start}: {error}") from error
            if errors is not None:
                errors.update({start + i: message for i, message in (found or {}).items()})
            start += len(held)
            yield scores

    return chunks()
