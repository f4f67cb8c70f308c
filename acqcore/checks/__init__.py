"""Validation of public arguments that several callers share.

Each function raises ValueError or TypeError naming the argument, what was given and what was expected. Code below the
public edge trusts its input. A leaf: imports torch only.
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
