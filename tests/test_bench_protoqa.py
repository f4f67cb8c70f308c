"""``bench_protoqa`` on a tiny student and made-up questions."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import bench_protoqa, evidence, pool_report
from benchmarks.bench_protoqa import Answers, Question


class Tokenizer:
    """One token per character; token 10 ends a line."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return type("Encoding", (), {"input_ids": [min(ord(c), 127) for c in text]})

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_entropy_of_people():
    question = Question("?", {"a": 40, "b": 40, "c": 0})
    assert question.entropy() == pytest.approx(math.log(2))
    assert question.entropy(rest=True) == pytest.approx(-(0.8 * math.log(0.4) + 0.2 * math.log(0.2)))
    assert Question("?", {"a": 7}).entropy() == 0.0


def test_answers_named_twice_are_added_up_and_unanswered_questions_left_out(tmp_path):
    rows = [{"question": "q", "answers": [["a", 3], ["a", 4], ["b", 7]]}, {"question": "r", "answers": [["a", 0]]}]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bench_protoqa.read(path) == [Question("q", {"a": 7, "b": 7})]


def test_answers_end_with_the_line(model):
    write = Answers(model, Tokenizer())
    assert write._first_line([10, 65, 66, 10, 67]) == [10, 65, 66]  # at least one token
    assert write._first_line([65, 2, 66]) == [65]
    assert write._first_line([65, 66]) == [65, 66]


def test_padding_does_not_change_greedy_answers(model):
    write = Answers(model, Tokenizer())
    prompts = [list(range(40, 50)), list(range(60, 85))]
    together = write(prompts, 1)
    assert together == [write([p], 1)[0] for p in prompts]


def test_rows_score_the_answer_after_its_prompt():
    whole = bench_protoqa.row([5, 6, 7], [8, 9], first=False)
    first = bench_protoqa.row([5, 6, 7], [8, 9], first=True)
    assert whole.targets.tolist() == [-100, -100, -100, 8, 9]
    assert first.ids.tolist() == [5, 6, 7, 8]
    assert first.targets.tolist() == [-100, -100, -100, 8]


def test_signals_of_the_first_token_are_those_of_the_models_logits(model):
    questions = [Question(text, {"a": 60, "b": 30}) for text in ("name a bird.", "name something red.", "why?")]
    found = bench_protoqa.signals(model, Tokenizer(), questions, n_answers=3)
    for i, question in enumerate(questions):
        ids = torch.tensor(Tokenizer()(bench_protoqa.prompt(question.text)).input_ids)
        with torch.no_grad():
            p = model(input_ids=ids[None]).logits[0, -1].double().softmax(dim=0)
        entropy = float(torch.special.entr(p).sum())
        assert found["first token"]["entropy"][i] == pytest.approx(entropy, rel=1e-5)
        assert found["first token"]["loss"][i] == pytest.approx(-math.log(p.max()), rel=1e-5)
    assert all(len(column) == 3 for values in found.values() for column in values.values())
    assert (found["whole answer"]["entropy of 3 answers"] <= math.log(3) + 1e-12).all()


def test_spearman_is_scipys_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 40).astype(float), rng.standard_normal(40)
    assert bench_protoqa.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert bench_protoqa.spearman(np.ones(4), np.arange(4.0)) == 0.0


def test_a_signal_of_ambiguity_is_told_from_noise():
    rng = np.random.default_rng(4)
    ambiguity, noise = rng.standard_normal(300), rng.standard_normal(300)
    noise -= ambiguity * (noise @ ambiguity) / (ambiguity @ ambiguity)  # exactly uncorrelated in this sample
    values = {
        "entropy": ambiguity + 0.5 * rng.standard_normal(300),
        "mutual information": noise,
        "mutual information, draws": ambiguity + 0.5 * rng.standard_normal(300),
    }
    results = {"first token": bench_protoqa.correlations(values, ambiguity, resamples=400)}
    low, high = results["first token"]["mutual information"]["interval"]
    assert low < 0 < high
    assert results["first token"]["mutual information"]["below_entropy_interval"][0] > 0.5
    said = bench_protoqa.verdicts(results)
    assert said[0] == "- mutual information, first token: no correlation with ambiguity is shown."
    assert said[1].endswith("it follows ambiguity, not shown to do so less than entropy: the claim fails here.")
    checks = {"first token": dict.fromkeys(values, 0.0)}
    text = bench_protoqa.table(results, 300, checks)
    assert text.index("| entropy |") < text.index("| mutual information |")


def test_the_page_has_its_places(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(bench_protoqa.PAGE.read_text())
    evidence.write_section(page, *evidence.marks("protoqa", "bench_protoqa"), "a table")
    evidence.write_section(page, *evidence.marks("protoqa", "bench_protoqa"), "another table")
    text = page.read_text()
    assert text.count("another table") == 1
    assert "a table" not in text
    assert pool_report.SECTION[0] in text


def test_cross_entropy_of_a_sampled_answer(model):
    """The sampled target is scored, not the greedy one."""
    questions = [Question("name a bird.", {"a": 60, "b": 30})]
    found = bench_protoqa.signals(model, Tokenizer(), questions, n_answers=1)
    prompt = Tokenizer()(bench_protoqa.prompt("name a bird.")).input_ids
    ((answer,),) = Answers(model, Tokenizer())([prompt], 1, seed=1)
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    loss = F.cross_entropy(logits, torch.tensor(answer))
    assert found["whole answer"]["loss, sampled"][0] == pytest.approx(float(loss), rel=1e-4)
