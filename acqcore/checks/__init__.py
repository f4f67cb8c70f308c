"""Validation of public arguments, shared by several callers.

Each function raises ValueError or TypeError naming the argument, the value given and the value expected. Code below the
public API trusts its input. This is a leaf package: it imports only torch.
"""

from __future__ import annotations

# isort: off
from acqcore.checks.basic import (  # noqa: F401
    FLOAT_DTYPES, IGNORE_INDEX, acquisition_values, at_most, describe, device, draws, dropout, enough_blocks, finite,
    float_tensor, given, installed, instance, layers, literal, max_length, module, names, one_of, positive,
    positive_int, probes, same_device, seed, some_blocks,
)  # fmt: skip
from acqcore.checks.gradients import (  # noqa: F401
    differentiable, labels, like_vector, offsets, ridge, scored_tokens, token_weights, vectors,
)  # fmt: skip
from acqcore.checks.heads import (  # noqa: F401
    alike, drawn_hidden, head, hidden, ignored_outside, logits, targets, targets_in_range, tiling, vocabulary,
    whole_head,
)  # fmt: skip
