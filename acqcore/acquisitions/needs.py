"""What an acquisition can need of a batch. Needs are frozen: equal ones are computed once, others not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, TypeAlias

import torch

from acqcore import checks
from acqcore.gradients.laplace import LaplacePosterior
from acqcore.gradients.need import GradientNeed, ProbeNeed
from acqcore.head import Head
from acqcore.head_grad import Bounds
from acqcore.literals import Form, Layers, Parameters, Positions, Posterior
from acqcore.row_stats import RowStats
from acqcore.students.student import Student, StudentLike

#: Default dropout probability on the last hidden state and in blocks: see the table in the README.
HIDDEN_DROPOUT, BLOCK_DROPOUT = 0.1, 0.05

#: Default variance of a weight under an isotropic posterior: 0.001 of standard deviation.
WEIGHT_VARIANCE = 1e-6


@dataclass(frozen=True)
class Options:
    """Arguments of an acquisition. Subclasses are frozen dataclasses whose ``__post_init__`` checks the values."""

    #: Whether an acquisition that gives standard errors gives them under these arguments.
    estimated: ClassVar[bool] = True

    def check(self, student: Student, head: Head) -> None:
        """Raise ValueError if they do not fit the student; called before any forward."""

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any] | Options) -> Any:
        """The options of acquisition ``name``, from a mapping or ready-made.

        Raises:
            TypeError: neither. ValueError: an unknown argument, or a missing one. Otherwise as ``__post_init__``.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise TypeError(
                f"acquisition_args[{name!r}]: expected a mapping or {cls.__name__}, got {checks.describe(given)}"
            )
        for argument in given:
            checks.one_of(f"acquisition_args[{name!r}]", argument, [field.name for field in fields(cls)])
        for argument in cls.required():
            if argument not in given:
                raise ValueError(
                    f"acquisition_args: {name!r} needs {argument!r}, as in {{{name!r}: {{{argument!r}: ...}}}}"
                )
        return cls(**given)

    @classmethod
    def required(cls) -> tuple[str, ...]:
        """Arguments without a default."""
        return tuple(f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)


@dataclass(frozen=True, kw_only=True)
class SketchOptions(Options):
    """``parameters``, ``dim`` and ``seed`` of :func:`acqcore.grad_sketch`."""

    parameters: Parameters = "head"
    dim: int = 4096
    seed: int = 0

    @property
    def need(self) -> GradientNeed:
        return GradientNeed(self.parameters, dim=self.dim, seed=self.seed)


@dataclass(frozen=True)
class RowNeed:
    """:class:`acqcore.RowStats` of the N scored tokens, without dropout."""


@dataclass(frozen=True)
class BatchNeed:
    """:class:`SampleBatch`: the hidden states themselves, where samples begin, and the statistics."""


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """The N scored tokens of B samples, one sample after another.

    Attributes:
        hidden: ``[N, D]``.
        head: the last layer.
        stats: of the N rows, with targets.
        bounds: [begin, end) of each sample among the rows.
        backend: the name asked for, or None.
    """

    hidden: torch.Tensor
    head: Head
    stats: RowStats
    bounds: Bounds
    backend: str | None


@dataclass(frozen=True)
class DrawOptions(Options):
    """:class:`acqcore.BayesStats` of the N scored tokens under K draws: options and need of Bayesian acquisitions.

    Args:
        layers: dropout acts on the last hidden state (0), in the last n blocks, in every block (``"all"``, the
            default), or in the student's own dropout layers at their own rates (``"own"``).
        dropout: probability p, by default 0.1 on the last hidden state and 0.05 in blocks; ignored by ``"own"``.
        draws: K.
        form, block: of dropout on the last hidden state, as in :func:`acqcore.mutual_information`; either one implies
            ``layers=0``.
        seed: of the masks.
        members: students to use instead of draws: models, paths or ``acqcore.Student``, all with the student's tokens.

    Raises:
        TypeError, ValueError: a value of a wrong type or out of range; arguments that exclude each other.
    """

    estimated: ClassVar[bool] = False  # draws share their masks over tokens, which a sample's spread does not show

    layers: Layers | None = None
    dropout: float | None = None
    draws: int = 8
    form: Form | None = None
    block: int | None = None
    seed: int = 0
    members: tuple[StudentLike, ...] = ()

    def __post_init__(self) -> None:
        checks.draws(self.draws)
        checks.seed(self.seed)
        if self.members != ():
            self._check_members()
            _resolve(self, members=tuple(self.members))
            return
        on_hidden = self.form is not None or self.block is not None
        layers = self.layers if self.layers is not None else 0 if on_hidden else "all"
        checks.layers(layers)
        if layers == 0:
            form, block = self.form or "element", 64 if self.block is None else self.block
            checks.literal("form", form, Form)
            checks.positive_int("block", block)
            _resolve(self, form=form, block=block)
        elif on_hidden:
            name = "block" if self.form is None else "form"
            raise ValueError(f"{name}: applies to dropout on the last hidden state, layers=0, got layers={layers!r}")
        _resolve(self, layers=layers, dropout=_dropout(self.dropout, layers))

    def _check_members(self) -> None:
        if isinstance(self.members, str) or not isinstance(self.members, Sequence):
            raise TypeError(f"members: expected a sequence of students, got {checks.describe(self.members)}")
        if len(self.members) < 2:
            raise ValueError(f"members: expected at least 2 students, got {len(self.members)}")
        for field in fields(self):
            if field.name != "members" and getattr(self, field.name) != field.default:
                raise ValueError(f"members: replaces draws by dropout, got {field.name!r} too")

    @property
    def on_hidden(self) -> bool:
        """Whether the draws follow from the hidden states of the forward without dropout."""
        return self.layers == 0


def _resolve(options: Options, **values: Any) -> None:
    """Set fields of frozen options while they are made."""
    for name, value in values.items():
        object.__setattr__(options, name, value)


def _dropout(given: float | None, layers: Layers) -> float:
    """The probability given, checked, or the default where dropout acts on these layers."""
    if given is None:
        return HIDDEN_DROPOUT if layers == 0 else BLOCK_DROPOUT
    checks.dropout(given)
    return given


@dataclass(frozen=True)
class LinearOptions(Options):
    """Mutual information to second order in a small perturbation: its linear form, by backwards of random cotangents.

    Args:
        posterior: what is perturbed: ``dropout``, the activations that dropout acts on, or the weights of linear layers
            in blocks, by Gaussian noise of one variance, ``isotropic``, or of those of a ``laplace`` approximation.
        layers: dropout acts on the last n blocks, on every block (``"all"``, the default), on the student's own dropout
            layers at their own rates (``"own"``), or on the last hidden state (0). Noise of weights acts on blocks.
        dropout: probability p, by default 0.1 on the last hidden state and 0.05 in blocks; ignored by ``"own"``. Of
            ``posterior="dropout"``.
        positions: noise on the activations of every token (``"all"``, the default), or of the completion alone, from
            the token that predicts the first scored one on: prompts then need no graph. Of ``posterior="dropout"``.
        variance: of a weight, by default 1e-6; a constant factor of the values. Of ``posterior="isotropic"``.
        reference: of ``posterior="laplace"``, from :func:`acqcore.laplace_posterior` with the same ``layers``.
        probes: cotangents averaged, a backward of activations each. From two on a sample has a standard error.
        seed: of the cotangents' signs.

    Raises:
        TypeError, ValueError: a value of a wrong type or out of range; arguments that exclude each other.
    """

    posterior: Posterior = "dropout"
    layers: Layers = "all"
    dropout: float | None = None
    positions: Positions | None = None
    variance: float | None = None
    reference: LaplacePosterior | None = None
    probes: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        checks.literal("posterior", self.posterior, Posterior)
        checks.layers(self.layers)
        checks.probes(self.probes)
        checks.seed(self.seed)
        owners = {"dropout": "dropout", "positions": "dropout", "variance": "isotropic", "reference": "laplace"}
        for argument, owner in owners.items():
            if getattr(self, argument) is not None and self.posterior != owner:
                raise ValueError(f"{argument}: belongs to posterior={owner!r}, got posterior={self.posterior!r}")
        if self.posterior == "dropout":
            positions = "all" if self.positions is None else self.positions
            checks.literal("positions", positions, Positions)
            _resolve(self, dropout=_dropout(self.dropout, self.layers), positions=positions)
            return
        if self.layers in (0, "own"):
            raise ValueError(
                f"layers: posterior={self.posterior!r} perturbs weights of blocks, expected 'all' or at least 1 block, "
                f"got {self.layers!r}"
            )
        if self.posterior == "laplace":
            checks.instance("reference", self.reference, LaplacePosterior, "what acqcore.laplace_posterior gives")
            assert self.reference is not None
            if self.reference.layers != self.layers:
                raise ValueError(f"layers: the reference was made with {self.reference.layers!r}, got {self.layers!r}")
            return
        variance = WEIGHT_VARIANCE if self.variance is None else self.variance
        checks.positive("variance", variance)
        _resolve(self, variance=variance)

    @property
    def need(self) -> ProbeNeed:
        """Squares of the gradients under each probe."""
        of: Literal["sites", "weights"] = "sites" if self.posterior == "dropout" else "weights"
        return ProbeNeed(
            of, self.layers, self.probes, self.seed, self.dropout or 0.0, posterior=self.reference,
            positions=self.positions or "all",
        )  # fmt: skip

    def check(self, student: Student, head: Head) -> None:
        """Raise ValueError if the reference was made with another student."""
        if self.reference is not None:
            self.reference.check(student)

    @property
    def factor(self) -> float:
        """What a sample's squares are multiplied by: a half of the variance of what is perturbed."""
        return 0.5 if self.variance is None else self.variance / 2


@dataclass(frozen=True)
class InformationOptions(DrawOptions):
    """Arguments of mutual information: of its linear form, the default, or of draws.

    ``draws``, ``members``, ``block`` and ``form="element"`` or ``"block"`` ask for draws: eight draws of dropout in all
    blocks agreed with themselves at 0.06 on a language model of 135 M parameters, where two probes of the linear form
    had 0.79 (docs/reliability.md).
    """

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any] | Options) -> DrawOptions | LinearOptions:
        if isinstance(given, LinearOptions):
            return given
        if not isinstance(given, Mapping):
            return DrawOptions.of(name, given)
        form = given.get("form")
        drawn = [argument for argument in ("draws", "members", "block") if argument in given]
        of_linear = ("positions", "posterior", "probes", "reference", "variance")
        linear = [argument for argument in of_linear if argument in given]
        if form == "linear" or (form is None and not drawn):
            return LinearOptions.of(name, {key: value for key, value in given.items() if key != "form"})
        if linear:
            of_draws = drawn[0] if drawn else "form"
            raise ValueError(f"acquisition_args[{name!r}]: {linear[0]!r} is of the linear form, {of_draws!r} of draws")
        return DrawOptions.of(name, given)


def sketch(options: SketchOptions) -> GradientNeed:
    """The need of an acquisition that compares sketches of gradients."""
    return options.need


def of_finite(
    sketches: torch.Tensor,  # [n, dim]
    value: Callable[[torch.Tensor], torch.Tensor],  # [m, dim] -> [m]
) -> torch.Tensor:
    """``value`` of the finite sketches, ``[n]``; NaN for the others."""
    finite = sketches.isfinite().all(dim=1)
    values = torch.full((len(sketches),), torch.nan)
    values[finite] = value(sketches[finite])
    return values


def draws(options: DrawOptions) -> DrawOptions:
    """The need of an acquisition whose options are those of its draws."""
    return options


Need: TypeAlias = RowNeed | BatchNeed | DrawOptions | GradientNeed | ProbeNeed
