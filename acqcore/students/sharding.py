"""Models whose parameters are spread over processes: by rows of the head, or in pieces of every parameter.

Two kinds, told apart because their ranks hold different rows of a batch:

- tensor parallel: the ranks pass the same samples through one forward. A head whose weight is a DTensor cut along the
  vocabulary stays cut (``Head(group=)``); of any other placement it is gathered.
- data parallel (FSDP2, FSDP1, ZeRO-3): each rank has samples of its own, and every parameter is gathered where it is
  used. A merge over the vocabulary would mix rows of different samples, so the head is gathered. Every forward is a
  collective, so that the ranks take as many: :meth:`DataParallel.in_step`.

Nothing here is imported or done for a model that is whole.
"""

from __future__ import annotations

import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import distributed, nn

# Held while the globals of transformers and the environment are others: two threads would restore each other's.
_loading = threading.RLock()


def is_dtensor(value: object) -> bool:
    """Whether a tensor is a DTensor; where the module was not imported nothing is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape; of a DTensor the whole, by a collective unless every rank holds it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def vocabulary_shard(
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
) -> dict[str, Any]:
    """Arguments of ``Head`` for a weight as it lies on this rank: the whole, or a shard and its group.

    A DTensor cut into rows along one dimension of its mesh, and on the others the same everywhere, is a shard.
    """
    if not is_dtensor(weight):
        return {"weight": weight, "bias": None if bias is None else full(bias)}
    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    cut = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    by_rows = sys.modules["torch.distributed.tensor"].Shard(0)
    if [placements[i] for i in cut] != [by_rows]:
        return {"weight": full(weight), "bias": None if bias is None else full(bias)}
    # As torch.chunk: ranks at the end may have fewer rows, or none.
    size = -(-weight.shape[0] // mesh.size(cut[0]))
    start = min(size * mesh.get_local_rank(cut[0]), weight.shape[0])
    if bias is not None and is_dtensor(bias):
        bias = bias.redistribute(placements=placements).to_local()  # type: ignore[attr-defined]
    elif bias is not None:
        bias = bias[start : start + size]
    return {
        "weight": weight.to_local(),  # type: ignore[attr-defined]
        "bias": bias,
        "vocab_start": start,
        "vocab_size": weight.shape[0],
        "group": mesh.get_group(cut[0]),
    }


class DataParallel(ABC):
    """A model each of whose parameters is in pieces on the ranks of a data-parallel group."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abstractmethod
    def groups(self) -> list[distributed.ProcessGroup | None]:
        """The groups whose ranks run forwards together; None stands for all processes."""

    @abstractmethod
    def whole(self, layer: nn.Module) -> Any:
        """A context in which the layer's own parameters are whole tensors or DTensors; all ranks enter it together."""

    def rest(self) -> None:  # noqa: B027
        """Give back what a forward leaves gathered."""

    def step(self, forward: bool, failed: bool = False) -> tuple[bool, bool]:
        """Whether any rank has a forward to run, which all then run with it, and whether any has failed."""
        flags = torch.tensor([forward, failed], dtype=torch.int32, device=next(self.model.parameters()).device)
        for group in self.groups():
            distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=group)
        any_forward, any_failed = flags.tolist()
        return bool(any_forward), bool(any_failed)

    @contextmanager
    def in_step(self, idle: Callable[[], Any]) -> Iterator[None]:
        """On leaving, also by an error, ``idle`` runs as long as another rank has a forward to run.

        Within, each forward begins with ``step(True)``.

        Raises:
            RuntimeError: another rank raised: what follows here would wait for it in vain.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            while (state := self.step(False, failed))[0]:
                idle()
            self.rest()
        if state[1]:
            raise RuntimeError("student: another rank of those that share its parameters raised an error in this call")


class Fsdp2(DataParallel):
    """``torch.distributed.fsdp.fully_shard``; with tensor parallelism inside or not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.rest()  # what is gathered at this moment is no DTensor
        mesh = next(p for p in model.parameters() if is_dtensor(p)).device_mesh  # type: ignore[attr-defined]
        self._groups = [mesh.get_group(i) for i in range(mesh.ndim)]

    def groups(self) -> list[distributed.ProcessGroup | None]:
        return self._groups

    @contextmanager
    def whole(self, layer: nn.Module) -> Iterator[None]:
        self.rest()
        yield

    def rest(self) -> None:
        """The root keeps what it gathered for a backward that does not come; a later step would leave it stale."""
        for module in self.model.modules():
            if isinstance(module, sys.modules["torch.distributed.fsdp"].FSDPModule):
                module.reshard()


class Fsdp1(DataParallel):
    """``FullyShardedDataParallel``."""

    def groups(self) -> list[distributed.ProcessGroup | None]:
        return [self._units()[0].process_group]

    @contextmanager
    def whole(self, layer: nn.Module) -> Iterator[None]:
        units = self._units()
        # From the outermost to the innermost.
        owners = [unit for unit in units if any(module is layer for module in unit.modules())]
        with ExitStack() as stack:
            # The root first: it tells the others that they are inside it.
            for unit in {id(unit): unit for unit in (owners[0], owners[-1])}.values():
                stack.enter_context(type(unit).summon_full_params(unit, recurse=False, writeback=False))
            yield

    def _units(self) -> list[Any]:
        return [module for module in self.model.modules() if is_fsdp1(module)]


class Zero3(DataParallel):
    """DeepSpeed's ZeRO stage 3: each parameter is gathered by hooks of the module that owns it."""

    def groups(self) -> list[distributed.ProcessGroup | None]:
        return [None]

    def whole(self, layer: nn.Module) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(layer.parameters()))


def data_parallel(model: nn.Module) -> DataParallel | None:
    """How the parameters of a model are sharded over ranks with samples of their own, None where they are not."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return Zero3(model)
    if fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        return Fsdp2(model)
    if any(is_fsdp1(module) for module in model.modules()):
        return Fsdp1(model)
    return None


def is_fsdp1(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def inside(module: nn.Module) -> Any:
    """The module inside wrappers that shard it: FSDP1's, DeepSpeed's engine."""
    deepspeed = sys.modules.get("deepspeed")
    while is_fsdp1(module) or (deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine)):
        module = module.module  # type: ignore[assignment]
    return module


def matrix_owners(model: nn.Module) -> set[nn.Module]:
    """The modules with a parameter of two dimensions or more of their own, however it is sharded."""
    owners = set()
    for module in model.modules():
        if any(len(getattr(p, "ds_shape", p.shape)) >= 2 for p in module._parameters.values() if p is not None):
            owners.add(module)
        flat: Any = module._flat_param if is_fsdp1(module) else None
        if flat is not None:  # FSDP1 keeps the shapes of what it has flattened nowhere else
            for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
                if len(shape) >= 2:
                    owners.add(info.module)
    return owners


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward meanwhile; hooks run as ever."""
    own = module.__dict__.get("forward")  # an instance's own: accelerate and others put one there
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def loading_whole() -> Iterator[None]:
    """A model that transformers loads meanwhile is whole on every rank, whatever the run around it does to its own.

    In a ZeRO-3 run transformers shards any model it loads, by a global configuration; in one of accelerate's FSDP with
    ``FSDP_CPU_RAM_EFFICIENT_LOADING`` it leaves the weights out on all ranks but the first of a node. Both are as found
    on leaving, also by an error. Threads take turns.
    """
    from transformers.integrations import deepspeed

    with _loading:
        reference = deepspeed._hf_deepspeed_config_weak_ref
        efficient = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
        deepspeed.unset_hf_deepspeed_config()
        try:
            yield
        finally:
            if efficient is not None:
                os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = efficient
            if reference is not None and (config := reference()) is not None:
                deepspeed.set_hf_deepspeed_config(config)
