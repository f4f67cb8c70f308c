from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pandas

from acqsynth.parsing import parse_sample

SPEC = importlib.util.spec_from_file_location("demo", Path(__file__).parents[2] / "examples" / "demo.py")
demo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(demo)


def test_prompts_show_examples_that_parse():
    asked = demo.prompts()
    assert len(asked) == demo.STEPS * demo.PROMPTS_PER_STEP
    for messages in asked:
        assert messages[-1]["role"] == "user"
        examples = [turn["content"] for turn in messages if turn["role"] == "assistant"]
        assert len(examples) == demo.SHOTS
        assert all(parse_sample(text) for text in examples)
    assert len({messages[1]["content"] for messages in asked}) == len(asked)


def test_the_hub_is_used_when_the_package_is_absent(monkeypatch, capsys):
    def absent():
        raise FileNotFoundError("the package is not installed")

    monkeypatch.setattr(demo, "smollm2_path", absent)
    assert demo.find_model() == demo.HUB_ID
    assert f"Using {demo.HUB_ID} from the hub" in capsys.readouterr().out


def test_the_demo_on_a_tiny_model(student_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_model", lambda: str(student_path))
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "out")
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "COMPLETION_TOKENS", 4)
    asked = []

    def loop(arguments):  # recipes are tested elsewhere
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
    table = pandas.read_parquet(tmp_path / "out" / "scores.parquet")
    assert len(table) == 60
    assert {"id", "kind", "entropy", "margin", "n_tokens", "valid"} <= set(table.columns)
    printed = capsys.readouterr().out
    assert "garbled" in printed
    assert "step 2 of 2: reward 0" in printed
