"""Domains: mathematics, medicine, code, text classification, a small arithmetic world. One file and class each."""

from __future__ import annotations

import importlib
from typing import Any

from acqsynth.domains.base import Domain as Domain, Messages as Messages, Sample as Sample

__all__ = ["DOMAINS", "Domain", "Messages", "Sample", "domain"]

#: Name -> module and class; imported on demand.
DOMAINS: dict[str, str] = {
    "math": "acqsynth.domains.math:Math",
    "medical": "acqsynth.domains.medical:Medical",
    "code": "acqsynth.domains.code:Code",
    "classification": "acqsynth.domains.classification:Classification",
    "arithmetic": "acqsynth.domains.arithmetic:Arithmetic",
    "arithmetic-skewed": "acqsynth.domains.arithmetic:SkewedArithmetic",
}


def domain(name: str, **options: Any) -> Domain:
    """Creates a domain by name, with the options of its class; ValueError for an unknown name."""
    if name not in DOMAINS:
        raise ValueError(f"domain: unknown {name!r}, expected one of {', '.join(DOMAINS)}")
    module, _, kind = DOMAINS[name].partition(":")
    found: Domain = getattr(importlib.import_module(module), kind)(**options)
    return found
