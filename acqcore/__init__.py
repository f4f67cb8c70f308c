"""Acquisition functions of active learning, fused with the language-model head.

``acqcore.score(student, samples, acquisitions)`` scores text with a student model;
``acqcore.row_stats(hidden, head, targets)`` is the one pass beneath it.
"""

from __future__ import annotations

from acqcore.acquisitions import Acquisition, acquisitions, register
from acqcore.backends import BackendInfo, backends
from acqcore.head import Head
from acqcore.row_stats import RowStats, logit_stats, row_stats

__version__ = "0.1.0"

__all__ = [
    "Acquisition",
    "BackendInfo",
    "Head",
    "RowStats",
    "__version__",
    "acquisitions",
    "backends",
    "logit_stats",
    "register",
    "row_stats",
]
