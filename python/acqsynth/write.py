"""Questions from a generator: prompts, filtering of samples, and selection among candidates."""

from __future__ import annotations

import logging
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from acqsynth import checks
from acqsynth.domains import Domain, Messages, Sample
from acqsynth.engines import Engine, Sampling, derived_seed
from acqsynth.rewards.batch import Batch, require_samples
from acqsynth.rewards.texts import NearCopies

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Minimum yield assumed when sizing the next round, so that a bad round does not make the next one endless.
_LEAST_RATE = 0.05


def prompts(
    domain: Domain, seeds: Sequence[Sample], n: int, *, shown: int, turns: bool = False, seed: int
) -> list[Messages]:
    """n prompts that ask a generator for a new sample, each with ``shown`` different seeds as examples.

    Seeds are dealt like cards: all of them, shuffled, before any is reused, so that the usage counts of two seeds
    differ by at most one. If the domain groups them (``Domain.hands``), groups are dealt in the same way, and a group
    with fewer than ``shown`` seeds is shown whole. A seed that occurs several times is dealt more often, but no prompt
    shows a question twice.

    With ``turns`` each seed is shown as an earlier answer to the same request instead of within it.

    Raises:
        ValueError: n is below 1, shown is negative or above the number of seeds, or seed is negative.
        TypeError: a seed row that is not a ``Sample``.
    """
    return [prompt(domain, hand, turns) for hand in deal(domain, seeds, n, shown=shown, seed=seed)]


def deal(domain: Domain, seeds: Sequence[Sample], n: int, *, shown: int, seed: int) -> list[list[Sample]]:
    """The seeds that each of the n prompts of :func:`prompts` shows."""
    checks.positive_int("n", n)
    require_samples("seeds", seeds)
    if not isinstance(shown, int) or not 0 <= shown <= len(seeds):
        raise ValueError(f"shown: expected 0 to {len(seeds)}, the number of seeds, got {shown}")
    if seed < 0:  # random.Random ignores the sign
        raise ValueError(f"seed: expected at least 0, got {seed}")
    shuffle = random.Random(seed).shuffle
    groups = domain.hands(seeds) if shown else [[]]
    sizes = [min(shown, len({sample.question for sample in group})) for group in groups]
    decks: list[list[int]] = [[] for _ in groups]
    order: list[int] = []
    hands: list[list[Sample]] = []
    for _ in range(n):
        if not order:
            order = list(range(len(groups)))
            shuffle(order)
        group = order.pop()
        hands.append(_hand(groups[group], decks[group], sizes[group], shuffle))
    return hands


def prompt(domain: Domain, examples: Sequence[Sample], turns: bool) -> Messages:
    """The prompt of :func:`prompts` that shows the examples."""
    if not turns or not examples:
        return domain.generator_prompt(examples)
    request = domain.request(examples)
    earlier = [[*request, {"role": "assistant", "content": domain.tagged(sample)}] for sample in examples]
    return [message for turn in (*earlier, request) for message in turn]


def _hand(pool: Sequence[Sample], deck: list[int], size: int, shuffle: Callable[[list[int]], None]) -> list[Sample]:
    """Takes ``size`` cards with different questions from the deck. If it has none left, a fresh one takes its place."""
    hand: dict[str, Sample] = {}
    while len(hand) < size:
        # A card whose question is already in the hand waits for the next prompt.
        place = next((i for i, card in enumerate(deck) if pool[card].question not in hand), None)
        if place is None:
            deck[:] = range(len(pool))
            shuffle(deck)
        else:
            sample = pool[deck.pop(place)]
            hand[sample.question] = sample
    return list(hand.values())


@dataclass
class WriteResult(Generic[T]):
    """The rows kept, in writing order, and counts of the rest."""

    rows: list[T]
    wanted: int
    completions: int = 0  #: drawn
    rounds: int = 0  #: passes over all or some of the prompts
    dropped: dict[str, int] = field(default_factory=dict)  #: reason -> number of completions dropped

    @property
    def incomplete(self) -> bool:
        """Whether fewer rows than wanted were kept."""
        return len(self.rows) < self.wanted


def write(
    engine: Engine,
    domain: Domain,
    prompts: Sequence[Messages],
    sampling: Sampling,
    *,
    rows: int,
    gates: Sequence[Any] = (),
    asked: NearCopies | None = None,
    rounds: int = 8,
) -> WriteResult[Sample]:
    """Samples that parse, have no fault, pass the gates and ask a new question. With the gate ``new``, a question must
    not be a near copy of an earlier one; otherwise it must have another normal form.

    Args:
        engine: engine of the generator.
        domain: parses samples and names faults.
        prompts: used in turn, and then again with other random seeds.
        sampling: how completions are drawn; each round derives its own seed.
        rows: number of rows wanted.
        gates: as in :mod:`acqsynth.rewards.gates`, in order; those with an archive add the rows kept.
        asked: questions asked before; those of the rows kept are added.
        rounds: maximum number of rounds; after that the result is returned incomplete, with a warning. A round uses as
            many prompts as are likely to suffice, each at most once.

    Raises:
        ValueError: rows, rounds or the number of prompts is below 1.
    """
    asked = questions() if asked is None else asked
    near = any(gate.name == "new" for gate in gates)

    def keep(picked: Sequence[Messages], sampling: Sampling, room: int, dropped: Counter[str]) -> list[Sample]:
        samples = []
        for sample in (domain.parse(draw.text) for group in engine.generate(picked, sampling) for draw in group):
            fault = "does not parse" if sample is None else domain.fault(sample)
            if sample is None or fault:
                dropped[str(fault)] += 1
            else:
                samples.append(sample)
        kept = _first_new(passing(gates, samples, dropped), lambda sample: sample, room, asked, dropped, near=near)
        for gate in gates:
            if hasattr(gate, "accept"):
                gate.accept(kept)
        return kept

    return _draw_until(prompts, keep, sampling, rows=rows, rounds=rounds, per_prompt=sampling.n)


def passing(gates: Sequence[Any], samples: Sequence[Sample], dropped: Counter[str]) -> list[Sample]:
    """The samples that pass every gate, in order; others are counted under the first gate that rejects them."""
    return [sample for sample in _judged(gates, Batch(samples), dropped) if sample is not None]


def _judged(gates: Sequence[Any], samples: Batch, dropped: Counter[str]) -> list[Sample | None]:
    """Each sample as the gates leave it, or None; a replacement passes the earlier gates again."""
    found: list[Sample | None] = list(samples)
    for i, gate in enumerate(gates):
        left = {j: sample for j, sample in enumerate(found) if sample is not None}
        verdicts = gate(samples.part(left.values())) if left else []
        replaced: dict[int, Sample] = {}
        for j, verdict in zip(left, verdicts, strict=True):
            if isinstance(verdict, Sample):
                replaced[j] = verdict
            elif not verdict:
                found[j] = None
                dropped[f"gate {gate.name}" + (" could not tell" if verdict is None else "")] += 1
        again = _judged(gates[:i], samples.part(replaced.values()), dropped)
        for j, sample in zip(replaced, again, strict=True):
            found[j] = sample
    return found


# --- candidates -------------------------------------------------------------------------------------------------------


class Scorer(Protocol):
    """Scores candidates, as :class:`acqsynth.rewards.ComposedReward` does."""

    def score(self, texts: Sequence[str], groups: Sequence[Hashable]) -> Any:
        """``total``, ``samples``, ``components`` and ``gates`` of n texts; a prompt's candidates form a group."""


@dataclass(frozen=True)
class Candidate:
    """A completion with its score."""

    prompt: Messages
    text: str
    sample: Sample | None  #: None if the text does not parse
    total: float | None  #: None if a scorer failed
    components: dict[str, float | None]
    gates: dict[str, bool]

    @property
    def rejected_by(self) -> str | None:
        """Why the candidate is unusable as training data; None if it is usable."""
        if self.sample is None:
            return "does not parse"
        gate = next((name for name, passes in self.gates.items() if not passes), None)
        if gate is not None:
            return f"gate {gate}"
        return "a scorer failed" if self.total is None else None


def candidates(
    engine: Engine, prompts: Sequence[Messages], reward: Scorer, sampling: Sampling
) -> list[list[Candidate]]:
    """Draws ``sampling.n`` candidates per prompt and scores all of them in one call. TypeError for a reward without
    ``score``, such as ``AcquisitionReward``."""
    if not hasattr(reward, "score"):
        raise TypeError(f"reward: expected one with score, such as ComposedReward, got {reward!r:.60}")
    texts = [draw.text for group in engine.generate(prompts, sampling) for draw in group]
    groups = [i for i in range(len(prompts)) for _ in range(sampling.n)]
    rewards = reward.score(texts, groups)
    found = [
        Candidate(
            prompts[groups[i]],
            text,
            rewards.samples[i],
            rewards.total[i],
            {name: values[i] for name, values in rewards.components.items()},
            {name: passes[i] for name, passes in rewards.gates.items()},
        )
        for i, text in enumerate(texts)
    ]
    return [found[i : i + sampling.n] for i in range(0, len(found), sampling.n)]


def best(
    engine: Engine,
    prompts: Sequence[Messages],
    reward: Scorer,
    sampling: Sampling,
    *,
    rows: int,
    asked: NearCopies | None = None,
    rounds: int = 8,
) -> WriteResult[Candidate]:
    """Rejection sampling: keeps the best candidate of each prompt by the reward.

    Args:
        engine: engine of the generator, which is not trained.
        prompts, rows, asked, rounds: as in :func:`write`.
        reward: scores candidates; those that a gate rejects or a scorer fails on are never kept.
        sampling: its ``n`` is the number of candidates per prompt.

    Returns:
        Candidates with a sample and a total, whose questions are new as in :func:`write`.
    """
    asked = questions() if asked is None else asked

    def keep(picked: Sequence[Messages], sampling: Sampling, room: int, dropped: Counter[str]) -> list[Candidate]:
        chosen = []
        for group in candidates(engine, picked, reward, sampling):
            dropped.update(reason for candidate in group if (reason := candidate.rejected_by))
            # A candidate that nothing rejects has a total.
            valid = sorted((c for c in group if c.rejected_by is None), key=lambda c: c.total or 0.0, reverse=True)
            dropped["not the best of its prompt"] += len(valid[1:])
            chosen += valid[:1]
        near = any("new" in candidate.gates for candidate in chosen)
        return _first_new(chosen, lambda candidate: candidate.sample, room, asked, dropped, near=near)

    return _draw_until(prompts, keep, sampling, rows=rows, rounds=rounds, per_prompt=1)


def questions() -> NearCopies:
    """An empty set of questions that drops none, however many are added."""
    return NearCopies(capacity=sys.maxsize)


def _first_new(
    rows: Sequence[T], sample_of: Callable[[T], Any], room: int, asked: NearCopies, dropped: Counter[str], *, near: bool
) -> list[T]:
    """The first ``room`` rows that ask a new question: not a near copy of one already asked or, without ``near``, one
    with another normal form. Only the questions of these rows are added to ``asked``."""
    kept: list[T] = []
    for row in rows:
        question = sample_of(row).question
        if len(kept) == room:
            dropped["surplus"] += 1
        elif asked.find(question) is not None if near else question in asked:
            dropped["repeats a question"] += 1
        else:
            asked.add([question])
            kept.append(row)
    return kept


def _draw_until(
    prompts: Sequence[Messages],
    keep: Callable[[Sequence[Messages], Sampling, int, Counter[str]], list[T]],
    sampling: Sampling,
    *,
    rows: int,
    rounds: int,
    per_prompt: int,
) -> WriteResult[T]:
    """Calls ``keep`` in rounds until there are enough rows. ``keep`` draws for some prompts, returns the rows kept, at
    most as many as are still wanted, and counts those dropped. Each round derives its own seed from that of
    ``sampling``. A prompt yields at most ``per_prompt`` rows."""
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    checks.positive_int("rows", rows)
    checks.positive_int("rounds", rounds)
    result: WriteResult[T] = WriteResult([], rows)
    dropped: Counter[str] = Counter()
    next_prompt = offered = 0
    while result.incomplete and result.rounds < rounds:
        rate = max(len(result.rows) / offered, _LEAST_RATE) if offered else 1.0
        asked = min(len(prompts), math.ceil((rows - len(result.rows)) / (rate * per_prompt)))
        picked = [prompts[(next_prompt + i) % len(prompts)] for i in range(asked)]
        room = rows - len(result.rows)
        result.rows += keep(picked, replace(sampling, seed=derived_seed(sampling.seed, result.rounds)), room, dropped)
        next_prompt = (next_prompt + asked) % len(prompts)
        offered += asked * per_prompt
        result.completions += asked * sampling.n
        result.rounds += 1
    result.dropped = {reason: count for reason, count in dropped.most_common() if count}
    if result.incomplete:
        logger.warning("%d of %d rows after %d rounds (%s)", len(result.rows), rows, result.rounds, reasons(dropped))
    return result


def reasons(dropped: Counter[str]) -> str:
    """Counts of dropped rows, as text."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped.most_common() if count)
