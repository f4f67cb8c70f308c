"""A small version of the table of supported students: a dozen families, each chosen for a reason."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

check, models = (
    SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))) for name in ("check", "models")
)

KINDS = [
    "llama",
    "gpt2",  # transposed linear layers, learned positions
    "bloom",  # adds the stream inside its branches
    "opt",  # flattens tokens, keeps its MLP on the block
    "falcon",  # adds in place
    "gemma2",  # norms after the branches, a softcap
    "mixtral",  # fused experts
    "bert",  # a transform between trunk and head
    "llama4_text",
    "mamba2",  # recurrent
    "qwen3_5_text",  # linear attention in every other block
    "minicpm3",  # latent attention, scaled logits
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_that_of_autograd(kind: str) -> None:
    found = check.check(models.build(kind), models.VOCABULARY)
    assert {name: tuple(verdict) for name, verdict in found.items()} == dict.fromkeys(found, ("right", ""))


def test_what_is_not_supported_is_refused_by_name() -> None:
    found = check.check(models.build("cpmant"), models.VOCABULARY)
    assert {verdict.verdict for verdict in found.values()} == {"refused"}
    assert found["scores"].reason == (
        "model: expected a causal language model, in CpmAntForCausalLM a token sees later tokens"
    )


def test_a_wrong_value_and_a_raw_exception_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = models.build("llama"), check.samples(models.VOCABULARY)
    real = check.acqcore.score

    def off(*arguments: Any, **options: Any) -> Any:
        scores = real(*arguments, **options)
        return {name: values + 0.01 for name, values in scores.items()}

    monkeypatch.setattr(check.acqcore, "score", off)
    assert check._verdict(check._scores, model, rows).verdict == "wrong"
    monkeypatch.setattr(check.acqcore, "score", lambda *_: {}["nothing"])
    assert check._verdict(check._scores, model, rows).verdict == "raw"
