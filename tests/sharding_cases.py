"""Script of test_sharding.py: ``python sharding_cases.py FOLDER GROUP...`` runs the groups' cases, each on its ranks.

A case is a function that returns pairs (result of the ranks together, result of one process alone), or raises. Every
process writes its results to ``FOLDER/GROUP RANK``; the test module compares them. The file lists cases of heads (rows,
gradients, draws, padding, bytes sent, errors), then of students by kind of sharding (tensor parallel, DTensor, FSDP,
ZeRO-3), then the groups of cases by number of ranks.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib.machinery import ModuleSpec
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeAlias
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import acqcore
from acqcore.row_stats import FIELDS, RowStats
from acqcore.students.sharding import vocabulary_shard
from acqcore.testing import CASES as INPUTS, Case, random_case

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
    """This rank's part of ``head`` if rank i holds ``sizes[i]`` rows; ``padding`` rows of large logits come last."""
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
    """Rows per rank as torch.chunk and DTensor split them; the last ranks may have fewer or none."""
    size = -(-v // dist.get_world_size())
    return [min(size, max(v - size * rank, 0)) for rank in range(dist.get_world_size())]


def uneven(v: int) -> list[int]:
    """Rows per rank: none on rank 0, a few on the next ranks, the rest on the last."""
    few = [0] + [min(7 * rank, v // 8) for rank in range(1, dist.get_world_size() - 1)]
    return [*few, v - sum(few)]


def fields_of(stats: RowStats) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in (*FIELDS, "hidden_norm")}


def row_fields(got: RowStats, expected: RowStats, label: str) -> Pairs:
    whole = fields_of(expected)
    return {f"{label} {name}": (value, whole[name]) for name, value in fields_of(got).items()}


def both(call: Callable[..., Any], part: acqcore.Head, whole: acqcore.Head, *arguments: Any, **options: Any) -> Any:
    """Results of ``call(hidden, head, ...)`` for this rank's part of a head and for the whole head."""
    hidden, *rest = arguments
    return call(hidden, part, *rest, **options), call(hidden, whole, *rest, **options)


Part: TypeAlias = Callable[[acqcore.Head], acqcore.Head]


def cut(measure: Callable[[Case, str, Part], dict[str, Any]], name: str) -> Pairs:
    """What ``measure`` finds if ranks share an input's head in either way, beside what it finds with the whole head.

    The input is in float32 for the fused backend and in float64 for eager.
    """
    pairs: Pairs = {}
    case = INPUTS[name]()
    for backend, of_backend in (("cpu", case), ("eager", case.to(torch.float64))):
        whole = measure(of_backend, backend, lambda head: head)
        for sizes in (chunked, uneven):
            found = measure(of_backend, backend, lambda head, sizes=sizes: shard(head, sizes(len(head.weight))))
            pairs |= {f"{backend} {sizes.__name__} {key}": (value, whole[key]) for key, value in found.items()}
    return pairs


def rows(case: Case, backend: str, part: Part) -> dict[str, Any]:
    return fields_of(replace(case, head=part(case.head)).run(backend))


def gradients(case: Case, backend: str, part: Part) -> dict[str, Any]:
    n = len(case.hidden)
    targets = torch.zeros(n, dtype=torch.int64) if case.targets is None else case.targets.clone()
    offsets = torch.tensor(sorted({0, n // 3, n}))
    targets[offsets[:-1]] = targets[offsets[:-1]].clamp_min(0)  # a scored token in each sample
    given, options = (case.hidden, part(case.head), targets), {"temperature": case.temperature, "backend": backend}
    found = {form: acqcore.head_grad_norm(*given, offsets, form=form, **options) for form in ("gram", "direct", "auto")}
    found["sketch"] = acqcore.grad_sketch(*given, offsets, dim=64, **options)
    size = case.head.weight.abs().max()  # the gradient is a mean of weight rows minus one row
    found["hidden_grad"] = acqcore.hidden_grad(*given, **options) / size
    return found


def draws(case: Case, backend: str, part: Part) -> dict[str, Any]:
    options: dict[str, Any] = {"targets": case.targets, "draws": 3, "dropout": 0.2, "backend": backend}
    stats = {
        form: acqcore.mutual_information(case.hidden, part(case.head), form=form, block=8, **options)
        for form in ("element", "block")
    }
    members = torch.stack([case.hidden, case.hidden.flip(1), case.hidden * 0.5])
    heads = [part(replace(case.head, weight=case.head.weight * k)) for k in (1, 0.9, 1.1)]
    stats["members"] = acqcore.ensemble_stats(members, heads, case.targets, backend=backend)
    found = {f"{form} {field}": getattr(of_form, field) for form, of_form in stats.items() for field in BAYES_FIELDS}
    return found | {f"{form} votes": of_form.votes[:, of_form.valid] for form, of_form in stats.items()}


def padding() -> Pairs:
    """A vocabulary of 50 in 64 rows; if the padding counted, its logits would be the largest."""
    case = random_case(9, 16, 50, bias=True)
    world = dist.get_world_size()
    offsets = torch.tensor([0, 4, 9])
    pairs: Pairs = {}
    for backend in ("cpu", "eager"):
        head = shard(case.head, [64 // world] * world, padding=14)
        part = replace(case, head=head)
        pairs |= row_fields(part.run(backend), case.run(backend), backend)
        packed = (case.hidden, case.targets, offsets)
        pairs[f"{backend} grad_norm"] = both(acqcore.head_grad_norm, head, case.head, *packed, backend=backend)
        mutual = both(acqcore.mutual_information, head, case.head, case.hidden, backend=backend)
        pairs[f"{backend} mutual"] = (mutual[0].mutual_information, mutual[1].mutual_information)
    return pairs


def half_precision() -> Pairs:
    pairs: Pairs = {}
    for dtype in (torch.bfloat16, torch.float16):
        case = random_case(12, 40, 300, seed=3).to(dtype)
        part = replace(case, head=shard(case.head, chunked(300)))
        pairs |= row_fields(part.run("cpu"), case.run("cpu"), str(dtype))
        mutual = both(acqcore.mutual_information, part.head, case.head, case.hidden)
        pairs[f"{dtype} mutual"] = (mutual[0].mutual_information, mutual[1].mutual_information)
    return pairs


@contextmanager
def wire() -> Iterator[list[int]]:
    """Yields a list of the bytes that this rank passes to each collective inside the context."""
    sent: list[int] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def counted_gather(out: list[torch.Tensor], given: torch.Tensor, **options: Any) -> Any:
        sent.append(given.numel() * given.element_size())
        return gather(out, given, **options)

    def counted_reduce(given: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(given.numel() * given.element_size())
        return reduce(given, *arguments, **options)

    with mock.patch.multiple(dist, all_gather=counted_gather, all_reduce=counted_reduce):
        yield sent


def bytes_on_the_wire() -> Pairs:
    """Independent of the vocabulary: 64 per row and 8 per sample; for draws, 24 per row and draw and 48 per row."""
    pairs: Pairs = {}
    offsets, n, dim = torch.tensor([0, 4, 11]), 11, 128
    for v in (200, 20000):
        case = random_case(n, 16, v)
        head = shard(case.head, chunked(v))
        with wire() as sent:
            acqcore.row_stats(case.hidden, head, case.targets)
        pairs[f"{v} first"] = (sent, [4 * 8, n * 64])  # each rank's rows, once per head
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


def mesh(*sizes: int) -> Any:
    return init_device_mesh("cpu", sizes or (dist.get_world_size(),))


def few_rows() -> Pairs:
    """DTensors of five rows: on four ranks the last has none; on a 2 x 2 mesh each pair of ranks holds them all."""
    case = random_case(9, 16, 5, bias=True)
    square = mesh(2, 2)
    flat_rank, row_rank = dist.get_rank(), square.get_local_rank(1)
    given = {
        "flat": (mesh(), [Shard(0)], ([0, 2, 4, 5][flat_rank], [2, 2, 1, 0][flat_rank], 4)),
        "square": (square, [Replicate(), Shard(0)], ([0, 3][row_rank], [3, 2][row_rank], 2)),
    }
    pairs: Pairs = {}
    for name, (of_name, placements, expected) in given.items():
        weight = distribute_tensor(case.head.weight, of_name, placements)
        biases = {"sharded": distribute_tensor(case.head.bias, of_name, placements), "whole": case.head.bias}
        for kind, bias in biases.items():
            head = acqcore.Head(**vocabulary_shard(weight, bias))
            size = dist.get_world_size(head.group)
            pairs[f"{name} {kind}"] = ((head.vocab_start, len(head.weight), size), expected)
            pairs |= row_fields(replace(case, head=head).run("cpu"), case.run("cpu"), f"{name} {kind}")
    return pairs


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors() -> Pairs:
    """Every rank raises the same message."""
    rank, world = dist.get_rank(), dist.get_world_size()
    weight, group = torch.randn(8, 4), dist.group.WORLD
    hidden = torch.randn(3, 4)
    ends = ", ".join(f"{8 * i}:{8 * i + 8}" for i in range(world))

    def used(vocab_start: int = 0, vocab_size: int | None = None, targets: torch.Tensor | None = None) -> str:
        options = {"vocab_start": vocab_start, "vocab_size": vocab_size, "group": group}
        return message(lambda: acqcore.row_stats(hidden, acqcore.Head(weight, **options), targets))

    sizes = ", ".join(f"{8 * world + i} x 4" for i in range(world))
    drawn = torch.randn(2, 3, 4)
    whole = acqcore.Head(weight, vocab_size=8 * world)
    shared = acqcore.Head(weight, vocab_size=8 * world, group=group)
    ranks = tuple(range(world))
    return {
        "missing rows": (
            used(8 * rank, 8 * world + 1),
            f"ValueError: head: expected the ranks' rows to tile a vocabulary of {8 * world + 1}, got {ends}",
        ),
        "rows twice": (
            used(0, 8 * world),
            f"ValueError: head: expected the ranks' rows to tile a vocabulary of {8 * world}, "
            f"got {', '.join(['0:8'] * world)}",
        ),
        "sizes": (
            used(8 * rank, 8 * world + rank),
            f"ValueError: head: expected one vocabulary size and width on every rank of the group, got {sizes}",
        ),
        "no size": (
            used(),
            "ValueError: vocab_size: expected the size of the whole vocabulary if a group shares it, got None",
        ),
        "a group for some draws": (
            message(lambda: acqcore.ensemble_stats(drawn, [whole, shared])),
            f"ValueError: head: expected heads with the same group, got None and {ranks} for draw 1",
        ),
        "a DTensor": (
            message(lambda: acqcore.Head(distribute_tensor(weight, mesh(), [Shard(0)]))),
            "TypeError: weight: expected a plain tensor [V, D], got a DTensor of shape [8, 4]; give its local rows "
            "with vocab_start, vocab_size and group, or the model to acqcore.Student.from_model",
        ),
        "target": (
            used(8 * rank, 8 * world, torch.tensor([0, 1, 8 * world])),
            f"ValueError: targets: expected values in [0, {8 * world}) or -100 (ignored), got {8 * world} at row 2",
        ),
    }


ACQUISITIONS = ["entropy", "margin", "loss", "grad_norm", "badge", "mutual_information", "variation_ratio",
                "gradient_diversity"]  # fmt: skip


def tiny_llama(**config: Any) -> Any:
    """A random model of 321 tokens, which two ranks cannot split evenly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 321, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "initializer_range": 0.2, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config})).eval()


def saved_llama(**config: Any) -> str:
    """The path of the model that rank 0 saves in the run's folder for ``from_pretrained``."""
    path = Path(sys.argv[1]) / "-".join(["llama", *config])
    if dist.get_rank() == 0 and not path.exists():
        tiny_llama(**config).save_pretrained(path)
    dist.barrier()
    return str(path)


def samples(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Samples of 5 to 20 tokens as one batch, padded on the right."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 21, (count,), generator=g)
    longest = max(lengths.tolist(), default=2)
    ids = torch.zeros(count, longest, dtype=torch.int64)
    for row, length in zip(ids, lengths.tolist(), strict=True):
        row[:length] = torch.randint(0, 321, (length,), generator=g)
    return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def scored(student: Any, given: Any, arguments: dict[str, Any] | None = None) -> acqcore.Scores:
    # Draws, because the linear form, mutual information's default, needs unsharded parameters.
    arguments = arguments or {"mutual_information": {"draws": 8}}
    return acqcore.score(student, given, ACQUISITIONS, batch_tokens=40, acquisition_args=arguments)


def compared(student: Any, reference: Any, given: Any) -> Pairs:
    """Compares all results for a student with a sharded head with those of a whole model."""
    got, expected = scored(student, given), scored(reference, given)
    pairs: Pairs = {name: (got[name], expected[name]) for name in ACQUISITIONS}
    for key, options in (("one block", {"layers": 1, "draws": 3}), ("hidden state", {"layers": 0, "draws": 8})):
        drawn = dict.fromkeys(("mutual_information", "variation_ratio"), options)
        got, expected = scored(student, given, drawn), scored(reference, given, drawn)
        pairs[key] = (got["mutual_information"], expected["mutual_information"])
    pairs["own pass"] = (acqcore.grad_norm(student, given), acqcore.grad_norm(reference, given))
    pairs["vectors"] = (
        acqcore.badge_embedding(student, given, dim=64), acqcore.badge_embedding(reference, given, dim=64)
    )  # fmt: skip
    pairs["deeper"] = (
        message(lambda: acqcore.grad_norm(student, given, 1)),
        "ValueError: parameters: 1 needs a student with unsharded parameters; for a sharded one "
        "(tensor parallel, FSDP, ZeRO-3) only 'head' is supported",
    )
    pairs["linear form"] = (
        message(lambda: acqcore.score(student, given, "mutual_information")),
        "ValueError: layers: gradients in the trunk need a student with unsharded parameters, got a sharded one "
        "(tensor parallel, FSDP, ZeRO-3)",
    )
    return pairs


def placed(student: acqcore.Student) -> tuple[int, int, int, bool]:
    head = student.head
    return head.vocab_start, len(head.weight), head.vocab_size, head.group is None


def tensor_parallel(**config: Any) -> Pairs:
    """A model from ``from_pretrained(tp_plan="auto")``."""
    from transformers import AutoModelForCausalLM

    path = saved_llama(**config)
    model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
    student = acqcore.Student.from_model(model.eval())
    pairs = compared(student, AutoModelForCausalLM.from_pretrained(path).eval(), samples(7))
    pairs["rows"] = (placed(student), share())
    return pairs


def parallelized(style: Any, expected: Callable[[], tuple[int, int, int, bool]], **config: Any) -> Pairs:
    """A head sharded by ``parallelize_module``."""
    model, whole = tiny_llama(**config), tiny_llama(**config)
    parallelize_module(model, mesh(), {"lm_head": style()})
    student = acqcore.Student.from_model(model)
    pairs = compared(student, whole, samples(7))
    pairs["rows"] = (placed(student), expected())
    return pairs


def share() -> tuple[int, int, int, bool]:
    return [0, 161][dist.get_rank()], [161, 160][dist.get_rank()], 321, False


def data_parallel(wrap: Callable[[Any], Any], make: Callable[[], Any] = tiny_llama, *, trains: bool = True) -> Pairs:
    """Every rank scores its own samples: more on the first rank, and at the end none on the second."""
    whole = make()
    wrapped = wrap(make())
    student = acqcore.Student.from_model(wrapped)
    rank = dist.get_rank()
    pairs = compared(student, whole, samples([9, 2][rank], seed=rank))
    pairs["rows"] = (placed(student), (0, 321, 321, True))
    few = samples([4, 0][rank], seed=5)
    got = scored(student, few)
    expected = scored(whole, few)
    pairs.update({f"none on one rank: {name}": (got[name], expected[name]) for name in ACQUISITIONS})
    # A rank with bad samples raises when the others are done, and they raise too.
    bad = samples(5)
    bad["input_ids"][0, 0] = 321 if rank == 1 else 0

    def failing() -> str:
        try:
            acqcore.score(student, bad, batch_tokens=40)
        except (ValueError, RuntimeError) as error:
            return str(error)[:40]
        return "no error"

    of_ranks = ["student: another rank that shares its pa", "samples[0]: token id 321 is outside the "]
    pairs["error"] = (failing(), of_ranks[rank])
    if not trains:
        return pairs
    # The model trains like one that was never scored, and its scores follow.
    fresh = wrap(make())
    pairs["training goes on"] = (one_step(wrapped, lambda: scored(student, few)), one_step(fresh))
    again = scored(student, few)
    pairs["after a step"] = (again["entropy"], scored(acqcore.Student.from_model(fresh), few)["entropy"])
    pairs["it did step"] = (bool((again["entropy"] != got["entropy"]).all()), True)
    return pairs


def one_step(model: Any, before_step: Callable[[], Any] = lambda: None) -> float:
    """Loss after a step of gradient descent on one batch, the same on every rank. DeepSpeed ignores ``before_step``."""
    ids = samples(3, seed=9)["input_ids"]
    of_deepspeed = hasattr(model, "backward")  # its engine contains the optimizer
    optimizer = model if of_deepspeed else torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        if of_deepspeed:
            model.backward(loss)
        else:
            optimizer.zero_grad()
            loss.backward()
            before_step()
        optimizer.step()
    return round(loss.item(), 4)


def replicated() -> Pairs:
    """Scores a student between training steps of DistributedDataParallel, without running the trainer's hooks."""
    model, fresh, whole = tiny_llama(), tiny_llama(), tiny_llama()
    trained, alone = (torch.nn.parallel.DistributedDataParallel(given) for given in (model, fresh))
    rank = dist.get_rank()
    own = samples([4, 3][rank], seed=rank)
    expected = acqcore.grad_norm(whole, own, "all")
    pairs: Pairs = {}
    for name, student in {"model": model, "wrapper": trained}.items():
        with wire() as sent:
            pairs[f"norms of the {name}"] = (acqcore.grad_norm(student, own, "all"), expected)
        pairs[f"sent for the {name}"] = (sent, [])
        pairs[f"gradients left in the {name}"] = (any(p.grad is not None for p in model.parameters()), False)
    pairs["training goes on"] = (one_step(trained), one_step(alone))
    pairs["after a step"] = (acqcore.grad_norm(trained, own, "all"), acqcore.grad_norm(fresh, own, "all"))
    return pairs


def whole_student() -> Pairs:
    """A whole student calls no collective, even if there is a process group."""
    with wire() as sent:
        scored(tiny_llama(), samples(3))
    return {"sent": (sent, [])}


def members() -> Pairs:
    """An ensemble member that several ranks run together is refused."""
    students = [tiny_llama(), fsdp2(tiny_llama())]
    options = {"mutual_information": {"members": students}}
    given = samples(3)
    got = message(lambda: acqcore.score(students[0], given, "mutual_information", acquisition_args=options))
    expected = "members: expected models that each rank runs independently, got one under FSDP or ZeRO-3 at 1"
    return {"refused": (got, f"ValueError: {expected}")}


def adapted_llama() -> Any:
    """LoRA in the attention and on the head."""
    from peft import LoraConfig, get_peft_model

    model = tiny_llama()
    torch.manual_seed(1)
    options = LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False)
    return get_peft_model(model, options).eval()


def fsdp2_and_tensor_parallel() -> Pairs:
    """On a 2 x 2 mesh, ranks of one row have the same samples and run each forward together with the other row."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    path = saved_llama()
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(fsdp_size=2, tp_size=2))
    student = acqcore.Student.from_model(model.eval())
    row = dist.get_rank() // 2
    pairs = compared(student, tiny_llama(), samples([9, 2][row], seed=row))
    pairs["rows"] = (placed(student), (0, 321, 321, True))
    return pairs


def fsdp2(model: Any) -> Any:
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def fsdp1(model: Any, use_orig_params: bool) -> Any:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    policy = ModuleWrapPolicy({LlamaDecoderLayer, torch.nn.Linear} if use_orig_params else {LlamaDecoderLayer})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


def zero3(model: Any) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


class Gathered:
    """Imitates ``deepspeed.zero.GatheredParameters``: parameters hold their values inside the context."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters

    def __enter__(self) -> None:
        for parameter in self.parameters:
            flat = torch.cat([piece.flatten() for piece in self.pieces(parameter)])
            parameter.data = flat[: parameter.ds_shape.numel()].view(parameter.ds_shape)

    def __exit__(self, *_: Any) -> None:
        for parameter in self.parameters:
            parameter.data = torch.empty(0)

    @staticmethod
    def pieces(parameter: Any) -> list[torch.Tensor]:
        pieces = [torch.empty_like(parameter.ds_tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, parameter.ds_tensor)
        return pieces


def like_zero3(model: Any) -> Any:
    """ZeRO-3's contract without DeepSpeed: a rank has a piece of each parameter, all of it while its module runs."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        for parameter in own:
            parameter.ds_id, parameter.ds_shape = id(parameter), parameter.shape
            world = dist.get_world_size()
            padded = torch.nn.functional.pad(parameter.detach().flatten(), (0, -parameter.numel() % world))
            parameter.ds_tensor = padded.chunk(world)[dist.get_rank()].clone()
            parameter.data = torch.empty(0)
        if own:
            gathered = Gathered(own)
            module.register_forward_pre_hook(lambda *_, gathered=gathered: gathered.__enter__())
            module.register_forward_hook(lambda *_, gathered=gathered: gathered.__exit__())
    return model


def imitated_zero3() -> Pairs:
    deepspeed: Any = ModuleType("deepspeed")
    deepspeed.__spec__ = ModuleSpec("deepspeed", None)  # transformers looks for one
    deepspeed.zero = SimpleNamespace(GatheredParameters=Gathered)
    deepspeed.DeepSpeedEngine = type("DeepSpeedEngine", (torch.nn.Module,), {})
    sys.modules["deepspeed"] = deepspeed
    try:
        return data_parallel(like_zero3, trains=False)
    finally:
        del sys.modules["deepspeed"]


# Inputs whose rows and gradients are compared; the omitted ones are large and cover nothing more.
ADVERSARIAL = [name for name in INPUTS if name not in ("N = 8200", "D = 2001", "N = 0", "V = 262144")]
DRAWN = ["random", "std 30", "-inf columns", "-inf first tiles", "confident 1e-12", "ties", "V = 1", "V = 2",
         "some rows ignored", "softcap", "everything"]  # fmt: skip
# Inputs for four ranks: those that the number of ranks can affect.
FEW = ["random", "-inf first tiles", "confident 1e-12", "ties", "V = 1", "V = 2", "everything"]


def of_heads(rows_of: list[str], gradients_of: list[str], draws_of: list[str]) -> dict[str, Callable[[], Pairs]]:
    return {
        **{f"rows: {name}": partial(cut, rows, name) for name in rows_of},
        **{f"gradients: {name}": partial(cut, gradients, name) for name in gradients_of},
        **{f"draws: {name}": partial(cut, draws, name) for name in draws_of},
        "padding": padding,
        "half precision": half_precision,
        "bytes on the wire": bytes_on_the_wire,
        "errors": errors,
    }


CASES: dict[str, dict[str, Callable[[], Pairs]]] = {
    "two ranks": {
        **of_heads([*ADVERSARIAL, "N = 0", "V = 262144"], [n for n in ADVERSARIAL if n != "std 30"], DRAWN),
        "tensor parallel": tensor_parallel,
        "DTensor by rows": partial(parallelized, partial(ColwiseParallel, output_layouts=Replicate()), share),
        "DTensor by rows, local logits": partial(parallelized, ColwiseParallel, share),
        "DTensor by columns": partial(
            parallelized, partial(RowwiseParallel, input_layouts=Replicate()), lambda: (0, 321, 321, True)
        ),
        "tensor parallel, tied": partial(tensor_parallel, tie_word_embeddings=True),
        "DistributedDataParallel": replicated,
        "a whole student": whole_student,
        "members": members,
        "FSDP2": partial(data_parallel, fsdp2),
        "FSDP2, LoRA": partial(data_parallel, fully_shard, adapted_llama, trains=False),
        "FSDP2 in one unit": partial(data_parallel, fully_shard, trains=False),
        "FSDP1, flat parameters": partial(data_parallel, partial(fsdp1, use_orig_params=False)),
        "FSDP1, original parameters": partial(data_parallel, partial(fsdp1, use_orig_params=True)),
        "a contract like ZeRO-3's": imitated_zero3,
    },
    "four ranks": {
        **of_heads(FEW, FEW, FEW),
        "few rows": few_rows,
        "FSDP2 and tensor parallel": fsdp2_and_tensor_parallel,
    },
    "ZeRO-3": {"ZeRO-3": partial(data_parallel, zero3)},
}
RANKS = {"two ranks": 2, "four ranks": 4, "ZeRO-3": 2}


def run(folder: Path, rank: int, group: str) -> None:
    world = RANKS[group]
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))  # as torchrun does
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting of {world}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    results: dict[str, Pairs | str] = {}
    for name, case in CASES[group].items():
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, folder / f"{group} {rank}")
    gc.collect()  # frees trainers' reducers before their group
    dist.destroy_process_group()


def main(folder: Path, groups: list[str]) -> int:
    """Forks the ranks of one group after another, which so import the libraries once; returns how many failed."""
    importlib.import_module("transformers.models.llama.modeling_llama")
    failed = 0
    for group in groups:
        ranks = [get_context("fork").Process(target=run, args=(folder, i, group)) for i in range(RANKS[group])]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(400)
            rank.kill()
            rank.join()
        failed += sum(rank.exitcode != 0 for rank in ranks)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
