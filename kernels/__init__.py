"""Triton kernels of acqcore (installed as ``acqcore.kernels``); they import only torch, triton, ``acqcore.kept`` and
``acqcore.slots``."""
