"""``acqcore.score``: samples in, acquisition values out, one trunk forward and one head pass per batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch

from acqcore import checks
from acqcore.acquisitions import REGISTRY, Acquisition, SampleBatch
from acqcore.bayes import BayesStats
from acqcore.draws import DrawBatch, DrawOptions, Draws
from acqcore.ghost import grad_norm
from acqcore.head import Head
from acqcore.head_visit import visit
from acqcore.influence import influence
from acqcore.packing import OVERHEAD_TOKENS, collate, partition
from acqcore.progress import Progress
from acqcore.row_stats import RowStats, checked_backend, row_stats
from acqcore.samples import Row, Samples, encode
from acqcore.scores import Scores
from acqcore.set_signals import archive_novelty, batch_diversity
from acqcore.student import Student, StudentLike, as_student

REDUCTIONS = ("mean", "sum", "max", "topk")

#: What ``acquisition_args`` may hold for each acquisition that takes arguments, and what it must.
ARGUMENTS = {
    "grad_norm": ("parameters", "loss"),
    "badge": ("parameters", "loss"),
    "influence": ("reference", "similarity"),
    "gradient_diversity": ("parameters", "dim", "seed", "ridge", "ordered"),
    "archive_novelty": ("archive", "parameters", "dim", "seed"),
    **{
        name: tuple(option.name for option in fields(DrawOptions))
        for name, entry in REGISTRY.items()
        if entry.per_draws is not None
    },
}
REQUIRED = {"influence": "reference", "archive_novelty": "archive"}

#: Acquisitions that may take a forward and backward pass of their own.
OWN_PASS: dict[str, Callable[..., torch.Tensor]] = {
    "grad_norm": grad_norm,
    "badge": partial(grad_norm, predicted=True),
    "influence": influence,
    "gradient_diversity": batch_diversity,
    "archive_novelty": archive_novelty,
}


def score(
    student: StudentLike,
    samples: Samples,
    acquisitions: str | Sequence[str] = ("entropy",),
    *,
    acquisition_args: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    reduction: str = "mean",
    topk: int = 8,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
    keep_tokens: bool = False,
    progress: bool | None = None,
) -> Scores:
    """Acquisition values of each sample for ``student``: how much it is worth learning from, larger is more.

    One trunk forward per batch; only the hidden states that predict a scored token reach the head, where one
    pass gives every acquisition asked for. A sample's values do not depend on what else is scored with it.

    Args:
        student: a transformers causal language model, a PEFT model, a hub id or local path, or
            ``acqcore.Student``. Its mode, gradients, dtype and device are left as found. A sharded model as
            ``acqcore.Student.from_model`` says; of any other no collective is made.
        samples: a list of strings (scored whole); of ``{"prompt", "completion"}``, strings or messages (the
            completion is scored); of ``{"messages"}`` (the last assistant turn is scored, through the chat
            template); a ``datasets.Dataset`` with such columns or ``"text"``; or tensors ``{"input_ids" [B,
            T], "attention_mask" [B, T], "labels" [B, T]}``, padded on any side, labels aligned with input_ids
            and -100 where not scored (mask and labels optional); or rows from ``acqcore.encode``.
        acquisitions: names from ``acqcore.acquisitions()``.
        acquisition_args: name -> arguments of that acquisition. ``grad_norm`` takes ``loss`` and ``parameters`` of
            :func:`acqcore.grad_norm`, ``badge`` the same; beyond ``"head"`` they run a forward and backward pass of
            their own. ``gradient_diversity`` and ``archive_novelty``, values of a sample among others, take
            ``parameters``, ``dim`` and ``seed`` of :func:`acqcore.grad_sketch`, the first ``ridge`` and ``ordered``
            too, the second needs ``archive``, an ``acqcore.Archive``.
            ``influence`` needs ``reference``, from :func:`acqcore.influence_reference`, and takes ``similarity``.
            ``mutual_information`` and the others of several draws take ``layers`` (dropout in the last n blocks,
            ``"all"``, ``"own"``, or 0 for the last hidden state alone), ``draws``, ``dropout``, ``form``, ``block``,
            ``seed``, or ``members``, an ensemble: see ``acqcore.draws.DrawOptions``. Equal arguments share the draws.
        tokenizer: of the student; by default the one loaded with a path. Tensors need none.
        reduction: of a sample's token values: ``mean``, ``sum``, ``max``, or ``topk``, the mean of the
            largest.
        topk: how many values ``topk`` takes; all where there are fewer.
        batch_tokens: most padded tokens in a trunk forward; a longer sample goes alone.
        max_length: truncates samples to this many tokens: the oldest tokens of a prompt first, down to the
            one that predicts the completion's first, then the completion's end; plain strings keep their
            beginning.
        backend: a name from ``acqcore.backends()``; by default the first that fits.
        keep_tokens: keep per-token values in ``Scores.tokens``.
        progress: show a bar on stderr; by default on a terminal when it takes longer than a few seconds.

    Returns:
        Scores in input order, float32. A value is NaN, and the sample not valid, where a token has no finite
        value.

    Raises:
        TypeError: an argument of a wrong kind, samples of several kinds, a missing tokenizer.
        ValueError: an unknown name, a sample with nothing to score or longer than the student takes (names
            its index), a model whose logits acqcore does not know how to form.
        RuntimeError: the backend is not available here; under FSDP or ZeRO-3, another rank raised.
    """
    arguments = checks.acquisition_args(acquisition_args, acquisitions, ARGUMENTS)
    request = Request.checked(acquisitions, reduction, topk, batch_tokens, backend, arguments)
    student = as_student(student)
    head = request.fitting_head(student)
    with student.in_step():
        rows = encode(
            samples,
            tokenizer if tokenizer is not None else student.tokenizer,
            vocab_size=head.vocab_size,
            limit=student.max_length,
            max_length=max_length,
        )
        names = request.acquisitions
        values = torch.full((len(names), len(rows)), torch.nan)
        valid = torch.zeros(len(rows), dtype=torch.bool)
        n_tokens = torch.tensor([row.n_scored for row in rows], dtype=torch.int64)
        per_token = [name for name in names if REGISTRY[name].per_token or REGISTRY[name].per_draws]
        tokens: dict[str, list[torch.Tensor]] = {name: [torch.empty(0)] * len(rows) for name in per_token}
        if not request.in_one_pass():
            valid.fill_(True)
        with Progress(sum(len(row.ids) for row in rows), progress) as bar:
            for batch in iterate(student, head, rows, request) if request.in_one_pass() else ():
                values[:, batch.indices] = batch.values
                valid[batch.indices] = batch.valid
                if keep_tokens:
                    for i, sample in zip(batch.indices, batch.tokens, strict=True):
                        for name in per_token:
                            tokens[name][i] = sample[name].clone()  # of a batch's column, which it would keep
                bar.update(batch.n_input_tokens)
    for name in request.own_passes:
        own = OWN_PASS[name](
            student, samples, **request.arguments.get(name, {}), tokenizer=tokenizer, batch_tokens=batch_tokens,
            max_length=max_length, backend=backend,
        )  # fmt: skip
        values[names.index(name)] = own
        valid &= own.isfinite()
    return Scores(dict(zip(names, values, strict=True)), n_tokens, valid, tokens if keep_tokens else None)


@dataclass(frozen=True)
class Request:
    """What is asked of every batch; arguments of :func:`score`, checked."""

    acquisitions: tuple[str, ...]
    reduction: str
    topk: int
    batch_tokens: int
    backend: str | None
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    draw_options: Mapping[str, DrawOptions] = field(default_factory=dict)

    @property
    def own_passes(self) -> list[str]:
        """The acquisitions that the head pass does not give."""
        return [name for name in self.acquisitions if name in OWN_PASS and not self._in_head(name)]

    def _in_head(self, name: str) -> bool:
        """Whether the head pass gives an acquisition that else takes a pass of its own."""
        of_head = self.arguments.get(name, {}).get("parameters", "head") == "head"
        return REGISTRY[name].per_sample is not None and of_head

    def in_one_pass(self) -> list[Acquisition]:
        """The acquisitions that the head pass gives."""
        return [REGISTRY[name] for name in self.acquisitions if name not in self.own_passes]

    @classmethod
    def checked(
        cls,
        acquisitions: str | Sequence[str],
        reduction: str,
        topk: int,
        batch_tokens: int,
        backend: str | None,
        arguments: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Request:
        names = checks.names("acquisitions", acquisitions, REGISTRY)
        checks.one_of("reduction", reduction, REDUCTIONS)
        checks.positive_int("topk", topk)
        checks.positive_int("batch_tokens", batch_tokens)
        checks.required_arguments(names, arguments or {}, REQUIRED)
        arguments = arguments or {}
        draws = {n: DrawOptions.checked(arguments.get(n, {})) for n in names if REGISTRY[n].per_draws is not None}
        return cls(names, reduction, topk, batch_tokens, backend, arguments, draws)

    def fitting_head(self, student: Student) -> Head:
        """The student's head, known before any forward is paid for to be one that the backend serves."""
        head = student.head
        row_stats(head.weight[:0], head, backend=self.backend)  # no rows: raises what a batch would
        return head


@dataclass(frozen=True, eq=False)
class Batch:
    """Finished samples: ``indices`` into the rows, values of A acquisitions in float32 on the CPU."""

    indices: list[int]
    values: torch.Tensor  # [A, B]
    valid: torch.Tensor  # [B] bool
    tokens: list[dict[str, torch.Tensor]]  # B of name -> [scored tokens], for acquisitions of tokens
    n_input_tokens: int


def iterate(
    student: Student,
    head: Head,
    rows: Sequence[Row],
    request: Request,
    done: Collection[int] = (),
) -> Iterator[Batch]:
    """Batches of ``rows`` as they finish; rows with nothing to score are left out.

    The batches are a function of the rows, the request and the device's type; those whose rows are all in
    ``done`` are left out.
    """
    draws = {
        options: Draws(student, head, options, request.batch_tokens, request.backend)
        for options in request.draw_options.values()
    }
    scored = [i for i, row in enumerate(rows) if row.n_scored]
    lengths = [len(rows[i].ids) for i in scored]
    overhead = OVERHEAD_TOKENS.get(student.device.type, OVERHEAD_TOKENS["cuda"])
    for batch in partition(lengths, request.batch_tokens, overhead):
        indices = [scored[i] for i in batch]
        if any(i not in done for i in indices):
            yield _score_batch(student, head, rows, indices, request, draws)


def _score_batch(
    student: Student,
    head: Head,
    rows: Sequence[Row],
    indices: list[int],
    request: Request,
    draws: Mapping[DrawOptions, Draws],
) -> Batch:
    picked = [rows[i] for i in indices]
    # Padded on the right and given no attention mask: the trunk is causal, so no real token sees the padding
    # after it, and what padded positions hold is never read. Without a mask SDPA takes its fast causal path.
    input_ids, positions, targets, offsets = collate(picked)
    counts = offsets.diff().tolist()
    # Scoring is per batch, not around the generator: a generator that is paused would leave its caller
    # without gradients.
    with student.scoring():
        hidden = student.hidden(input_ids.to(student.device)).flatten(0, 1)  # [B * T, D]
        hidden = hidden.index_select(0, positions.to(hidden.device))  # [N, D]
        # A head in float32 over a half-precision trunk (an adapter's sum): widening hidden is exact.
        dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
        hidden = hidden.to(device=head.weight.device, dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            bounds = checks.offsets(offsets, targets)
            of_device = targets.to(hidden.device)
            visited = None
            if any(entry.needs_gram for entry in request.in_one_pass()):
                chosen = checked_backend(hidden, head, of_device, 1.0, request.backend)
                visited = visit(hidden, head, of_device, bounds, 1.0, chosen)
                stats = visited.stats
            else:
                stats = row_stats(hidden, head, of_device, backend=request.backend)
        drawn: dict[DrawOptions, BayesStats] = {}
        for options, of_student in draws.items():
            drawn[options] = of_student.stats(DrawBatch(picked, input_ids, positions, targets, offsets, hidden))
        token_values, sample_values = {}, {}
        for entry in request.in_one_pass():
            if entry.per_token is not None or entry.per_draws is not None:
                column = _token_values(entry, stats, drawn, request)
                checks.token_values(entry.name, column, len(stats))
                token_values[entry.name] = column.double()  # [N]
            else:
                own = {k: v for k, v in request.arguments.get(entry.name, {}).items() if k != "parameters"}
                assert entry.per_sample is not None
                batch = SampleBatch(hidden, head, stats, bounds, request.backend, visited)
                sample_values[entry.name] = entry.per_sample(batch, **own).double()  # [B]
    # One copy to the host a batch: on a GPU each would wait for it.
    found = {**token_values, **sample_values}
    lengths = [len(column) for column in found.values()]
    pieces = torch.cat([column.to(hidden.device) for column in found.values()]).cpu().split(lengths) if found else ()
    of_host = dict(zip(found, pieces, strict=True))
    values = torch.full((len(request.acquisitions), len(indices)), torch.nan)
    tokens: list[dict[str, torch.Tensor]] = [{} for _ in indices]
    in_pass = torch.zeros(len(request.acquisitions), dtype=torch.bool)
    for a, name in enumerate(request.acquisitions):
        if name in sample_values:
            values[a] = _finite(of_host[name].float())
        elif name in token_values:
            entry = REGISTRY[name]
            # An infinity of either sign becomes NaN here: later a maximum would hide it.
            column = _finite(of_host[name])
            values[a] = _finish(entry, _reduce(column, counts, request.reduction, request.topk))
            for sample, piece in zip(tokens, _finish(entry, column).split(counts), strict=True):
                sample[name] = piece
        in_pass[a] = name in sample_values or name in token_values
    return Batch(indices, values, values[in_pass].isfinite().all(dim=0), tokens, sum(len(row.ids) for row in picked))


def _token_values(
    entry: Acquisition, stats: RowStats, drawn: Mapping[DrawOptions, BayesStats], request: Request
) -> torch.Tensor:
    """``[N]`` of the scored tokens."""
    if entry.per_token is not None:
        return entry.per_token(stats)
    assert entry.per_draws is not None
    return entry.per_draws(drawn[request.draw_options[entry.name]])


def _reduce(
    values: torch.Tensor,  # [N] float64, sample after sample
    counts: list[int],  # [B], their sum is N
    reduction: str,
    topk: int,
) -> torch.Tensor:
    """``[B]``; NaN where a value of the sample is."""
    if reduction == "topk":  # NaN counts as the largest
        return torch.stack([piece.topk(min(topk, len(piece))).values.mean() for piece in values.split(counts)])
    return torch.segment_reduce(values, reduction, lengths=torch.tensor(counts, device=values.device))


def _finish(
    entry: Acquisition,
    values: torch.Tensor,  # [n] float64
) -> torch.Tensor:
    """``[n]`` float32, NaN where not finite."""
    return _finite((values if entry.finish is None else entry.finish(values)).float())


def _finite(values: torch.Tensor) -> torch.Tensor:
    """The same shape, NaN where not finite."""
    return values.where(values.isfinite(), torch.nan)
