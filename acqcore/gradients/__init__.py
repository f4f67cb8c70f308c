"""Norms and sketches of each sample's gradient, from one batched forward and backward.

``need`` declares the quantities that can be requested, ``rules`` forms a module's gradient pieces, ``capture`` collects
them during the backward, ``measures`` reduces them to numbers, ``per_sample`` shares one backward among measures.
"""
