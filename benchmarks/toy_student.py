"""A small student whose ignorance is known, to test what a Bayesian acquisition can distinguish.

It learns a table of 64 keys (``easy``) and a second kind of question whose answer is redrawn from 32 each time
(``ambiguous``: nobody can know it). Keys that it never saw are ``unseen``: here the student is ignorant. An acquisition
that is useful as a reward ranks ``unseen`` above both.
"""

from __future__ import annotations

from typing import Any

import torch

KINDS = ("easy", "ambiguous", "unseen")
KEYS, CLASSES = 64, 32
STEPS = {3: 400, 6: 800}  #: blocks of a student -> training steps it needs to learn the table
_TABLE, _COIN, _SEEN, _UNSEEN, _ANSWER = 1, 2, 8, 72, 136  # first token of each range
VOCABULARY = _ANSWER + KEYS


def questions(kind: str, n: int, generator: torch.Generator) -> torch.Tensor:
    """Token ids ``[n, 5]``: kind of question, key, two meaningless words, answer."""
    words = torch.randint(_SEEN, _SEEN + KEYS, (n, 3), generator=generator)
    if kind == "unseen":
        words[:, 0] = torch.randint(_UNSEEN, _UNSEEN + KEYS, (n,), generator=generator)
    if kind == "ambiguous":
        answer = torch.randint(0, CLASSES, (n,), generator=generator)
    else:
        table = torch.randperm(KEYS, generator=torch.Generator().manual_seed(5))
        answer = table[(words[:, 0] - _SEEN) % KEYS]
    first = torch.full((n, 1), _COIN if kind == "ambiguous" else _TABLE)
    return torch.cat([first, words, _ANSWER + answer[:, None]], dim=1)


def train(seed: int, blocks: int = 3, steps: int = 300) -> Any:
    """A Llama of ``blocks`` blocks and width 64, trained without dropout on easy and ambiguous questions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=blocks, max_position_embeddings=32, **sizes)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.cat([questions(kind, 64, generator) for kind in ("easy", "ambiguous")])
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, -2], ids[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def samples(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Questions ``[n, 5]`` as samples for ``acqcore.score``, with only the answer scored."""
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "labels": labels}


def auroc(
    above: torch.Tensor,  # [n]
    below: torch.Tensor,  # [m]
) -> float:
    """Probability that a value of ``above`` exceeds one of ``below``; ties count half."""
    wins = (above[:, None] > below).double() + 0.5 * (above[:, None] == below).double()
    return float(wins.mean())
