"""What a signal is, and the acquisitions of ``acqcore`` as signals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from acqsynth.domains import Domain, Sample
from acqsynth.rewards.scoring import Scorer

#: Acquisitions that can do nothing without an argument, and what it is.
NEEDED = {
    "influence": ("reference", "samples or an acqcore.Reference"),
    "archive_novelty": ("archive", "an acqcore.Archive"),
}
#: Acquisitions whose values depend on the other samples of the call.
SET_LEVEL = frozenset({"gradient_diversity"})


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
        ValueError: an acquisition that is not the scorer's, one without the argument that it needs, or a scorer without
            a domain.
    """

    def __init__(self, scorer: Scorer, acquisition: str, *, name: str | None = None) -> None:
        if acquisition not in scorer.acquisitions:
            raise ValueError(f"acquisition: expected one of the scorer's {scorer.acquisitions}, got {acquisition!r}")
        if scorer.domain is None:
            raise ValueError("scorer: expected one with a domain, got one of plain samples")
        argument, kind = NEEDED.get(acquisition, ("", ""))
        if argument and scorer.arguments.get(acquisition, {}).get(argument) is None:
            raise ValueError(f"{acquisition}: expected {argument!r} among its arguments, {kind}")
        self.scorer = scorer
        self.acquisition = acquisition
        self.name = name or acquisition
        self.set_level = acquisition in SET_LEVEL

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        return self.scorer(samples)[0][self.acquisition]

    def refresh(self, student: Any) -> None:
        self.scorer.refresh(student)


class ArchiveNovelty(AcquisitionSignal):
    """``archive_novelty`` with an archive that grows: what passes a call adds the sketch of its gradient.

    The archive should hold few directions beside the length of a sketch, as in :class:`acqsynth.rewards.Diversity`.
    """

    def accept(self, samples: Sequence[Sample]) -> None:
        """Take samples into the archive."""
        if samples:
            options = {key: value for key, value in self._arguments().items() if key != "archive"}
            sketches = self.scorer.sketches(samples, **options)
            self._arguments()["archive"].add(sketches[sketches.isfinite().all(dim=1)])

    def __len__(self) -> int:
        return len(self._arguments()["archive"])

    def state_dict(self) -> dict[str, Any]:
        return {"archive": self._arguments()["archive"].state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._arguments()["archive"].load_state_dict(state["archive"])

    def _arguments(self) -> Mapping[str, Any]:
        return self.scorer.arguments[self.acquisition]


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
    kinds = {"archive_novelty": ArchiveNovelty}
    return [kinds.get(acquisition, AcquisitionSignal)(scorer, acquisition) for acquisition in scorer.acquisitions]
