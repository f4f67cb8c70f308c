"""The reliability benchmark: its statistics, and runs that stop and resume."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import acqcore
from benchmarks import real_rows, reliability_report
from benchmarks.reliability_signals import ENTROPY, SIGNALS, TRUNK
from benchmarks.reliability_students import Shape, counted
from benchmarks.reliability_units import Store, interval, spearman, stepped_up


def test_spearman_is_the_mean_over_pairs_of_seeds():
    values = np.random.default_rng(0).standard_normal((3, 40)).round(1)  # with ties
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([spearmanr(values[a], values[b]).statistic for a, b in pairs])
    assert spearman(values) == pytest.approx(expected)
    assert np.isnan(spearman(np.ones((2, 5))))


def test_the_interval_holds_the_correlation_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = 0
    true = 0.786  # rank correlation of normal values whose correlation is 0.8
    for _ in range(60):
        common = rng.standard_normal(100)
        values = np.stack([2 * common + rng.standard_normal(100) for _ in range(2)])
        low, high = interval(values)
        held += low <= true <= high
    assert 50 <= held <= 60


def test_two_halves_step_up_to_the_whole():
    rng = np.random.default_rng(2)
    common = rng.standard_normal(100_000)
    halves = [common + rng.standard_normal(100_000) for _ in range(4)]
    half = np.corrcoef(halves[0], halves[1])[0, 1]
    whole = np.corrcoef(halves[0] + halves[1], halves[2] + halves[3])[0, 1]
    assert stepped_up(half) == pytest.approx(whole, abs=0.01)


def test_a_run_goes_on_where_it_stopped(tmp_path):
    done: list[int] = []

    def work(i):
        done.append(i)
        if i == 1 and done.count(1) == 1:
            raise MemoryError("too large")
        return {"value": i}

    store = Store(tmp_path, {"rows": 3}, seconds=60)
    assert all(store.run(("real", i), lambda i=i: work(i)) for i in range(3))
    assert set(store.found("real")) == {(0,), (2,)}
    again = Store(tmp_path, {"rows": 3}, seconds=60)
    assert all(again.run(("real", i), lambda i=i: work(i)) for i in range(3))
    assert done == [0, 1, 2, 1]  # the failed unit is retried
    assert again.found("real")[(1,)] == {"value": 1}
    late = Store(tmp_path, {"rows": 3}, seconds=-1)
    assert late.run(("real", 0), lambda: work(0))
    assert not late.run(("real", 9), lambda: work(9))
    assert done == [0, 1, 2, 1]
    with pytest.raises(SystemExit, match="contains a run with rows 3, expected 4"):
        Store(tmp_path, {"rows": 4})
    assert Store(tmp_path, {}).settings == {"rows": 3}


def test_a_summary_of_known_values(tmp_path):
    name, half = "linear, all blocks, 2 probes", "linear, all blocks, 1 probe"
    store = Store(tmp_path, {"machine": {"cpu": "some"}})
    rng = np.random.default_rng(3)
    common = rng.standard_normal(50)
    values = {seed: (common + 0.5 * rng.standard_normal(50)).tolist() for seed in (1, 2)}
    for seed in (1, 2):
        for signal, seconds in ((TRUNK, 1.0), (ENTROPY, 2.0), (name, 6.0 + seed)):
            unit: dict[str, Any] = {"seconds": seconds}
            if signal == name:
                unit |= {"values": values[seed], "stderr": [0.5] * 50}
            store.run(("real", "GSM8K", signal, seed), lambda unit=unit: unit)
        unit = {"seconds": 4.0, "values": (common + 0.7 * rng.standard_normal(50)).tolist(), "stderr": [None] * 50}
        store.run(("real", "GSM8K", half, seed), lambda unit=unit: {**unit, "stderr": [float("nan")] * 50})
    store.run(("flops", "GSM8K", ENTROPY), lambda: {"flops": 10})
    store.run(("flops", "GSM8K", name), lambda: {"flops": 45})
    by_name = {row["signal"]: row["sets"]["GSM8K"] for row in reliability_report.summary(Store(tmp_path, {}))}
    cell = by_name[name]
    first, second = np.array(values[1]), np.array(values[2])
    assert cell["test_retest"] == pytest.approx(spearmanr(first, second).statistic, abs=1e-3)
    assert cell["interval"][0] < cell["test_retest"] < cell["interval"][1]
    assert (cell["entropy"], cell["trunks"], cell["entropy_counted"]) == (3.75, 7.5, 4.5)
    predicted = np.mean([1 - 0.25 / first.var(ddof=1), 1 - 0.25 / second.var(ddof=1)])
    assert cell["from_stderr"] == pytest.approx(predicted, abs=1e-3)
    again = by_name[half]["test_retest"]
    assert cell["split_half"] == pytest.approx(2 * again / (1 + again), abs=2e-3)
    assert "from_stderr" not in by_name[half]


def test_rows_scored_from_one_graph_are_put_together(tmp_path):
    """Two ranges of rows, the later one first; no timings, and no standard errors with one probe."""
    name, one = "linear, completions, 2 probes", "linear, completions, 1 probe"
    store = Store(tmp_path, {"machine": {"cpu": "some"}})
    values = np.random.default_rng(4).standard_normal((2, 40)).round(3)
    for begin in (20, 0):
        signals = [
            {
                "signal": signal,
                "seed": seed,
                "values": values[seed - 1, begin : begin + 20].tolist(),
                "stderr": [None if signal == one else 0.5] * 20,
            }
            for signal in (name, one)
            for seed in (1, 2)
        ]
        store.run(("shared", "MBPP", begin, "linear, completions"), lambda signals=signals: {"signals": signals})
    by_name = {row["signal"]: row["sets"]["MBPP"] for row in reliability_report.summary(Store(tmp_path, {}))}
    for cell in by_name.values():
        assert cell["rows"] == 40
        assert cell["test_retest"] == pytest.approx(spearmanr(*values).statistic, abs=1e-3)
        assert "seconds" not in cell
    assert "from_stderr" in by_name[name]
    assert "from_stderr" not in by_name[one]
    assert "0." in reliability_report.markdown(reliability_report.summary(store)).splitlines()[2]


def test_counted_products():
    """Ten tokens with the last four scored, counted by hand."""
    shape = Shape(linear=100, attention=10, head=1000)
    targets = torch.full((10,), -100)
    targets[6:] = 1
    row = acqcore.Row(torch.arange(10), targets)
    expected = {
        TRUNK: 6000,
        ENTROPY: 14000,
        "draws, all blocks, 8, p=0.05": 112_000,
        "linear, all blocks, 2 probes": 14000 + 2 * (12000 + 8000) + 8000,
        "linear, completions, 2 probes": 14000 + 2 * (6000 + 8000) + 8000,
    }
    assert {name: shape.flops(SIGNALS[name], row) for name in expected} == expected
    assert all(counted(SIGNALS[name]) for name in expected)
    assert not counted(SIGNALS["linear, last 4 blocks, 4 probes"])
    assert not counted(SIGNALS["isotropic weights, all blocks, 2 probes"])


def test_each_half_is_a_signal_with_half_of_it():
    for name, signal in SIGNALS.items():
        if signal.half is not None:
            counts = [
                options.get("probes", options.get("draws"))
                for options in (signal.options, SIGNALS[signal.half].options)
            ]
            assert counts[0] == 2 * counts[1], name


def test_rows_of_every_data_set(tmp_path):
    records = {
        "GSM8K": {"question": "How many?", "answer": "Two. #### 2"},
        "PubMedQA": {"question": "Does it?", "long_answer": "It does."},
        "MBPP": {"text": "Write it.", "code": "pass"},
        "BANKING77": {"text": "My card?", "intent": "card_arrival"},
        "CLINC150": {"text": "How do I say fly?", "intent": "translate"},
    }
    for name, record in records.items():
        path = tmp_path / real_rows.SETS[name].file
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({**record, "n": i}) + "\n" for i in range(3)))
    assert real_rows.load("GSM8K", 2, folder=tmp_path) == [{"prompt": "How many?\n", "completion": "Two. #### 2"}] * 2
    assert real_rows.load("BANKING77", 1, folder=tmp_path) == [
        {"prompt": "My card?\nIntent:", "completion": " card arrival"}
    ]
    assert [row["completion"] for name in ("PubMedQA", "MBPP") for row in real_rows.load(name, 1, folder=tmp_path)] == [
        "It does.",
        "pass",
    ]
    with pytest.raises(SystemExit, match="expected at least 4 rows, found 3"):
        real_rows.load("MBPP", 4, folder=tmp_path)
    with pytest.raises(SystemExit, match=r"no such file\. Set ACQCORE_DATA"):
        real_rows.load("MBPP", 1, folder=tmp_path / "nowhere")
