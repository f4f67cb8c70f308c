"""Questions: the generator learns, what is written or selected repeats nothing, and which labels are dropped."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fake_run
import pytest
from fake_run import plan_of, run
from fakes import SEEDS, TRAINER, Sums, written

from acqsynth import domains, engines, label, write
from acqsynth.artefacts import read_json, read_rows, write_rows
from acqsynth.config import EngineConfig, LabellingConfig, RewardConfig, SamplingConfig
from acqsynth.domains import Sample
from acqsynth.stages import questions
from acqsynth.stages.questions import Writing
from acqsynth.stages.rows import Scoring
from acqsynth.steps import StepContext, StepError, Store

GRPO = TRAINER | {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4}


@pytest.fixture
def train(scoring, student_path):
    arguments = {"generator": student_path, "prompts": 4, "shown": 2, "turns": False, "seed": 0}
    return partial(questions.train_generator, scoring=scoring, candidates=None, **arguments)


def test_a_generator_learns_from_a_student_that_moves(train, tmp_path):
    said = []
    train(StepContext(tmp_path, said.append), options=GRPO)
    assert (tmp_path / "model/config.json").is_file()
    assert read_json(tmp_path / "counts.json") == {"completions": 6, "masked": 0}
    assert sum("of 3: reward" in line for line in said) == 3
    assert [line for line in said if "scores with" in line] == ["the reward scores with checkpoint-1"]
    # DPO draws its candidates first; random bytes never parse.
    with pytest.raises(ValueError, match="expected a prompt whose best candidate passes the gates"):
        train(StepContext(tmp_path / "dpo"), options=TRAINER, candidates=(SamplingConfig(max_tokens=4), 2))


@pytest.mark.parametrize("log", [{"logging_steps": 3}, {"log_completions": False}])
def test_completions_are_counted_however_they_are_logged(train, tmp_path, log):
    train(StepContext(tmp_path), options=GRPO | log)
    assert read_json(tmp_path / "counts.json")["completions"] == 6


def test_errors_are_shown_by_their_skills_share(fakes, recipe):
    pool = [Sample(f"a{i}", "1", "", {"skill": "a"}) for i in range(10)]
    pool += [Sample(f"b{i}", "1", "", {"skill": "b"}) for i in range(90)]
    # All of a and a tenth of b are wrong, so a's share of errors is ten times b's.
    right = [False] * 10 + [i >= 9 for i in range(90)]
    drawn = Counter(sample.question[0] for sample in questions.sample_mistakes(pool, right, 11000, seed=0))
    assert drawn["a"] / drawn["b"] == pytest.approx(10, rel=0.15)
    with pytest.raises(StepError, match="no mistake on the held-out rows; remove error_driven from baselines"):
        questions.sample_mistakes(pool, [True] * 100, 5, seed=0)


@pytest.fixture
def writing(tmp_path, monkeypatch, student_path):
    """Writing with a reward that knows how new a question is, and prompts that show held-out rows."""
    monkeypatch.setattr(domains, "DOMAINS", {"sums": "fakes:Sums"})
    write_rows(tmp_path / "seeds.parquet", SEEDS)
    write_rows(tmp_path / "held_out.parquet", [Sample(f"{n}+9", str(n + 9)) for n in range(20, 24)])
    reward = RewardConfig(signals={"diversity": {}}, embedder="ngram", gates=["sound", "new"])
    seeds = tmp_path / "seeds.parquet"
    scoring = Scoring(reward, "sums", EngineConfig(), student_path, seeds, [seeds], seeds)
    return Writing(scoring, "generator", SamplingConfig(), 1, False, 8, 0, tmp_path / "held_out.parquet")


@pytest.fixture(params=[questions.write_questions, partial(questions.select_questions, candidates=2, spent=())])
def ask(request):
    """Writes or selects questions."""
    return request.param


def test_rows_that_prompts_show_are_not_written(writing, tmp_path, monkeypatch, scripted, ask):
    """Neither copies of seeds nor of held-out rows, as they were or disguised, but other questions are."""
    copies = itertools.cycle(["20+9", "1+1", "Question 3: 22+9", "2\u200b1+9"])
    drawn = itertools.count(50)
    engine = scripted(lambda prompt, i, seed: written(f"{n}+9" if (n := next(drawn)) % 2 else next(copies), 1))
    monkeypatch.setattr(engines, "load", lambda *arguments: engine)
    ask(StepContext(tmp_path), writing=writing)
    found = {sample.question for sample in read_rows(tmp_path / "samples.parquet")}
    assert found == {f"{n}+9" for n in range(51, 67, 2)}
    counts = read_json(tmp_path / "counts.json")
    assert counts["dropped"]["gate new"] == counts["completions"] // 2


def test_a_round_asks_no_question_of_an_earlier_one(writing, tmp_path, monkeypatch, scripted):
    """The engine repeats what it wrote in the first round before it goes on."""

    def asked(name, writing):
        (tmp_path / name).mkdir()
        drawn = itertools.count(50)
        engine = scripted(lambda prompt, i, seed: written(f"{next(drawn)}+9", 1))
        monkeypatch.setattr(engines, "load", lambda *arguments: engine)
        questions.write_questions(StepContext(tmp_path / name), writing=writing)
        return [sample.question for sample in read_rows(tmp_path / name / "samples.parquet")]

    assert asked("one", writing) == [f"{n}+9" for n in range(50, 58)]
    later = replace(writing, earlier=[tmp_path / "one/samples.parquet"])
    assert asked("two", later) == [f"{n}+9" for n in range(58, 66)]


def test_repeats_of_an_earlier_chunk_are_replaced(writing, tmp_path, monkeypatch, scripted, ask):
    """Without the gate new too, and a killed step goes on to the same rows."""
    monkeypatch.setattr(questions, "CHUNK", 5)
    ungated = replace(writing.scoring, reward=writing.scoring.reward.model_copy(update={"gates": ["sound"]}))
    write_rows(tmp_path / "earlier.parquet", [Sample(f"{n}+9", str(n + 9)) for n in range(50, 60)])
    asking = replace(writing, scoring=ungated, n=25, earlier=[tmp_path / "earlier.parquet"])

    def asked(folder, killed_at=0):
        calls = itertools.count(1)

        def says(prompt, i, seed):
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            drawn = random.Random(f"{prompt} {i} {seed}").randint(50, 110)
            return written(f"{drawn}+9", drawn + 9)

        monkeypatch.setattr(engines, "load", lambda *arguments: scripted(says))
        folder.mkdir(exist_ok=True)
        ask(StepContext(folder), writing=asking)
        counts = read_json(folder / "counts.json")
        return [sample.question for sample in read_rows(folder / "samples.parquet")], counts

    whole, counts = asked(tmp_path / "whole")
    assert len(set(whole)) == len(whole) == counts["kept"] == 25
    assert {int(question[:-2]) for question in whole}.isdisjoint(range(50, 60))
    assert counts["dropped"]["repeats a question"] > 5
    assert counts["dropped"]["surplus"] > 0
    for killed_at in (12, 40, counts["completions"]):
        with pytest.raises(KeyboardInterrupt):
            asked(tmp_path / str(killed_at), killed_at)
        assert asked(tmp_path / str(killed_at)) == (whole, counts)


def test_no_two_chunks_or_seeds_draw_alike(writing, tmp_path, monkeypatch, scripted, ask):
    """The second chunk of seed 0 begins where seed 5 would."""
    monkeypatch.setattr(questions, "CHUNK", 5)
    drawn = itertools.count(50)
    engine = scripted(lambda prompt, i, seed: written(f"{next(drawn)}+9", 1))
    monkeypatch.setattr(engines, "load", lambda *arguments: engine)
    for seed in (0, 1, 5):
        (tmp_path / str(seed)).mkdir()
        ask(StepContext(tmp_path / str(seed)), writing=replace(writing, n=10, seed=seed))
    seeds = [sampling.seed for _, sampling in engine.calls]
    assert len(seeds) >= 6
    assert len(set(seeds)) == len(seeds)


def test_the_gate_new_gets_the_rows_shown(writing, tmp_path, monkeypatch, scripted, ask):
    """A held-out row that no prompt shows may be asked, and earlier questions are read once, not for each chunk."""
    monkeypatch.setattr(questions, "CHUNK", 2)
    write_rows(tmp_path / "held_out.parquet", [Sample(f"{n}+9", str(n + 9)) for n in range(20, 60)])
    numbers = itertools.cycle(range(20, 60))
    engine = scripted(lambda prompt, i, seed: written(f"{(n := next(numbers))}+9", n + 9))
    monkeypatch.setattr(engines, "load", lambda *arguments: engine)
    made = []
    monkeypatch.setattr(write, "questions", lambda of=write.questions: made.append(of()) or made[-1])
    ask(StepContext(tmp_path), writing=writing)
    shown = {prompt[0]["content"].split()[1] for prompts, _ in engine.calls for prompt in prompts}
    found = [sample.question for sample in read_rows(tmp_path / "samples.parquet")]
    assert len(shown) == len(found) == 8
    assert shown.isdisjoint(found)
    assert len(made) == 1


def test_nothing_written_is_one_sentence(fakes, recipe, monkeypatch):
    nothing = SimpleNamespace(rows=[], completions=64, dropped={"does not parse": 60, "gate new": 4})
    monkeypatch.setattr(write, "write", lambda *arguments, **options: nothing)
    told = r"none of 128 completions is a sample \(120 does not parse, 8 gate new\)"
    with pytest.raises(StepError, match=told):
        run(recipe)


def test_a_later_round_that_repeats_itself_adds_no_rows(fakes, recipe, monkeypatch):
    first = []

    def converged(*arguments, asked, **options):
        if not len(asked):
            first.append(asked)
        repeats = SimpleNamespace(rows=[], completions=45, dropped={"repeats a question": 45})
        of_first_round = any(asked is each for each in first)
        return fake_run.write(*arguments, asked=asked, **options) if of_first_round else repeats

    monkeypatch.setattr(write, "write", converged)
    plan, said = plan_of(recipe, "rounds=2", "baselines=[no_rl]", "evaluation.validity.batches=0"), []
    store = Store(Path(plan.config.output), said.append)
    for step in plan.steps:
        store.run(step)
    arm = plan.arms["grpo"]
    first, second = (read_rows(store.path(step) / "samples.parquet") for step in arm.labelled)
    assert first
    assert second == []
    metrics = read_json(store.path(plan.report) / "metrics.json")
    kept = read_json(store.path(arm.written[0]) / "counts.json")["kept"]
    assert metrics["arms"]["grpo"]["written"]["kept"] == kept
    assert metrics["arms"]["grpo"]["written"]["dropped"]["repeats a question"] == 45
    assert any("adds no rows: set fewer rounds or a higher generator.sampling.temperature" in line for line in said)


def test_nothing_labelled_is_one_sentence(fakes, recipe, monkeypatch):
    silent = SimpleNamespace(sample=None, agreement=0.0)
    monkeypatch.setattr(label, "label", lambda engine, domain, samples, **options: [silent] * len(samples))
    with pytest.raises(StepError, match=r"03-label/grpo: the answers agree on none of [0-9]+ questions"):
        run(recipe)


def labelled(folder, **arguments):
    rows = {"seeds": folder / "seeds.parquet", "samples": folder / "asked.parquet"}
    questions.label_questions(StepContext(folder), engine=EngineConfig(), seed=0, **rows, **arguments)


@pytest.mark.parametrize(("gates", "kept"), [(None, [1]), (["new"], [0, 1])])
def test_a_label_that_the_question_gives_away_is_dropped(tmp_path, monkeypatch, gates, kept):
    asked = [Sample("The answer is 8. What is 3+5?", "7"), Sample("What is 4+4?", "7")]
    monkeypatch.setattr(Sums, "computed", lambda self, samples, seed: [replace(s, answer="8") for s in samples])
    monkeypatch.setattr(domains, "DOMAINS", {"sums": "fakes:Sums"})
    write_rows(tmp_path / "asked.parquet", asked)
    write_rows(tmp_path / "seeds.parquet", SEEDS)
    labelled(tmp_path, domain="sums", labelling=LabellingConfig(method="computed"), model=None, gates=gates)
    assert read_rows(tmp_path / "samples.parquet") == [replace(asked[i], answer="8") for i in kept]
    counts = read_json(tmp_path / "counts.json")
    assert (counts["labelled"], counts["dropped"]) == (len(kept), {} if gates else {"gate no_leak": 1})


@pytest.mark.parametrize("gates", [None, ["new", "fluent"]])
def test_a_label_that_no_seed_has_is_dropped(tmp_path, monkeypatch, scripted, gates):
    """Known labels are written as the seeds spell them, and the skill goes with the label."""
    says = {"gone": "Sure! It is about a delivery.", "late": "card arrival", "stolen": "Lost  Phone\nas it was stolen"}
    engine = scripted(lambda prompt, i, seed: says[prompt[0]["content"].split()[0]])
    monkeypatch.setattr(engines, "load", lambda *arguments: engine)
    seeds = [Sample("my parcel is due", "card_arrival"), Sample("my phone was taken", "Lost_phone")]
    write_rows(tmp_path / "seeds.parquet", seeds)
    texts = ("gone with the wind", "late is my envelope", "stolen on the train")
    write_rows(tmp_path / "asked.parquet", [Sample(each, "lost", "", {"skill": "lost"}) for each in texts])
    labelled(tmp_path, domain="classification", labelling=LabellingConfig(k=2), model="student", gates=gates)
    found = read_rows(tmp_path / "samples.parquet")
    assert [(sample.question, sample.answer, sample.extra) for sample in found] == [
        ("late is my envelope", "card_arrival", {"skill": "card_arrival"}),
        ("stolen on the train", "Lost_phone", {"skill": "Lost_phone"}),
    ]
    counts = read_json(tmp_path / "counts.json")
    assert (counts["labelled"], counts["dropped"]) == (2, {"gate sound": 1})
