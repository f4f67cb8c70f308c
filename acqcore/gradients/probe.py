"""Tests on a few tokens how the gradients of a student's parameters can be captured.

The captured pieces are compared with autograd's gradients, parameter by parameter and sample by sample. If they differ
in size or direction, or a module fits no rule, batches hold one sample and autograd computes the gradients of the
parameters in question. Mixture-of-experts layers need this, as an expert only sees the tokens routed to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from acqcore.defaults import float32_products
from acqcore.gradients.capture import Capture
from acqcore.gradients.measures import GradPiece, SquaredNorm, of_sample
from acqcore.gradients.rules import is_embedding, is_linear
from acqcore.head import compute_dtype
from acqcore.students.causal_lm import CausalLM
from acqcore.students.findings import alterations, findings
from acqcore.students.student import Student

#: Shape of the token ids for comparing pieces with autograd.
SHAPE = (2, 8)

#: Largest norm of the difference between a parameter's gradient and autograd's, relative to autograd's norm and to that
#: over all parameters. The latter covers gradients that are zero up to rounding (a key's bias) and have no relative
#: error.
TOLERANCE = {
    torch.float64: (1e-6, 1e-9),
    torch.float32: (2e-3, 1e-5),
    torch.float16: (5e-2, 5e-3),
    torch.bfloat16: (5e-2, 1e-2),
}

#: Entries of a gradient that are converted to float64 at a time, 8 MiB.
PART_ELEMENTS = 1 << 20


class Probe:
    """Prepares a capture for its student.

    Args:
        capture: receives its ``rules``.
        tied: names of head weights among the selected parameters.
    """

    def __init__(self, capture: Capture, student: Student, tied: Collection[str | None]) -> None:
        self._capture = capture
        self._student = student
        self._tied = tied
        self._done = False
        rows, length = SHAPE
        length = min(length, student.max_length or length)
        with torch.inference_mode(False):  # autograd saves the tokens
            generator = torch.Generator().manual_seed(0)
            self._tokens = torch.randint(student._vocab_size, (rows, length), generator=generator).to(student.device)

    def prepare(
        self,
        input_ids: torch.Tensor,  # [n, T] int64, of real samples
    ) -> None:
        """Find out which rules hold, once; call before the first batch is formed.

        If random tokens reach none of the parameters, real samples are tried: an adapter may need a certain token.
        """
        capture, student = self._capture, self._student
        if self._done or not capture.names:
            return
        assert student._module is not None
        known = findings(student._module, "gradients")
        with student.alone():  # so that no hooks of another thread are in the state
            state = (frozenset(capture.names.values()), *map(_state, capture.modules))
            if state in known:
                capture.rules = copy.deepcopy(known[state])
            else:
                self._find(input_ids.to(student.device))
                rules = capture.rules
                # Otherwise later samples may still reach the parameters, or a gate that is 0 for now may open.
                if rules.used and rules.touched <= rules.nonzero:
                    known[state] = copy.deepcopy(rules)
        self._done = True  # not if memory ran out: a smaller batch may be tried next

    def _find(
        self,
        input_ids: torch.Tensor,  # [n, T] int64 of real samples
    ) -> None:
        names, rules = set(self._capture.names.values()), self._capture.rules
        failed = self._compare(self._tokens)
        if failed is not None and not rules.used:
            self._tokens = input_ids
            failed = self._compare(self._tokens)
        if failed is None or failed:
            self.take_one_by_one()
        self._refuse_unseen()
        # Samples may use parameters outside their modules, where no rule sees them.
        rules.by_autograd |= names - rules.touched

    def take_one_by_one(self) -> None:
        """Use batches of one sample from now on, and leave parameters that fit no rule to autograd."""
        capture, rules = self._capture, self._capture.rules
        names = set(capture.names.values())
        rules.one_by_one = True
        rules.forms.clear()
        rules.touched.clear()
        failed = self._compare(self._tokens[:1])
        if failed is None:
            failed = rules.used = rules.touched = rules.nonzero = names
            self._require_graph()
        ruled = {name for m, own in capture.owners.items() if is_linear(m) or is_embedding(m) for name in own.values()}
        rules.by_autograd = names - ((ruled & rules.touched) - failed)

    def _compare(
        self,
        ids: torch.Tensor,  # [n, T] int64
    ) -> set[str] | None:
        """Names of parameters that fit no rule or whose pieces differ from autograd's gradients; None if the student
        rejects the batch or its modules' outputs cannot be tapped."""
        capture, student, batch = self._capture, self._student, len(ids)
        rules = capture.rules
        generator = torch.Generator().manual_seed(0)
        bad: set[str] = set()
        try:
            with (
                torch.inference_mode(False),
                student.scoring(),
                torch.enable_grad(),
                capture.probing(bad),
                capture.attached(),
            ):
                hidden = capture.forward(ids)
                tolerance, floor = TOLERANCE[torch.bfloat16 if capture.half else hidden.dtype]
                for sample in range(batch):
                    noise = torch.zeros(hidden.shape, dtype=compute_dtype(hidden.dtype))
                    noise[sample] = torch.randn(hidden.shape[1:], generator=generator)
                    both = _Comparison(capture, batch, sample)
                    last = sample == batch - 1
                    capture.run_backward(hidden, noise.to(hidden.device), [both], last, capture.names, both.receive)
                    rules.touched |= both.norms.keys()
                    rules.nonzero |= {name for name, norm in both.norms.items() if norm}
                    total = math.hypot(*both.norms.values())
                    for name, error in both.errors().items():
                        # A gradient may be 0 only for now, such as that of a LoRA factor whose partner is 0.
                        norm = both.norms.get(name, 0.0)
                        if not error <= tolerance * norm + floor * total:
                            bad.add(name)
                        if norm > floor * total:
                            rules.used.add(name)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the student's code may reject a tapped output or a batch
            return None
        return bad

    def _require_graph(self) -> None:
        """Raise ValueError if the student runs only without gradients, its own error if it does not run at all."""
        student = self._student
        with torch.inference_mode(False), student.scoring():
            student.hidden(self._tokens[:1])
            try:
                with torch.enable_grad():
                    student.hidden(self._tokens[:1])
            except Exception as error:
                name = next(iter(self._capture.names.values()))
                raise ValueError(
                    f"parameters: the student does not run with gradients, which {name} needs: {error}"
                ) from error

    def _refuse_unseen(self) -> None:
        """Reject parameters that affect the logits but not the hidden states, such as adapters on the head."""
        student, rules = self._student, self._capture.rules
        seen_here = rules.touched.union(self._tied)
        silent = {p: name for p, name in self._capture.names.items() if name not in seen_here}
        if not silent or not isinstance(student._source, CausalLM):
            return
        ids = torch.arange(2, device=student.device)[None] % student._vocab_size
        with (
            torch.inference_mode(False),
            student.scoring(),
            torch.enable_grad(),
            self._capture.attached(),
            ExitStack() as stack,
        ):
            for parameter in silent:
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(True)
            reached = _reached(student.hidden(ids), silent)
            seen = [name for name in _reached(student._source.logits(ids), silent) if name not in reached]
        if reached and not rules.one_by_one:  # these tokens reach them, the probe's did not
            self.take_one_by_one()
        if seen:
            more = f" and {len(seen) - 1} more" if len(seen) > 1 else ""
            raise ValueError(f"parameters: no rule covers {seen[0]}{more}: it is part of the student's head")


class _Comparison:
    """The gradients of one sample as pieces and by autograd, in a backward that starts from that sample alone."""

    def __init__(self, capture: Capture, batch: int, sample: int) -> None:
        self._capture = capture
        self._batch = batch
        self._sample = sample
        self._pieces: dict[str, GradPiece] = {}
        self.norms: dict[str, float] = {}  # name -> norm of autograd's gradient
        self._errors: dict[str, float] = {}

    def takes(self, name: str) -> bool:
        return True

    def add(self, name: str, piece: GradPiece, factor: torch.Tensor | None) -> None:
        self._pieces[name] = piece

    @float32_products()
    def receive(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,  # by autograd, in the parameter's shape
    ) -> None:
        """Compare autograd's gradient with the sum of the pieces of all uses, which arrive before it."""
        name, factor = self._capture.names[parameter], self._capture.factor
        scale = 1.0 if factor is None else float(factor[self._sample])
        self.norms[name] = scale * _norm(_parts(gradient))
        piece = self._pieces.pop(name, None) or self._capture.unfinished(name)
        if piece is None:
            self._errors[name] = math.inf
            return
        own = of_sample(piece, self._sample, gradient.shape, self._capture.transposed(parameter))
        difference = _norm(a.double() - b for a, b in zip(_parts(gradient), _parts(own), strict=True))
        of_others = self._norms_of(name, piece)
        of_others[self._sample] = 0
        self._errors[name] = scale * difference + float(of_others.max())

    def errors(self) -> dict[str, float]:
        """Name -> norm of the difference between piece and autograd's gradient, plus what the piece gives the other
        samples; infinite for a gradient without a piece."""
        for name, piece in self._pieces.items():  # without a gradient by autograd
            self._errors.setdefault(name, float(self._norms_of(name, piece).max()))
        return self._errors

    def _norms_of(self, name: str, piece: GradPiece) -> torch.Tensor:
        """``[B]`` on the CPU."""
        measure = SquaredNorm(self._batch, torch.device("cpu"))
        measure.add(name, piece, self._capture.factor)
        return measure.values.sqrt()


def _parts(gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return gradient.reshape(-1).split(PART_ELEMENTS)


def _norm(parts: Iterable[torch.Tensor]) -> float:
    return math.hypot(*(float(part.double().norm()) for part in parts))


def _state(module: nn.Module) -> tuple[Any, ...]:
    """State that may change how a module's parameters are used: its hooks, its own forward and PEFT adapters."""
    adapters = [getattr(module, name, None) for name in ("merged_adapters", "_disable_adapters", "_active_adapter")]
    return *alterations(module), str(adapters)


def _reached(output: torch.Tensor, parameters: Mapping[torch.Tensor, str]) -> list[str]:
    """Names of the parameters on which ``output`` depends."""
    if not output.requires_grad:
        return []
    gradients = torch.autograd.grad(output.sum(), list(parameters), allow_unused=True)
    return [name for name, gradient in zip(parameters.values(), gradients, strict=True) if gradient is not None]
