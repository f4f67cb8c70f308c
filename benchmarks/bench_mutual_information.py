"""Mutual information (BALD): separation of ignorance from ambiguity, and cost against K forward passes of the head.

``--part separation`` trains small students whose ignorance is known (``toy_student``) and tabulates how well each form
ranks unknown questions above ambiguous and above known ones (AUROC, mean and minimum over the seeds), and its cost.
``--part head`` times one head pass against peers, ``--part score`` SmolLM2 on GSM8K rows. Each part writes
``results/mutual_information_<part>.json`` and prints its table.
"""

from __future__ import annotations

import argparse
import importlib.util
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
    forms: dict[str, dict[str, Any]] = {
        ENTROPY: {},
        "last hidden state": {"layers": 0},
        "last hidden state, blocks of 16": {"form": "block", "block": 16},
        "last block": {"layers": 1},
        "last two thirds": {"layers": 2 * blocks // 3},
        "all blocks, dropout 0.1": {"dropout": 0.1},
        "all blocks, dropout 0.1, 4 draws": {"dropout": 0.1, "draws": 4},
        "all blocks, dropout 0.1, 16 draws": {"dropout": 0.1, "draws": 16},
        "all blocks, dropout 0.05": {},
        "all blocks, dropout 0.2": {"dropout": 0.2},
        f"ensemble of {ENSEMBLE}": {},
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    for seed in range(seeds):
        students = [toy_student.train(1000 * seed + i, blocks, steps) for i in range(ENSEMBLE)]
        forms[f"ensemble of {ENSEMBLE}"] = {"members": students}
        generator = torch.Generator().manual_seed(seed)
        asked = {kind: toy_student.questions(kind, 256, generator) for kind in toy_student.KINDS}
        for form, options in forms.items():
            name = "entropy" if form == ENTROPY else "mutual_information"
            if "members" not in options:
                options = {"draws": 8, **options}
            given = None if form == ENTROPY else {name: options}
            begin = time.perf_counter()
            values = {
                kind: acqcore.score(students[0], toy_student.samples(ids), name, acquisition_args=given)[name]
                for kind, ids in asked.items()
            }
            seconds = time.perf_counter() - begin
            others = {key: values[key] for key in ("ambiguous", "easy")}
            others["both"] = torch.cat(list(others.values()))
            areas = {key: toy_student.auroc(values["unseen"], below) for key, below in others.items()}
            found[form].append({**areas, "seconds": seconds})
    print(f"\n{blocks} blocks: AUROC of unseen keys over {seeds} seeds, mean (minimum); cost relative to entropy\n")
    table = []
    for form, rows in found.items():
        columns = [[row[kind] for row in rows] for kind in ("ambiguous", "easy", "both")]
        cost = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(rows, found[ENTROPY], strict=True))
        cells = [f"{statistics.fmean(column):.2f} ({min(column):.2f})" for column in columns]
        table.append([form, *cells, f"{cost:.1f}"])
    print("\n".join(harness.markdown(["", "above ambiguous", "above easy", "above both", "cost"], *table)), flush=True)
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
    from baal.active.heuristics import BALD

    probabilities = _all_draws(hidden, weight, draws).exp().permute(0, 2, 1)  # [N, V, K]
    return BALD().compute_score(probabilities.numpy())


def batchbald(hidden: torch.Tensor, weight: torch.Tensor, draws: int) -> torch.Tensor:
    from batchbald_redux.batchbald import compute_conditional_entropy, compute_entropy

    log_p = _all_draws(hidden, weight, draws)
    return compute_entropy(log_p) - compute_conditional_entropy(log_p)


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
        for name, peer in {"baal BALD": baal, "batchbald_redux": batchbald}.items() if libraries else ():
            if importlib.util.find_spec(name.split()[0]) is None:
                print(f"not measured: {name}: not installed")
            else:
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
