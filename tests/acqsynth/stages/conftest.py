from __future__ import annotations

import pytest
from fakes import SEEDS

from acqsynth import domains
from acqsynth.artefacts import write_rows
from acqsynth.config import EngineConfig, RewardConfig
from acqsynth.stages.rows import Scoring


@pytest.fixture
def scoring(student_path, tmp_path, monkeypatch):
    """The default reward with a student of a few thousand parameters, refreshed every two steps."""
    monkeypatch.setattr(domains, "DOMAINS", {"sums": "fakes:Sums"})
    write_rows(tmp_path / "seeds.parquet", SEEDS)
    reward = RewardConfig(answers={"k": 2, "max_tokens": 4}, refresh_steps=2)
    seeds = tmp_path / "seeds.parquet"
    return Scoring(reward, "sums", EngineConfig(), student_path, seeds, [seeds], seeds)
