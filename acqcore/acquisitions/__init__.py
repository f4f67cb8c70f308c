"""Acquisition functions, one file each: formula, source, public function, slow readable reference."""

from __future__ import annotations

# The order is the one `acqcore.acquisitions()` shows.
from acqcore.acquisitions.loss import loss as loss  # isort: skip
from acqcore.acquisitions.perplexity import perplexity as perplexity  # isort: skip
from acqcore.acquisitions.entropy import entropy as entropy  # isort: skip
from acqcore.acquisitions.varentropy import varentropy as varentropy  # isort: skip
from acqcore.acquisitions.least_confidence import least_confidence as least_confidence  # isort: skip
from acqcore.acquisitions.margin import margin as margin  # isort: skip
from acqcore.acquisitions.gini import gini as gini  # isort: skip
from acqcore.acquisitions.el2n import el2n as el2n  # isort: skip
from acqcore.acquisitions.expected_gradient_length import (  # isort: skip
    expected_gradient_length as expected_gradient_length,
)
from acqcore.acquisitions.token_grad_norm import token_grad_norm as token_grad_norm  # isort: skip
from acqcore.acquisitions.mutual_information import mutual_information as mutual_information  # isort: skip
from acqcore.acquisitions.predictive_entropy import predictive_entropy as predictive_entropy  # isort: skip
from acqcore.acquisitions.expected_entropy import expected_entropy as expected_entropy  # isort: skip
from acqcore.acquisitions.variation_ratio import variation_ratio as variation_ratio  # isort: skip
from acqcore.acquisitions.bald_quadratic import bald_quadratic as bald_quadratic  # isort: skip
from acqcore.acquisitions.grad_norm import grad_norm as grad_norm  # isort: skip
from acqcore.acquisitions.badge import badge as badge  # isort: skip
from acqcore.acquisitions import influence as _influence  # isort: skip  # noqa: F401
from acqcore.acquisitions import gradient_diversity as _gradient_diversity  # isort: skip  # noqa: F401
from acqcore.acquisitions import archive_novelty as _archive_novelty  # isort: skip  # noqa: F401
from acqcore.acquisitions.base import REGISTRY, Acquisition, SampleBatch, register

__all__ = ["REGISTRY", "Acquisition", "SampleBatch", "acquisitions", "register"]


def acquisitions() -> dict[str, str]:
    """Name -> one-line description of every acquisition ``score`` knows, the user's own included."""
    return {name: entry.description for name, entry in REGISTRY.items()}
