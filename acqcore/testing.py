"""Inputs and assertions that check a backend against the numerics contract, for tests of acqcore and other backends.

The oracle is the ``eager`` backend in float64 on the same, already rounded inputs. Tolerances are those of the
contract and do not depend on the input dtype, because products always accumulate in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from acqcore.head import Head
from acqcore.row_stats import FIELDS, RowStats, logit_stats, row_stats

#: field -> (absolute, relative) tolerance; the error may reach absolute + relative * |value|.
TOLERANCE: dict[str, tuple[float, float]] = {
    "logsumexp": (2e-5, 2e-5),
    "logprob": (2e-5, 2e-5),
    "entropy": (2e-5, 2e-5),
    "varentropy": (1e-4, 1e-4),
    "sum_sq_prob": (0.0, 1e-4),
    "gini": (1e-24, 1e-4),
    "top1_prob": (0.0, 1e-4),
    "top2_prob": (1e-24, 1e-4),
    "top1_index": (0.0, 0.0),
    "residual_norm": (1e-24, 1e-4),
    "hidden_norm": (1e-6, 1e-6),
}


@dataclass(frozen=True, eq=False)
class Case:
    """One input of ``row_stats``."""

    hidden: torch.Tensor  # [N, D]
    head: Head
    targets: torch.Tensor | None  # [N] int64
    temperature: float = 1.0

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Case:
        """The case rounded to ``dtype``; strides are kept."""

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            memory = tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,))  # elements may overlap
            return memory.to(device, dtype, copy=True).as_strided(tensor.shape, tensor.stride())

        bias = None if self.head.bias is None else self.head.bias.to(device)
        head = replace(self.head, weight=convert(self.head.weight), bias=bias)
        targets = None if self.targets is None else self.targets.to(device)
        return Case(convert(self.hidden), head, targets, self.temperature)

    def run(self, backend: str) -> RowStats:
        """``row_stats`` of the case."""
        return row_stats(self.hidden, self.head, self.targets, temperature=self.temperature, backend=backend)

    def oracle(self) -> RowStats:
        """``row_stats`` of the case in float64."""
        return self.to(torch.float64).run("eager")


def random_case(
    n: int,
    d: int,
    v: int,
    *,
    std: float = 3.0,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    targets: bool = True,
    seed: int = 0,
) -> Case:
    """Gaussian hidden states ``[n, d]`` and weights ``[v, d]`` whose logits have standard deviation ``std``."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g)
    weight = torch.randn(v, d, generator=g) * (std / max(d, 1) ** 0.5)
    b = torch.randn(v, generator=g) if bias else None
    y = torch.randint(0, v, (n,), generator=g) if targets else None
    return Case(hidden, Head(weight, b, softcap, scale), y, temperature)


def case_from_logits(logits: torch.Tensor, targets: torch.Tensor | None = None) -> Case:
    """A case with exactly these logits ``[N, V]``, -inf only in whole columns; its hidden states are unit vectors."""
    absent = (logits == -torch.inf).all(dim=0)
    bias = torch.zeros(logits.shape[1]).masked_fill(absent, -torch.inf) if bool(absent.any()) else None
    weight = logits.T.contiguous().masked_fill(absent[:, None], 0.0)
    return Case(torch.eye(logits.shape[0]), Head(weight, bias), targets)


def exact_hidden_grad(case: Case) -> torch.Tensor:
    """Gradient of the summed loss with respect to the hidden states, by autograd in float64: ``[N, D]``."""
    exact = case.to(torch.float64)
    assert exact.targets is not None
    hidden = exact.hidden.requires_grad_()
    z = exact.head.logits(hidden, exact.temperature)
    loss = torch.nn.functional.cross_entropy(z, exact.targets, ignore_index=-100, reduction="sum")
    return torch.autograd.grad(loss, hidden)[0]


def _confident(gap: float) -> Case:
    """Rows whose runner-up is ``gap`` nats below the maximum; targets are the maximum, the runner-up and another."""
    logits = torch.full((4, 700), -gap - 20.0)
    logits[:, 300] = 0.0
    logits[:, 650] = -gap
    logits[3] += 40.0
    return case_from_logits(logits, torch.tensor([300, 650, 5, 300]))


def _absent_columns(v: int, begin: int, end: int) -> Case:
    """Random logits whose columns ``begin:end`` are -inf."""
    case = random_case(9, 33, v, bias=True)
    assert case.head.bias is not None
    assert case.targets is not None
    case.head.bias[begin:end] = -torch.inf
    return replace(case, targets=case.targets.where((case.targets < begin) | (case.targets >= end), 0))


def _strided() -> Case:
    """Views: every other hidden column, a transposed weight."""
    case = random_case(20, 64, 300)
    return Case(case.hidden[:, ::2], Head(case.head.weight.T.contiguous().T[:, ::2]), case.targets)


def _expanded() -> Case:
    """Rows and columns of stride 0."""
    case = random_case(20, 64, 300)
    return Case(case.hidden[:1].expand(20, 64), Head(case.head.weight[:, :1].expand(300, 64)), case.targets)


def _ignored(every: int) -> Case:
    case = random_case(23, 40, 301)
    assert case.targets is not None
    case.targets[::every] = -100
    return case


def _ties() -> Case:
    """Equal maxima in different tiles: the lowest index is the maximum, and the runner-up has the same logit."""
    logits = torch.randn(3, 1200, generator=torch.Generator().manual_seed(0)).clamp(max=2.0)
    logits[:, [7, 8, 600, 1199]] = 5.0
    return case_from_logits(logits, torch.tensor([7, 8, 1199]))


CASES: dict[str, Callable[[], Case]] = {
    "random": lambda: random_case(37, 123, 507),
    "std 30": lambda: random_case(29, 576, 4099, std=30.0),
    "all logits -150": lambda: case_from_logits(
        torch.randn(5, 900, generator=torch.Generator().manual_seed(1)) - 150, torch.arange(5)
    ),
    "all logits equal": lambda: case_from_logits(torch.full((3, 777), 2.5), torch.tensor([0, 5, 776])),
    "rising logits": lambda: case_from_logits(torch.arange(2000.0).expand(2, 2000) / 16, torch.tensor([0, 1999])),
    "falling logits": lambda: case_from_logits(-torch.arange(2000.0).expand(2, 2000) / 16, torch.tensor([0, 1999])),
    "-inf columns": lambda: _absent_columns(507, 100, 103),
    "-inf first tiles": lambda: _absent_columns(2000, 0, 1100),
    "-inf last tiles": lambda: _absent_columns(2000, 900, 2000),
    "confident 1e-12": lambda: _confident(27.6),
    "confident 1e-20": lambda: _confident(46.0),
    "ties": _ties,
    "V = 1": lambda: random_case(5, 16, 1),
    "V = 2": lambda: random_case(5, 16, 2),
    "V = 255": lambda: random_case(15, 16, 255),
    "V = 256": lambda: random_case(15, 16, 256),
    "V = 257": lambda: random_case(15, 16, 257),
    "V = 262144": lambda: random_case(3, 8, 262144),
    "D = 1": lambda: random_case(6, 1, 130),
    "D = 2001": lambda: random_case(31, 2001, 331),
    "N = 1": lambda: random_case(1, 96, 1000),
    "N = 0": lambda: random_case(0, 96, 1000),
    "N = 8200": lambda: random_case(8200, 4, 70),
    "strided": _strided,
    "expanded": _expanded,
    "some rows ignored": lambda: _ignored(3),
    "all rows ignored": lambda: _ignored(1),
    "no targets": lambda: random_case(11, 40, 600, targets=False),
    "bias": lambda: random_case(14, 40, 600, bias=True),
    "softcap": lambda: random_case(14, 40, 600, std=20.0, softcap=30.0),
    "scale, temperature": lambda: random_case(14, 40, 600, scale=0.0625, std=30.0, temperature=0.7),
    "everything": lambda: random_case(14, 41, 600, bias=True, softcap=15.0, scale=0.5, temperature=1.3),
}  # fmt: skip


def logit_cases() -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None, float]]:
    """Every case as (name, logits ``[N, V]`` float32, targets ``[N]``, temperature)."""
    for name, make in CASES.items():
        case = make()
        yield name, case.head.logits(case.hidden), case.targets, case.temperature


def worst_errors(stats: RowStats, oracle: RowStats) -> dict[str, float]:
    """Largest ratio of error to tolerance per field, over scored rows (1 is the bound); NaN patterns must agree."""
    errors = {}
    for field in (*FIELDS, "hidden_norm"):
        got, expected = getattr(stats, field), getattr(oracle, field)
        if (got is None) != (expected is None):
            raise AssertionError(f"{field}: got {got}, expected {expected}")
        if expected is None:
            continue
        got, expected = got.double().cpu(), expected.double().cpu()
        if got.shape != expected.shape:
            raise AssertionError(f"{field}: shape {list(got.shape)}, expected {list(expected.shape)}")
        if not torch.equal(got.isnan(), expected.isnan()):
            raise AssertionError(f"{field}: NaN in different rows than the oracle")
        same = (got == expected) | expected.isnan()  # includes equal infinities
        absolute, relative = TOLERANCE[field]
        bound = absolute + relative * expected.abs()
        error = ((got - expected).abs() / bound.clamp_min(1e-300)).masked_fill(same, 0.0)
        errors[field] = float(error.max()) if len(error) else 0.0
    return errors


def assert_close_to_oracle(stats: RowStats, oracle: RowStats) -> None:
    """Asserts that every field is within the contract's tolerance of the float64 oracle.

    Raises:
        AssertionError: naming each field beyond its bound, with the factor.
    """
    beyond = {field: error for field, error in worst_errors(stats, oracle).items() if not error <= 1}
    if beyond:
        raise AssertionError(f"ratio of error to tolerance: { {k: round(v, 2) for k, v in beyond.items()} }")


def assert_no_worse_than_eager(case: Case, backend: str, slack: float = 0.5) -> None:
    """Asserts that the backend's error is at most eager torch's in the same dtype plus ``slack`` times the tolerance.

    Raises:
        AssertionError: naming each field that is worse.
    """
    oracle = case.oracle()
    ours = worst_errors(case.run(backend), oracle)
    eager = worst_errors(case.run("eager"), oracle)
    worse = {field: (error, eager[field]) for field, error in ours.items() if not error <= eager[field] + slack}
    if worse:
        raise AssertionError(f"ratio of error to tolerance, (backend, eager): {worse}")


def assert_logits_match(logits: torch.Tensor, targets: torch.Tensor | None, temperature: float, backend: str) -> None:
    """Asserts that ``logit_stats`` of ``logits [N, V]`` agrees with the float64 oracle on the same values."""
    got = logit_stats(logits, targets, temperature=temperature, backend=backend)
    oracle = logit_stats(logits.double(), targets, temperature=temperature, backend="eager")
    assert_close_to_oracle(got, oracle)
