"""Domains: mathematics, medicine, code, and a small world of arithmetic. One file each, one class."""

from __future__ import annotations

from acqsynth.domains.base import Domain as Domain
from acqsynth.domains.base import Messages as Messages
from acqsynth.domains.base import Sample as Sample

__all__ = ["Domain", "Messages", "Sample"]
