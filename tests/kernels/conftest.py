"""A process either interprets or compiles kernels; tests of the other kind are not collected."""

from __future__ import annotations

import importlib.util

from acqcore.backends.triton import INTERPRETED

OF_INTERPRETER = [
    "test_cotangents.py", "test_factors.py", "test_gram.py", "test_mixture.py", "test_philox.py", "test_row_stats.py",
    "test_sketch.py",
]  # fmt: skip
COMPILED = ["test_compile.py", "test_compile_cotangents.py", "test_gpu_static.py"]
collect_ignore = COMPILED if INTERPRETED else OF_INTERPRETER
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
