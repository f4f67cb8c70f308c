"""A request becomes a plan: the needs of its acquisitions, each computed once a batch.

``api`` is called by users, ``plan`` checks a request and turns results into values, ``run`` computes the needs,
``draws`` and ``acqcore.gradients`` those that take passes of their own; ``gradients`` has the public functions that ask
for one gradient need.
"""
