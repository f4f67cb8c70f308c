"""Quantities that acquisitions may need for a batch. Each is computed only if needed; equal needs are computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch

from acqcore import checks
from acqcore.gradients.laplace import LaplacePosterior
from acqcore.gradients.need import GradientNeed, ProbeNeed
from acqcore.head import Head
from acqcore.head_grad import Bounds
from acqcore.literals import Form, Layers, Parameters, Positions, Posterior
from acqcore.row_stats import RowStats
from acqcore.students.student import Student, StudentLike

#: Default dropout probability on the last hidden state and in blocks, compared in docs/concepts/mutual-information.md.
HIDDEN_DROPOUT, BLOCK_DROPOUT = 0.1, 0.05

#: Default variance of a weight under an isotropic posterior: a standard deviation of 0.001.
WEIGHT_VARIANCE = 1e-6


@dataclass(frozen=True)
class Options:
    """Arguments of an acquisition. Subclasses are frozen dataclasses whose ``__post_init__`` checks the values."""

    #: Whether acquisitions with standard errors provide them under these arguments.
    estimated: ClassVar[bool] = True

    def check(self, student: Student, head: Head) -> None:
        """Raise ValueError if the arguments do not fit the student; called before any forward."""

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any] | Options) -> Any:
        """The options of acquisition ``name``, from a mapping or an instance.

        Raises:
            TypeError: neither. ValueError: an unknown or missing argument. Other errors are from ``__post_init__``.
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


@dataclass(frozen=True)
class RowNeed:
    """:class:`acqcore.RowStats` of the N scored tokens, without dropout."""


@dataclass(frozen=True)
class BatchNeed:
    """:class:`SampleBatch`: hidden states, sample boundaries and statistics."""


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """The N scored tokens of B samples, one sample after another.

    Attributes:
        hidden: ``[N, D]``.
        head: the last layer.
        stats: of the N rows, with targets.
        bounds: [begin, end) of each sample among the rows.
        backend: the requested name, or None.
    """

    hidden: torch.Tensor
    head: Head
    stats: RowStats
    bounds: Bounds
    backend: str | None


@dataclass(frozen=True)
class DrawOptions(Options):
    """:class:`acqcore.BayesStats` of the N scored tokens under K draws; both options and need of Bayesian acquisitions.

    Args:
        layers: dropout acts on the last hidden state (0), in the last n blocks, in every block (``"all"``, the
            default), or in the student's own dropout layers at their own rates (``"own"``).
        dropout: probability p, by default 0.1 on the last hidden state and 0.05 in blocks; ignored by ``"own"``.
        draws: K.
        form, block: form and block size of dropout on the last hidden state, as in :func:`acqcore.mutual_information`;
            either one implies ``layers=0``.
        seed: seed of the masks.
        members: students to use instead of draws: models, paths or ``acqcore.Student``, all with the student's tokens.

    Raises:
        TypeError, ValueError: a value of a wrong type or out of range; mutually exclusive arguments.
    """

    estimated: ClassVar[bool] = False  # tokens share a draw's masks, which the spread within a sample does not show

    layers: Layers | None = None
    dropout: float | None = None
    draws: int = 8
    form: Form | None = None
    block: int | None = None
    seed: int = 0
    members: tuple[StudentLike, ...] = ()

    def __post_init__(self) -> None:
        _resolve(self, draws=checks.draws(self.draws), seed=checks.seed(self.seed))
        if self.members != ():
            self._check_members()
            _resolve(self, members=tuple(self.members))
            return
        on_hidden = self.form is not None or self.block is not None
        layers = checks.layers(self.layers if self.layers is not None else 0 if on_hidden else "all")
        if layers == 0:
            form, block = self.form or "element", 64 if self.block is None else self.block
            checks.literal("form", form, Form)
            _resolve(self, form=form, block=checks.positive_int("block", block))
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
                raise ValueError(f"members: replaces draws by dropout, so {field.name!r} must not be given")

    @property
    def on_hidden(self) -> bool:
        """Whether draws are computed from the hidden states of the forward without dropout."""
        return self.layers == 0


def _resolve(options: Options, **values: Any) -> None:
    """Set fields of frozen options during construction."""
    for name, value in values.items():
        object.__setattr__(options, name, value)


def _dropout(given: float | None, layers: Layers) -> float:
    """The given probability, checked, or the default for these layers."""
    if given is None:
        return HIDDEN_DROPOUT if layers == 0 else BLOCK_DROPOUT
    return checks.dropout(given)


@dataclass(frozen=True)
class LinearOptions(Options):
    """Linear form of mutual information: to second order in a small perturbation, by backwards of random cotangents.

    Args:
        posterior: what is perturbed: the activations that dropout acts on (``dropout``), or linear weights in blocks,
            by Gaussian noise of one variance (``isotropic``) or with the variances of a Laplace approximation
            (``laplace``).
        layers: dropout acts on the last n blocks, on every block (``"all"``, the default), on the student's own dropout
            layers at their own rates (``"own"``), or on the last hidden state (0). Weight noise acts on blocks.
        dropout: probability p, by default 0.1 on the last hidden state and 0.05 in blocks; ignored by ``"own"``. For
            ``posterior="dropout"`` only.
        positions: noise on the activations of every token (``"all"``, the default), or only of those from the token
            that predicts the first scored one onwards (``"completion"``); prompts then need no graph. For
            ``posterior="dropout"`` only.
        variance: variance of a weight, by default 1e-6; only scales the values. For ``posterior="isotropic"`` only.
        reference: for ``posterior="laplace"``, from :func:`acqcore.laplace_posterior` with the same ``layers``.
        probes: cotangents to average, one backward of activations each. Two or more give each sample a standard error,
            which is up to a third too small with two probes and a single scored token.
        seed: seed of the cotangents' signs.

    Raises:
        TypeError, ValueError: a value of a wrong type or out of range; mutually exclusive arguments.
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
        _resolve(
            self, layers=checks.layers(self.layers), probes=checks.probes(self.probes), seed=checks.seed(self.seed)
        )
        owners = {"dropout": "dropout", "positions": "dropout", "variance": "isotropic", "reference": "laplace"}
        for argument, owner in owners.items():
            if getattr(self, argument) is not None and self.posterior != owner:
                raise ValueError(f"{argument}: requires posterior={owner!r}, got posterior={self.posterior!r}")
        if self.posterior == "dropout":
            positions = "all" if self.positions is None else self.positions
            checks.literal("positions", positions, Positions)
            _resolve(self, dropout=_dropout(self.dropout, self.layers), positions=positions)
            return
        if self.layers in (0, "own"):
            raise ValueError(
                f"layers: the noise perturbs weights of blocks, expected 'all' or at least 1 block, got {self.layers!r}"
            )
        if self.posterior == "laplace":
            checks.instance("reference", self.reference, LaplacePosterior, "the result of acqcore.laplace_posterior")
            assert self.reference is not None
            if self.reference.layers != self.layers:
                raise ValueError(f"layers: the reference was made with {self.reference.layers!r}, got {self.layers!r}")
            return
        variance = WEIGHT_VARIANCE if self.variance is None else self.variance
        _resolve(self, variance=checks.positive("variance", variance))

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
        """Factor of a sample's squares: half the variance, or 1/2 if the squares already include variances."""
        return 0.5 if self.variance is None else self.variance / 2


@dataclass(frozen=True)
class InformationOptions(DrawOptions):
    """Arguments of mutual information in its linear form, the default, or from draws.

    ``draws``, ``members``, ``block`` and ``form="element"`` or ``"block"`` request draws. On a language model of 135 M
    parameters, the ranks of two seeds correlate at 0.04 to 0.18 with eight draws of dropout in all blocks, and at 0.78
    to 0.90 with four probes of the linear form (docs/reliability.md).
    """

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any] | Options) -> DrawOptions | LinearOptions:
        if isinstance(given, LinearOptions):
            return given
        if not isinstance(given, Mapping):
            return DrawOptions.of(name, given)
        if (form := given.get("form")) is not None:
            checks.one_of("form", form, ("linear", *get_args(Form)))
        drawn = [argument for argument in ("draws", "members", "block") if argument in given]
        of_linear = ("positions", "posterior", "probes", "reference", "variance")
        linear = [argument for argument in of_linear if argument in given]
        if form == "linear" or (form is None and not drawn):
            return LinearOptions.of(name, {key: value for key, value in given.items() if key != "form"})
        if linear:
            of_draws = drawn[0] if drawn else "form"
            raise ValueError(
                f"acquisition_args[{name!r}]: {linear[0]!r} belongs to the linear form, but {of_draws!r} requests draws"
            )
        return DrawOptions.of(name, given)


def sketch(options: SketchOptions) -> GradientNeed:
    """The need of an acquisition that compares sketches of gradients."""
    return GradientNeed(options.parameters, dim=options.dim, seed=options.seed)


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
    """The need of an acquisition whose options describe its draws."""
    return options


Need: TypeAlias = RowNeed | BatchNeed | DrawOptions | GradientNeed | ProbeNeed
