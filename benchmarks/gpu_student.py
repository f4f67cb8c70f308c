"""Checks for :mod:`benchmarks.gpu_parity`: every acquisition of a small student on a device against the CPU.

The student is a two-block Llama with random float32 weights. The CPU scores it with the ``eager`` backend. Masks and
signs are functions of counters, so stochastic values are the same on both devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

import acqcore

#: Largest allowed difference, relative to the largest value among the samples.
BOUND = 1e-3
VOCAB, SAMPLES, LONGEST = 500, 6, 24

#: Requests in addition to every acquisition with its defaults: title -> (acquisition, its arguments).
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "grad_norm, all": ("grad_norm", {"parameters": "all"}),
    "grad_norm, last block": ("grad_norm", {"parameters": 1}),
    "badge, all": ("badge", {"parameters": "all"}),
    "mutual_information, draws in the trunk": ("mutual_information", {"draws": 4}),
    "mutual_information, draws in the last block": ("mutual_information", {"draws": 4, "layers": 1}),
    "mutual_information, draws, element": ("mutual_information", {"draws": 4, "layers": 0, "form": "element"}),
    "mutual_information, draws, block": ("mutual_information", {"draws": 4, "layers": 0, "form": "block"}),
    "mutual_information, isotropic": ("mutual_information", {"form": "linear", "posterior": "isotropic"}),
}


@cache
def student(device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device)


def samples() -> dict[str, torch.Tensor]:
    """Samples of several lengths, padded on the right."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (SAMPLES, LONGEST), generator=g)
    lengths = torch.randint(6, LONGEST + 1, (SAMPLES, 1), generator=g)
    place = torch.arange(LONGEST)
    labels = ids.where((place >= 3) & (place < lengths), -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (place < lengths).long()}


def arguments_of(name: str, device: str) -> dict[str, Any]:
    """The required arguments of an acquisition."""
    few = {key: value[:2] for key, value in samples().items()}
    if name == "influence":
        return {"reference": acqcore.influence_reference(student(device), few, dim=256)}
    if name == "epig":
        return {"reference": acqcore.epig_reference(student(device), few, dim=256)}
    if name == "archive_novelty":
        return {"archive": acqcore.Archive(4)}
    return {}


def titles() -> Iterator[str]:
    yield from acqcore.acquisitions()
    yield from REQUESTS


def score(title: str, backend: str, device: str) -> torch.Tensor:
    name, arguments = REQUESTS.get(title, (title, {}))
    needed = arguments_of(name, device) | arguments
    given = {name: needed} if needed else {}
    scores = acqcore.score(student(device), samples(), (name,), acquisition_args=given, backend=backend, progress=False)
    return scores[name].double()


def error(title: str, backend: str, dtype: torch.dtype, device: str) -> float:
    """Largest difference from the CPU, relative to the bound."""
    expected = score(title, "eager", "cpu")
    got = score(title, backend, device)
    if expected.shape != got.shape or not torch.equal(expected.isnan(), got.isnan()):
        raise AssertionError("other samples have a value")
    scale = expected.nan_to_num().abs().max().clamp_min(1e-30)
    return float((got - expected).nan_to_num().abs().max() / scale) / BOUND
