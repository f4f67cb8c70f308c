"""Models whose parameters are sharded over processes.

- Tensor parallel: the ranks run the same samples through one forward. A head whose weight is a DTensor sharded along
  the vocabulary stays sharded (``Head(group=)``); with any other placement it is gathered.
- Data parallel (FSDP2, FSDP1, ZeRO-3): each rank has its own samples, and parameters are gathered where they are used.
  A merge over the vocabulary would mix rows of different samples, so the head is gathered. Every forward is a
  collective, so all ranks run the same number: :meth:`DataParallel.in_step`.

Models that are not sharded neither import nor run any of this.
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

# Held while globals of transformers and the environment are replaced, lest threads restore each other's.
_loading = threading.RLock()


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor; always False unless the DTensor module was imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a DTensor, by a collective unless it is replicated; other tensors are returned unchanged."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def vocabulary_shard(
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
) -> dict[str, Any]:
    """Arguments of ``Head``: the whole weight, or this rank's shard and its group.

    A weight stays sharded if it is a DTensor split by rows along one mesh dimension and replicated along the others.
    """
    placements = weight.placements if is_dtensor(weight) else ()  # type: ignore[attr-defined]
    cut = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) != 1 or placements[cut[0]] != sys.modules["torch.distributed.tensor"].Shard(0):
        return {"weight": gathered(weight), "bias": None if bias is None else gathered(bias)}
    mesh = weight.device_mesh  # type: ignore[attr-defined]
    # As with torch.chunk, the last ranks may have fewer rows, or none.
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
    """A model whose parameters are sharded over the ranks of a data-parallel group."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abstractmethod
    def groups(self) -> list[distributed.ProcessGroup | None]:
        """The groups whose ranks run forwards together; None means all processes."""

    @abstractmethod
    def whole(self, layer: nn.Module) -> Any:
        """Context in which the layer's own parameters are whole tensors or DTensors; a collective."""

    def rest(self) -> None:  # noqa: B027
        """Free parameters that a forward left gathered."""

    def step(self, forward: bool, failed: bool = False) -> tuple[bool, bool]:
        """Whether any rank has a forward to run, which all ranks then join, and whether any has failed."""
        flags = torch.tensor([forward, failed], dtype=torch.int32, device=next(self.model.parameters()).device)
        for group in self.groups():
            distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=group)
        any_forward, any_failed = flags.tolist()
        return bool(any_forward), bool(any_failed)

    @contextmanager
    def in_step(self, idle: Callable[[], Any]) -> Iterator[None]:
        """Context whose forwards begin with ``step(True)``. On exit, even after an error, ``idle`` runs as long as
        another rank has a forward to run.

        Raises:
            RuntimeError: another rank raised an error, so it takes no part in further collectives.
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
            raise RuntimeError("student: another rank that shares its parameters raised an error in this call")


class Fsdp2(DataParallel):
    """``torch.distributed.fsdp.fully_shard``, with or without tensor parallelism inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.rest()  # gathered parameters are not DTensors
        mesh = next(p for p in model.parameters() if is_dtensor(p)).device_mesh  # type: ignore[attr-defined]
        self._groups = [mesh.get_group(i) for i in range(mesh.ndim)]

    def groups(self) -> list[distributed.ProcessGroup | None]:
        return self._groups

    @contextmanager
    def whole(self, layer: nn.Module) -> Iterator[None]:
        self.rest()
        yield

    def rest(self) -> None:
        """The root keeps parameters gathered for a backward that never comes; a later step would make them stale."""
        for module in self.model.modules():
            if isinstance(module, sys.modules["torch.distributed.fsdp"].FSDPModule):
                module.reshard()


class Fsdp1(DataParallel):
    """``FullyShardedDataParallel``."""

    def groups(self) -> list[distributed.ProcessGroup | None]:
        return [self._units()[0].process_group]

    @contextmanager
    def whole(self, layer: nn.Module) -> Iterator[None]:
        self.rest()
        units = self._units()
        # Outermost to innermost.
        owners = [unit for unit in units if any(module is layer for module in unit.modules())]
        with ExitStack() as stack:
            # The root first: it marks the other units as nested.
            for unit in {id(unit): unit for unit in (owners[0], owners[-1])}.values():
                stack.enter_context(type(unit).summon_full_params(unit, recurse=False, writeback=False))
            yield

    def rest(self) -> None:
        """As for FSDP2; with ``SHARD_GRAD_OP``, all units keep their parameters gathered."""
        from torch.distributed.fsdp._runtime_utils import _reshard

        for unit in self._units():
            # A unit that has not run yet or does not shard has no space for gathered parameters.
            if (handle := unit._handle) is not None and hasattr(handle.flat_param, "_full_param_padded"):
                _reshard(unit, handle, True)

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
    """The model's sharding over ranks with different samples, None if it has none."""
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


def unwrapped(module: nn.Module) -> Any:
    """The module inside sharding wrappers (FSDP1, DeepSpeed's engine)."""
    deepspeed = sys.modules.get("deepspeed")
    while is_fsdp1(module) or (deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine)):
        module = module.module  # type: ignore[assignment]
    return module


def matrix_owners(model: nn.Module) -> set[nn.Module]:
    """The modules that own a parameter of two or more dimensions, sharded or not."""
    owners = set()
    for module in model.modules():
        if any(len(getattr(p, "ds_shape", p.shape)) >= 2 for p in module._parameters.values() if p is not None):
            owners.add(module)
        flat: Any = module._flat_param if is_fsdp1(module) else None
        if flat is not None:  # the only place where FSDP1 keeps shapes of flattened parameters
            for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
                if len(shape) >= 2:
                    owners.add(info.module)
    return owners


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context that replaces a module's forward; its hooks still run."""
    own = module.__dict__.get("forward")  # set on the instance by accelerate and others
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
    """Context in which transformers loads whole models on every rank.

    In a ZeRO-3 run, a global configuration makes transformers shard every model. Under accelerate's FSDP with
    ``FSDP_CPU_RAM_EFFICIENT_LOADING`` only the first rank of a node gets the weights. Both settings are restored on
    exit. Threads take turns.
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
