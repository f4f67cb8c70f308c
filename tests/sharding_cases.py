"""What each process of test_sharding.py runs: ``python sharding_cases.py FOLDER RANK WORLD GROUP``.

A case is a function that returns pairs (what the ranks got together, what one process gets alone), or raises. Every
process writes its results to ``FOLDER/RANK``; the test module compares them.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

import acqcore
from acqcore.row_stats import FIELDS, RowStats
from acqcore.testing import CASES as INPUTS
from acqcore.testing import Case, random_case

Pairs: TypeAlias = dict[str, tuple[Any, Any]]

BAYES_FIELDS = (
    "mutual_information",
    "predictive_entropy",
    "expected_entropy",
    "variation_ratio",
    "expected_pairwise_kl",
    "logprob",
    "quadratic_mutual_information",
)


def shard(head: acqcore.Head, sizes: list[int], padding: int = 0) -> acqcore.Head:
    """This rank's rows where rank i holds ``sizes[i]``; ``padding`` rows of large logits follow the last."""
    rank = dist.get_rank()
    start = sum(sizes[:rank])
    weight, bias = head.weight, head.bias
    weight = torch.cat([weight, weight.new_full((padding, weight.shape[1]), 9.0)])
    bias = None if bias is None else torch.cat([bias, bias.new_full((padding,), 9.0)])
    part = slice(start, start + sizes[rank])
    return replace(
        head, weight=weight[part], bias=None if bias is None else bias[part], vocab_start=start, group=dist.group.WORLD
    )


def chunked(v: int) -> list[int]:
    """Rows of each rank as torch.chunk and DTensor cut them: the last may have fewer, or none."""
    size = -(-v // dist.get_world_size())
    return [min(size, max(v - size * rank, 0)) for rank in range(dist.get_world_size())]


def uneven(v: int) -> list[int]:
    """Rank 0 holds none, the next a few, the last what is left."""
    few = [0] + [min(7 * rank, v // 8) for rank in range(1, dist.get_world_size() - 1)]
    return [*few, v - sum(few)]


def row_fields(got: RowStats, expected: RowStats) -> Pairs:
    return {name: (getattr(got, name), getattr(expected, name)) for name in (*FIELDS, "hidden_norm")}


def inputs(name: str) -> Iterator[tuple[str, Case, str]]:
    """An input in float32 on the fused backend and in float64 on eager."""
    case = INPUTS[name]()
    yield "cpu", case, "cpu"
    yield "eager", case.to(torch.float64), "eager"


def rows(name: str) -> Pairs:
    pairs: Pairs = {}
    for label, case, backend in inputs(name):
        for cut in (chunked, uneven):
            part = replace(case, head=shard(case.head, cut(len(case.head.weight))))
            fields = row_fields(part.run(backend), case.run(backend))
            pairs.update({f"{label} {cut.__name__} {field}": pair for field, pair in fields.items()})
    return pairs


def gradients(name: str) -> Pairs:
    pairs: Pairs = {}
    for label, case, backend in inputs(name):
        n, v = len(case.hidden), len(case.head.weight)
        targets = torch.zeros(n, dtype=torch.int64) if case.targets is None else case.targets.clone()
        offsets = torch.tensor(sorted({0, n // 3, n}))
        targets[offsets[:-1]] = targets[offsets[:-1]].clamp_min(0)  # a scored token in each sample
        for cut in (chunked, uneven):
            head = shard(case.head, cut(v))
            options: dict[str, Any] = {"temperature": case.temperature, "backend": backend}
            for form in ("gram", "direct", "auto"):
                norms = [
                    acqcore.head_grad_norm(case.hidden, h, targets, offsets, form=form, **options)
                    for h in (head, case.head)
                ]
                pairs[f"{label} {cut.__name__} {form}"] = (norms[0], norms[1])
            sketches = [
                acqcore.grad_sketch(case.hidden, h, targets, offsets, dim=64, **options) for h in (head, case.head)
            ]
            grads = [acqcore.hidden_grad(case.hidden, h, targets, **options) for h in (head, case.head)]
            pairs[f"{label} {cut.__name__} sketch"] = (sketches[0], sketches[1])
            size = case.head.weight.abs().max()  # the gradient is a mean of rows of the weight, less one of them
            pairs[f"{label} {cut.__name__} hidden_grad"] = (grads[0] / size, grads[1] / size)
    return pairs


def draws(name: str) -> Pairs:
    pairs: Pairs = {}
    for label, case, backend in inputs(name):
        for cut in (chunked, uneven):
            head = shard(case.head, cut(len(case.head.weight)))
            options: dict[str, Any] = {"targets": case.targets, "draws": 3, "dropout": 0.2, "backend": backend}
            stats = [
                (f"{form}", *(acqcore.mutual_information(case.hidden, h, form=form, block=8, **options)
                              for h in (head, case.head)))
                for form in ("element", "block")
            ]  # fmt: skip
            members = torch.stack([case.hidden, case.hidden.flip(1), case.hidden * 0.5])
            whole = [replace(case.head, weight=case.head.weight * k) for k in (1, 0.9, 1.1)]
            parts = [shard(member, cut(len(case.head.weight))) for member in whole]
            of_members = [acqcore.ensemble_stats(members, h, case.targets, backend=backend) for h in (parts, whole)]
            stats.append(("members", of_members[0], of_members[1]))
            for form, got, expected in stats:
                pairs.update(
                    {
                        f"{label} {cut.__name__} {form} {field}": (getattr(got, field), getattr(expected, field))
                        for field in BAYES_FIELDS
                    }
                )
                valid = expected.valid
                pairs[f"{label} {cut.__name__} {form} votes"] = (got.votes[:, valid], expected.votes[:, valid])
    return pairs


def padding() -> Pairs:
    """A vocabulary of 50 in 64 rows: the padding's logits, were they counted, would be the largest."""
    case = random_case(9, 16, 50, bias=True)
    world = dist.get_world_size()
    offsets = torch.tensor([0, 4, 9])
    assert case.targets is not None
    pairs: Pairs = {}
    for backend in ("cpu", "eager"):
        head = shard(case.head, [64 // world] * world, padding=14)
        part = replace(case, head=head)
        pairs.update({f"{backend} {k}": pair for k, pair in row_fields(part.run(backend), case.run(backend)).items()})
        norms = [
            acqcore.head_grad_norm(case.hidden, h, case.targets, offsets, backend=backend) for h in (head, case.head)
        ]
        mutual = [acqcore.mutual_information(case.hidden, h, backend=backend) for h in (head, case.head)]
        pairs[f"{backend} grad_norm"] = (norms[0], norms[1])
        pairs[f"{backend} mutual"] = (mutual[0].mutual_information, mutual[1].mutual_information)
    return pairs


def half_precision() -> Pairs:
    """bfloat16 and float16 shards."""
    pairs: Pairs = {}
    for dtype in (torch.bfloat16, torch.float16):
        case = random_case(12, 40, 300, seed=3).to(dtype)
        part = replace(case, head=shard(case.head, chunked(300)))
        pairs.update({f"{dtype} {k}": pair for k, pair in row_fields(part.run("cpu"), case.run("cpu")).items()})
        mutual = [acqcore.mutual_information(case.hidden, h) for h in (part.head, case.head)]
        pairs[f"{dtype} mutual"] = (mutual[0].mutual_information, mutual[1].mutual_information)
    return pairs


@contextmanager
def wire() -> Iterator[list[int]]:
    """Bytes that this rank gives to each collective meanwhile."""
    sent: list[int] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def counted_gather(out: list[torch.Tensor], given: torch.Tensor, **options: Any) -> Any:
        sent.append(given.numel() * given.element_size())
        return gather(out, given, **options)

    def counted_reduce(given: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(given.numel() * given.element_size())
        return reduce(given, *arguments, **options)

    dist.all_gather, dist.all_reduce = counted_gather, counted_reduce
    try:
        yield sent
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce


def bytes_on_the_wire() -> Pairs:
    """The same for two vocabularies: 64 of a row, 8 of a sample, 24 of a row and draw and 48 of a row."""
    pairs: Pairs = {}
    offsets, n, dim = torch.tensor([0, 4, 11]), 11, 128
    for v in (200, 20000):
        case = random_case(n, 16, v)
        assert case.targets is not None
        head = shard(case.head, chunked(v))
        with wire() as sent:
            acqcore.row_stats(case.hidden, head, case.targets)
        pairs[f"{v} first"] = (sent, [4 * 8, n * 64])  # each rank's rows, once a head
        with wire() as sent:
            acqcore.row_stats(case.hidden, head, case.targets)
        pairs[f"{v} rows"] = (sent, [n * 64])
        with wire() as sent:
            acqcore.head_grad_norm(case.hidden, head, case.targets, offsets)
        pairs[f"{v} grad_norm"] = (sent, [n * 64, 2 * 8])
        with wire() as sent:
            acqcore.grad_sketch(case.hidden, head, case.targets, offsets, dim=dim)
        pairs[f"{v} sketch"] = (sent, [n * 64, 2 * dim * 4])
        with wire() as sent:
            acqcore.mutual_information(case.hidden, head, draws=5)
        pairs[f"{v} draws"] = (sent, [n * 5 * 24, n * 48])
        with wire() as sent:
            acqcore.row_stats(case.hidden[:0], head)
            acqcore.row_stats(case.hidden, case.head)
        pairs[f"{v} none"] = (sent, [])
    return pairs


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors() -> Pairs:
    """Every rank raises, and says the same."""
    rank, world = dist.get_rank(), dist.get_world_size()
    weight, group = torch.randn(8, 4), dist.group.WORLD
    hidden = torch.randn(3, 4)
    ends = ", ".join(f"{8 * i}:{8 * i + 8}" for i in range(world))

    def used(**options: Any) -> Callable[[], Any]:
        return lambda: acqcore.row_stats(hidden, acqcore.Head(weight, group=group, **options))

    short = {"vocab_start": 8 * rank, "vocab_size": 8 * world + 1}
    same = {"vocab_start": 0, "vocab_size": 8 * world}
    own = {"vocab_start": 8 * rank, "vocab_size": 8 * world + rank}
    sizes = ", ".join(f"{8 * world + i} x 4" for i in range(world))
    drawn = torch.randn(2, 3, 4)
    whole = acqcore.Head(weight, vocab_size=8 * world)
    shared = acqcore.Head(weight, vocab_size=8 * world, group=group)
    ranks = tuple(range(world))
    return {
        "missing rows": (
            message(used(**short)),
            f"ValueError: head: expected the ranks' rows to tile a vocabulary of {8 * world + 1}, got {ends}",
        ),
        "rows twice": (
            message(used(**same)),
            f"ValueError: head: expected the ranks' rows to tile a vocabulary of {8 * world}, "
            f"got {', '.join(['0:8'] * world)}",
        ),
        "sizes": (
            message(used(**own)),
            f"ValueError: head: expected one vocabulary size and width on every rank of the group, got {sizes}",
        ),
        "no size": (
            message(used()),
            "ValueError: vocab_size: expected the size of the whole vocabulary where a group shares it, got None",
        ),
        "a group for some draws": (
            message(lambda: acqcore.ensemble_stats(drawn, [whole, shared])),
            f"ValueError: head: expected heads alike in group, got None and {ranks} for draw 1",
        ),
        "target": (
            message(
                lambda: acqcore.row_stats(
                    hidden,
                    acqcore.Head(weight, vocab_start=8 * rank, vocab_size=8 * world, group=group),
                    torch.tensor([0, 1, 8 * world]),
                )
            ),
            f"ValueError: targets: expected values in [0, {8 * world}) or -100 (ignored), got {8 * world} at row 2",
        ),
    }


# Rows and gradients of these inputs are compared; those left out are large and reach nothing more.
ADVERSARIAL = [name for name in INPUTS if name not in ("N = 8200", "D = 2001", "N = 0", "V = 262144")]
DRAWN = ["random", "std 30", "-inf columns", "-inf first tiles", "confident 1e-12", "ties", "V = 1", "V = 2",
         "some rows ignored", "softcap", "everything"]  # fmt: skip
# Four ranks: what their number can change.
FEW = ["random", "-inf first tiles", "confident 1e-12", "ties", "V = 1", "V = 2", "everything"]


def of_heads(rows_of: list[str], gradients_of: list[str], draws_of: list[str]) -> dict[str, Callable[[], Pairs]]:
    return {
        **{f"rows: {name}": partial(rows, name) for name in rows_of},
        **{f"gradients: {name}": partial(gradients, name) for name in gradients_of},
        **{f"draws: {name}": partial(draws, name) for name in draws_of},
        "padding": padding,
        "half precision": half_precision,
        "bytes on the wire": bytes_on_the_wire,
        "errors": errors,
    }


CASES: dict[str, dict[str, Callable[[], Pairs]]] = {
    "heads": of_heads([*ADVERSARIAL, "N = 0", "V = 262144"], ADVERSARIAL, DRAWN),
    "heads of 4": of_heads(FEW, FEW, FEW),
}


def main(folder: Path, rank: int, world: int, cases: dict[str, Callable[[], Pairs]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results: dict[str, Pairs | str] = {}
    for name, case in cases.items():
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, folder / f"{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), CASES[sys.argv[4]])
