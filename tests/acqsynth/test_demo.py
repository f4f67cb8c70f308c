from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
import torch

import acqcore
from acqsynth import demo
from acqsynth.parsing import parse_sample
from acqsynth.seeds import DOMAINS


def test_eager_statistics_are_those_of_the_fused_pass() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16), torch.randn(50, 16)
    targets = torch.randint(50, (7,))
    stats = acqcore.row_stats(hidden, acqcore.Head(weight), targets)
    eager = demo.eager_statistics(hidden @ weight.T, hidden, targets)
    assert set(eager) == set(demo.ACQUISITIONS) - {"perplexity"}
    torch.testing.assert_close(eager["entropy"], stats.entropy)
    torch.testing.assert_close(eager["varentropy"], stats.varentropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eager["el2n"], stats.residual_norm)
    torch.testing.assert_close(eager["loss"], -stats.logprob)


def test_prompts_show_examples_that_parse() -> None:
    rows = demo.prompts()
    assert len(rows) == demo.STEPS * demo.PROMPTS_PER_STEP
    assert {row["domain"] for row in rows} == set(DOMAINS)
    for row in rows:
        assert row["prompt"][-1]["role"] == "user"
        examples = [turn["content"] for turn in row["prompt"] if turn["role"] == "assistant"]
        assert len(examples) == demo.SHOTS
        assert all(parse_sample(text) for text in examples)
    assert len({row["prompt"][1]["content"] for row in rows}) == len(rows)


def test_the_hub_is_taken_when_the_package_is_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> Path:
        raise FileNotFoundError("the package is not installed")

    monkeypatch.setattr(demo, "smollm2_path", absent)
    assert demo.find_model() == demo.HUB_ID
    assert f"Taking {demo.HUB_ID} from the hub" in capsys.readouterr().out


def test_the_whole_demo_on_a_tiny_model(
    student_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_model", lambda: str(student_path))
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "out")
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "RUNS", 1)
    monkeypatch.setattr(demo, "COMPLETION_TOKENS", 4)
    asked: list[list[str]] = []

    def loop(arguments: list[str]) -> int:  # recipes have tests of their own
        asked.append(arguments)
        demo.report().parent.mkdir(parents=True)
        demo.report().with_name("metrics.json").write_text('{"verdict": [{"kind": "gain", "text": "It learnt."}]}')
        return 0

    monkeypatch.setattr(demo.cli, "main", loop)
    demo.main()
    assert asked == [["run", "arithmetic", f"output={tmp_path / 'out' / 'loop'}"]]
    measured = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert [step["parsed"] for step in measured["grpo"]["steps"]] == [0, 0]
    assert 0 < measured["grpo"]["reward_share"] < 1
    assert measured["loop"]["verdict"] == [{"kind": "gain", "text": "It learnt."}]
    assert measured["scoring"]["largest_entropy_difference"] < 1e-4
    table = pandas.read_parquet(tmp_path / "out" / "scores.parquet")
    assert len(table) == 60
    assert {"id", "kind", "entropy", "margin", "n_tokens", "valid"} <= set(table.columns)
    printed = capsys.readouterr().out
    assert "garbled" in printed
    assert "step 2: reward 0.000, parsed 0%" in printed
