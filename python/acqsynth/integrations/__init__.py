"""Rewards for trainers other than TRL, none of which is imported here.

The environment variable ``ACQSYNTH_REWARD`` names the reward as ``package.module:attribute``: a ``ComposedReward``, or
a function without arguments that creates one on first use.
"""
