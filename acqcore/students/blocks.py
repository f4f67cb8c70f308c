"""Finds a student's transformer blocks and their branches by running a few tokens.

Blocks are members of a list that take and return the residual stream. Branches are the modules whose outputs a block
adds to the stream. Neither is guessed from names or lengths: a vision tower that text does not visit has no blocks, and
a module that adds the stream to its own output is not a branch, but one inside it is.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from acqcore.students.findings import remembered
from acqcore.students.sharding import is_dtensor, matrix_owners, unwrapped

#: Maximum depth of a branch inside its block.
DEPTH = 6

#: Changes of a block's output up to this size, relative to its input, are ignored.
TOLERANCE = 1e-5


def blocks_of(model: nn.Module, forward: Callable[[], Any]) -> list[nn.Module]:
    """The blocks in execution order; ``forward`` runs a few tokens."""
    modules = tuple(map(weakref.ref, model.modules()))
    names = remembered(model, "blocks", modules, lambda: _names(model, _streaming(model, forward)))
    return [unwrapped(model.get_submodule(name)) for name in names]


def branches_of(model: nn.Module, forward: Callable[[], Any]) -> list[list[nn.Module]]:
    """The branches of each block, in execution order."""
    blocks = blocks_of(model, forward)

    def find() -> list[list[str]]:
        return [_names(model, branches) for branches in _Analysis(model, blocks, forward).branches()]

    state = (*map(weakref.ref, model.modules()), *scales(blocks))
    return [[model.get_submodule(name) for name in names] for names in remembered(model, "branches", state, find)]


def _names(model: nn.Module, modules: Iterable[nn.Module]) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in modules]


def scales(blocks: Iterable[nn.Module]) -> tuple[int, ...]:
    """Order of magnitude, at most 0, of each norm's weight, bias and gate in the blocks: one near 0 hides a branch."""
    vectors = [p.detach() for block in blocks for p in block.parameters() if p.dim() < 2 and not is_dtensor(p)]
    small = [p for p in vectors if p.is_floating_point() and p.numel() and not p.is_meta]
    if not small:
        return ()
    largest = torch.stack([p.abs().max().to(small[0].device, torch.float32) for p in small])
    return tuple(largest.clamp(1e-30, 1).log10().round().int().tolist())


def stream(values: Iterable[Any]) -> torch.Tensor | None:
    """The first of ``values`` that may be the residual stream: floating point, with three or more dimensions."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3:
            return value
    return None


def first_tensor(output: Any) -> torch.Tensor | None:
    """A module's output if it is a tensor, else the first floating-point tensor in it."""
    if isinstance(output, torch.Tensor):
        return output
    values = output if isinstance(output, (tuple, list)) else getattr(output, "values", tuple)()
    return next((value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()), None)


def with_first(output: Any, tensor: torch.Tensor) -> Any:
    """The output with its first tensor replaced."""
    if isinstance(output, torch.Tensor):
        return tensor
    named = isinstance(output, Mapping)  # such as transformers' ModelOutput
    values = output.items() if named else enumerate(output)
    place = next(key for key, value in values if isinstance(value, torch.Tensor) and value.is_floating_point())
    if named:
        changed = copy.copy(output)
        changed[place] = tensor
        return changed
    replaced = [*output[:place], tensor, *output[place + 1 :]]
    return type(output)(*replaced) if hasattr(output, "_fields") else type(output)(replaced)


def _streaming(module: nn.Module, forward: Callable[[], Any]) -> list[nn.Module]:
    """List members, none inside another, that hold a matrix and were called with a tensor of their output's shape.

    Plain layers are not blocks: some models have a list of them before or after the blocks.
    """
    owners = matrix_owners(module)
    listed = [
        member
        for container in module.modules()
        if isinstance(container, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        for member in container.children()
        if not (type(member).__module__.startswith("torch.nn.modules") and not list(member.children()))
        and not owners.isdisjoint(member.modules())
    ]
    seen: dict[nn.Module, None] = {}

    def note(member: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, taken = first_tensor(output), stream((*args, *kwargs.values()))
        if given is not None and taken is not None and given.shape == taken.shape:
            seen.setdefault(member)

    with _hooks((member, note) for member in dict.fromkeys(listed)):
        forward()
    nested: set[nn.Module] = set()
    for member in dict.fromkeys(listed):  # outer modules come before inner ones
        if member in seen and member not in nested:
            nested.update(set(member.modules()) - {member})
    return [member for member in seen if member not in nested]


class _Analysis:
    """Forwards in which every block gets its input from the first forward, and some modules return other values.

    All blocks are tested at once, so the number of forwards does not grow with the number of blocks.
    """

    def __init__(self, module: nn.Module, blocks: list[nn.Module], forward: Callable[[], Any]) -> None:
        self._blocks = blocks
        self._forward = forward
        self._owners = matrix_owners(module)
        self._streams: dict[nn.Module, torch.Tensor] = {}
        self._outputs: dict[nn.Module, torch.Tensor] = {}  # of modules in an unaltered forward

    def branches(self) -> list[list[nn.Module]]:
        found = {block: self._children(block) for block in self._blocks}
        inner = [module for block in self._blocks for module in block.modules() if module in self._owners]
        watched = [*inner, *(child for children in found.values() for child in children), *self._blocks]
        self._outputs = self._run({}, watched)
        for _ in range(DEPTH):
            if not self._descend(found):
                break
        self._drop_swallowed(found)
        self._check(found)
        executed = list(self._run({}, [c for of_block in found.values() for c in of_block]))
        return [sorted(of_block, key=executed.index) for of_block in found.values()]

    def _children(self, module: nn.Module) -> list[nn.Module]:
        found: list[nn.Module] = []
        for child in module.children():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # never called itself
                found += self._children(child)
            elif not self._owners.isdisjoint(child.modules()):
                found.append(child)
        return found

    def _descend(self, found: dict[nn.Module, list[nn.Module]]) -> bool:
        """Replace candidates that add the stream to their output with those inside them; returns whether any did.

        The output of such a candidate differs between tokens even if all matrices inside it return zero.
        """
        candidates = {c: block for block, of_block in found.items() for c in of_block}
        zeros = {m: None for c in candidates for m in c.modules() if m in self._owners and m is not c}
        zeros |= {c: None for c in candidates if not self._children(c)}
        given = self._run(zeros, [c for c in candidates if c not in zeros])
        changed = False
        for candidate, block in candidates.items():
            value = given.get(candidate)
            if value is None or not self._differs(value, value.flatten(0, -2)[:1], block):
                continue
            place = found[block].index(candidate)
            inside = self._children(candidate)
            found[block][place : place + 1] = inside
            for module in inside:
                self._outputs.pop(module, None)
            changed = True
        if changed:
            self._outputs |= self._run({}, [c for of_block in found.values() for c in of_block])
        return changed

    def _drop_swallowed(self, found: dict[nn.Module, list[nn.Module]]) -> None:
        """Drop candidates whose output passes through another one, and so vanishes when the other returns zero."""
        zeros = {c: None for of_block in found.values() for c in of_block}
        without = self._run(zeros, self._blocks)
        kept: dict[nn.Module, list[nn.Module]] = {block: [] for block in found}
        for place in range(max(map(len, found.values()), default=0)):
            tried = {block: of_block[place] for block, of_block in found.items() if place < len(of_block)}
            noise = {c: self._noise(c) for c in tried.values() if c in self._outputs}
            given = self._run({**zeros, **noise}, self._blocks)
            for block, candidate in tried.items():
                if candidate in noise and self._differs(given[block], without[block], block):
                    kept[block].append(candidate)
        found.update(kept)

    def _check(self, found: dict[nn.Module, list[nn.Module]]) -> None:
        """Check that only the stream is left with all branches at zero: tokens differ and do not affect each other."""
        zeros = {c: None for of_block in found.values() for c in of_block}
        without = self._run(zeros, self._blocks)
        changed = {block: value.clone() for block, value in self._streams.items()}
        for value in changed.values():
            other = torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(1)).to(value)
            value.flatten(0, -2)[0] = other * value.abs().max()
        given = self._run(zeros, self._blocks, streams=changed)
        for block, of_block in found.items():
            name, first = type(block).__name__, without[block].flatten(0, -2)
            if not of_block:
                raise ValueError(f"layers: {name} adds no module's output, so dropout has nothing to act on")
            if self._differs(first[1:], given[block].flatten(0, -2)[1:], block):
                raise ValueError(
                    f"layers: {name} adds something to the residual stream that is not a module's output, so "
                    "dropout would miss it"
                )
            if not self._differs(first, first[:1], block):
                raise ValueError(f"layers: {name} adds the residual stream inside a module without submodules")

    def _differs(self, a: torch.Tensor, b: torch.Tensor, block: nn.Module) -> bool:
        """Whether any entry differs beyond its rounding: in half precision 4 eps of the largest hides a branch."""
        floor = TOLERANCE * (float(self._streams[block].abs().max()) + 1e-30)
        rounding = 4 * torch.finfo(a.dtype).eps
        a, b = a.double(), b.double()
        return not bool(((a - b).abs() <= floor + rounding * torch.maximum(a.abs(), b.abs())).all())

    def _noise(self, module: nn.Module) -> torch.Tensor:
        like = self._outputs[module]
        noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0))
        return noise.to(like) * like.abs().max().clamp_min(1e-3)

    def _run(
        self,
        given: Mapping[nn.Module, torch.Tensor | None],
        watched: Iterable[nn.Module],
        streams: dict[nn.Module, torch.Tensor] | None = None,
    ) -> dict[nn.Module, torch.Tensor]:
        """Outputs of ``watched`` in a forward in which modules return the values ``given``, zeros for None."""
        outputs: dict[nn.Module, torch.Tensor] = {}

        def give(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            value = first_tensor(output)
            if value is None:
                return output
            other = given[module]
            fits = other is not None and other.shape == value.shape
            return with_first(output, other.clone() if fits and other is not None else torch.zeros_like(value))

        def watch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            value = first_tensor(output)
            if value is not None and value.numel() and module not in outputs:
                outputs[module] = value.detach().clone()

        def enter(block: nn.Module, args: Any, kwargs: Any) -> Any:
            value = stream((*args, *kwargs.values()))
            if value is None:
                return None
            if block not in self._streams:
                self._streams[block] = value.detach().clone(memory_format=torch.contiguous_format)
            forced = (streams or self._streams)[block].clone()
            swap = lambda x: forced if x is value else x  # noqa: E731
            return tuple(map(swap, args)), {key: swap(x) for key, x in kwargs.items()}

        with ExitStack() as stack:
            for block in self._blocks:
                handle = block.register_forward_pre_hook(enter, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(_hooks((module, give) for module in given))
            stack.enter_context(_hooks((module, watch) for module in dict.fromkeys(watched)))
            self._forward()
        return outputs


@contextmanager
def _hooks(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Context that registers forward hooks with keyword arguments."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield
