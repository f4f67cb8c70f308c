"""Turns a request into a plan: the needs of its acquisitions, each computed once per batch.

Users call ``api``. ``plan`` checks a request and turns results into values, ``run`` computes the needs, with ``draws``
and ``acqcore.gradients`` for those that require extra passes. ``gradients`` has the public functions that
return gradients or compare them.
"""
