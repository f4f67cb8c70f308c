"""The report of a run: what was measured, as one HTML file that needs nothing else."""

from __future__ import annotations

from acqsynth.report.html import render as render

__all__ = ["render"]
