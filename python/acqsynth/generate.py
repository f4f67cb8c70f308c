"""Questions from a generator: what it is asked, and what is kept of what it writes."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from acqsynth.domains.base import Domain, Messages, Sample
from acqsynth.engines.base import Engine, Sampling

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: A pass over the prompts in which less than this share of the completions is kept counts as if it were so much:
#: otherwise one bad pass would make the next one draw without end.
_LEAST_RATE = 0.05


def prompts(domain: Domain, seeds: Sequence[Sample], n: int, *, shown: int, seed: int) -> list[Messages]:
    """n prompts that ask a generator for a new sample, each with ``shown`` different seeds as examples.

    The seeds are dealt like cards: all of them, shuffled, before any comes again, so that the uses of two seeds differ
    by one at most.

    Raises:
        ValueError: n below 1, shown negative or more than there are seeds.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    if not 0 <= shown <= len(seeds):
        raise ValueError(f"shown: expected 0 to {len(seeds)}, the number of seeds, got {shown}")
    shuffle = random.Random(seed).shuffle
    deck: list[int] = []
    asked = []
    for _ in range(n):
        hand: list[int] = []
        while len(hand) < shown:
            if not deck:
                deck = list(range(len(seeds)))
                shuffle(deck)
            # A fresh deck may begin with what the hand has from the old one: that stays for the next prompt.
            hand.append(deck.pop(next(i for i, card in enumerate(deck) if card not in hand)))
        asked.append(domain.generator_prompt([seeds[card] for card in hand]))
    return asked


@dataclass
class Collected(Generic[T]):
    """What was kept, in the order it was written, and what became of the rest."""

    rows: list[T]
    wanted: int
    #: completions drawn
    drawn: int = 0
    #: passes over (some of) the prompts
    rounds: int = 0
    #: why -> completions that were not kept
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def short(self) -> bool:
        """Whether there are fewer rows than were wanted."""
        return len(self.rows) < self.wanted


def generate(
    engine: Engine,
    domain: Domain,
    prompts: Sequence[Messages],
    sampling: Sampling,
    *,
    rows: int,
    gates: Sequence[Any] = (),
    rounds: int = 8,
) -> Collected[Sample]:
    """Samples that parse, have no fault, pass the gates and ask a question that no other one asks.

    Args:
        engine: of the generator.
        domain: parses and names faults.
        prompts: asked in turn, again with other seeds when all were asked.
        sampling: n completions a prompt are drawn; its seed is that of the first round.
        rows: how many are wanted.
        gates: as in :mod:`acqsynth.rewards.gates`, asked in order; archives of those that have one take in what is
            kept.
        rounds: after so many what there is is returned, and a warning says that it is short. A round asks as many
            prompts as are likely to be enough, each once at most.

    Raises:
        ValueError: rows, rounds or the number of prompts is below 1.
    """
    asked: set[str] = set()

    def keep(picked: Sequence[Messages], sampling: Sampling, dropped: Counter[str]) -> list[Sample]:
        texts = [draw.text for group in engine.generate(picked, sampling) for draw in group]
        samples = []
        for sample in map(domain.parse, texts):
            fault = "does not parse" if sample is None else domain.fault(sample)
            if sample is None or fault:
                dropped[str(fault)] += 1
            else:
                samples.append(sample)
        kept = []
        for sample in passing(gates, samples, dropped):
            question = " ".join(sample.question.lower().split())
            if question in asked:
                dropped["asks what another one asks"] += 1
            else:
                asked.add(question)
                kept.append(sample)
        for gate in gates:
            if hasattr(gate, "accept"):
                gate.accept(kept)
        return kept

    return collect(prompts, keep, sampling, rows=rows, rounds=rounds)


def passing(gates: Sequence[Any], samples: Sequence[Sample], dropped: Counter[str]) -> list[Sample]:
    """The samples that every gate passes, in order; the others are counted under the gate that speaks first."""
    left = list(samples)
    for gate in gates:
        verdicts = gate(left) if left else []
        for verdict in verdicts:
            if verdict is None or verdict is False:
                dropped[f"gate {gate.name}" if verdict is False else f"gate {gate.name} could not tell"] += 1
        passed = [(s, v) for s, v in zip(left, verdicts, strict=True) if v is True or isinstance(v, Sample)]
        left = [sample if verdict is True else verdict for sample, verdict in passed]
    return left


def collect(
    prompts: Sequence[Messages],
    keep: Callable[[Sequence[Messages], Sampling, Counter[str]], list[T]],
    sampling: Sampling,
    *,
    rows: int,
    rounds: int,
    per_prompt: int | None = None,
) -> Collected[T]:
    """Rounds of ``keep`` until there are enough rows.

    Args:
        prompts: asked in turn.
        keep: prompts, how to draw and a count of what was dropped -> the rows kept of what was drawn.
        sampling: of the first round; later ones have the seeds that follow.
        rows, rounds: as in :func:`generate`.
        per_prompt: most rows that one prompt can give; by default ``sampling.n``.

    Raises:
        ValueError: rows, rounds or the number of prompts is below 1.
    """
    for name, value in (("rows", rows), ("rounds", rounds), ("prompts", len(prompts))):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    found: Collected[T] = Collected([], rows)
    dropped: Counter[str] = Counter()
    yields = per_prompt or sampling.n
    next_prompt = offered = 0
    while found.short and found.rounds < rounds:
        rate = max(len(found.rows) / offered, _LEAST_RATE) if offered else 1.0
        asked = min(len(prompts), math.ceil((rows - len(found.rows)) / (rate * yields)))
        picked = [prompts[(next_prompt + i) % len(prompts)] for i in range(asked)]
        found.rows += keep(picked, replace(sampling, seed=sampling.seed + found.rounds), dropped)
        next_prompt = (next_prompt + asked) % len(prompts)
        offered += asked * yields
        found.drawn += asked * sampling.n
        found.rounds += 1
    surplus = len(found.rows) - rows
    if surplus > 0:
        dropped["more than were wanted"] += surplus
        del found.rows[rows:]
    found.dropped = dict(dropped.most_common())
    if found.short:
        reasons = ", ".join(f"{count} {why}" for why, count in found.dropped.items())
        logger.warning("%d rows of %d after %d rounds (%s)", len(found.rows), rows, found.rounds, reasons)
    return found
