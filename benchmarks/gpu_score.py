"""``score`` of whole students on a GPU relative to their forward pass: the fourth stage of ``make gpu-check``.

No weights need to be copied to a rented GPU: students have published sizes and random weights, which cost the same as
trained ones. Samples are random tokens. One JSON object per measurement is appended to ``--rows``; ratios are to the
trunk's forward on the same batches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import acqcore
from benchmarks import harness

TRUNK = "trunk forward"

#: Sizes of published students, SmolLM2 135M and Llama 3.2 1B, and one for trials without a GPU.
STUDENTS: dict[str, dict[str, int]] = {
    "SmolLM2 135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "Llama 3.2 1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip

INFORMATION = {"mutual_information": {"layers": 0, "form": "block"}}
#: Tokens per batch: the default, and one with which a small student no longer waits for its launches.
BATCH_TOKENS = {"SmolLM2 135M": (8192, 32768), "Llama 3.2 1B": (8192,), "tiny": (8192,)}
#: Samples of the reference set of ``influence``.
REFERENCES = 8

#: Title -> acquisitions to score and their arguments.
REQUESTS: dict[str, tuple[tuple[str, ...], dict[str, dict[str, Any]]]] = {
    "score(entropy)": (("entropy",), {}),
    "score(entropy, grad_norm)": (("entropy", "grad_norm"), {}),
    "score(mutual_information)": (("mutual_information",), {}),
    "score(entropy, grad_norm, mutual_information)": (("entropy", "grad_norm", "mutual_information"), {}),
    "score(grad_norm), all blocks": (("grad_norm",), {"grad_norm": {"parameters": "all"}}),
    "score(influence)": (("influence",), {}),
    "score(mutual_information), block": (("mutual_information",), INFORMATION),
    "score(entropy, grad_norm, mutual_information), block": (
        ("entropy", "grad_norm", "mutual_information"),
        INFORMATION,
    ),
}


def make(name: str, device: str) -> Any:
    """A Llama with random bfloat16 weights whose logits have the spread of a trained model's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**STUDENTS[name], tie_word_embeddings=True, max_position_embeddings=2048)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(0, 3 / config.hidden_size**0.5)
    return model


def measure(
    name: str, model: Any, count: int, tokens: int, batch_tokens: int, turns: int, device: str, rows: Path
) -> None:
    """Times every request on ``count`` samples of ``tokens`` tokens, scoring the second half of each."""
    student = acqcore.Student.from_model(model)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(STUDENTS[name]["vocab_size"], (count, tokens), generator=g)
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    samples = {"input_ids": ids, "labels": labels}
    batch = max(1, batch_tokens // tokens)
    reference = acqcore.influence_reference(student, {key: value[:REFERENCES] for key, value in samples.items()})

    def trunk() -> None:
        with student.scoring():
            for begin in range(0, count, batch):
                student.hidden(ids[begin : begin + batch].to(device))

    def logits() -> None:
        """The model's own forward with logits at every position, as in a trainer."""
        with torch.no_grad():
            for begin in range(0, count, batch):
                model(input_ids=ids[begin : begin + batch].to(device), use_cache=False)

    calls: dict[str, Callable[[], object]] = {TRUNK: trunk, "forward with logits": logits}
    for title, (names, arguments) in REQUESTS.items():
        given = {"influence": {"reference": reference}} if names == ("influence",) else arguments
        calls[title] = partial(
            acqcore.score, student, samples, names, acquisition_args=given, batch_tokens=batch_tokens, progress=False
        )
    case = f"{name}, random weights, bfloat16, {count} samples of {tokens} tokens, batches of {batch_tokens}"
    times: dict[str, list[float]] = {}
    for title, call in calls.items():
        try:
            _seconds(call, device)
        except Exception as error:  # the other requests are still measured
            harness.append(rows, stage="score", case=case, peer=title, not_measured=harness.first_line(error))
            print(f"{case}: {title}: {harness.first_line(error)}", flush=True)
        else:
            times[title] = []
    for _ in range(turns):
        for title, seconds in times.items():
            seconds.append(_seconds(calls[title], device))
    for title, seconds in times.items():
        median = statistics.median(seconds)
        ratio = statistics.median(a / b for a, b in zip(seconds, times[TRUNK], strict=True))
        row = {
            "ms": round(median * 1e3, 2),
            "ratio": round(ratio, 3),
            "spread": round((max(seconds) - min(seconds)) / median, 4),
            "scored_tokens": count * (tokens - tokens // 2),
        }
        harness.append(rows, stage="score", case=case, peer=title, **row)
        print(f"{case}: {title}: {row['ms']} ms, {row['ratio']} of the trunk", flush=True)


def _seconds(call: Callable[[], object], device: str) -> float:
    """Wall-clock seconds, including host time."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--rows", type=Path, required=True, help="file that results are appended to")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    device = arguments.device
    shapes = [("SmolLM2 135M", 128, 256), ("Llama 3.2 1B", 128, 256)] if device == "cuda" else [("tiny", 6, 32)]
    for name, count, tokens in shapes:
        model = make(name, device)
        for batch_tokens in BATCH_TOKENS[name]:
            measure(name, model, count, tokens, batch_tokens, arguments.turns, device, arguments.rows)


if __name__ == "__main__":
    main()
