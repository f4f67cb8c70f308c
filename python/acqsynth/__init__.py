"""Trainers on top of acqcore: acquisition functions as the reward of a model that writes training data."""
