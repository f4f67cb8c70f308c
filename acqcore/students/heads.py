"""The head of a transformers causal language model: its weights with adapters applied, and its logit map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from acqcore import checks
from acqcore.head import compute_dtype
from acqcore.students.sharding import DataParallel, gathered, is_dtensor, unwrapped, vocabulary_shard

#: Known logits that replace the output embedding's own to probe the model's logit map. The smallest reveals the scale,
#: as a cap has no effect on it, the largest the cap.
KNOWN_LOGITS = (2.0**-14, -50.0, -1.0, 0.0, 1.0, 50.0)

#: Largest allowed deviation of the mapped known logits from scale and cap, relative to their size.
MAP_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class LogitMap:
    """How a model transforms the output embedding's product: ``cap(scale * z)``, see :class:`acqcore.Head`."""

    scale: float = 1.0
    softcap: float | None = None
    columns: int | None = None  # number of logits if the model drops the padding of its vocabulary

    @classmethod
    def fitted(cls, mapped: torch.Tensor) -> LogitMap | None:
        """The map from ``KNOWN_LOGITS`` to ``mapped [6]``, or None if none fits."""
        known = torch.tensor(KNOWN_LOGITS, dtype=torch.float64)
        values = mapped.double().cpu()
        tolerance = MAP_TOLERANCE[mapped.dtype]
        scale, largest = float(values[0]) / KNOWN_LOGITS[0], float(values[-1])
        if not math.isfinite(scale) or not math.isfinite(largest) or scale <= 0 or largest <= 0:
            return None
        linear = scale * KNOWN_LOGITS[-1]
        found = cls(_rounded(scale, tolerance))
        if abs(largest - linear) > tolerance * linear:
            found = cls(found.scale, _rounded(_softcap(found.scale * KNOWN_LOGITS[-1], largest), tolerance))
        error = (found(known) - values).abs()
        return found if bool((error <= tolerance * values.abs() + 1e-12).all()) else None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        z = logits * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def _softcap(linear: float, capped: float) -> float:
    """The c with ``c * tanh(linear / c) = capped``, by bisection."""
    low, high = capped, 1e3 * linear
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.tanh(linear / middle) < capped else (low, middle)
    return high


def _rounded(value: float, tolerance: float) -> float:
    """The number with the fewest digits that is close enough to ``value``: configurations say 30, not 30.0000002."""
    for digits in range(1, 7):
        short = float(f"{value:.{digits}g}")
        if abs(short - value) <= tolerance / 10 * abs(value):
            return short
    return value


def placed_projection(model: Any, data_parallel: DataParallel | None) -> dict[str, Any]:
    """Arguments of ``Head`` for the output embedding: weight ``[V, D]``, bias ``[V]`` and shard. A collective if
    ``data_parallel`` is given."""
    layer = unwrapped(model.get_output_embeddings())
    if data_parallel is None:
        weight, bias = _projection(layer)
        return vocabulary_shard(weight.detach(), None if bias is None else bias.detach())
    with torch.no_grad(), data_parallel.whole(layer):
        # A copy: the gathered tensors are freed on exit.
        weight, bias = _projection(layer)
        bias = None if bias is None else gathered(bias.detach()).clone()
        return {"weight": gathered(weight.detach()).clone(), "bias": bias}


def _projection(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight ``[V, D]`` and bias ``[V]`` of the output embedding, with PEFT adapters applied."""
    if type(layer).__module__.partition(".")[0] == "peft":
        return _adapted_projection(layer)
    if not isinstance(layer, torch.nn.Linear):
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        raise ValueError(
            f"model: expected its output embedding to be torch.nn.Linear, got {kind}; use acqcore.Student(trunk, head)"
        )
    if "weight" not in layer._parameters and layer._forward_pre_hooks:  # of pruning or weight norm, which compute it
        layer(layer.weight[:0])
    weight: torch.Tensor = layer.weight
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) or is_dtensor(weight)
    if not plain or not weight.is_floating_point():
        kind = checks.describe(weight) if type(weight) is torch.nn.Parameter else type(weight).__name__
        raise ValueError(
            f"model: the weight of its output embedding is {kind}, expected a floating-point tensor; "
            "exclude the head from quantisation"
        )
    return weight, layer.bias


def _adapted_projection(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import TrainableTokensWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        if layer.disable_adapters or not layer.active_adapters:
            return _projection(layer.original_module)
        return _projection(layer.modules_to_save[layer.active_adapters[0]])
    if isinstance(layer, TrainableTokensWrapper):  # of an embedding tied to the head
        weight, bias = _projection(layer.original_module)
        tokens = layer.token_adapter
        unchanged = tokens.disable_adapters or tokens.merged
        return weight if unchanged else tokens.get_merged_weights(tokens.active_adapters), bias
    if not isinstance(layer, LoraLinear):
        raise ValueError(
            f"model: the adapter on the output embedding is {checks.describe(layer)}; expected LoRA or "
            "modules_to_save, merge it first"
        )
    variants = [name for name in layer.active_adapters if name in layer.lora_variant]
    if variants:
        kind = type(layer.lora_variant[variants[0]]).__name__
        raise ValueError(
            f"model: the adapter on the output embedding is a LoRA variant ({kind}); expected plain LoRA, "
            "merge it first"
        )
    if layer.merged and layer.disable_adapters:
        raise ValueError(
            "model: the adapter on the output embedding is both merged and disabled; call model.unmerge_adapter() first"
        )
    weight, bias = _projection(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return weight, bias
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        # Half precision would round away most of a small update; the model never forms this sum.
        dtype = compute_dtype(weight.dtype)
        weight = weight.to(dtype) + layer.get_delta_weight(adapter).to(dtype)
        extra = layer.lora_B[adapter].bias
        if extra is not None:
            extra = extra.to(dtype) * layer.scaling[adapter]
            bias = extra if bias is None else bias.to(dtype) + extra
    return weight, bias
