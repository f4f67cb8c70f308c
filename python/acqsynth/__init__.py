"""Trainers built on acqcore: acquisition functions reward a model for writing useful training data."""
