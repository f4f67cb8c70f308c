"""The students and questions used to measure signals: SmolLM2, toy students, base models of the arithmetic world."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

import acqcore
from acqcore import Reduction
from acqcore.acquisitions import LinearOptions
from acqcore.acquisitions.mutual_information import mutual_information, stderr
from acqcore.gradients.selection import select_linear
from acqcore.scoring.run import Runner
from acqcore.students.packing import OVERHEAD_TOKENS, collate, partition
from benchmarks import real_rows, toy_student
from benchmarks.calibration import calibrate_dropout
from benchmarks.reliability_signals import ENTROPY, EPIG, LAPLACE, MI, SIGNALS, Signal
from benchmarks.reliability_units import rounded

REFERENCE_ROWS = 16  # for influence, expected predictive information gain, and a posterior of the weights
RISE = 0.02  #: rise in loss, as a share, under draws at the calibrated rate
TOY_QUESTIONS = 256  # per kind
WORLD_QUESTIONS = 32  # per skill


class Scorer:
    """A student; ``rate`` is its calibrated dropout, ``references`` its samples for each kind of reference."""

    student: acqcore.Student
    rate: float
    references: Mapping[str, Any]
    batch_tokens = 8192

    def __init__(self) -> None:
        self._made: dict[tuple[str, int], Any] = {}

    def resolved(self, signal: Signal, seed: int) -> dict[str, Any]:
        """The arguments of a signal under a seed, with placeholders filled in."""
        options = dict(signal.options)
        if options.get("dropout") == "calibrated":
            options["dropout"] = self.rate
        if "reference" in options:
            options["reference"] = self._reference(options["reference"], seed)
        if signal.stochastic and ("reference" not in options or signal.acquisition == MI):
            options["seed"] = seed
        return options

    def _reference(self, kind: str, seed: int) -> Any:
        """The object that a signal refers to: the kind of influence is that of its parameters."""
        if (kind, seed) not in self._made:
            others: dict[str, Any] = {EPIG: acqcore.epig_reference, LAPLACE: acqcore.laplace_posterior}
            influence: Any = acqcore.influence_reference
            make = others.get(kind, partial(influence, parameters=kind))
            samples = self.references[kind]
            self._made[kind, seed] = make(self.student, samples, seed=seed, batch_tokens=self.batch_tokens)
        return self._made[kind, seed]


class Real(Scorer):
    """SmolLM2 and the rows of each data set.

    Args:
        student: folder of the model.
        rows: rows per data set.
        scored: scored tokens per row; None keeps completions whole.
        batch_tokens: tokens per forward pass.
    """

    def __init__(
        self,
        student: Path,
        device: str,
        dtype: torch.dtype,
        rows: int,
        scored: int | None,
        sets: Sequence[str],
        batch_tokens: int,
    ) -> None:
        super().__init__()
        self.student = acqcore.Student.load(student, dtype=dtype, device=device)
        if device == "cpu":  # the backward of flash attention in bfloat16 is 1.4 times slower there
            module: Any = self.student._module
            module.set_attn_implementation("eager")
        self.device = device
        self.batch_tokens = batch_tokens
        self.rows = {name: real_rows.encode(self.student, real_rows.load(name, rows), scored) for name in sets}
        asked = real_rows.load("GSM8K", REFERENCE_ROWS, seed=1)
        self.references = dict.fromkeys(("head", "all", EPIG, LAPLACE), real_rows.encode(self.student, asked, scored))
        self._warm: set[Signal] = set()

    def score(self, signal: Signal, rows: Sequence[acqcore.Row], seed: int) -> Any:
        """Values and standard errors ``[n]``, the latter None if not available; None for the bare trunk."""
        if not signal.acquisition:
            return self._trunk(rows)
        options = self.resolved(signal, seed)
        if signal.acquisition == EPIG:
            return acqcore.epig(self.student, rows, batch_tokens=self.batch_tokens, **options), None
        arguments = {signal.acquisition: options} if options else None
        scores = acqcore.score(
            self.student, rows, signal.acquisition, acquisition_args=arguments, batch_tokens=self.batch_tokens,
            progress=False,
        )  # fmt: skip
        return scores[signal.acquisition], scores.stderr.get(signal.acquisition)

    @cached_property
    def rate(self) -> float:  # type: ignore[override]
        """The dropout rate that raises the loss of the reference rows by ``RISE``."""
        return calibrate_dropout(self.student, self.references["head"], rise=RISE, batch_tokens=self.batch_tokens)

    def unit(self, signal: Signal, name: str, seed: int) -> dict[str, Any]:
        """Values, standard errors if the estimator provides them, and seconds."""
        self.resolved(signal, seed)  # creates what calls share, which is not timed, nor are a signal's first two rows
        if signal not in self._warm:
            self._warm.add(signal)
            self.score(signal, self.rows[next(iter(self.rows))][:2], seed)
        # With one thread, use CPU time, which other work on the machine affects little.
        alone = self.device == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
        self._settle()
        begin = clock()
        found = self.score(signal, self.rows[name], seed)
        self._settle()
        seconds = clock() - begin
        if found is None:
            return {"seconds": seconds}
        values, errors = found
        unit: dict[str, Any] = {"seconds": seconds, "values": rounded(values)}
        return unit if errors is None else {**unit, "stderr": rounded(errors)}

    def shared(self, names: Sequence[str], of_set: str, rows: slice, seeds: Sequence[int]) -> dict[str, Any]:
        """Values and standard errors of some rows; linear forms share one graph for all probes and seeds."""
        picked = self.rows[of_set][rows]
        signals = {name: SIGNALS[name] for name in names}
        if any("probes" not in signal.options or signal.acquisition != MI for signal in signals.values()):
            values = {(name, s): self.score(signal, picked, s) for name, signal in signals.items() for s in seeds}
        else:
            asked = {(name, s): self._linear(signal, s) for name, signal in signals.items() for s in seeds}
            values = self._from_one_graph(asked, picked)
        return {
            "signals": [
                {"signal": name, "seed": seed, "values": rounded(of_rows)}
                | ({} if errors is None else {"stderr": rounded(errors)})
                for (name, seed), (of_rows, errors) in values.items()
            ]
        }

    def _linear(self, signal: Signal, seed: int) -> LinearOptions:
        return LinearOptions.of(MI, {key: value for key, value in self.resolved(signal, seed).items() if key != "form"})

    def _from_one_graph(
        self, asked: Mapping[tuple[str, int], LinearOptions], rows: Sequence[acqcore.Row]
    ) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
        """Values and standard errors ``[n]`` for each request."""
        found = {key: torch.full((2, len(rows)), torch.nan) for key in asked}
        runner = Runner(self.student, [options.need for options in asked.values()], self.batch_tokens, None)
        for batch in runner.batches(rows):
            for key, options in asked.items():
                squares = batch.results[options.need]
                errors = stderr(squares, options)
                assert errors is not None
                found[key][:, batch.indices] = torch.stack([mutual_information(squares, options), errors]).float()
        return {key: (values[0], values[1]) for key, values in found.items()}

    def flops(self, signal: Signal, name: str) -> dict[str, Any]:
        """Floating-point operations of all matrix products for a data set's rows, computed from shapes."""
        trunk = select_linear(self.student, "all").names
        assert self.student._module is not None
        config: Any = self.student._module.config
        per_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_attention_heads * per_head
        shape = Shape(sum(w.numel() for w in trunk), config.num_hidden_layers * width, self.student.head.weight.numel())
        return {"flops": sum(shape.flops(signal, row) for row in self.rows[name])}

    def _trunk(self, rows: Sequence[acqcore.Row]) -> None:
        """Runs only the forward passes that ``score`` makes."""
        lengths = [len(row.ids) for row in rows]
        overhead = OVERHEAD_TOKENS.get(self.student.device.type, OVERHEAD_TOKENS["cuda"])
        with self.student.scoring():
            for picked in partition(lengths, self.batch_tokens, overhead):
                self.student.hidden(collate([rows[i] for i in picked])[0].to(self.student.device))

    def _settle(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Shape:
    """Sizes that determine the cost of a student's products.

    Attributes:
        linear: number of weights in the blocks' linear layers.
        attention: width of attention, summed over blocks.
        head: number of weights in the head.
    """

    linear: int
    attention: int
    head: int

    def flops(self, signal: Signal, row: acqcore.Row) -> int:
        """Operations for one row alone. The backward of activations costs as much as the forward in linear layers and
        5/2 as much in attention (which recomputes its weights); statistics cost one product with the head, or 2 + P
        with the cotangents of P probes."""
        length = len(row.ids)
        forward = 2 * self.linear * length + 4 * self.attention * length**2
        head = 2 * self.head * row.n_scored
        options = signal.options
        if signal.acquisition == "":
            return forward
        if "draws" in options:
            return int(options["draws"]) * (forward + head)
        probes = options.get("probes", 0)
        first = int((row.targets >= 0).nonzero()[0]) - 1 if options.get("positions") == "completion" else 0
        graph = length - first  # tokens whose activations are kept
        backward = 2 * self.linear * graph + 10 * self.attention * graph * length
        return forward + head + probes * (backward + head) + (head if probes else 0)


def counted(signal: Signal) -> bool:
    """Whether :class:`Shape` covers the signal: the trunk, entropy, and activation noise in every block."""
    options = signal.options
    plain = not set(options) - {"form", "posterior", "probes", "draws", "layers", "dropout", "positions"}
    of_blocks = options.get("layers", "all") == "all" and options.get("posterior", "dropout") == "dropout"
    return signal.acquisition in ("", ENTROPY, MI) and plain and of_blocks


class Small(Scorer):
    """A small student."""

    def timed(self, signal: Signal, samples: Any, reduction: Reduction = "mean") -> tuple[torch.Tensor, float]:
        """A signal's values ``[n]``, and seconds."""
        name, options = signal.acquisition, self.resolved(signal, 0)
        asked = {name: options} if options else None
        begin = time.perf_counter()
        scores = acqcore.score(self.student, samples, name, acquisition_args=asked, reduction=reduction, progress=False)
        return scores[name], time.perf_counter() - begin


class Toy(Small):
    """A student of ``blocks`` blocks, and questions of each kind."""

    def __init__(self, blocks: int, seed: int) -> None:
        super().__init__()
        self.student = acqcore.Student.from_model(toy_student.train(seed, blocks, toy_student.STEPS[blocks]))
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.cat([toy_student.questions(kind, TOY_QUESTIONS, generator) for kind in toy_student.KINDS])
        # Unseen keys are excluded: the student is confidently wrong about them, so dropout lowers their loss.
        learnt = self.ids[: 2 * TOY_QUESTIONS]
        self.rate = calibrate_dropout(self.student, toy_student.samples(learnt), rise=RISE)
        # New questions: learnt kinds for the weights' posterior; seen and unseen keys of the table for EPIG.
        kinds = {LAPLACE: ("easy", "ambiguous"), EPIG: ("easy", "unseen")}
        self.references = {
            kind: toy_student.samples(
                torch.cat([toy_student.questions(of, REFERENCE_ROWS // 2, generator) for of in kinds[kind]])
            )
            for kind in kinds
        }

    def unit(self, signal: Signal) -> dict[str, Any]:
        """AUROC of unseen questions above ambiguous and above all other questions, values, seconds."""
        values, seconds = self.timed(signal, toy_student.samples(self.ids))
        easy, ambiguous, unseen = values.split(TOY_QUESTIONS)
        return {
            "ambiguous": toy_student.auroc(unseen, ambiguous),
            "both": toy_student.auroc(unseen, torch.cat([easy, ambiguous])),
            "rate": self.rate,
            "seconds": seconds,
            "values": rounded(values),
        }


class World(Small):
    """The base model of a seed, and questions of every skill; traps are uniform or skewed."""

    def __init__(self, seed: int, skewed: bool = False) -> None:
        # Imported here because machines that only measure real rows need not have the loop's dependencies.
        from acqsynth.world import Settings, base_model
        from benchmarks.bench_signals import SKILLS, TRAPS, messages

        super().__init__()
        settings = Settings(seed=seed, skewed=skewed)
        self.student = acqcore.Student.load(base_model(settings))
        skills = [settings.domain.rows(WORLD_QUESTIONS, seed, skills=[name]) for name in SKILLS]
        self.rows = [row for rows in skills for row in messages(rows)]
        self.rate = calibrate_dropout(self.student, self.rows[::8], rise=RISE)
        # New questions: every skill for the weights' posterior; learnable skills for EPIG.
        others = {name: messages(settings.domain.rows(2, seed + 1000, skills=[name])) for name in SKILLS}
        self.references = {
            LAPLACE: [row for rows in others.values() for row in rows],
            EPIG: [row for name, rows in others.items() if name not in TRAPS for row in rows],
        }

    def unit(self, signal: Signal) -> dict[str, Any]:
        """Values, skill after skill, and seconds."""
        # The sum, as in the recipe: a row's information is the sum over its tokens.
        values, seconds = self.timed(signal, self.rows, reduction="sum")
        return {"rate": self.rate, "seconds": seconds, "values": rounded(values)}
