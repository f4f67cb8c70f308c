"""Mutual information (BALD): separation of ignorance from ambiguity, and cost against K forward passes of the head.

``--part separation`` trains small students whose ignorance is known (``toy_student``) and tabulates how well each form
ranks unknown questions above ambiguous and above known ones (AUROC, mean and minimum over the seeds), and its cost.
``--part head`` times one head pass against peers, ``--part score`` SmolLM2 on GSM8K rows. Each part writes
``results/mutual_information_<part>.json`` and prints its table.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import acqcore
from acqsynth.models import smollm2_path
from benchmarks import harness, real_rows, toy_student
from benchmarks.real_rows import TRUNK

BARE = "hidden @ weight.T (once, no statistics)"
ENTROPY = "entropy (no draws)"
ENSEMBLE = 5


def separation(seeds: int) -> None:
    """Measures AUROC and cost of each form over seeds, for students of each depth."""
    found = {blocks: _separation(blocks, steps, seeds) for blocks, steps in toy_student.STEPS.items()}
    content = {"machine": harness.machine(), "seeds": seeds, "blocks": found}
    harness.write(harness.RESULTS / "mutual_information_separation.json", content)


def _separation(blocks: int, steps: int, seeds: int) -> dict[str, list[dict[str, float]]]:
    forms: dict[str, dict[str, Any] | None] = {
        ENTROPY: None,
        "last hidden state": {"layers": 0},
        "last hidden state, blocks of 16": {"form": "block", "block": 16},
        "last block": {"layers": 1},
        "last two thirds": {"layers": 2 * blocks // 3},
        "all blocks, dropout 0.1": {"dropout": 0.1},
        "all blocks, dropout 0.1, 4 draws": {"dropout": 0.1, "draws": 4},
        "all blocks, dropout 0.1, 16 draws": {"dropout": 0.1, "draws": 16},
        "all blocks, dropout 0.05": {},
        "all blocks, dropout 0.2": {"dropout": 0.2},
        f"ensemble of {ENSEMBLE}": {"members": True},
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    for seed in range(seeds):
        students = [toy_student.train(1000 * seed + i, blocks, steps) for i in range(ENSEMBLE)]
        generator = torch.Generator().manual_seed(seed)
        asked = {kind: toy_student.questions(kind, 256, generator) for kind in toy_student.KINDS}
        for form, options in forms.items():
            if options is not None and "members" in options:
                options = {"members": students}
            elif options is not None:
                options = {"draws": 8, **options}
            name = "entropy" if options is None else "mutual_information"
            arguments = None if options is None else {name: options}
            begin = time.perf_counter()
            values = {
                kind: acqcore.score(students[0], toy_student.samples(ids), name, acquisition_args=arguments)[name]
                for kind, ids in asked.items()
            }
            found[form].append(
                {
                    "ambiguous": toy_student.auroc(values["unseen"], values["ambiguous"]),
                    "easy": toy_student.auroc(values["unseen"], values["easy"]),
                    "both": toy_student.auroc(values["unseen"], torch.cat([values["ambiguous"], values["easy"]])),
                    "seconds": time.perf_counter() - begin,
                }
            )
    print(f"\n{blocks} blocks: AUROC of unseen keys over {seeds} seeds, mean (minimum); cost relative to entropy\n")
    print("| | above ambiguous | above easy | above both | cost |\n|---|---|---|---|---|")
    for form, rows in found.items():
        cells = []
        for kind in ("ambiguous", "easy", "both"):
            values_of = [row[kind] for row in rows]
            cells.append(f"{statistics.fmean(values_of):.2f} ({min(values_of):.2f})")
        cost = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(rows, found[ENTROPY], strict=True))
        print(f"| {form} | {' | '.join(cells)} | {cost:.1f} |", flush=True)
    return found


def eager(hidden: torch.Tensor, weight: torch.Tensor, draws: int) -> torch.Tensor:
    """K forward passes with a running mean, as a careful user would write it."""
    mean = torch.zeros(hidden.shape[0], weight.shape[0])
    entropy = torch.zeros(hidden.shape[0])
    for _ in range(draws):
        log_p = (torch.nn.functional.dropout(hidden, 0.1) @ weight.T).log_softmax(dim=1)
        p = log_p.exp()
        mean += p / draws
        entropy -= (p * log_p).sum(dim=1) / draws
    return -(mean * mean.log().masked_fill(mean == 0, 0)).sum(dim=1) - entropy


def _all_draws(hidden: torch.Tensor, weight: torch.Tensor, draws: int) -> torch.Tensor:
    """Log-probabilities ``[N, K, V]``, the libraries' input."""
    rows = torch.nn.functional.dropout(hidden[:, None].expand(-1, draws, -1), 0.1)
    return (rows @ weight.T).log_softmax(dim=2)


def baal(hidden: torch.Tensor, weight: torch.Tensor, draws: int) -> Any:
    heuristics = importlib.import_module("baal.active.heuristics")
    probabilities = _all_draws(hidden, weight, draws).exp().permute(0, 2, 1)  # [N, V, K]
    return heuristics.BALD().compute_score(probabilities.numpy())


def batchbald(hidden: torch.Tensor, weight: torch.Tensor, draws: int) -> torch.Tensor:
    module = importlib.import_module("batchbald_redux.batchbald")
    log_p = _all_draws(hidden, weight, draws)
    return module.compute_entropy(log_p) - module.compute_conditional_entropy(log_p)


def torch_uncertainty(hidden: torch.Tensor, weight: torch.Tensor, draws: int) -> torch.Tensor:
    metrics = importlib.import_module("torch_uncertainty.metrics")
    metric = metrics.MutualInformation(reduction="none")
    metric.update(_all_draws(hidden, weight, draws).exp())
    return metric.compute()


PEERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "baal BALD": ("baal.active.heuristics", baal),
    "batchbald_redux": ("batchbald_redux.batchbald", batchbald),
    "torch-uncertainty": ("torch_uncertainty.metrics", torch_uncertainty),
}


def head(turns: int) -> None:
    """Times one head pass against peers."""
    g = torch.Generator().manual_seed(0)
    d, v = 576, 49152
    weight = torch.randn(v, d, generator=g) * (3 / d**0.5)
    of_head = acqcore.Head(weight)
    compiled = torch.compile(eager)
    rows = []
    for n, draws, libraries in ((1024, 8, False), (256, 4, True), (256, 8, True), (256, 16, True)):
        hidden = torch.randn(n, d, generator=g)
        ours = partial(acqcore.mutual_information, hidden, of_head, draws=draws)
        calls: dict[str, Callable[[], object]] = {
            BARE: partial(torch.mm, hidden, weight.T),
            "acqcore cpu, element": ours,
            "acqcore cpu, block of 64": partial(ours, form="block"),
            "eager, K forwards": partial(eager, hidden, weight, draws),
            "torch.compile of eager": partial(compiled, hidden, weight, draws),
        }
        for name, (module, peer) in PEERS.items() if libraries else ():
            try:
                importlib.import_module(module)
            except ImportError as error:
                print(f"{name} cannot be imported: {error}")
                continue
            calls[name] = partial(peer, hidden, weight, draws)
        case = f"N={n} D={d} V={v} K={draws} float32"
        rows += harness.measure(case, calls, baseline=BARE, turns=turns)
    harness.report("mutual_information_head", rows, unit="", notes={"ratio_to": BARE})


def score(count: int, turns: int) -> None:
    """Times SmolLM2 on GSM8K rows."""
    student = acqcore.Student.load(smollm2_path(), dtype=torch.float32)
    samples = real_rows.gsm8k(count)

    def ours(**options: Any) -> Callable[[], object]:
        arguments = {"mutual_information": options}
        return lambda: acqcore.score(student, samples, "mutual_information", acquisition_args=arguments, progress=False)

    calls: dict[str, Callable[[], object]] = {
        TRUNK: partial(real_rows.run_trunk, student, real_rows.token_rows(student, samples)),
        "score(mutual_information, block)": ours(form="block"),
        "score(mutual_information, element)": ours(form="element"),
        "score(mutual_information, layers=2)": ours(layers=2, draws=8),
        "score(mutual_information, layers='all')": ours(layers="all", draws=8),
        "score(mutual_information), linear, 4 probes": ours(),
    }
    case = f"SmolLM2-135M float32, {count} GSM8K rows, 8 draws"
    rows = harness.measure(case, calls, baseline=TRUNK, turns=turns, memory=False)
    harness.report("mutual_information_score", rows, unit="", notes={"ratio_to": TRUNK})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("separation", "head", "score"), required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.part == "separation":
        separation(arguments.seeds)
    elif arguments.part == "head":
        head(arguments.turns)
    else:
        score(arguments.rows, arguments.turns)


if __name__ == "__main__":
    main()
