"""Acquisition functions, one file each: formula, source, slow reference, options, needs.

Call the package to list them: ``acqcore.acquisitions()``.
"""

from __future__ import annotations

from acqcore.acquisitions.base import REGISTRY, Acquisition, acquisitions, register
from acqcore.acquisitions.needs import BatchNeed, DrawOptions, GradientNeed, Options, RowNeed, SampleBatch

# isort: off
from acqcore.acquisitions import (  # in the order in which they are listed
    loss,
    perplexity,
    entropy,
    varentropy,
    least_confidence,
    margin,
    gini,
    el2n,
    expected_gradient_length,
    token_grad_norm,
    mutual_information,
    predictive_entropy,
    expected_entropy,
    variation_ratio,
    bald_quadratic,
    grad_norm,
    badge,
    influence,
    gradient_diversity,
    archive_novelty,
)
# isort: on

__all__ = [
    "REGISTRY",
    "Acquisition",
    "BatchNeed",
    "DrawOptions",
    "GradientNeed",
    "Options",
    "RowNeed",
    "SampleBatch",
    "acquisitions",
    "archive_novelty",
    "badge",
    "bald_quadratic",
    "el2n",
    "entropy",
    "expected_entropy",
    "expected_gradient_length",
    "gini",
    "grad_norm",
    "gradient_diversity",
    "influence",
    "least_confidence",
    "loss",
    "margin",
    "mutual_information",
    "perplexity",
    "predictive_entropy",
    "register",
    "token_grad_norm",
    "varentropy",
    "variation_ratio",
]
