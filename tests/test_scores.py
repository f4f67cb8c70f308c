"""``Scores`` is a mapping that converts to tables."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from acqcore import Scores


def scores(n: int = 3, tokens: bool = False) -> Scores:
    entropy = torch.arange(n, dtype=torch.float32)
    valid = torch.ones(n, dtype=torch.bool)
    if n > 1:
        entropy[1], valid[1] = torch.nan, False
    kept = {"entropy": [torch.ones(2)] * n} if tokens else None
    return Scores({"entropy": entropy, "margin": entropy / 2}, torch.full((n,), 2), valid, kept)


def test_mapping():
    s = scores()
    assert isinstance(s, Mapping)
    assert list(s) == ["entropy", "margin"]
    assert len(s) == 2
    assert s["margin"][2] == 1
    for name in ("loss", 0, slice(2)):
        with pytest.raises(KeyError, match="expected one of entropy, margin"):
            s[name]
    assert s in {s}
    assert s != scores()


def test_tokens_only_if_kept():
    assert scores(tokens=True).tokens["entropy"][2].tolist() == [1, 1]
    with pytest.raises(ValueError, match="tokens: per-token values were not kept, expected score"):
        scores().tokens  # noqa: B018


def test_repr_is_a_table_with_means():
    lines = repr(scores()).splitlines()
    assert lines[0] == "Scores of 3 samples, 1 not valid"
    assert lines[1].split() == ["entropy", "margin", "n_tokens"]
    assert lines[2].split() == ["0", "0", "0", "2"]
    assert lines[3].split() == ["1", "nan", "nan", "2"]
    assert lines[-1].split() == ["mean", "1", "0.5", "2"]
    assert len({len(line) for line in lines[1:]}) == 1
    long = repr(scores(1000)).splitlines()
    assert len(long) < 15
    assert long[-2].split()[0] == "..."


def test_standard_errors_are_columns():
    pytest.importorskip("pandas")
    errors = {"margin": torch.tensor([0.25, 0.5])}
    values = {"entropy": torch.ones(2), "margin": torch.ones(2)}
    s = Scores(values, torch.full((2,), 3), torch.tensor([True, False]), stderr=errors)
    frame = s.to_pandas()
    assert frame["entropy"].dtype == "float32"
    assert frame["valid"].tolist() == [True, False]
    assert list(frame.columns) == ["entropy", "margin", "margin_stderr", "n_tokens", "valid"]
    assert frame["margin_stderr"].tolist() == [0.25, 0.5]
    assert list(s) == ["entropy", "margin"]


def test_to_dataset():
    datasets = pytest.importorskip("datasets")
    data = scores().to_dataset()
    assert isinstance(data, datasets.Dataset)
    assert data.column_names == ["entropy", "margin", "n_tokens", "valid"]
    assert data[2]["entropy"] == 2.0
