"""Chooses among the GPU backends that can serve a call: the fastest as measured, else the first in a fixed order.

``preference.json`` holds the fixed order of each operation ("unmeasured") and a row for each measured class of shapes:
``{"capability": "9.0", "op": "logit_stats", "dtype": "bfloat16", "rows": "many", "vocab": "large", "order": [...]}``.
Rows come from ``make gpu-check``, which prints those for its machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "preference.json").read_text())


def shape_class(rows: int, vocab: int) -> tuple[str, str]:
    """("few" or "many" rows, "small" or "large" vocabulary): whether rows alone fill a GPU, and their length."""
    return "few" if rows < 256 else "many", "small" if vocab < 32768 else "large"


def order(op: str, capability: str, dtype: str, rows: int, vocab: int) -> list[str]:
    """Names of backends, best first; empty for an operation that is not in the table."""
    key = (op, capability, dtype, *shape_class(rows, vocab))
    for row in TABLE["measured"]:
        if (row["op"], row["capability"], row["dtype"], row["rows"], row["vocab"]) == key:
            return list(row["order"])
    return list(TABLE["unmeasured"].get(op, []))
