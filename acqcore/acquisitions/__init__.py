"""Acquisition functions, one file each: formula, source, slow reference, options, needs.

Call the package to list them: ``acqcore.acquisitions()``.
"""

from __future__ import annotations

from acqcore.acquisitions.base import REGISTRY, Acquisition, acquisitions, register
from acqcore.acquisitions.needs import (
    BatchNeed,
    DrawOptions,
    GradientNeed,
    LinearOptions,
    Options,
    ProbeNeed,
    RowNeed,
    SampleBatch,
)

# isort: off
from acqcore.acquisitions import (  # noqa: F401  # in listing order
    loss, perplexity, entropy, varentropy, least_confidence, margin, gini, el2n, expected_gradient_length,
    token_grad_norm, mutual_information, predictive_entropy, expected_entropy, variation_ratio, bald_quadratic,
    grad_norm, badge, influence, epig, gradient_diversity, archive_novelty,
)  # fmt: skip
# isort: on

__all__ = [
    "REGISTRY", "Acquisition", "BatchNeed", "DrawOptions", "GradientNeed", "LinearOptions", "Options", "ProbeNeed",
    "RowNeed", "SampleBatch", "acquisitions", "register",
]  # fmt: skip
