"""Choosing among vectors: subsets, and the worth of a vector beside others."""
