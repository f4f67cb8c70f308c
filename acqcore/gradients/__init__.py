"""Norms and sketches of each sample's gradient, from one batched forward and backward.

``need`` names what can be asked for, ``capture`` catches the gradients' pieces while the backward runs, ``rules`` makes
the pieces, ``measures`` turns them into numbers, ``per_sample`` has several measures share the backward.
"""
