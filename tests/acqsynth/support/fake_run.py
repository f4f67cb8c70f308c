"""Runs a whole recipe without models: a student is a percentage of right answers, a generator a sequence of sums.

``install(setattr)`` replaces the domain, the engines, the reward, the writer and the trainers with them.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
from fakes import FakeEngine, PlainDomain

from acqsynth import config, pipeline
from acqsynth.domains import Sample
from acqsynth.engines import Completion, Sampling
from acqsynth.report import page
from acqsynth.steps import Store

PAUSE = "ACQSYNTH_TEST_PAUSE"  #: environment variable naming the call at which this process waits to be killed

RECIPE = """
domain: sums
data:
  seeds: {source: "sums:0", limit: 20}
  held_out: {source: "sums:100", limit: 20}
  real: {source: "sums:200", limit: 200}
  evaluation: {source: "sums:1000", limit: 150}
generator: {model: generator, method: grpo, prompts: 8, shown: 2, questions: 90}
student: {model: student, rows: [70], seeds: [0, 1]}
labelling: {k: 4}
evaluation:
  others: {more: {source: "sums:3000", limit: 40}}
  resamples: 20
  validity: {batches: 4, rows: 5}
"""

calls: Counter[str] = Counter()


def reached(name):
    """Counts a call; at the one named by the environment, writes the pause file and waits."""
    calls[name] += 1
    if os.environ.get(PAUSE) == f"{name} {calls[name]}":
        Path(os.environ[PAUSE + "_FILE"]).write_text(name)
        time.sleep(120)


class Sums(PlainDomain):
    name = "sums"
    answer_tokens = 4

    def generator_prompt(self, shown):
        return [{"role": "user", "content": "new " + ", ".join(sample.question for sample in shown)}]

    def answer_of(self, completion):
        return completion if completion.isdigit() else None

    def verify(self, samples):
        return [str(truth(sample.question)) == sample.answer for sample in samples]

    def load(self, source, split="train", columns=None, limit=None):
        family, _, first = source.partition(":")
        if family != "sums":
            raise FileNotFoundError(f"{source}: no such file")
        numbers = range(int(first), int(first) + (limit or 10))
        return [Sample(f"{n}+1", str(n + 1), "", {"skill": ("even", "odd")[n % 2]}) for n in numbers]


def truth(question):
    return sum(map(int, question.split("+")))


class Counting(FakeEngine):
    """Answers correctly in ``strength`` percent of cases, decided by a hash of the question."""

    def __init__(self, path):
        super().__init__()
        self.strength = strength(path)

    def generate(self, prompts, sampling):
        reached("generate")
        return super().generate(prompts, sampling)

    def draw(self, prompt, i, sampling):
        question = prompt[-1]["content"]
        right = zlib.crc32(question.encode()) % 100 < self.strength
        return Completion(str(truth(question) + (not right)), [], True)


def strength(path):
    folder = Path(path)
    return int(json.loads((folder / "config.json").read_text())["strength"]) if folder.is_dir() else 40


def keep(output, value):
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(json.dumps({"strength": value}))


class Gate:
    name = "new"

    def __init__(self):
        self.held = []

    def __call__(self, samples):
        return [sample.question not in self.held for sample in samples]

    def accept(self, samples):
        self.held += [sample.question for sample in samples]


class Size:
    name = "size"

    def __call__(self, samples):
        return [float(truth(sample.question)) for sample in samples]


class Reward:
    fusion, weights = "raw", {"size": 1.0}
    scored, masked = 12, 1  # by the fake training
    length_bins = ()

    def __init__(self, student):
        self.student = student
        self.gates = [Gate()]
        self.signals = [Size()]

    def state_dict(self):
        return {"held": list(self.gates[0].held)}

    def load_state_dict(self, state):
        self.gates[0].held = list(state["held"])


def questions(domain, prompts, sampling):
    """One new question per prompt, derived from its content and position."""
    numbers = [zlib.crc32(f"{i} {prompt[-1]['content']}".encode()) % 90000 + 5000 for i, prompt in enumerate(prompts)]
    return [Sample(f"{n}+{sampling.seed % 7}", "0") for n in numbers]


def write(engine, domain, prompts, sampling, *, rows, gates, asked):
    reached("write")
    made = [s for s in questions(domain, prompts, sampling) if all(gate([s])[0] for gate in gates)]
    for gate in gates:
        gate.accept(made)
    return SimpleNamespace(rows=made, completions=len(prompts) + 3, dropped={"does not parse": 3})


def best(engine, prompts, reward, sampling, *, rows, asked):
    reached("best")
    made = [s for s in questions(Sums(), prompts, sampling) if reward.gates[0]([s])[0]]
    reward.gates[0].accept(made)
    scored = [SimpleNamespace(sample=s, total=float(len(reward.gates[0].held)), components={"size": 1.0}) for s in made]
    return SimpleNamespace(rows=scored, completions=len(prompts) * sampling.n, dropped={})


def grpo(generator, prompts, reward, output, options, **rest):
    reached("train")
    (output / "completions").mkdir(parents=True, exist_ok=True)
    (output / "checkpoint-1").mkdir(exist_ok=True)
    reached("train-checkpoint")
    log = [
        {"step": step, "reward": 0.1 * step, "reward_std": 0.1, "reward/size/mean": step, "reward/gated/parses": 0.2}
        | {"completions/mean_length": 20.0, "reward/archive/new": 8 * step, "seconds": 2.0, "reward_seconds": 0.1}
        | {"reward_share": 0.05}
        for step in (1, 2, 3)
    ]
    (output / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    completions = {
        "step": [1] * 12,
        "prompt": ["p"] * 12,
        "completion": [[{"role": "assistant", "content": f"<b>text {i}</b>"}] for i in range(12)],
        "reward": [i / 12 for i in range(11)] + [float("nan")],  # a sample on which a scorer failed
        "reward_size": [float(i) for i in range(12)],
        "reward_gate": ["parses" if i < 2 else "" for i in range(12)],
    }
    pyarrow.parquet.write_table(pyarrow.table(completions), output / "completions" / "completions_00001.parquet")
    (output / "checkpoint-1").rmdir()
    keep(output, strength(generator) + 5 + (strength(reward.student) > 40))


def label(engine, domain, samples, *, seed, **options):
    reached("label")
    drawn = engine.generate([domain.student_prompt(s.question) for s in samples], Sampling(seed=seed))
    found = []
    for sample, [draw] in zip(samples, drawn, strict=True):
        sure = zlib.crc32(sample.question.encode()) % 10 > 0
        labelled = Sample(sample.question, draw.text, "so", {"skill": "even"})
        found.append(SimpleNamespace(sample=labelled if sure else None, agreement=0.75))
    return found


def sft(student, domain, samples, output, options, **rest):
    reached("fit")
    right = sum(str(truth(sample.question)) == sample.answer for sample in samples)
    keep(output, strength(student) + right // 4 + options["seed"])
    (output / "rows.json").write_text(json.dumps({"learnt": len(samples), "dropped": 0, "cut": 0, "endless": False}))
    return output


def deal(domain, seeds, n, *, shown, seed):
    return [[seeds[(i + seed) % len(seeds)], seeds[(i // 7) % len(seeds)]] for i in range(n)]


def install(put, figures=False):
    """``put(object, name, value)`` is ``setattr`` or a monkeypatch's. Figures take seconds; off by default."""
    from acqsynth import domains, engines, label as labels, train, write as writing
    from acqsynth.rewards import build

    put(domains, "DOMAINS", {"sums": "fake_run:Sums"})
    put(engines, "load", lambda name, path: Counting(path))
    put(build, "build", lambda config, domain, student, engine, **rows: Reward(student))
    put(labels, "label", label)
    if not figures:
        put(page, "_figures", lambda *given: defaultdict(lambda: None))
    for module, functions in ((writing, (deal, write, best)), (train, (grpo, sft))):
        for function in functions:
            put(module, function.__name__, function)


def plan_of(recipe, *overrides):
    return pipeline.plan(config.load(recipe, overrides))


def run(recipe, *overrides):
    """The plan, the store, and the names of the steps that ran."""
    plan = plan_of(recipe, *overrides)
    store = Store(Path(plan.config.output))
    return plan, store, [str(step) for step in plan.steps if store.run(step)]
