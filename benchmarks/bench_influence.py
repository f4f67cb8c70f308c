"""Does a sketch rank influence like the gradients themselves? Spearman correlation, 256 rows of real text, dim 4096.

``python -m benchmarks.bench_influence`` writes ``results/influence.json``. Influence is the inner product or cosine of
a row's gradient and the mean gradient of 32 other rows. Head: SmolLM2-135M, gradients computed row by row. All layers:
a three-block Llama on the same tokens, briefly trained, with autograd.
"""

from __future__ import annotations

import torch
from scipy.stats import spearmanr
from transformers import LlamaConfig, LlamaForCausalLM

import acqcore
from acqsynth.models import smollm2_path
from benchmarks import harness, real_rows

RANKED, REFERENCE, LENGTH, DIM = 256, 32, 128, 4096


def agreement(products: torch.Tensor, norms: torch.Tensor, sketches: torch.Tensor) -> dict[str, float]:
    """Compares exact ``products [256]`` and ``norms [256]`` with ``sketches [288, dim]``, reference rows last."""
    ranked, mean = sketches[:RANKED], sketches[RANKED:].mean(dim=0)
    approximate = ranked @ mean
    return {
        "spearman_dot": float(spearmanr(products, approximate).statistic),
        "spearman_cosine": float(spearmanr(products / norms, approximate / ranked.norm(dim=1)).statistic),
    }


def head_agreement(student: acqcore.Student, rows: list[tuple[torch.Tensor, int]]) -> dict[str, float]:
    weight = student.head.weight
    hidden, targets, counts = [], [], [0]
    with student.scoring():
        for ids, prompt in rows:
            hidden.append(student.hidden(ids[None])[0, prompt - 1 : -1])
            targets.append(ids[prompt:])
            counts.append(len(ids) - prompt)

    def gradient(i: int) -> torch.Tensor:
        delta = (hidden[i] @ weight.T).softmax(dim=1)
        delta[torch.arange(len(delta)), targets[i]] -= 1
        return delta.T @ hidden[i] / len(delta)

    with torch.no_grad():
        mean = torch.zeros_like(weight)
        for i in range(RANKED, RANKED + REFERENCE):
            mean += gradient(i) / REFERENCE
        exact = [(float((g * mean).sum()), float(g.norm())) for g in map(gradient, range(RANKED))]
    offsets = torch.tensor(counts).cumsum(0)
    sketches = acqcore.grad_sketch(torch.cat(hidden), student.head, torch.cat(targets), offsets, dim=DIM)
    products, norms = torch.tensor(exact).T
    return agreement(products, norms, sketches)


def all_layers_agreement(ids: list[torch.Tensor], training: list[torch.Tensor], vocab: int) -> dict[str, float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for x in training:
        optimizer.zero_grad()
        model(input_ids=x[None], labels=x[None]).loss.backward()
        optimizer.step()
    parameters = list(model.parameters())

    def gradient(x: torch.Tensor) -> torch.Tensor:
        loss = model(input_ids=x[None], labels=x[None]).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    mean = torch.zeros(sum(p.numel() for p in parameters))
    for x in ids[RANKED:]:
        mean += gradient(x) / REFERENCE
    exact = [(float(g @ mean), float(g.norm())) for g in map(gradient, ids[:RANKED])]
    longest = max(len(x) for x in ids)
    tensors = {
        "input_ids": torch.stack([torch.nn.functional.pad(x, (0, longest - len(x))) for x in ids]),
        "attention_mask": torch.stack([(torch.arange(longest) < len(x)).long() for x in ids]),
    }
    products, norms = torch.tensor(exact).T
    return agreement(products, norms, acqcore.grad_sketch(model, tensors, "all", dim=DIM))


def main() -> None:
    student = acqcore.Student.load(smollm2_path(), dtype=torch.float32)
    rows = real_rows.token_rows(student, real_rows.gsm8k(RANKED + REFERENCE))
    rows = [(ids[: max(LENGTH, prompt + 8)], prompt) for ids, prompt in rows]
    training = [ids[:LENGTH] for ids, _ in real_rows.token_rows(student, real_rows.gsm8k(60, "train"))]
    results = {
        "all layers, Llama of 3 blocks": all_layers_agreement(
            [ids[:LENGTH] for ids, _ in rows], training, student.head.weight.shape[0]
        ),
        "head, SmolLM2-135M": head_agreement(student, rows),
    }
    content = {"machine": harness.machine(), "rows": RANKED, "reference": REFERENCE, "dim": DIM, "results": results}
    harness.write(harness.RESULTS / "influence.json", content)
    for name, values in results.items():
        print(name, {key: round(value, 4) for key, value in values.items()})


if __name__ == "__main__":
    main()
