"""Forms a module's parameter gradients from its input and the gradient of its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.func import functional_call, vjp, vmap

from acqcore import checks
from acqcore.gradients.measures import CHUNK_ELEMENTS, DenseGrad, GradPiece, OuterGrad, RowGrad
from acqcore.head import compute_dtype

#: Most parameter elements of a module without a rule; its gradients are formed sample by sample.
SMALL_ELEMENTS = 1 << 20

#: Largest deviation of an embedding's output from scaled rows of its weight, relative to the largest entry.
SCALED_ROWS_TOLERANCE = 1e-2


#: Norm -> the weight with which it returns the normalised values: 1, or 0 if it scales them by 1 + w.
_UNITS: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


class Uncovered(ValueError):  # noqa: N818
    """Raised for a call that fits no rule."""


class ModuleCall:
    """One call of a module that owns selected parameters.

    Args:
        names: selected parameters that the module owns, attribute -> name in the model.
        args, kwargs, output: of the call; the first tensor is the input.
        batch, length: of the token ids. The :func:`form` of a tensor tells how its samples are laid out; in a batch of
            one, every tensor belongs to that sample.

    Raises:
        Uncovered: the module fits no rule (names the parameter).
    """

    def __init__(
        self,
        module: nn.Module,
        names: Mapping[str, str],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
        batch: int,
        length: int,
    ) -> None:
        self.names = names
        self.module = module
        self._shape = (batch, length)
        self._args = [_detached(value) for value in args]
        self._kwargs = {key: _detached(value) for key, value in kwargs.items()}
        values = (*self._args, *self._kwargs.values())
        given = next((value for value in values if isinstance(value, torch.Tensor)), None)
        if given is None or not isinstance(output, torch.Tensor):
            handled = f"its {type(module).__name__} takes or returns"
            odd = given if given is None else output
            raise self._uncovered(f"{handled} {checks.describe(odd)} where one tensor was expected")
        self._input = given
        if batch > 1:
            for tensor in (output, *(x for x in values if isinstance(x, torch.Tensor))):
                if form(tensor, batch, length) is None:
                    raise self._uncovered(
                        f"its {type(module).__name__} takes or returns a {checks.describe(tensor)}, in which the "
                        f"{batch} samples of {length} tokens cannot be separated"
                    )
        self.forms = (str(form(self._input, batch, length)), str(form(output, batch, length)))
        self._version = self._input._version
        self._scale = 1.0
        if is_embedding(module):
            if type(module).forward is not nn.Embedding.forward:
                self._scale = self._row_scale(output.detach())
        elif not is_linear(module):
            size = sum(getattr(module, key).numel() for key in names)
            if size > SMALL_ELEMENTS:
                raise self._uncovered(
                    f"{type(module).__name__} is neither a linear layer nor an embedding, and its {size} parameters "
                    f"exceed the limit of {SMALL_ELEMENTS} for differentiation sample by sample"
                )

    def _uncovered(self, reason: str) -> Uncovered:
        return Uncovered(f"parameters: no rule covers {next(iter(self.names.values()))}: {reason}")

    def pieces(
        self,
        gradient: torch.Tensor,  # of the output, in its shape
    ) -> dict[str, GradPiece]:
        """Gradient pieces of the selected parameters, by attribute."""
        if self._input._version != self._version:
            raise self._uncovered("the input of its module was changed in place")
        if is_linear(self.module):
            gradient, value = self._rows(gradient), self._rows(self._input)  # [B, T, out], [B, T, in]
            dtype = compute_dtype(gradient.dtype)
            return {
                key: OuterGrad(gradient, value) if key == "weight" else DenseGrad(gradient.sum(1, dtype=dtype))
                for key in self.names
            }
        if is_embedding(self.module):
            return {"weight": self._embedding(self._tokens(gradient))}
        if is_norm(self.module):
            return self._norm(self._tokens(gradient))
        return self._other(gradient)

    def _embedding(
        self,
        gradient: torch.Tensor,  # [B, T, D]
    ) -> GradPiece:
        weight: Any = self.module.weight
        ids = self._by_sample(self._input).flatten(1)
        padding = getattr(self.module, "padding_idx", None)
        if padding is not None:  # autograd gives this row no gradient
            gradient = gradient.masked_fill((ids == padding)[:, :, None], 0)
        return RowGrad(ids, gradient * self._scale, weight.shape[0])

    def _row_scale(self, output: torch.Tensor) -> float:
        """Factor by which the output scales the weight's rows (Gemma 3: the square root of the width)."""
        weight: Any = self.module.weight
        if self._input.is_floating_point() or self._input.dtype == torch.bool:
            raise self._uncovered(f"its embedding takes {checks.describe(self._input)}, not token ids")
        rows = nn.functional.embedding(self._input, weight.detach())
        other = self._uncovered("its embedding does not return a multiple of the rows of its weight")
        if rows.shape != output.shape:
            raise other
        rows, output = rows.double(), output.double()
        scale = (rows * output).sum() / rows.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        error = (output - scale * rows).abs().max()
        if not bool(error <= SCALED_ROWS_TOLERANCE * output.abs().max()):
            raise other
        return float(scale)

    def _norm(
        self,
        gradient: torch.Tensor,  # [B, T, D]
    ) -> dict[str, GradPiece]:
        """Pieces of a weight w that scales the normalised values by w or 1 + w, and of an additive bias.

        The normalised values are output(w = 1) - output(w = 0). These two calls show whether w or 1 + w scales them;
        from then on one call suffices. On a GPU two were a fifth of a small student's launches.
        """
        args = tuple(_cast(x, gradient.dtype) for x in self._args)
        kwargs = {key: _cast(x, gradient.dtype) for key, x in self._kwargs.items()}

        def output(weight: float) -> torch.Tensor:
            filled = {
                key: torch.full_like(p, weight if key == "weight" else 0.0, dtype=gradient.dtype)
                for key, p in self.module.named_parameters(recurse=False)
            }
            found: torch.Tensor = functional_call(self.module, filled, args, kwargs)
            return self._tokens(found)

        pieces: dict[str, GradPiece] = {}
        if "weight" in self.names:
            unit = _UNITS.get(self.module)
            if unit is None:
                zero = output(0.0)
                normalised = output(1.0) - zero
                if bool(normalised.any()):  # zeros fit both
                    if not bool(zero.any()):
                        _UNITS[self.module] = 1.0
                    elif torch.equal(zero, normalised):
                        _UNITS[self.module] = 0.0
            else:
                normalised = output(unit)
            pieces["weight"] = DenseGrad((gradient * normalised).sum(1))
        if "bias" in self.names:
            pieces["bias"] = DenseGrad(gradient.sum(1))
        return pieces

    def _other(
        self,
        gradient: torch.Tensor,  # of the output, in its shape
    ) -> dict[str, GradPiece]:
        """Differentiate the module sample by sample; exact for any computation."""
        module, batch = self.module, self._shape[0]
        dtype = compute_dtype(self._input.dtype)
        values = {key: getattr(module, key).detach().to(dtype) for key in self.names}
        arguments: dict[Any, Any] = {**dict(enumerate(self._args)), **self._kwargs}
        inputs = {key: _cast(self._by_sample(x), dtype) for key, x in arguments.items() if isinstance(x, torch.Tensor)}

        def of_one(one: dict[Any, torch.Tensor], out: torch.Tensor) -> dict[str, torch.Tensor]:
            args = [one[i][None] if i in one else x for i, x in enumerate(self._args)]
            kwargs = {key: one[key][None] if key in one else x for key, x in self._kwargs.items()}
            return vjp(lambda own: functional_call(module, own, tuple(args), kwargs), values)[1](out[None])[0]

        size = sum(value.numel() for value in values.values())
        per_sample = vmap(of_one, chunk_size=max(1, CHUNK_ELEMENTS // size))
        try:
            gradients = per_sample(inputs, self._by_sample(gradient).to(dtype))
        except (RuntimeError, LookupError, TypeError, ValueError) as error:  # control flow that depends on values
            name = type(module).__name__
            raise self._uncovered(f"{name} could not be differentiated sample by sample: {error}") from error
        return {key: DenseGrad(value.reshape(batch, -1)) for key, value in gradients.items()}

    def _tokens(
        self,
        value: torch.Tensor,  # by sample, [..., P]
    ) -> torch.Tensor:
        """``[B, T, P]``; half precision becomes float32."""
        return self._rows(value).to(compute_dtype(value.dtype))

    def _rows(
        self,
        value: torch.Tensor,  # by sample, [..., P]
    ) -> torch.Tensor:
        """``[B, T, P]``."""
        return self._by_sample(value).reshape(self._shape[0], -1, value.shape[-1])

    def _by_sample(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` with samples along the first dimension."""
        batch, length = self._shape
        if batch == 1:
            return value if value.shape[:1] == (1,) else value[None]
        if value.shape[0] == batch:
            return value
        if value.shape[0] == 1:
            return value.expand(batch, *value.shape[1:])
        return value.unflatten(0, (batch, length))


def form(tensor: torch.Tensor, batch: int, length: int) -> str | None:
    """How the samples of a batch are laid out in a tensor; None if they cannot be separated.

    ``[n, P]`` does not count as n samples, since it may be n tokens picked from the batch.
    """
    if tensor.dim() >= 2 and tensor.shape[:2] == (batch, length):
        return "tokens"
    if tensor.dim() >= 3 and tensor.shape[0] == batch:
        return "samples"
    if tensor.dim() >= 1 and tensor.shape[0] == batch * length:
        return "flat"
    return "shared" if tensor.dim() >= 1 and tensor.shape[0] == 1 else None


def is_linear(module: nn.Module) -> bool:
    """Whether it computes ``x W^T + b``, or is the ``Conv1D`` of transformers (GPT-2), with W transposed."""
    kind = type(module)
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return True
    return isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq


def is_norm(module: nn.Module) -> bool:
    """Whether it is a LayerNorm or RMSNorm by name, with one weight per column and at most a bias besides."""
    parameters = module._parameters
    weight = parameters.get("weight")
    named = type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    return named and weight is not None and weight.dim() == 1 and parameters.keys() <= {"weight", "bias"}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point tensors to ``dtype``; return anything else unchanged."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
