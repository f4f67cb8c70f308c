"""What several stages share: the inputs of a reward, its signals' values, and columns saved in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acqsynth import engines
from acqsynth.artefacts import read_rows
from acqsynth.config import EngineConfig, RewardConfig
from acqsynth.domains import Domain, Sample, domain as find_domain
from acqsynth.engines import Engine
from acqsynth.rewards.batch import Batch, numbers, sample_length
from acqsynth.rewards.fusion import LengthBins, fuse

CHUNK = 64  #: samples saved together; a kill loses at most this many


@dataclass(frozen=True)
class Scoring:
    """Inputs for a step's reward."""

    reward: RewardConfig
    domain: str
    engine: EngineConfig
    student: Any  #: the model that scores
    seeds: Any  #: rows shown to the generator in training
    evaluation: Any  #: rows for in-distribution accuracy, which no sample may repeat
    reference: Any  #: rows whose loss should fall, for influence
    models: Sequence[Any] = ()  #: the other models that it loads, so that a change of their files is noticed
    other_evaluation: Sequence[Any] = ()  #: the rows of the other evaluation sets, which no sample may repeat either

    def find_domain(self) -> Domain:
        """The domain, completed by the seeds."""
        return find_domain(self.domain).with_seeds(read_rows(self.seeds))

    def build(self, shown: Sequence[Sample] = ()) -> Any:
        """The reward; ``shown`` are rows besides the seeds that prompts show."""
        from acqsynth.rewards.build import build

        return build(
            self.reward,
            find_domain(self.domain),
            str(self.student),
            self.engine,
            seeds=read_rows(self.seeds),
            evaluation=[row for path in (self.evaluation, *self.other_evaluation) for row in read_rows(path)],
            reference=read_rows(self.reference),
            shown=shown,
        )


def load_engine(config: EngineConfig, model: str | Path) -> Engine:
    return engines.load(config.name, str(model), **config.options)


def signal_values(reward: Any, samples: Sequence[Sample]) -> dict[str, list[float | None]]:
    """Each signal's values of the samples; signals share intermediate results."""
    batch = Batch(samples)
    return {signal.name: numbers(signal, batch) for signal in reward.signals}


def fused(columns: Mapping[str, Sequence[float | None]], reward: Any, samples: Sequence[Sample]) -> list[float | None]:
    """Fuses the signals' values of samples like the reward, as one group."""
    weighted = {name: columns[name] for name in reward.weights}  # a signal of weight 0 is only logged
    # Samples that lack a value are left out of all statistics.
    lacking = {i for values in weighted.values() for i, value in enumerate(values) if value is None}
    lengths = [sample_length(sample) for sample in samples]
    for name, values in weighted.items():
        known = [None if i in lacking else value for i, value in enumerate(values)]
        weighted[name] = LengthBins()(known, lengths) if name in reward.length_bins else known
    return fuse(weighted, [0] * len(samples), reward.fusion, reward.weights)


def joined(chunks: Iterable[Mapping[str, Sequence[Any]]]) -> dict[str, list[Any]]:
    """Concatenates the columns of all chunks."""
    columns: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in chunk.items():
            columns.setdefault(name, []).extend(values)
    return columns
