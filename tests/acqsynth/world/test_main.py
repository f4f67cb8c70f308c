from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from acqsynth.domains.arithmetic import SKILLS
from acqsynth.world import Settings, __main__


def test_it_makes_the_model_of_its_seed_and_prints_a_line_for_each_skill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def tiny(settings: Settings) -> Path:
        made.append(settings)
        small = {"hidden_size": 32, "heads": 1, "layers": 1, "intermediate_size": 32}
        return base_model(replace(settings, steps=2, practice_rows=4, writing_rows=2, **small))

    base_model = __main__.base_model
    monkeypatch.setenv("ACQCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(__main__, "base_model", tiny)
    monkeypatch.setattr("sys.argv", ["acqsynth.world", "--seed", "3"])
    __main__.main()
    assert made == [Settings(seed=3)]
    printed = capsys.readouterr().out
    for name, skill in SKILLS.items():
        (line,) = (line for line in printed.splitlines() if line.split()[:2] == [name, skill.kind])
        assert line.count("%") >= 2
    assert "0% parse" in printed
    assert "loss at the end: practice " in printed
