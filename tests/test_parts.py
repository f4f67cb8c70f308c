"""Finished batches on disk survive a kill, and belong to one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from acqcore.parts import Parts

NAN = float("nan")


def test_batches_come_back(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "o.csv", {"a": 1})
    assert parts.load(0) == {}
    parts.append(0, [3, 1], [[0.1, 2.0], [1 / 3, NAN]])
    parts.append(0, [2], [[5.0, 6.0]])
    parts.append(1, [0], [[7.0, 8.0]])
    again = Parts(tmp_path / "o.csv", {"a": 1})
    done = again.load(0)
    assert sorted(done) == [1, 2, 3]
    assert done[3] == [0.1, 2.0]
    assert done[1][0] == 1 / 3
    assert again.load(1) == {0: [7.0, 8.0]}
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_line_is_cut_off(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "o.csv", {})
    parts.append(0, [1], [[1.0]])
    path = tmp_path / "o.csv.parts" / "chunk-000000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"rows": [2], "val')
    assert parts.load(0) == {1: [1.0]}
    assert path.read_bytes() == whole
    parts.append(0, [2], [[2.0]])
    assert parts.load(0) == {1: [1.0], 2: [2.0]}


def test_another_run_is_refused(tmp_path: Path) -> None:
    Parts(tmp_path / "o.csv", {"a": 1, "b": [1, 2]})
    with pytest.raises(ValueError, match=r"holds a cut-off run with another b \(\[1, 2\] there, \[1\] here\)"):
        Parts(tmp_path / "o.csv", {"a": 1, "b": [1]})
