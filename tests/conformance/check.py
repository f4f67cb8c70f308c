"""Compares acqcore's values for a student with plain autograd on the model's own logits.

A verdict is ``right``, ``refused`` (a ValueError or TypeError that names the argument), ``wrong``, ``raw`` (any other
exception) or ``none`` (the model itself fails), with a reason unless it is ``right``.
"""

from __future__ import annotations

import contextlib
import copy
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import acqcore
from acqcore.philox import keep_mask

LENGTHS = (11, 6, 8)
#: Check -> its column of the table.
TITLES = {
    "scores": "loss, entropy",
    "head": "head norm",
    "all": "norm, all layers",
    "lora": "norm, LoRA",
    "draws": "mutual information",
    "bf16": "bfloat16",
}

#: Public argument names that may begin a refusal.
REFUSAL = re.compile(r"^(model|parameters|layers|trunk|samples|student|reference|acquisitions?)\b")

DRAWS, DROPOUT = 2, 0.25


class Verdict(NamedTuple):
    verdict: str
    reason: str = ""


class Wrong(Exception):  # noqa: N818
    """A value that differs from its reference."""


class NoReference(Exception):  # noqa: N818
    """The model itself fails."""


def samples(vocabulary: int) -> list[torch.Tensor]:
    """Rows of token ids; the first two tokens of each are context."""
    generator = torch.Generator().manual_seed(3)
    low = min(8, vocabulary // 2)  # avoids special tokens
    return [torch.randint(low, vocabulary, (length,), generator=generator) for length in LENGTHS]


def padded(rows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows as tensors with left padding, which acqcore strips."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    labels = ids.masked_fill(~mask, -100)
    for i, row in enumerate(rows):
        labels[i, width - len(row) : width - len(row) + 2] = -100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def check(model: Any, vocabulary: int) -> dict[str, Verdict]:
    """The verdict of each check. Adapters are added to ``model``."""
    rows = samples(vocabulary)
    functions = {"scores": _scores, "head": _head, "all": _all, "draws": _draws, "bf16": _bf16, "lora": _lora}
    return {name: _verdict(function, model, rows) for name, function in functions.items()}


def _verdict(function: Callable[[Any, list[torch.Tensor]], None], model: Any, rows: list[torch.Tensor]) -> Verdict:
    try:
        acqcore.Student.from_model(model)  # refuses before a reference is computed
        function(model, rows)
    except Wrong as error:
        return Verdict("wrong", str(error))
    except NoReference as error:
        return Verdict("none", str(error))
    except (ValueError, TypeError) as error:
        if type(error) in (ValueError, TypeError) and REFUSAL.match(str(error)):
            return Verdict("refused", str(error))
        return Verdict("raw", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Verdict("raw", f"{type(error).__name__}: {error}")
    return Verdict("right")


def _compare(
    compute: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    rows: list[torch.Tensor],
    expected: torch.Tensor,  # [n]
    rtol: float,
    atol: float = 0.0,
) -> None:
    """Raises ``Wrong`` unless the rows' values, in a batch and alone, match ``expected``."""
    together = compute(padded(rows))
    alone = torch.cat([compute(padded([row])) for row in rows])
    for where, values in (("in a batch", together), ("alone", alone)):
        error = (values.double() - expected).abs()
        if not bool((error <= rtol * expected.abs() + atol).all()):
            raise Wrong(f"{where} {_show(values)}, expected {_show(expected)}")


def _show(values: torch.Tensor) -> str:
    return " ".join(f"{value:.5g}" for value in values.tolist())


def _logits(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Logits ``[T - 2, V]`` that predict the scored tokens."""
    try:
        return model(input_ids=row[None]).logits[0, 1:-1]
    except Exception as error:
        raise NoReference(f"{type(error).__name__}: {error}") from error


def _loss(model: Any, row: torch.Tensor) -> torch.Tensor:
    logits = _logits(model, row)
    return torch.nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), row[2:])


@torch.no_grad()
def _scores(model: Any, rows: list[torch.Tensor]) -> None:
    for name in ("loss", "entropy"):
        expected = []
        for row in rows:
            log_p = _logits(model, row).double().log_softmax(1)
            value = (
                -(log_p.exp() * log_p).nansum(1) if name == "entropy" else -log_p[torch.arange(len(row) - 2), row[2:]]
            )
            expected.append(value.mean())
        _compare(lambda x, name=name: acqcore.score(model, x, name)[name], rows, torch.stack(expected), 2e-4, 1e-5)


def _head(model: Any, rows: list[torch.Tensor]) -> None:
    layer = model.get_output_embeddings()
    expected = []
    for row in rows:
        seen: list[torch.Tensor] = []

        def keep(_: Any, args: Any, output: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            product = output.detach().requires_grad_()  # the gradient of the head alone
            seen.extend([args[0].detach()[0], product])
            return product

        with layer.register_forward_hook(keep):
            [delta] = torch.autograd.grad(_loss(model, row), seen[1:2])
        squared = (delta[0].double().T @ seen[0].double()).square().sum()
        if layer.bias is not None:
            squared += delta[0].double().sum(0).square().sum()
        expected.append(squared.sqrt())
    _compare(lambda x: acqcore.grad_norm(model, x), rows, torch.stack(expected), 1e-3)


def _all(model: Any, rows: list[torch.Tensor]) -> None:
    model.requires_grad_(True)
    expected = _norms(model, rows)
    _compare(lambda x: acqcore.grad_norm(model, x, "all"), rows, expected, 2e-3)


def _norms(model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for row in rows:
        try:
            gradients = torch.autograd.grad(_loss(model, row), parameters, allow_unused=True)
        except Exception as error:
            raise NoReference(f"{type(error).__name__}: {error}") from error
        norms.append(sum(g.double().square().sum() for g in gradients if g is not None).sqrt())
    return torch.stack(norms)


def _lora(model: Any, rows: list[torch.Tensor]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    head = model.get_output_embeddings()
    # PEFT refuses ``out_proj`` in Mamba blocks, whose kernels read its weight, and a router, which returns a pair.
    recurrent = any(word in type(model).__name__.lower() for word in ("mamba", "falconh1", "nemotronh"))
    left = ("router", "out_proj") if recurrent else ("router",)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    linear = [n for n, _ in layers if not n.endswith(left)]
    if not linear:
        linear = [n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"]
    model.requires_grad_(False)
    config = LoraConfig(r=2, target_modules=linear, init_lora_weights=False)
    torch.manual_seed(0)
    try:
        inject_adapter_in_model(config, model)
    except Exception as error:  # PEFT refuses some layers of some models
        raise NoReference(f"{type(error).__name__}: {error}") from error
    _compare(lambda x: acqcore.grad_norm(model.eval(), x, "trainable"), rows, _norms(model, rows), 2e-3)


@torch.no_grad()
def _draws(model: Any, rows: list[torch.Tensor]) -> None:
    student = acqcore.Student.from_model(model)
    arguments = {"mutual_information": {"layers": "all", "draws": DRAWS, "dropout": DROPOUT}}

    def compute(x: dict[str, torch.Tensor]) -> torch.Tensor:
        return acqcore.score(student, x, "mutual_information", acquisition_args=arguments)["mutual_information"]

    compute(padded(rows[:1]))  # a student without blocks or branches is refused here
    sites = [branch for of_block in student.branches for branch in of_block]
    expected = []
    for row in rows:
        p = torch.stack([_dropped(model, row, sites, draw) for draw in range(DRAWS)])
        entropies = -(p * p.clamp_min(1e-300).log()).sum(2)
        mean = p.mean(0)
        expected.append((-(mean * mean.clamp_min(1e-300).log()).sum(1) - entropies.mean(0)).mean())
    _compare(compute, rows, torch.stack(expected), 5e-3, 1e-4)


def _dropped(model: Any, row: torch.Tensor, sites: list[Any], draw: int) -> torch.Tensor:
    """Probabilities ``[T - 2, V]`` under one draw of dropout on the outputs of ``sites``."""
    sample = torch.full((len(row),), zlib.crc32(row.numpy().tobytes()))

    def hook(site: int) -> Callable[..., Any]:
        def drop(_: Any, args: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, (tuple, list)) else output
            keep = keep_mask(sample, torch.arange(len(row)), value.shape[-1], DROPOUT, 0, draw, site)
            value = value * keep.view(value.shape) / (1 - DROPOUT)
            return type(output)([value, *output[1:]]) if isinstance(output, (tuple, list)) else value

        return drop

    with contextlib.ExitStack() as hooks:
        for site, module in enumerate(sites, 1):
            hooks.enter_context(module.register_forward_hook(hook(site)))
        return _logits(model, row).double().softmax(1)


@torch.no_grad()
def _bf16(model: Any, rows: list[torch.Tensor]) -> None:
    model = copy.deepcopy(model).to(torch.bfloat16)
    expected = torch.stack([_loss(model, row).double() for row in rows])
    _compare(lambda x: acqcore.score(model, x, "loss")["loss"], rows, expected, 5e-2, 5e-2)
