"""Estimates memory and time of scoring from a model configuration, a batch and a device: ``acqcore plan``.

Models of a few blocks are built from the configuration and scored for a few seconds. Because blocks are alike, the
whole model follows by extrapolation.
"""
