"""Do signals follow the ambiguity of real questions? ProtoQA: the answers of 100 people against the student's signals.

``python -m benchmarks.bench_protoqa --student MODEL --data FILE`` writes ``results/protoqa.json`` and its section of
``docs/evidence-pool.md``; with ``--questions N``, ``results/protoqa_N.json`` and the section of that sample.

Protocol, written before the run
--------------------------------
The entropy of the people's answers is a measured ambiguity: "name something tropical" has many good answers, and no
amount of learning removes them. For each signal the table gives Spearman's correlation with that entropy over the
questions, with a 95 % bootstrap interval (questions resampled 2,000 times). The student's predictive entropy should
follow it. A signal that claims to measure what the student does not know, as opposed to what nobody can know, should
not: its interval should contain 0, or at least lie below that of entropy (the table gives the paired difference).

Questions: those whose listed answers cover at least 80 of the 100 people; the entropy is that of the listed answers.
As a check, all questions, with the people without a listed answer counted as one more answer. The student sees two
worked examples and the question; its answer is its greedy completion, up to the end of the line or 8 tokens. Signals
are computed at the answer's first token and as means over the answer. ``sampled`` uses an answer drawn at temperature 1
as the target; the answers' entropy is that of 10 drawn answers, compared without case and punctuation.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata

import acqcore
from acqsynth.models import smollm2_path
from benchmarks import evidence, harness, real_rows
from benchmarks.pool_signals import MUTUAL_INFORMATION

PAGE = evidence.DOCS / "evidence-pool.md"
COVERED, ANSWER_TOKENS, ANSWERS, RESAMPLES = 80, 8, 10, 2000
EXAMPLES = (
    ("name a fruit that is often red.", "apple"),
    ("tell me something people do on a sunday morning.", "sleep in"),
)
PLAIN = ("entropy", "varentropy", "margin", "gini", "least_confidence", "loss", "grad_norm", "expected_gradient_length")
#: Signals that claim to distinguish what the student does not know from what nobody can know.
EPISTEMIC = tuple(MUTUAL_INFORMATION)

HEADINGS = ("signal", "with people's entropy", "entropy minus it", "with the student's entropy", "all questions")

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """``answers`` maps an answer to the number of people out of 100 who gave it."""

    text: str
    answers: dict[str, int]

    @property
    def covered(self) -> int:
        return sum(self.answers.values())

    def entropy(self, rest: bool = False) -> float:
        """Entropy of the people's answers in nats; ``rest`` counts people without a listed answer as one answer."""
        counts = [n for n in self.answers.values() if n]
        if rest and self.covered < 100:
            counts.append(100 - self.covered)
        return entropy(counts)


def entropy(counts: Collection[int]) -> float:
    """Entropy of a distribution given by counts, in nats."""
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts)


def read(path: Path) -> list[Question]:
    """The questions of a file that at least one person answered."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file. Name ProtoQA's development questions with --data")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = []
    for row in rows:
        counts: Counter[str] = Counter()
        for answer, people in row["answers"]:
            counts[answer] += people
        if sum(counts.values()):
            found.append(Question(row["question"], dict(counts)))
    return found


def prompt(question: str) -> str:
    shown = [f"Question: {text}\nAnswer: {answer}\n\n" for text, answer in EXAMPLES]
    return "".join(shown) + f"Question: {question}\nAnswer:"


class Answers:
    """Writes a student's answers to prompts."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    def __call__(self, prompts: Sequence[Sequence[int]], n: int, seed: int | None = None) -> list[list[list[int]]]:
        """n answers per prompt, greedy without a seed; each has at least one token and excludes the end of the line."""
        torch.manual_seed(seed or 0)
        longest = max(map(len, prompts))
        found: list[list[list[int]]] = []
        for begin in range(0, len(prompts), 128):
            part = prompts[begin : begin + 128]
            ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in part], device=self._model.device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part], device=self._model.device)
            sampling: dict[str, Any] = {"do_sample": seed is not None}
            if seed is not None:
                sampling.update(temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=n)
            written = self._model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, pad_token_id=0, **sampling
            )[:, longest:].tolist()
            cut = [self._first_line(row) for row in written]
            found += [cut[i : i + n] for i in range(0, len(cut), n)]
        return found

    def _first_line(self, ids: Sequence[int]) -> list[int]:
        for end in range(1, len(ids)):
            if ids[end] in (0, self._tokenizer.eos_token_id) or "\n" in self._tokenizer.decode(ids[end : end + 1]):
                return list(ids[:end])
        return list(ids)


def row(prompt_ids: Sequence[int], answer: Sequence[int], first: bool) -> acqcore.Row:
    """A row in which the answer, or only its first token, is scored after its prompt."""
    ids = torch.tensor([*prompt_ids, *answer])
    targets = torch.full_like(ids, -100)
    begin = len(prompt_ids)
    end = begin + 1 if first else len(ids)
    targets[begin:end] = ids[begin:end]
    return acqcore.Row(ids[:end], targets[:end])


def signals(model: Any, tokenizer: Any, questions: Sequence[Question], n_answers: int) -> dict[str, dict[str, Values]]:
    """``first token`` and ``whole answer`` -> signal -> a value per question; omits failing signals with a message."""
    prompts = [tokenizer(prompt(q.text), add_special_tokens=False).input_ids for q in questions]
    write = Answers(model, tokenizer)
    greedy = [answer for (answer,) in write(prompts, 1)]
    drawn = write(prompts, n_answers, seed=1)
    student = acqcore.Student.from_model(model)
    batch_tokens = 16384 if model.device.type == "cuda" else 4096
    found: dict[str, dict[str, Values]] = {}
    for level in ("first token", "whole answer"):
        first = level == "first token"
        own = [row(p, answer, first) for p, answer in zip(prompts, greedy, strict=True)]
        sampled = [row(p, answers[0], first) for p, answers in zip(prompts, drawn, strict=True)]
        values = found.setdefault(level, {})

        def score(rows: Sequence[acqcore.Row], names: Sequence[str], arguments: Any = None) -> acqcore.Scores:
            return acqcore.score(
                student, rows, names, acquisition_args=arguments, batch_tokens=batch_tokens, progress=False
            )

        scores = score(own, PLAIN)
        values.update({name: scores[name].double().numpy() for name in PLAIN})
        scores = score(sampled, ("loss", "grad_norm"))
        values.update({f"{name}, sampled": scores[name].double().numpy() for name in ("loss", "grad_norm")})
        for name, arguments in MUTUAL_INFORMATION.items():
            try:
                made = score(own, ("mutual_information",), {"mutual_information": arguments})
                values[name] = made["mutual_information"].double().numpy()
            except (ValueError, RuntimeError) as error:
                print(f"{name} is omitted: {harness.first_line(error)}")
    texts = [[_plain(tokenizer.decode(answer)) for answer in answers] for answers in drawn]
    found["whole answer"][f"entropy of {n_answers} answers"] = np.array(
        [entropy(Counter(row).values()) for row in texts]
    )
    return found


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def spearman(a: Values, b: Values) -> float:
    """Rank correlation; ties share their mean rank; 0 if either argument is constant."""
    x, y = rankdata(a), rankdata(b)
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else 0.0


def correlations(
    values: dict[str, Values],
    ambiguity: Values,  # [n]
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Signal -> ``rho``, its correlation with the ambiguity, with a 95 % ``interval``; ``below_entropy``, entropy's
    correlation minus its own, with an interval; ``with_entropy``, its correlation with the student's entropy."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(ambiguity), (resamples, len(ambiguity)))
    every = {name: np.array([spearman(column[d], ambiguity[d]) for d in draws]) for name, column in values.items()}
    found = {}
    for name, column in values.items():
        rho = spearman(column, ambiguity)
        gap = every["entropy"] - every[name]
        found[name] = {
            "rho": rho,
            "interval": _percentiles(every[name]),
            "below_entropy": spearman(values["entropy"], ambiguity) - rho,
            "below_entropy_interval": _percentiles(gap),
            "with_entropy": spearman(column, values["entropy"]),
        }
    return found


def _percentiles(values: Values) -> list[float]:
    return [float(value) for value in np.percentile(values, (2.5, 97.5))]


def table(results: dict[str, dict[str, dict[str, Any]]], n: int, checks: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = [
        f"ProtoQA, {n} questions. Spearman with the entropy of people's answers, 95 % bootstrap intervals. Entropy",
        "should follow ambiguity; mutual information, if it measures ignorance, should not.",
    ]
    for level, found in results.items():
        rows = []
        for name, one in sorted(found.items(), key=lambda item: -item[1]["rho"]):
            cells = [name, _cell(one["rho"], one["interval"])]
            own = name == "entropy"
            cells.append("" if own else _cell(one["below_entropy"], one["below_entropy_interval"]))
            cells += ["" if own else f"{one['with_entropy']:.2f}", f"{checks[level][name]:+.2f}"]
            rows.append(cells)
        lines += ["", f"**{level}**", "", *harness.markdown(HEADINGS, *rows)]
    return "\n".join([*lines, "", *verdicts(results)])


def _cell(value: float, interval: Sequence[float]) -> str:
    return f"{value:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"


def verdicts(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """A sentence for each signal that claims to distinguish ignorance from ambiguity."""
    lines = []
    for level, found in results.items():
        for name in EPISTEMIC:
            if name not in found:
                continue
            low, high = found[name]["interval"]
            if low <= 0 <= high:
                said = "no correlation with ambiguity is shown"
            elif high < 0:
                said = "it falls with ambiguity"
            elif found[name]["below_entropy_interval"][0] > 0:
                said = "it follows ambiguity, less than entropy does: the claim holds in part"
            else:
                said = "it follows ambiguity, not shown to do so less than entropy: the claim fails here"
            lines.append(f"- {name}, {level}: {said}.")
    return lines


def picture(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Plots the correlations with their intervals, one panel per level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, len(results), sharex=True, squeeze=False)
    for axis, (level, found) in zip(axes[0], results.items(), strict=True):
        names = sorted(found, key=lambda name: found[name]["rho"])
        for place, name in enumerate(names):
            colour = "#c44e52" if name in EPISTEMIC else "#4c72b0" if name == "entropy" else "#8c9bb0"
            axis.plot(found[name]["interval"], [place, place], color=colour, lw=1.4)
            axis.plot([found[name]["rho"]], [place], "o", color=colour, ms=5)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.axvline(0, color="#888888", lw=0.8)
        axis.set_title(level, fontsize=10, loc="left")
        axis.set_xlabel("Spearman with the entropy of people's answers", fontsize=9)
    harness.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", default=None, help="folder or hub id (default: the packaged SmolLM2)")
    parser.add_argument("--data", type=Path, default=real_rows.FOLDER / "protoqa" / "dev_scraped.jsonl")
    parser.add_argument("--out", type=Path, default=None, help="output folder instead of results/ and docs/")
    parser.add_argument("--questions", type=int, default=None, help="size of a random sample (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="student's dtype")
    parser.add_argument("--render", type=Path, default=None, help="rewrite the page from this JSON")
    arguments = parser.parse_args()
    content = measured(arguments) if arguments.render is None else json.loads(arguments.render.read_text())
    text = table(content["results"], content["questions"], content["all_questions"])
    print(text)
    sample = "" if arguments.questions is None else f"_{arguments.questions}"
    name = f"protoqa{sample}" if arguments.render is None else arguments.render.stem
    draw, section = partial(picture, content["results"]), evidence.marks(name, "bench_protoqa")
    evidence.publish(name, content, draw, PAGE, section, text, arguments.out)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = arguments.student or str(smollm2_path())
    questions = read(arguments.data)
    if arguments.questions is not None and arguments.questions < len(questions):
        kept = np.random.default_rng(0).permutation(len(questions))[: arguments.questions]
        questions = [questions[i] for i in sorted(kept.tolist())]
    model = AutoModelForCausalLM.from_pretrained(student, dtype=getattr(torch, arguments.dtype))
    model = model.to(arguments.device).eval()
    begin = time.perf_counter()
    values = signals(model, AutoTokenizer.from_pretrained(student), questions, ANSWERS)
    seconds = time.perf_counter() - begin
    covered = np.array([question.covered >= COVERED for question in questions])
    ambiguity = np.array([question.entropy() for question in questions])
    with_rest = np.array([question.entropy(rest=True) for question in questions])
    results = {
        level: correlations({name: column[covered] for name, column in found.items()}, ambiguity[covered])
        for level, found in values.items()
    }
    checks = {level: {name: spearman(x, with_rest) for name, x in found.items()} for level, found in values.items()}
    return {
        "machine": harness.machine(), "questions": int(covered.sum()), "asked": len(questions), "answers": ANSWERS,
        "dtype": arguments.dtype, "seconds": round(seconds, 1), "results": results, "all_questions": checks,
    }  # fmt: skip


if __name__ == "__main__":
    main()
