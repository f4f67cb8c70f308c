"""What a signal is, and the acquisitions of ``acqcore`` as signals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from acqsynth.domains import Domain, Sample
from acqsynth.rewards.scoring import Scorer


@runtime_checkable
class Signal(Protocol):
    """How much samples are worth to a student, by one measure.

    Three attributes are read where a signal has them. ``set_level = True``: its values depend on the other samples
    of the call, so it is given those of all ranks at once. ``accept(samples)``: takes in what passed a call, as an
    archive does. ``refresh(student)``: another student from now on. ``state_dict()`` and ``load_state_dict(state)``
    together: it is saved with the reward.
    """

    name: str

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """n values, larger = more worth acquiring; None where a sample could not be scored."""
        ...


class AcquisitionSignal:
    """One acquisition of ``acqcore``.

    Args:
        scorer: over a domain; several signals on one scorer share its pass.
        acquisition: one of the scorer's.
        name: by default the acquisition's.

    Raises:
        ValueError: an acquisition that is not the scorer's, influence without a reference, or a scorer without a
            domain.
    """

    def __init__(self, scorer: Scorer, acquisition: str, *, name: str | None = None) -> None:
        if acquisition not in scorer.acquisitions:
            raise ValueError(f"acquisition: expected one of the scorer's {scorer.acquisitions}, got {acquisition!r}")
        if scorer.domain is None:
            raise ValueError("scorer: expected one with a domain, got one of plain samples")
        if acquisition == "influence" and scorer.arguments.get("influence", {}).get("reference") is None:
            raise ValueError("influence: expected a reference among its arguments, samples or an acqcore.Reference")
        self.scorer = scorer
        self.acquisition = acquisition
        self.name = name or acquisition

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        return self.scorer(samples)[0][self.acquisition]

    def refresh(self, student: Any) -> None:
        self.scorer.refresh(student)


def acquisition_signals(
    student: Any,
    acquisitions: Sequence[str] | Mapping[str, Mapping[str, Any]],
    domain: Domain,
    **options: Any,
) -> list[AcquisitionSignal]:
    """A signal for each acquisition, all values from one ``acqcore.score`` call.

    Args:
        student, options: as :class:`acqsynth.rewards.scoring.Scorer`.
        acquisitions: names, or name -> arguments.
        domain: of the samples.

    Raises:
        ValueError: as Scorer.
    """
    arguments = acquisitions if isinstance(acquisitions, Mapping) else None
    scorer = Scorer(student, tuple(acquisitions), domain=domain, arguments=arguments, **options)
    return [AcquisitionSignal(scorer, acquisition) for acquisition in scorer.acquisitions]
