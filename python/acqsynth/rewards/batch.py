"""The samples of one reward call, and what its signals and gates share about them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from acqsynth.domains import Domain, Sample


class Batch(list[Sample]):
    """Samples with results that are computed once in a reward call: answers drawn, embeddings, verdicts, scores.

    A reward calls its signals and gates with one. It is a list of samples: parts that share nothing can treat it as
    such, and parts called with another list share nothing. Nothing outlives the call, as the student may move.

    Args:
        samples: in order.
        results: of the call; None starts without any.
    """

    def __init__(self, samples: Iterable[Sample] = (), results: dict[Hashable, dict[Any, Any]] | None = None) -> None:
        super().__init__(samples)
        self._results = {} if results is None else results
        #: scorer -> its values of exactly these samples
        self.scores: dict[Any, Any] = {}

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Batch:
        """The samples themselves if they are a batch, else a batch of them."""
        return samples if isinstance(samples, Batch) else cls(samples)

    def part(self, samples: Iterable[Sample]) -> Batch:
        """Other samples of the same call."""
        return Batch(samples, self._results)

    def each(
        self, name: Hashable, keys: Sequence[Any], compute: Callable[[list[Any]], Iterable[Any]], ids: bool = False
    ) -> list[Any]:
        """The result of each key; ``compute(new keys)`` is called for those without one.

        Args:
            name: of the results.
            keys: what to compute; equal keys have one result.
            compute: new keys -> their results, in order.
            ids: keys are told apart by identity, for those that cannot be hashed.
        """
        known = self._results.setdefault(name, {})
        named = {id(key) if ids else key: key for key in keys}
        new = {name: key for name, key in named.items() if name not in known}
        if new:
            results = zip(new.items(), compute(list(new.values())), strict=True)
            # The key is kept too: an id is unique only while its object lives.
            known.update((name, (key, result)) for (name, key), result in results)
        return [known[id(key) if ids else key][1] for key in keys]

    def verified(self, domain: Domain) -> list[bool | None]:
        """``domain.verify`` of each sample, asked once: it may run programs."""
        return self.each((domain, "verified"), self, domain.verify, ids=True)
