"""Triton kernels of acqcore (installed as ``acqcore.kernels``); imports only torch, triton and itself."""
