"""Validation of public arguments, shared by several callers.

Each function raises ValueError or TypeError naming the argument, the value given and the value expected. Code below the
public API trusts its input. This is a leaf package: it imports only torch.
"""

from __future__ import annotations

# isort: off
from acqcore.checks.basic import (  # noqa: F401
    FLOAT_DTYPES, IGNORE_INDEX, acquisition_values, at_most, describe, device, finite, float_tensor, given, installed,
    instance, literal, max_length, module, names, one_of, positive, positive_int, same_device,
)  # fmt: skip
from acqcore.checks.gradients import differentiable, offsets, scored_tokens, token_weights  # noqa: F401
from acqcore.checks.heads import (  # noqa: F401
    head, hidden, ignored_outside, logits, target_range, targets, targets_in_range, tiling, vocabulary,
    whole_head,
)  # fmt: skip
from acqcore.checks.mixtures import (  # noqa: F401
    alike, drawn_hidden, draws, dropout, enough_blocks, layers, probes, seed, some_blocks,
)  # fmt: skip
from acqcore.checks.sketches import labels, like_vector, ridge, vectors  # noqa: F401
