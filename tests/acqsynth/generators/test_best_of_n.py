from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from acqsynth.domains import Sample
from acqsynth.engines import Sampling
from acqsynth.generators.best_of_n import select
from acqsynth.generators.candidates import candidates

ASK = [[{"role": "user", "content": f"prompt {i}"}] for i in range(3)]


@pytest.fixture
def engine(scripted: Any, written: Callable[..., str]) -> Any:
    texts = [
        [written("1+1", 2), written("2+3", 5), "no sample"],
        [written("bad 9+9", 18), written("6+7", 13), written("2+2", 4)],
        [written("2 + 3", 5), written("1+2", 3), written("2+3", 6)],
    ]
    return scripted(lambda prompt, i, seed: texts[int(prompt[0]["content"][-1])][i])


def test_candidates_of_a_prompt_are_a_group(engine: Any, answer_reward: Any) -> None:
    groups = candidates(engine, ASK, answer_reward, Sampling(n=3))
    assert answer_reward.groups == [[0, 0, 0, 1, 1, 1, 2, 2, 2]]
    assert [[scored.total for scored in group] for group in groups] == [[2, 5, 0], [0, None, 4], [5, 3, 6]]
    assert [[scored.rejected_by for scored in group] for group in groups] == [
        [None, None, "does not parse"],
        ["gate good", "a scorer failed", None],
        [None] * 3,
    ]
    assert groups[1][2].sample == Sample("2+2", "4")
    assert groups[1][2].prompt == ASK[1]
    assert groups[1][0].components == {"value": 18.0}
    assert groups[1][0].gates == {"parses": True, "good": False}


def test_the_best_of_each_prompt(engine: Any, answer_reward: Any) -> None:
    found = select(engine, ASK, answer_reward, rows=3, sampling=Sampling(n=3), rounds=1)
    assert [(scored.sample.question, scored.total) for scored in found.rows] == [("2+3", 5), ("2+2", 4)]
    assert found.dropped == {
        "not the best of its prompt": 3,
        "does not parse": 1,
        "gate good": 1,
        "a scorer failed": 1,
        "asks what another one asks": 1,
    }
    assert (found.drawn, found.short) == (9, True)


def test_a_threshold_and_as_many_rows_as_wanted(engine: Any, answer_reward: Any) -> None:
    found = select(engine, ASK, answer_reward, rows=1, sampling=Sampling(n=3), threshold=4.5)
    assert [scored.total for scored in found.rows] == [5]
    assert len(engine.calls) == 1
    assert len(engine.calls[0][0]) == 1
    high = select(engine, ASK, answer_reward, rows=1, sampling=Sampling(n=3), threshold=math.inf, rounds=2)
    assert high.rows == []
    assert high.dropped["below the threshold"] > 0
