"""Triton kernels of acqcore (installed as ``acqcore.kernels``); imports torch, triton and itself only."""
