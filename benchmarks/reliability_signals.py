"""The stochastic signals whose reliability is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TRUNK, ENTROPY = "trunk", "entropy"
MI = "mutual_information"
EPIG = "epig"
LAPLACE = "laplace"


@dataclass(frozen=True, eq=False)
class Signal:
    """A signal to measure.

    Attributes:
        family: determines the colour in the plot.
        acquisition: name in acqcore.
        options: its arguments; ``"calibrated"`` for ``dropout`` means the student's calibrated rate, and ``reference``
            names the kind of reference set.
        half: the signal with half the draws or probes.
        pass_: a pass starts once the previous pass has all seeds; products are counted for pass 0.
        stochastic: whether values depend on the seed.
    """

    family: str
    acquisition: str
    options: Mapping[str, Any] = field(default_factory=dict)
    half: str | None = None
    pass_: int = 0
    stochastic: bool = True


def _draws(half: str | None = None, pass_: int = 0, acquisition: str = MI, **options: Any) -> Signal:
    return Signal("draws", acquisition, options, half, pass_)


def _linear(probes: int, posterior: str = "dropout", half: str | None = None, **options: Any) -> Signal:
    asked = {"form": "linear", "posterior": posterior, "probes": probes, **options}
    if posterior == LAPLACE:
        asked["reference"] = LAPLACE
    return Signal("linear" if posterior == "dropout" else "weights", MI, asked, half)


def _family(name: str, *counts: int, **options: Any) -> dict[str, Signal]:
    """Linear forms by number of probes; each one's ``half`` is the signal with half as many."""
    named = {count: f"{name}, {count} probe{'s' * (count > 1)}" for count in counts}
    halves = {2 * count: called for count, called in named.items()}
    return {named[count]: _linear(count, half=halves.get(count), **options) for count in counts}


def graphs(names: Sequence[str]) -> dict[str, list[str]]:
    """Groups of signals that can share a graph, by common name: linear forms that differ only in their probes."""
    together: dict[str, list[str]] = {}
    for name in names:
        probed = "probes" in SIGNALS[name].options and SIGNALS[name].acquisition == MI
        together.setdefault(name.rpartition(", ")[0] if probed else name, []).append(name)
    return together


ALL_BLOCKS: dict[str, Any] = {"layers": "all", "dropout": 0.05}

#: Name -> signal. The name states every option that is not the form's default.
SIGNALS: dict[str, Signal] = {
    TRUNK: Signal("cost", "", stochastic=False),
    ENTROPY: Signal("cost", ENTROPY, stochastic=False),
    "draws, all blocks, 8, p=0.05": _draws("draws, all blocks, 4, p=0.05", draws=8, **ALL_BLOCKS),
    "draws, all blocks, 4, p=0.05": _draws(draws=4, **ALL_BLOCKS),
    "draws, all blocks, 8, p=0.01": _draws(draws=8, layers="all", dropout=0.01),
    "draws, all blocks, 8, calibrated p": _draws(draws=8, layers="all", dropout="calibrated"),
    **_family("linear, all blocks", 1, 2, 3, 4, 8, 16),
    **_family("linear, completions", 1, 2, 3, 4, 5, 6, 8, 16, positions="completion"),
    "linear, last 8 blocks, 4 probes": _linear(4, layers=8),
    "linear, last 4 blocks, 4 probes": _linear(4, layers=4),
    "linear, last hidden state, 4 probes": _linear(4, layers=0),
    **_family("isotropic weights, all blocks", 1, 2, 4, 8, posterior="isotropic"),
    **_family("Laplace weights, all blocks", 2, 4, posterior=LAPLACE),
    "isotropic weights, last 8 blocks, 4 probes": _linear(4, "isotropic", layers=8),
    "draws, last 4 blocks, 8, p=0.05": _draws(draws=8, layers=4, dropout=0.05),
    "draws, last hidden state, 8, p=0.1": _draws(draws=8, layers=0, dropout=0.1),
    "draws, last hidden state, 8, p=0.1, blocks of 64": _draws(draws=8, layers=0, dropout=0.1, form="block"),
    "expected entropy, all blocks, 8, p=0.05": _draws(pass_=1, acquisition="expected_entropy", draws=8, **ALL_BLOCKS),
    "predictive entropy, all blocks, 8, p=0.05": _draws(
        pass_=1, acquisition="predictive_entropy", draws=8, **ALL_BLOCKS
    ),
    "variation ratio, all blocks, 8, p=0.05": _draws(pass_=1, acquisition="variation_ratio", draws=8, **ALL_BLOCKS),
    "bald_quadratic, all blocks, 8, p=0.05": _draws(pass_=1, acquisition="bald_quadratic", draws=8, **ALL_BLOCKS),
    "influence, head": Signal("influence", "influence", {"reference": "head"}),
    "influence, all parameters": Signal("influence", "influence", {"reference": "all"}),
    "epig, 2 probes": Signal("epig", EPIG, {"reference": EPIG, "probes": 2}),
    "epig, 4 probes": Signal("epig", EPIG, {"reference": EPIG, "probes": 4}, half="epig, 2 probes"),
    "gradient_diversity, head": Signal("influence", "gradient_diversity", {"parameters": "head"}),
    "draws, all blocks, 64, calibrated p": _draws(pass_=2, draws=64, layers="all", dropout="calibrated"),
    "draws, all blocks, 64, p=0.05": _draws(pass_=2, draws=64, **ALL_BLOCKS),
}

#: Proxies for the noise-free value, provided that they are reliable.
MANY_DRAWS = ("draws, all blocks, 64, calibrated p", "draws, all blocks, 64, p=0.05")
#: Skipped for toy students: meaningless with a vocabulary of 200 tokens and 3 or 6 blocks.
TOY_SKIPPED = (
    TRUNK, "influence, head", "influence, all parameters", "gradient_diversity, head",
    "draws, last 4 blocks, 8, p=0.05", "linear, last 8 blocks, 4 probes", "linear, last 4 blocks, 4 probes",
    "isotropic weights, last 8 blocks, 4 probes",
)  # fmt: skip
