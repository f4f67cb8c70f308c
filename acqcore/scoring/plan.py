"""A checked request: its acquisitions with their options, their needs, and the reduction of values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeAlias

import torch

from acqcore import checks
from acqcore.acquisitions import REGISTRY, Acquisition, DrawOptions, GradientNeed, Options
from acqcore.acquisitions.base import Over
from acqcore.acquisitions.needs import Need
from acqcore.literals import Reduction
from acqcore.scoring.run import Found, Runner
from acqcore.students.samples import Row
from acqcore.students.student import StudentLike

#: Name -> arguments of that acquisition, as a mapping or an options object.
AcquisitionArgs: TypeAlias = Mapping[str, Mapping[str, Any] | Options]


@dataclass(frozen=True, eq=False)
class Scored:
    """Finished samples: ``indices`` into the rows, values of A acquisitions in float32 on the CPU.

    Acquisitions over sets have no values yet; ``sketches`` holds their inputs.
    """

    indices: list[int]
    values: torch.Tensor  # [A, B]
    tokens: list[dict[str, torch.Tensor]]  # B of name -> [scored tokens], for acquisitions with token values
    sketches: Mapping[GradientNeed, torch.Tensor]  # [B, ...]
    stderr: Mapping[str, torch.Tensor]  # name -> [B] float32, for acquisitions that have a standard error
    n_input_tokens: int


@dataclass(frozen=True)
class Plan:
    """Checked arguments of :func:`acqcore.score`; made by :meth:`of`."""

    asked: tuple[tuple[Acquisition, Options], ...]
    reduction: Reduction
    topk: int
    batch_tokens: int
    backend: str | None

    @classmethod
    def of(
        cls,
        acquisitions: str | Sequence[str],
        arguments: AcquisitionArgs | None = None,
        *,
        reduction: Reduction = "mean",
        topk: int = 8,
        batch_tokens: int = 8192,
        backend: str | None = None,
    ) -> Plan:
        """Check the arguments; raises TypeError or ValueError as :func:`acqcore.score`."""
        names = checks.names("acquisitions", acquisitions, REGISTRY)
        checks.literal("reduction", reduction, Reduction)
        topk, batch_tokens = checks.positive_int("topk", topk), checks.positive_int("batch_tokens", batch_tokens)
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, Mapping):
            raise TypeError(f"acquisition_args: expected a mapping name -> arguments, got {checks.describe(arguments)}")
        for name in arguments:
            if name not in names:
                raise ValueError(f"acquisition_args: {name!r} is not among the acquisitions asked for")
            if not fields(REGISTRY[name].options):
                raise ValueError(f"acquisition_args: {name!r} takes no arguments")
        records = [REGISTRY[name] for name in names]
        asked = tuple((entry, entry.options.of(entry.name, arguments.get(entry.name, {}))) for entry in records)
        for entry, options in asked:
            needs, over = entry.needed(options), entry.values_over(options)
            checks.literal("over", over, Over)
            if over == "average" and reduction not in ("mean", "sum"):
                raise ValueError(
                    f"reduction: {entry.name!r} has no token values with these arguments, expected 'mean' or "
                    f"'sum', got {reduction!r}"
                )
            if over == "set" and not all(isinstance(need, GradientNeed) for need in needs):
                raise ValueError(f"acquisition {entry.name!r}: over='set' allows only gradient needs, got {needs}")
        return cls(asked, reduction, topk, batch_tokens, backend)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry, _ in self.asked)

    @cached_property
    def needs(self) -> tuple[Need, ...]:
        """Distinct needs, in the order of request."""
        return tuple(dict.fromkeys(need for entry, options in self.asked for need in entry.needed(options)))

    @property
    def draws(self) -> list[DrawOptions]:
        return [need for need in self.needs if isinstance(need, DrawOptions)]

    @property
    def of_tokens(self) -> list[str]:
        """Acquisitions with a value for each token."""
        return [entry.name for entry, options in self.asked if entry.values_over(options) == "token"]

    @property
    def estimated(self) -> list[str]:
        """Acquisitions whose values have standard errors."""
        return [entry.name for entry, options in self.asked if entry.stderr is not None and options.estimated]

    @property
    def of_sets(self) -> list[tuple[Acquisition, Options]]:
        """Acquisitions whose values compare the samples of a call."""
        return [(entry, options) for entry, options in self.asked if entry.values_over(options) == "set"]

    @cached_property
    def set_needs(self) -> tuple[GradientNeed, ...]:
        """Distinct needs of acquisitions over sets."""
        needs = (need for entry, options in self.of_sets for need in entry.needed(options))
        return tuple(dict.fromkeys(need for need in needs if isinstance(need, GradientNeed)))

    def sample_by_sample(self, instead: str) -> None:
        """Raise ValueError for an acquisition that compares the samples of a call; ``instead`` is the advice."""
        for entry, _ in self.of_sets:
            raise ValueError(f"acquisitions: {entry.name!r} compares all samples of a call: {instead}")

    def runner(self, student: StudentLike) -> Runner:
        """A runner for the needs. Raises as :class:`Runner`; ValueError for options that do not fit the student."""
        runner = Runner(student, self.needs, self.batch_tokens, self.backend)
        for _, options in self.asked:
            options.check(runner.student, runner.head)
        return runner

    def batches(self, runner: Runner, rows: Sequence[Row], done: Collection[int] = ()) -> Iterator[Scored]:
        """Values of each batch of :meth:`Runner.batches`."""
        return map(self._scored, runner.batches(rows, done))

    @torch.no_grad()
    def _scored(self, found: Found) -> Scored:
        counts = found.counts
        columns: dict[str, torch.Tensor] = {}
        stderr: dict[str, torch.Tensor] = {}
        for entry, options in self.asked:
            over = entry.values_over(options)
            if over != "set":
                column = entry.compute(options, found.results)
                checks.acquisition_values(entry.name, column, sum(counts) if over == "token" else len(counts))
                columns[entry.name] = column.double()
                error = entry.standard_error(options, found.results)
                if error is not None:
                    checks.acquisition_values(entry.name, error, len(counts))
                    stderr[entry.name] = _finite(self._of_averages(over, error.double().cpu(), counts).float())
        of_host = _on_host(columns)
        values = torch.full((len(self.asked), len(counts)), torch.nan)
        tokens: list[dict[str, torch.Tensor]] = [{} for _ in counts]
        for a, (entry, options) in enumerate(self.asked):
            over = entry.values_over(options)
            if over in ("average", "sample"):
                values[a] = _finite(self._of_averages(over, of_host[entry.name], counts).float())
            elif over == "token":
                # Infinities become NaN before the reduction, where a maximum would hide them.
                column = _finite(of_host[entry.name])
                values[a] = _finish(entry, reduce(column, counts, self.reduction, self.topk))
                for sample, piece in zip(tokens, _finish(entry, column).split(counts), strict=True):
                    sample[entry.name] = piece
        sketches = {need: found.results[need] for need in self.set_needs}
        return Scored(found.indices, values, tokens, sketches, stderr, found.n_input_tokens)

    def _of_averages(
        self,
        over: Over,
        values: torch.Tensor,  # [B] float64 on the CPU
        counts: list[int],  # [B], tokens
    ) -> torch.Tensor:
        """``[B]``: apply the reduction to averages over tokens; sample values are unchanged."""
        return values * torch.tensor(counts) if over == "average" and self.reduction == "sum" else values


def _on_host(columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The columns on the CPU, in a single copy, as each copy from a GPU synchronizes."""
    found = dict(columns)
    on_gpu = {name: column for name, column in columns.items() if column.device.type != "cpu"}
    if on_gpu:
        device = next(iter(on_gpu.values())).device
        pieces = torch.cat([column.to(device) for column in on_gpu.values()]).cpu()
        found.update(zip(on_gpu, pieces.split([len(column) for column in on_gpu.values()]), strict=True))
    return found


def reduce(
    values: torch.Tensor,  # [N] float64, sample by sample
    counts: list[int],  # [B], their sum is N
    reduction: Reduction,
    topk: int,
) -> torch.Tensor:
    """``[B]``; NaN if any value of the sample is NaN."""
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
