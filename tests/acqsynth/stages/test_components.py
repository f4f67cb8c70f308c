"""What a recipe names is what is made; the trainers are reached with a model of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from acqsynth import config as recipes
from acqsynth.config import EngineConfig, LabellingConfig, RewardConfig
from acqsynth.domains import Domain, Sample
from acqsynth.domains.arithmetic import Arithmetic
from acqsynth.engines import Sampling
from acqsynth.rewards import PaperReward
from acqsynth.rewards.composed import DEFAULT_WEIGHTS
from acqsynth.stages import components

SEEDS = [Sample(f"{n}+{n}", str(2 * n), f"{n} and {n}") for n in range(1, 9)]
TRAINER = {"max_steps": 2, "use_cpu": True, "bf16": False, "save_steps": 1, "gradient_checkpointing": False}


def reward(config: RewardConfig, domain: Domain, student: Path, **rows: Any) -> Any:
    rows = {"seeds": SEEDS, "evaluation": SEEDS[:2]} | rows
    return components.reward(config, domain, str(student), EngineConfig(), **rows)


def test_the_default_reward(sums: Domain, student_path: Path) -> None:
    made = reward(RewardConfig(answers={"k": 2}, reference=3), sums, student_path)
    assert [signal.name for signal in made.signals] == ["mutual_information", "influence", "learnability", "diversity"]
    assert made.fusion == "z"
    assert made.weights == DEFAULT_WEIGHTS
    assert made.signals[2].answers.k == 2
    assert len(made.signals[1].scorer.arguments["influence"]["reference"]) == 3
    assert "not_in_evaluation" in [gate.name for gate in made.gates]


@pytest.mark.parametrize("signals", [None, {"diversity": {}}])
def test_a_reward_of_labelled_samples(student_path: Path, signals: dict[str, dict[str, Any]] | None) -> None:
    asked = [Sample("double 321", "0"), Sample("no question", "1")]
    computed = RewardConfig(signals=signals, labelling=LabellingConfig("computed"))
    [gate] = [g for g in reward(computed, Arithmetic(), student_path).gates if g.name == "labelled"]
    assert gate(asked) == [Sample("double 321", "642", "", {"skill": "double"}), False]
    own = RewardConfig(signals=signals, labelling=LabellingConfig("own"))
    for config in (own, RewardConfig(signals=signals)):
        assert "labelled" not in [g.name for g in reward(config, Arithmetic(), student_path).gates]


@pytest.mark.parametrize("signals", [None, {"diversity": {}}])
def test_one_engine_answers_and_labels_and_moves_with_the_student(
    sums: Domain, student_path: Path, monkeypatch: pytest.MonkeyPatch, signals: dict[str, dict[str, Any]] | None
) -> None:
    made: list[Any] = []

    def load(name: str, path: str) -> Any:
        made.append(SimpleNamespace(reloaded=[]))
        made[-1].reload = made[-1].reloaded.append
        return made[-1]

    monkeypatch.setattr("acqsynth.engines.load", load)
    found = reward(RewardConfig(signals=signals, labelling=LabellingConfig(k=4)), sums, student_path)
    [engine] = made
    components._refresh(found, student_path)
    assert engine.reloaded == [str(student_path)]


def test_a_majority_labels_samples_of_the_reward(sums: Domain, scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str, path: str) -> Any:
        loaded.append(path)
        return scripted(lambda prompt, i, seed: "7" if i < 3 or path == "teacher" else "8")

    monkeypatch.setattr("acqsynth.engines.load", load)
    for config, path in ((LabellingConfig(k=4), "student"), (LabellingConfig("teacher", "teacher", k=4), "teacher")):
        [found] = components.labeller(config, sums, EngineConfig(), "student")([Sample("3+4", "9")], 0)
        assert loaded.pop() == path
        assert found.sample == Sample("3+4", "7")
        assert found.agreement == (0.75 if path == "student" else 1.0)


def test_signals_are_those_named_in_their_order(sums: Domain, student_path: Path) -> None:
    names = ["diversity", "entropy", "semantic_entropy", "gradient", "margin", "confidence", "proximity"]
    config = RewardConfig(
        signals={name: {} for name in names} | {"proximity": {"clusters": 4}},
        fusion="z",
        weights={"entropy": 2.0},
        gates=["sound", "new"],
    )
    made = reward(config, sums, student_path)
    assert [signal.name for signal in made.signals] == names
    assert made.fusion == "z"
    assert made.weights["entropy"] == 2.0
    assert [gate.name for gate in made.gates] == ["sound", "new"]
    by_name = {signal.name: signal for signal in made.signals}
    assert by_name["entropy"].scorer is by_name["margin"].scorer
    assert by_name["confidence"].answers.top2


def test_the_released_reward(sums: Domain, student_path: Path) -> None:
    made = reward(RewardConfig(signals={"diversity": {}}, paper_compat=True), sums, student_path)
    assert isinstance(made, PaperReward)
    assert made.signals[0].released is not None


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (RewardConfig(signals={"entropi": {}}), "reward.signals: unknown 'entropi', expected of confidence"),
        (RewardConfig(signals={"entropy": {}}, gates=["sond"]), "reward.gates: unknown sond, expected of sound"),
        (RewardConfig(gates=["sond"]), "reward.gates: unknown sond, expected of sound"),
    ],
)
def test_an_unknown_part_is_named(sums: Domain, student_path: Path, config: RewardConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        reward(config, sums, student_path)


def test_every_reward_of_the_recipes_can_be_made(sums: Domain, student_path: Path) -> None:
    for name in recipes.recipes():
        assert reward(recipes.load(name).reward, sums, student_path).signals


def test_fuse_weighs_as_the_reward_does(sums: Domain, student_path: Path) -> None:
    config = RewardConfig(signals={"entropy": {}, "margin": {}}, weights={"entropy": 2.0, "margin": -1.0}, fusion="raw")
    made = reward(config, sums, student_path)
    fused = components.fuse({"entropy": [3.0, 1.0, None, 2.0], "margin": [0.0, 9.0, 5.0, 1.0]}, made)
    assert fused == [6.0, -7.0, None, 3.0]


def test_seeds_are_shown_within_the_request_or_as_turns(sums: Domain) -> None:
    [within] = components.prompts(sums, SEEDS[:2], 1, shown=2, turns=False, seed=0)
    assert [message["role"] for message in within] == ["user"]
    apart = components.prompts(sums, SEEDS, 4, shown=2, turns=True, seed=0)
    for messages in apart:
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
        assert {message["content"] for message in messages[::2]} == {"new "}
        shown = [sums.parse(message["content"]) for message in messages[1::2]]
        assert all(sample in SEEDS for sample in shown)
        assert shown[0] != shown[1]


def test_grpo_learns_with_a_student_that_moves(sums: Domain, student_path: Path, tmp_path: Path) -> None:
    made = reward(RewardConfig(answers={"k": 2, "max_tokens": 4}), sums, student_path)
    output, said = tmp_path / "generator", []
    options = TRAINER | {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4}
    components.train(
        "grpo",
        str(student_path),
        components.prompts(sums, SEEDS, 4, shown=2, turns=False, seed=0),
        made,
        output,
        options | {"max_steps": 3},
        sampling=Sampling(n=2),
        engine=EngineConfig(),
        refresh=(2, output),
        probe=SEEDS[:3],
        say=said.append,
    )
    assert (output / "config.json").is_file()
    assert sum("of 3: reward" in line for line in said) == 3
    assert [line for line in said if "scores with" in line] == [
        f"step 2: the reward scores with {output / 'checkpoint-1'}"
    ]


def test_fit_learns_and_mixes_replay_in(sums: Domain, student_path: Path, tmp_path: Path) -> None:
    said: list[str] = []
    components.fit(
        str(student_path),
        sums,
        SEEDS[:4],
        tmp_path / "student",
        TRAINER,
        replay=(sums, SEEDS[4:]),
        replay_share=0.5,
        say=said.append,
    )
    assert (tmp_path / "student/config.json").is_file()
    assert "4 rows of replay" in (tmp_path / "student/README.md").read_text()
    assert said
    assert said[-1].startswith("step 2 of 2: loss ")


def test_the_newest_checkpoint_before_a_step(tmp_path: Path) -> None:
    assert components.newest_checkpoint(tmp_path, 10) is None
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-10", "checkpoint-last", "checkpoint-6"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-6":  # which is not whole
            (tmp_path / name / "config.json").write_text("{}")
    assert components.newest_checkpoint(tmp_path, 10) == tmp_path / "checkpoint-4"
    assert components.newest_checkpoint(tmp_path, 11) == tmp_path / "checkpoint-10"
    assert components.newest_checkpoint(tmp_path, 2) is None
