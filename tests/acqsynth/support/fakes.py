"""Shared by tests: a plain domain, a fake engine, a signal, samples as text, errors and a trainer's log."""

from __future__ import annotations

import types

import torch

from acqsynth.domains import Domain, Sample
from acqsynth.engines import Engine


class PlainDomain(Domain):
    """Asks questions verbatim and compares answers as text; other fakes override what they need."""

    name = "plain"

    def generator_prompt(self, shown):
        return [{"role": "user", "content": "new " + " ".join(sample.question for sample in shown)}]

    def student_prompt(self, question):
        return [{"role": "user", "content": question}]

    def answer_of(self, completion):
        return completion or None

    def canonical(self, answer):
        return answer.strip()

    def load(self, source, split="train", columns=None, limit=None):
        raise FileNotFoundError(source)


class Sums(PlainDomain):
    """Sums answered by a number in the last line. 7, 7.0 and 07 are equivalent, 7 and " 7" also in canonical form."""

    name = "sums"
    answer_tokens = 8

    def answer_of(self, completion):
        lines = completion.splitlines()
        return lines[-1] if lines and self._value(lines[-1]) is not None else None

    def equivalent(self, gold, answers):
        pairs = zip(gold, answers, strict=True)
        return [a is not None and self._value(sample.answer) == self._value(a) for sample, a in pairs]

    def fault(self, sample):
        return None if "+" in sample.question else "no sum"

    def verify(self, samples):
        return [
            None if "?" in sample.question else sum(map(int, sample.question.split("+"))) == self._value(sample.answer)
            for sample in samples
        ]

    @staticmethod
    def _value(text):
        try:
            return float(text)
        except ValueError:
            return None


class FakeEngine(Engine):
    """Completes with ``draw(prompt, i, sampling)``; ``calls`` records the prompts and sampling of each call."""

    name = "fake"

    def __init__(self):
        self.calls = []

    def generate(self, prompts, sampling):
        self.calls.append((list(prompts), sampling))
        return [[self.draw(prompt, i, sampling) for i in range(sampling.n)] for prompt in prompts]

    def reload(self, weights):
        raise NotImplementedError


class Told:
    """A signal with given values and optional standard errors by answer; other answers raise KeyError."""

    def __init__(self, name, values, errors=None):
        self.name = name
        self.values = values
        self.errors = errors
        self.asked = []  # the answers of each call
        self.asked_errors = 0

    def __call__(self, samples):
        self.asked.append([sample.answer for sample in samples])
        return [self.values[sample.answer] for sample in samples]

    def stderr(self, samples):
        self.asked_errors += 1
        return None if self.errors is None else [self.errors[sample.answer] for sample in samples]


SEEDS = [Sample(f"{n}+{n}", str(2 * n), f"{n} and {n}") for n in range(1, 9)]
TRAINER = {"max_steps": 3, "use_cpu": True, "bf16": False, "save_steps": 1, "gradient_checkpointing": False}

GOOD = "<question>What is 6 * 7?</question><answer>It is 42.</answer>"
LONGER = "<question>Name a prime.</question><reasoning>Seven has no divisor but 1.</reasoning><answer>7</answer>"


def written(question, answer, reasoning=""):
    """A sample in the format that generators write."""
    middle = f"<reasoning>{reasoning}</reasoning>" if reasoning else ""
    return f"<question>{question}</question>{middle}<answer>{answer}</answer>"


def error_of(response):
    """Status, type and message of an error that the service returns."""
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"type", "message"}
    return response.status_code, response.json()["error"]["type"], response.json()["error"]["message"]


class Log:
    """Records what a reward passes to a trainer's ``log_extra`` and ``log_metric``."""

    def __init__(self):
        self.columns = {}
        self.metrics = {}

    def call(self, reward, completions, prompts=None):
        """Calls ``reward`` as TRL 1.16 does, by default for one prompt."""
        n = len(completions)
        return reward(
            prompts=[[{"role": "user", "content": "Write a sample."}]] * n if prompts is None else prompts,
            completions=completions,
            completion_ids=[[0]] * n,
            domain=["mathematics"] * n,
            trainer_state=types.SimpleNamespace(global_step=0),
            log_extra=self.columns.__setitem__,
            log_metric=self.metrics.__setitem__,
        )


def teach(model, batches):
    """Trains a model on batches of token ids, ``[B, T]`` each."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for ids in batches:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def trained(model, tokenizer, rewards, folder, method="GRPO", **options):
    """The logged steps of a real TRL run on a CPU; by default two steps of two prompts."""
    import datasets
    import trl

    given = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "beta": 0.0,
    }
    trainer = getattr(trl, f"{method}Trainer")(
        model=model,
        reward_funcs=rewards,
        args=getattr(trl, f"{method}Config")(
            output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, **{**given, **options}
        ),
        train_dataset=datasets.Dataset.from_dict(
            {"prompt": ["Write a sample.", "Another one."] * 2, "domain": ["code"] * 4}
        ),
        processing_class=tokenizer,
    )
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert not model.lm_head.weight.detach().equal(before)
    return [row for row in trainer.state.log_history if "reward" in row]
