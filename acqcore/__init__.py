"""Acquisition functions for active learning, fused with the language-model head.

``acqcore.score(student, samples, acquisitions)`` scores text with a student model;
``acqcore.row_stats(hidden, head, targets)`` is the underlying single pass.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from acqcore.acquisitions import Acquisition, register
from acqcore.backends import BackendInfo
from acqcore.bayes import BayesStats, ensemble_stats, mutual_information
from acqcore.files.data import records
from acqcore.gradients.laplace import LaplacePosterior
from acqcore.gradients.reference import EpigReference, Reference
from acqcore.head import Head
from acqcore.head_grad import head_grad_norm, hidden_grad, hidden_grad_norm
from acqcore.literals import Reduction
from acqcore.row_stats import RowStats, logit_stats, row_stats
from acqcore.scores import Scores
from acqcore.scoring.api import check_request, score, score_stream
from acqcore.scoring.gradients import (
    badge_embedding,
    epig,
    epig_reference,
    grad_norm,
    grad_sketch,
    influence,
    influence_reference,
    laplace_posterior,
)
from acqcore.scoring.prompts import prompt_embedding
from acqcore.selection.diversity import Archive, gradient_diversity, vendi_score
from acqcore.selection.subsets import select
from acqcore.selection.trust import label_trust
from acqcore.students.loading import load_model, load_tokenizer
from acqcore.students.samples import Row, encode
from acqcore.students.student import Student

if TYPE_CHECKING:
    from acqcore.acquisitions import acquisitions
    from acqcore.backends import backends
else:
    from acqcore import acquisitions, backends

__version__ = "0.1.0"

__all__ = [
    "Acquisition", "Archive", "BackendInfo", "BayesStats", "EpigReference", "Head", "LaplacePosterior", "Reduction",
    "Reference", "Row", "RowStats", "Scores", "Student", "__version__", "acquisitions", "backends", "badge_embedding",
    "check_request", "encode", "ensemble_stats", "epig", "epig_reference", "grad_norm", "grad_sketch",
    "gradient_diversity", "head_grad_norm", "hidden_grad", "hidden_grad_norm", "influence", "influence_reference",
    "label_trust", "laplace_posterior", "load_model", "load_tokenizer", "logit_stats", "mutual_information",
    "prompt_embedding", "records", "register", "row_stats", "score", "score_stream", "select", "vendi_score",
]  # fmt: skip


class _CallablePackage(ModuleType):
    """Makes a package callable as its function of the same name, which would otherwise hide the package's modules."""

    def __call__(self):  # type: ignore[no-untyped-def]
        return getattr(self, self.__name__.rpartition(".")[2])()


for _package in (acquisitions, backends):
    _package.__class__ = _CallablePackage
