"""The last layer of a language model, as acqcore represents it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from acqcore import checks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class Head:
    """The map from a hidden state to logits: ``z = cap(scale * (W h + b))``.

    ``cap(x) = softcap * tanh(x / softcap)`` if a softcap is given (Gemma 2), else the identity.

    Args:
        weight: ``[V, D]`` float32, bfloat16, float16 or float64; any strides.
        bias: ``[V]`` or None.
        softcap: positive float or None (``final_logit_softcapping``).
        scale: multiplies the product, bias included (Cohere's ``logit_scale``; 1 / ``logits_scaling`` of Granite).
        vocab_start: index of this weight's first row in the whole vocabulary, for a shard of a head.
            Targets and ``top1_index`` are always indices into the whole vocabulary.
        vocab_size: size of the whole vocabulary; by default ``vocab_start + V``. Weight rows at or past it are padding:
            ``weight`` and ``bias`` become views without them.
        group: the ``torch.distributed`` ranks that share the vocabulary (tensor parallelism). Each rank passes its own
            rows (any number, including 0) and the same hidden states and targets, makes the same calls in the same
            order, and gets the results of the whole head. Ranks exchange a few numbers per row or sample, never
            logits. The first use compares the ranks' rows; the constructor runs no collective.

    Raises:
        TypeError: a tensor that is not floating point or is a DTensor, a group that is not a ProcessGroup.
        ValueError: mismatched shapes, a softcap or scale out of range, a group without ``vocab_size``, no rows.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    vocab_start: int = 0
    vocab_size: int = None  # type: ignore[assignment]  # always an int after __post_init__
    group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        softcap, scale = checks.head(self.weight, self.bias, self.softcap, self.scale)
        object.__setattr__(self, "softcap", softcap)
        object.__setattr__(self, "scale", scale)
        rows = self.weight.shape[0]
        start, size = checks.vocabulary(self.vocab_start, rows, self.vocab_size, self.group)
        object.__setattr__(self, "vocab_start", start)
        object.__setattr__(self, "vocab_size", size)
        if start + rows > size:
            true = max(size - start, 0)
            object.__setattr__(self, "weight", self.weight[:true])
            object.__setattr__(self, "bias", None if self.bias is None else self.bias[:true])

    def logits(self, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Logits ``[N, V]`` of ``hidden [N, D]``: the readable definition.

        The product is computed in float32 for float32, bfloat16 and float16, and in float64 if either side is float64.
        """
        dtype = compute_dtype(hidden.dtype, self.weight.dtype)
        z = hidden.to(dtype) @ self.weight.to(dtype).T
        if self.bias is not None:
            z = z + self.bias.to(dtype)
        z = z * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / temperature


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any of ``dtypes`` is, else float32: half-precision products are never rounded to half."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
