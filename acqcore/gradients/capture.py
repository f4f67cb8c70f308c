"""Catches the pieces of the selected parameters' gradients while a backward pass runs.

The output of each module that owns a selected parameter goes through a *tap*, which hands it on and sees its gradient;
so do the outputs that dropout acts on.
The backward runs towards the taps' own leaf and nothing else, whatever requires a gradient besides (gradient
checkpointing and PEFT make embeddings do so). No parameter requires a gradient meanwhile: autograd computes gradients
of activations only, and none before the first tap, where activations are not kept.

Before the first batch the pieces of a few tokens are compared with autograd's own gradients, parameter by parameter and
sample by sample. Where they differ, or a module fits no rule, samples come one at a time, and autograd itself gives the
gradient of the parameters in question. Experts that are called with the tokens routed to them are of this kind.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from acqcore import checks
from acqcore.gradients.measures import DenseGrad, GradPiece, RowGrad, SquaredNorm, merged, scaled
from acqcore.gradients.rules import ModuleCall, Uncovered, is_embedding, is_linear
from acqcore.head import compute_dtype
from acqcore.students.blocks import first_tensor, with_first
from acqcore.students.student import Student

#: Shape of the token ids on which pieces are compared with autograd.
PROBE = (2, 8)

#: Most findings kept of a model: a training run may change its state any number of times.
KEPT_FINDINGS = 16

#: Largest difference of a parameter's gradient norm from autograd's, relative to it, and to the norm of all together:
#: a gradient that is zero but for rounding, as that of a key's bias, has no relative error.
PROBE_TOLERANCE = {
    torch.float64: (1e-6, 1e-9),
    torch.float32: (2e-3, 1e-5),
    torch.float16: (5e-2, 5e-3),
    torch.bfloat16: (5e-2, 1e-2),
}


class OneByOne(Exception):  # noqa: N818
    """A batch whose samples a module does not keep apart: they must come one at a time."""


@dataclass(frozen=True)
class _Findings:
    """What a few tokens told of a student."""

    one_by_one: bool
    by_autograd: frozenset[str]
    used: frozenset[str]
    forms: dict[int, frozenset[tuple[str, str]]]  # of the modules, by their number


# Module -> its state and the selected names -> findings: a reward called at each step pays for them once.
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], _Findings]] = WeakKeyDictionary()


def _state(module: nn.Module) -> tuple[Any, ...]:
    """What may change how a module's parameters are used: its hooks, and the state of PEFT's adapters."""
    adapters = [getattr(module, name, None) for name in ("merged_adapters", "_disable_adapters", "_active_adapter")]
    return id(module), len(module._forward_hooks), len(module._forward_pre_hooks), str(adapters)


class PieceTaker(Protocol):
    def takes(self, name: str) -> bool:
        """Whether it wants this parameter's gradient."""

    def add(self, name: str, piece: GradPiece) -> None:
        """The gradient of a selected parameter."""


class SiteTaker(Protocol):
    def add_site(self, module: nn.Module, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """The output of a site and its gradient, ``[B, ..., D]`` or ``[B * T, D]`` each."""


class Capture:
    """Catches the pieces of the selected parameters' gradients.

    Args:
        student: whose trunk runs.
        names: parameter -> name.
        tied: names of head weights among them: an embedding's rows and the head's add up.
        sites: modules whose outputs dropout acts on.
    """

    def __init__(
        self,
        student: Student,
        names: Mapping[torch.Tensor, str],
        tied: Collection[str | None] = (),
        sites: Collection[nn.Module] = (),
    ) -> None:
        self._student = student
        self._names = names
        self._tied = tied
        self._modules = [] if student._module is None else list(student._module.modules())
        self._owners: dict[nn.Module, dict[str, str]] = {}  # module -> attribute -> name
        for module in self._modules:
            own = {key: names[p] for key, p in module._parameters.items() if p is not None and p in names}
            if own:
                self._owners[module] = own
        parameters = [p for module in self._modules for p in module._parameters.values() if p is not None]
        self._half = any(p.dtype in (torch.float16, torch.bfloat16) for p in parameters)
        #: Whether batches must be of one sample; known once :meth:`prepare` ran.
        self.one_by_one = False
        self._prepared = False
        rows, length = PROBE
        length = min(length, student.max_length or length)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(student._vocab_size, (rows, length), generator=generator)
        self._tokens = tokens.to(student.device)  # of the probe
        self._by_autograd: dict[torch.Tensor, str] = {}
        #: Names of parameters that have a gradient in the probe, more than rounding.
        self.used: set[str] = set()
        self._touched: set[str] = set()  # names of parameters that autograd gives any gradient in the probe
        self._forms: dict[nn.Module, set[tuple[str, str]]] = {}
        self._failed: set[str] | None = None  # names that fit no rule, while the probe runs
        self._active = False
        self._shape = (0, 0)
        self._leaf = torch.zeros(())
        self._uses: Counter[str] = Counter()
        self._pending: dict[str, list[GradPiece]] = {}
        self._arrived: set[str] = set()
        self._factor: torch.Tensor | None = None
        self._sites = list(sites)
        self._ran_sites = 0
        self._last = True
        self._of_parameters: Sequence[PieceTaker] = ()
        self._of_sites: Sequence[SiteTaker] = ()

    def prepare(
        self,
        input_ids: torch.Tensor,  # [n, T] int64, of real samples
    ) -> None:
        """Find out on a few tokens which rules hold, once; call it before the first batch is made.

        Real samples are tried where arbitrary tokens reach none of the parameters: an adapter may wait for a token.
        """
        if self._prepared or not self._names:
            return
        self._prepared = True
        assert self._student._module is not None
        known = _KNOWN.setdefault(self._student._module, {})
        state = (frozenset(self._names.values()), *map(_state, self._modules))
        if state in known:
            self._restore(known[state])
            return
        failed = self._probe(self._tokens)
        if failed is not None and not self.used:
            self._tokens = input_ids.to(self._student.device)
            failed = self._probe(self._tokens)
        if failed is None or failed:
            self.take_one_by_one()
        self._refuse_unseen()
        if self.used:  # other samples may reach what these do not
            if len(known) == KEPT_FINDINGS:
                known.clear()
            known[state] = self._findings()

    def _findings(self) -> _Findings:
        forms = {i: frozenset(self._forms[m]) for i, m in enumerate(self._modules) if m in self._forms}
        names = frozenset(self._by_autograd.values())
        return _Findings(self.one_by_one, names, frozenset(self.used), forms)

    def _restore(self, found: _Findings) -> None:
        self.one_by_one, self.used = found.one_by_one, set(found.used)
        self._by_autograd = {p: name for p, name in self._names.items() if name in found.by_autograd}
        self._forms = {self._modules[i]: set(forms) for i, forms in found.forms.items()}

    def take_one_by_one(self) -> None:
        """From here on batches are of one sample. What fits no rule then is left to autograd."""
        self.one_by_one = True
        self._forms.clear()
        failed = self._probe(self._tokens[:1])
        if failed is None:
            failed = self.used = self._touched = set(self._names.values())
            self._require_graph()
        ruled = {name for m, own in self._owners.items() if is_linear(m) or is_embedding(m) for name in own.values()}
        self._by_autograd = {p: name for p, name in self._names.items() if name in failed or name not in ruled}

    def _require_graph(self) -> None:
        """Raise ValueError where the student runs, but not with gradients; what it raises where it does not run."""
        student = self._student
        with torch.inference_mode(False), student.scoring():
            student.hidden(self._tokens[:1])
            try:
                with torch.enable_grad():
                    student.hidden(self._tokens[:1])
            except Exception as error:
                name = next(iter(self._names.values()))
                raise ValueError(
                    f"parameters: the student does not run with gradients, as {name} needs: {error}"
                ) from error

    def _refuse_unseen(self) -> None:
        """Refuse parameters that the logits depend on and the hidden states do not, such as adapters on the head."""
        names, student = self._names, self._student
        seen_here = self._touched.union(self._tied)
        silent = {p: name for p, name in names.items() if name not in seen_here}
        if not silent or student._logits is None:
            return
        ids = torch.arange(2, device=student.device)[None] % student._vocab_size
        with torch.inference_mode(False), student.scoring(), torch.enable_grad(), self.attached(), ExitStack() as stack:
            for parameter in silent:
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(True)
            reached = _reached(student.hidden(ids), silent)
            seen = [name for name in _reached(student._logits(ids), silent) if name not in reached]
        if reached and not self.one_by_one:  # by some tokens, but not by those of the probe
            self.take_one_by_one()
        if seen:
            more = f" and {len(seen) - 1} more" if len(seen) > 1 else ""
            raise ValueError(f"parameters: no rule covers {seen[0]}{more}: it is part of the student's head")

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks installed, and no parameter but those left to autograd requiring a gradient; undone on exit."""
        parameters = {p: p.requires_grad for m in self._modules for p in m._parameters.values() if p is not None}
        with ExitStack() as stack:
            for parameter, required in parameters.items():
                wanted = parameter in self._by_autograd
                if required != wanted:
                    parameter.requires_grad_(wanted)
                    stack.callback(parameter.requires_grad_, required)
            for owner in self._owners:
                stack.callback(owner.register_forward_hook(self._after_forward, with_kwargs=True).remove)
            for site in self._sites:
                stack.callback(site.register_forward_hook(self._after_site).remove)
            yield

    def forward(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
        start: int = 0,
    ) -> torch.Tensor:
        """The trunk's hidden states ``[B, T, D]`` with the graph that :meth:`backward` needs, from token ``start`` on.

        Raises:
            OneByOne: samples that a module does not keep apart. ValueError: a module that fits no rule; no site ran.
        """
        self._shape = (input_ids.shape[0], input_ids.shape[1] - start)
        self._leaf = torch.zeros((), requires_grad=True)
        self._uses.clear()
        self._pending.clear()
        self._ran_sites = 0
        if start:
            hidden = self._student.hidden_after(input_ids, start, self._catching())
        else:
            with self._catching():
                hidden = self._student.hidden(input_ids)
        if self._sites and not self._ran_sites:
            raise ValueError("layers: the student's forward went through none of the modules that dropout acts on")
        return hidden

    @contextmanager
    def _catching(self) -> Iterator[None]:
        """Context of the forward whose modules are tapped."""
        self._active = True
        try:
            with torch.enable_grad():
                yield
        finally:
            self._active = False

    def backward(
        self,
        hidden: torch.Tensor,  # [B, T, D] of forward
        gradient: torch.Tensor,  # [B, T, D]
        of_parameters: Sequence[PieceTaker],
        of_sites: Sequence[SiteTaker],
        last: bool = True,
    ) -> None:
        """Pass each parameter's piece to ``of_parameters`` as soon as it is complete, and each site's gradient to
        ``of_sites``; ``last`` frees the graph.

        Raises:
            ValueError: a parameter took part in the forward and got no gradient, or autograd fails.
        """
        self._of_sites = of_sites
        self._backward(hidden, gradient, of_parameters, last, self._by_autograd, self._after_autograd)
        silent = [n for n in self.used if self._uses[n] and n not in self._arrived and self._taken(n)]
        if silent:
            raise ValueError(
                f"parameters: {silent[0]} took part in the forward and got no gradient; "
                "is part of the student detached or run without gradients?"
            )

    def _backward(
        self,
        hidden: torch.Tensor,  # [B, T, D]
        gradient: torch.Tensor,  # [B, T, D]
        of_parameters: Sequence[PieceTaker],
        last: bool,
        whole: Mapping[torch.Tensor, str],
        receive: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> None:
        """The pieces to ``of_parameters``, and autograd's gradients of the parameters ``whole`` to ``receive``."""
        self._of_parameters, self._last = of_parameters, last
        self._arrived.clear()
        self._factor = None
        if self._half or torch.is_autocast_enabled(hidden.device.type):
            # The mean over a long sample would underflow in half precision.
            largest = gradient.flatten(1).abs().amax(1).double()
            exponent = torch.frexp(largest.where(largest.isfinite() & (largest > 0), 1.0)).exponent
            self._factor = torch.ldexp(torch.ones_like(largest), exponent)  # [B]
            gradient = gradient / self._factor[:, None, None].to(gradient)
        if hidden.requires_grad:
            with _streamed(whole, receive):
                try:
                    inputs = [self._leaf, *whole]
                    torch.autograd.backward(hidden, gradient.to(hidden.dtype), retain_graph=not last, inputs=inputs)
                except (torch.OutOfMemoryError, ValueError, OneByOne):
                    raise
                except Exception as error:  # of the student's own backward
                    name = next(iter(self._names.values()))
                    raise ValueError(
                        f"parameters: the gradient of {name} and others cannot be taken: {error}"
                    ) from error
        for name in list(self._pending):  # a call that nothing depends on gets no gradient
            self._finish(name)

    def _probe(
        self,
        ids: torch.Tensor,  # [n, T] int64
    ) -> set[str] | None:
        """Compare the pieces of a few tokens with autograd's gradients: names of parameters whose pieces differ or that
        fit no rule; None where samples cannot be batched or the modules' outputs not be tapped."""
        student, batch = self._student, len(ids)
        generator = torch.Generator().manual_seed(0)
        norms: dict[str, torch.Tensor] = {}
        squares: defaultdict[str, float] = defaultdict(float)
        bad: set[str] = set()

        def receive(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
            self._touched.add(self._names[parameter])
            squares[self._names[parameter]] += float(gradient.double().square().sum())

        class Norms:
            def takes(self, name: str) -> bool:
                return True

            def add(self, name: str, piece: GradPiece) -> None:
                measure = SquaredNorm(batch, student.device)
                measure.add(name, piece)
                norms[name] = measure.values.sqrt().cpu()

        self._of_sites = ()
        self._by_autograd, self._failed = dict(self._names), bad
        try:
            with torch.inference_mode(False), student.scoring(), torch.enable_grad(), self.attached():
                hidden = self.forward(ids)
                tolerance, floor = PROBE_TOLERANCE[torch.bfloat16 if self._half else hidden.dtype]
                for sample in range(batch):
                    noise = torch.zeros(hidden.shape, dtype=compute_dtype(hidden.dtype))
                    noise[sample] = torch.randn(hidden.shape[1:], generator=generator)
                    squares.clear()
                    norms.clear()
                    last = sample == batch - 1
                    self._backward(hidden, noise.to(hidden.device), [Norms()], last, self._names, receive)
                    total = sum(squares.values()) ** 0.5
                    for name in self._names.values():
                        expected = torch.zeros(batch, dtype=torch.float64)
                        expected[sample] = size = squares[name] ** 0.5
                        error = float((norms.get(name, torch.zeros(batch)) - expected).abs().max())
                        if not error <= tolerance * size + floor * total:
                            bad.add(name)
                        if size > floor * total:
                            self.used.add(name)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of the student's own code, which a tapped output or a batch may not suit
            return None
        finally:
            self._by_autograd, self._failed = {}, None
        return bad

    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> torch.Tensor | None:
        if not self._active:
            return None
        names = {key: name for key, name in self._owners[module].items() if self._captured(name)}
        if not names:
            return None
        probing = self._failed is not None
        try:
            call = ModuleCall(module, names, args, kwargs, output, *self._shape)
        except Uncovered as error:
            if self._failed is None and self._shape[0] > 1:
                raise OneByOne from error
            if self._failed is None:
                raise
            self._failed.update(names.values())
            return None
        # A batch must not tell its samples apart by a shape that the module's calls in the probe did not have: as many
        # tokens may be routed to an expert as there are samples.
        if self._shape[0] > 1 and not probing and call.forms not in self._forms.get(module, ()):
            raise OneByOne
        if probing:
            self._forms.setdefault(module, set()).add(call.forms)
        self._uses.update(names.values())
        # A linear layer does not need its output again, so that may change in place; other outputs are copied.
        alias = is_linear(module) and output._base is None
        receive = partial(self._after_backward, [call])
        return _Tap.apply(output, self._leaf, self._shape[0], alias, receive)

    def _after_site(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._active:
            return None
        value = first_tensor(output)
        batch, length = self._shape
        if value is None or value.dim() < 2 or value.shape[0] not in (batch, batch * length):
            raise ValueError(f"layers: dropout acts on [{batch}, T, D], got {checks.describe(value)}")
        self._ran_sites += 1
        receive = partial(self._after_site_backward, module, value.detach())
        return with_first(output, _Tap.apply(value, self._leaf, batch, False, receive))

    def _after_site_backward(self, module: nn.Module, value: torch.Tensor, gradient: torch.Tensor) -> None:
        if self._factor is not None:
            of_samples = gradient.to(compute_dtype(gradient.dtype)).reshape(len(self._factor), -1)
            gradient = (of_samples * self._factor.to(of_samples)[:, None]).view(gradient.shape)
        for taker in self._of_sites:
            taker.add_site(module, value, gradient)

    def _taken(self, name: str) -> bool:
        return any(taker.takes(name) for taker in self._of_parameters)

    def _captured(self, name: str) -> bool:
        return self._failed is not None or name not in self._by_autograd.values()

    def _after_backward(self, calls: list[ModuleCall], gradient: torch.Tensor) -> None:
        call = calls.pop() if self._last else calls[0]  # the last backward frees the module's input
        if not any(map(self._taken, call.names.values())):
            return
        try:
            pieces = call.pieces(gradient)
        except Uncovered:
            if self._failed is None:
                raise
            self._failed.update(call.names.values())
            return
        for key, piece in pieces.items():
            name = call.names[key]
            self._pending.setdefault(name, []).append(piece)
            if len(self._pending[name]) == self._uses[name]:
                self._finish(name)

    def _after_autograd(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        name = self._by_autograd[parameter]
        gradient = gradient.to(compute_dtype(gradient.dtype))
        piece: GradPiece = DenseGrad(gradient.reshape(1, -1))
        if name in self._tied:
            rows = torch.arange(len(gradient), device=gradient.device)[None]
            piece = RowGrad(rows, gradient[None], len(gradient))
        self._pending[name] = [piece]
        self._finish(name)

    def _finish(self, name: str) -> None:
        piece = merged(self._pending.pop(name))
        if piece is None:
            if self._failed is None:
                raise ValueError(f"parameters: no rule covers {name}: layers of different kinds share it")
            self._failed.add(name)
            return
        self._arrived.add(name)
        piece = piece if self._factor is None else scaled(piece, self._factor)
        for taker in self._of_parameters:
            taker.add(name, piece)


class _Tap(torch.autograd.Function):
    """Hands on a module's output, and its gradient to ``receive``."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        leaf: torch.Tensor,
        batch: int,
        alias: bool,
        receive: Callable[[torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.receive, ctx.device = receive, leaf.device
        ctx.shared = batch > 1 and output.shape[0] == 1
        if ctx.shared:  # as positions are: a row for each sample tells their gradients apart
            return output.expand(batch, *output.shape[1:]).clone()
        return output.data if alias else output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        [gradient] = gradients
        ctx.receive(gradient)
        own = None
        if ctx.needs_input_grad[0]:
            own = gradient.sum(0, keepdim=True) if ctx.shared else gradient
        return own, torch.zeros((), device=ctx.device), None, None, None


def _reached(output: torch.Tensor, parameters: Mapping[torch.Tensor, str]) -> list[str]:
    """Names of the parameters that have a gradient in the output."""
    if not output.requires_grad:
        return []
    gradients = torch.autograd.grad(output.sum(), list(parameters), allow_unused=True)
    return [name for name, gradient in zip(parameters.values(), gradients, strict=True) if gradient is not None]


@contextmanager
def _streamed(
    parameters: Collection[torch.Tensor], receive: Callable[[torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Context in which gradients of leaves go to ``receive`` one by one; ``grad`` is restored on exit."""
    kept = [(parameter, parameter.grad) for parameter in parameters]

    def arrived(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        receive(parameter, gradient)

    with ExitStack() as stack:
        for parameter, gradient in kept:
            parameter.grad = None
            stack.callback(setattr, parameter, "grad", gradient)
            stack.callback(parameter.register_post_accumulate_grad_hook(arrived).remove)
        yield
