"""The report of a run: its numbers, and one HTML file that needs nothing else."""

from __future__ import annotations

from acqsynth.report.page import render as render

__all__ = ["render"]
