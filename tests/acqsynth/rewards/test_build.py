"""Building a reward from a recipe."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from fakes import written

import acqcore
from acqsynth import config as recipes, engines
from acqsynth.config import EngineConfig, LabellingConfig, RewardConfig
from acqsynth.domains import Sample, domain as find_domain
from acqsynth.domains.arithmetic import Arithmetic
from acqsynth.rewards import PaperReward, texts
from acqsynth.rewards.build import build, check
from acqsynth.rewards.paper import ReleasedDiversity
from acqsynth.rewards.reward import DEFAULT_WEIGHTS

SEEDS = [Sample(f"{n}+{n}", str(2 * n), f"{n} and {n}") for n in range(1, 9)]


def reward(config, domain, student, engine=EngineConfig()):  # noqa: B008
    return build(config, domain, str(student), engine, seeds=SEEDS, evaluation=SEEDS[:2])


def test_the_default_reward(domain, student_path):
    made = reward(RewardConfig(answers={"k": 2}, reference=3, weights={"influence": 0.5}), domain, student_path)
    assert [signal.name for signal in made.signals] == ["mutual_information", "influence", "learnability", "diversity"]
    assert made.fusion == "z"
    assert made.weights == DEFAULT_WEIGHTS | {"influence": 0.5}
    assert made.signals[2].answers.k == 2
    assert "not_in_evaluation" in [gate.name for gate in made.gates]


@pytest.mark.parametrize("signals", [None, {"diversity": {}}])
def test_a_reward_of_labelled_samples(student_path, signals):
    asked = [Sample("double 321", "0"), Sample("no question", "1")]
    computed = RewardConfig(signals=signals, labelling=LabellingConfig(method="computed"))
    [gate] = [g for g in reward(computed, Arithmetic(), student_path).gates if g.name == "labelled"]
    assert gate(asked) == [Sample("double 321", "642", "", {"skill": "double"}), False]
    own = RewardConfig(signals=signals, labelling=LabellingConfig(method="own"))
    for config in (own, RewardConfig(signals=signals)):
        assert "labelled" not in [g.name for g in reward(config, Arithmetic(), student_path).gates]


def weights(engine):
    return engine.model.get_output_embeddings().weight.data_ptr()


def test_the_reward_holds_one_copy_of_the_student_and_moves_it(domain, student_path, tmp_path):
    """Scorers, sampled answers and labels share the same weights before and after a refresh."""
    config = RewardConfig(labelling=LabellingConfig(k=4), answers={"k": 2, "max_tokens": 4})
    made = reward(config, domain, student_path)
    parts = {part.name: part for part in (*made.signals, *made.gates)}
    engine = parts["learnability"].answers.engine
    assert parts["labelled"].label.labeller.engine is engine
    made.score(["<question>1 + 1?</question><answer>2</answer>"], [0])
    scorers = [parts[name].scorer for name in ("mutual_information", "influence", "fluent")]
    student = scorers[0]._student()
    assert all(scorer._student() is student for scorer in scorers)
    assert weights(engine) == student.head.weight.data_ptr()
    newer = tmp_path / "newer"
    engine.tokenizer.save_pretrained(newer)
    for _ in range(2):  # from another path, then newer weights from the same one
        with torch.no_grad():
            engine.model.get_output_embeddings().weight.mul_(2.0)
        saved = engine.model.get_output_embeddings().weight.clone()
        engine.model.save_pretrained(newer)
        made.refresh(str(newer))
        moved = scorers[0]._student()
        assert moved is not student
        assert torch.equal(moved.head.weight, saved)
        assert all(scorer._student() is moved for scorer in scorers)
        assert weights(engine) == moved.head.weight.data_ptr()
        student = moved
    made.refresh(str(newer))
    assert scorers[0]._student() is student  # nothing to load


def test_an_engine_on_another_device_or_in_another_dtype_loads_its_own(domain, student_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(engines, "load", lambda name, path, **options: loaded.append((name, path, options)))
    config = RewardConfig(signals={"learnability": {}, "entropy": {}}, scoring={"device": "cpu"})
    reward(config, domain, student_path, EngineConfig(options={"dtype": "bfloat16"}))
    reward(config, domain, student_path, EngineConfig(options={"device": "meta"}))
    reward(config, domain, student_path, EngineConfig(name="vllm"))
    path = str(student_path)
    assert loaded == [
        ("transformers", path, {"dtype": "bfloat16"}),
        ("transformers", path, {"device": "meta"}),
        ("vllm", path, {}),
    ]


def test_a_teacher_labels_with_an_engine_of_its_own(domain, scripted, monkeypatch):
    loaded = []
    monkeypatch.setattr(engines, "load", lambda name, path: loaded.append(path) or scripted(lambda question: ["2"]))
    config = RewardConfig(
        signals={"diversity": {}},
        gates=["labelled"],
        labelling=LabellingConfig(method="teacher", teacher="a/teacher", k=2),
    )
    [gate] = reward(config, domain, "student").gates
    assert gate([Sample("1 + 1?", "3")]) == [Sample("1 + 1?", "2", "2")]
    assert loaded == ["a/teacher"]


def test_signals_are_those_named_in_their_order(domain, student_path):
    names = ["diversity", "entropy", "semantic_entropy", "gradient", "margin", "confidence", "proximity"]
    config = RewardConfig(
        signals={name: {} for name in names} | {"proximity": {"clusters": 4}, "gradient": {"max_length": 64}},
        scoring={"max_length": 96},
        fusion="z",
        weights={"entropy": 2.0},
        gates=["sound", "new"],
    )
    made = reward(config, domain, student_path)
    assert [signal.name for signal in made.signals] == names
    assert made.fusion == "z"
    assert made.weights == dict.fromkeys(names, 1.0) | {"entropy": 2.0}
    assert [gate.name for gate in made.gates] == ["sound", "new"]
    by_name = {signal.name: signal for signal in made.signals}
    assert by_name["entropy"].scorer is by_name["margin"].scorer
    assert (by_name["entropy"].scorer.max_length, by_name["gradient"].scorer.max_length) == (96, 64)
    assert by_name["confidence"].answers.sampling.top2


EMBEDDERS = {"ngrams": "ngram", "MiniLM": "minilm", "minilm2": "minilm", "my-ngram": None, "minilm-v2": None}


@pytest.mark.parametrize(("name", "meant"), EMBEDDERS.items())
def test_a_misspelt_embedder_is_reported_unless_it_is_a_folder(domain, tmp_path, monkeypatch, name, meant):
    monkeypatch.chdir(tmp_path)
    config = RewardConfig(signals={"diversity": {}}, embedder=name)
    with pytest.raises(ValueError, match=f"'{name}', did you mean {meant}") if meant else nullcontext():
        check(config, domain)
    (tmp_path / name).mkdir()
    check(config, domain)


@pytest.mark.parametrize(
    ("signal", "released", "needs"),
    [
        ("entropy", False, False),
        ("answer_variance", False, False),
        ("answer_variance", True, True),
        ("diversity", False, True),
        ("proximity", False, True),
    ],
)
def test_the_embedder_is_needed_only_by_signals_that_embed(domain, monkeypatch, signal, released, needs):
    def missing():
        raise FileNotFoundError("not installed")

    monkeypatch.setattr(texts, "minilm_path", missing)
    config = RewardConfig(signals={signal: {}}, embedder="minilm", paper_compat=released)
    with pytest.raises(ValueError, match="embedder: not installed") if needs else nullcontext():
        check(config, domain)


def test_the_released_reward(domain, student_path):
    made = reward(RewardConfig(signals={"diversity": {}}, paper_compat=True), domain, student_path)
    assert isinstance(made, PaperReward)
    assert isinstance(made.signals[0], ReleasedDiversity)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (RewardConfig(signals={"entropi": {}}), "^signals: unknown 'entropi', expected one of confidence"),
        (RewardConfig(signals={"entropy": {}}, gates=["sond"]), "^gates: unknown 'sond', expected one of sound"),
        (RewardConfig(gates=["sond"]), "^gates: unknown 'sond', expected one of sound"),
        (RewardConfig(signals={"entropy": {}}, gates=["answerable"]), "answerable needs a signal of sampled answers"),
        (RewardConfig(signals={"entropy": {}}, answers={"kk": 4}), "^answers: .*unexpected keyword argument 'kk'"),
    ],
)
def test_an_unknown_part_is_named(domain, student_path, config, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        check(config, domain)


@pytest.mark.parametrize("name", recipes.recipes())
def test_every_reward_of_the_recipes_can_be_made(student_path, name):
    recipe = recipes.load(name)
    domain = find_domain(recipe.domain)
    assert reward(recipe.reward, domain, student_path).signals
    check(recipe.reward, domain)


def test_a_call_of_the_default_reward_reads_each_sample_as_rarely_as_it_can(domain, student_path, sample, monkeypatch):
    """32 samples take at most 3 student passes besides generation, and about one tokenizer call per engine prompt."""
    config = RewardConfig(answers={"k": 2, "max_tokens": 4}, scoring={"batch_tokens": 65536})
    seeds = [sample(10 * a + 1, 7) for a in range(1, 9)]
    made = build(config, domain, str(student_path), EngineConfig(), seeds=seeds, evaluation=[])
    texts = [written(s.question, s.answer) for s in (sample(a, 100) for a in range(32))]
    made.score(texts, [0] * 32, update=False)  # computes the limits of the seeds and the reference in advance
    counts = Counter()

    def count(owner, name):
        inner = getattr(owner, name)

        def counting(*arguments, **options):
            counts[name] += 1
            return inner(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    count(type(made.signals[2].answers.engine.tokenizer), "__call__")
    count(acqcore.Student, "hidden")
    assert all(made.score(texts, [0] * 32, update=False).passed)
    assert counts["__call__"] <= 35
    assert 1 <= counts["hidden"] <= 3, counts
