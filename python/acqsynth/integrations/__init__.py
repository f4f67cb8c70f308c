"""Rewards for trainers other than TRL; none of them is imported here.

The reward is named by the environment variable ``ACQSYNTH_REWARD``, ``package.module:attribute``: a
``ComposedReward``, or a function without arguments that makes one at the first call.
"""
