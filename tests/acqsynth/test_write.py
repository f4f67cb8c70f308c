from __future__ import annotations

import logging
import time
from collections import Counter

import pytest
from fakes import written

from acqsynth.domains import Sample
from acqsynth.engines import Sampling
from acqsynth.rewards.gates import Check, Labelled, New
from acqsynth.write import best, candidates, passing, prompts, questions, write

SEEDS = [Sample(f"{i}+{i}", str(2 * i)) for i in range(7)]
ASK = [[{"role": "user", "content": f"prompt {i}"}] for i in range(4)]


@pytest.mark.parametrize("shown", [1, 3, 7])
def test_seeds_are_used_equally_and_never_twice_in_a_prompt(sums, shown):
    asked = prompts(sums, SEEDS, 20, shown=shown, seed=1)
    hands = [prompt[0]["content"].split()[1:] for prompt in asked]
    assert all(len(set(hand)) == shown for hand in hands)
    used = Counter(question for hand in hands for question in hand)
    assert set(used) == {seed.question for seed in SEEDS}
    assert max(used.values()) - min(used.values()) <= 1


@pytest.mark.parametrize("shown", [1, 2, 3, 5])
def test_a_repeated_seed_is_shown_more_often_but_once_in_a_prompt(sums, shown):
    """As drawn from a student's mistakes; fewer different seeds than wanted are shown all."""
    often, seldom, rare = SEEDS[:3]
    asked = prompts(sums, [often] * 6 + [seldom] * 3 + [rare], 40, shown=shown, seed=1)
    hands = [prompt[0]["content"].split()[1:] for prompt in asked]
    assert all(len(set(hand)) == len(hand) == min(shown, 3) for hand in hands)
    used = Counter(question for hand in hands for question in hand)
    assert used[often.question] >= used[seldom.question] >= used[rare.question] > 0
    assert used[often.question] > used[rare.question] or shown >= 3


def test_prompts_of_many_seeds_take_linear_time(sums):
    """Guards against a pass over all seeds for each prompt, half a minute; not a benchmark."""
    seeds = [Sample(f"{i}+{i}", str(2 * i)) for i in range(20_000)]
    begin = time.process_time()
    asked = prompts(sums, seeds, 20_000, shown=1, seed=0)
    assert {prompt[0]["content"].split()[1] for prompt in asked} == {seed.question for seed in seeds}
    assert time.process_time() - begin < 5


def test_the_seed_decides_the_order(sums):
    first = prompts(sums, SEEDS, 5, shown=2, seed=1)
    assert first == prompts(sums, SEEDS, 5, shown=2, seed=1)
    assert first != prompts(sums, SEEDS, 5, shown=2, seed=2)
    assert prompts(sums, [], 2, shown=0, seed=1) == [sums.generator_prompt([])] * 2


def test_prompts_that_can_not_be(sums):
    for n in (0, 1.5):
        with pytest.raises(ValueError, match=f"n: expected an int >= 1, got {n}"):
            prompts(sums, SEEDS, n, shown=1, seed=0)
    for shown in (8, 1.5):
        with pytest.raises(ValueError, match=f"shown: expected 0 to 7, the number of seeds, got {shown}"):
            prompts(sums, SEEDS, 1, shown=shown, seed=0)
    with pytest.raises(ValueError, match="seed: expected at least 0, got -1"):
        prompts(sums, SEEDS, 1, shown=1, seed=-1)
    with pytest.raises(TypeError, match=r"seeds\[0\]: expected acqsynth.domains.Sample"):
        prompts(sums, [{"question": "1+1", "answer": "2"}], 1, shown=1, seed=0)


def test_seeds_are_shown_within_the_request_or_as_turns(sums):
    [within] = prompts(sums, SEEDS[:2], 1, shown=2, seed=0)
    assert [message["role"] for message in within] == ["user"]
    apart = prompts(sums, SEEDS, 4, shown=2, turns=True, seed=0)
    for messages in apart:
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
        assert {message["content"] for message in messages[::2]} == {"new "}
        shown = [sums.parse(message["content"]) for message in messages[1::2]]
        assert all(sample in SEEDS for sample in shown)
        assert shown[0] != shown[1]


class Large:
    """A gate with an archive that passes answers of at least 5 and cannot decide on 9."""

    name = "large"

    def __init__(self):
        self.archive = []

    def __call__(self, samples):
        return [None if sample.answer == "9" else int(sample.answer) >= 5 for sample in samples]

    def accept(self, samples):
        self.archive += [sample.question for sample in samples]


def test_gates_speak_in_order():
    samples = [Sample("q", str(i)) for i in (4, 5, 9, 6)]
    dropped = Counter()
    even = Check("even", lambda sample: int(sample.answer) % 2 == 0)
    assert passing([Large(), even], samples, dropped) == [samples[3]]
    assert dropped == {"gate large": 1, "gate large could not tell": 1, "gate even": 1}
    assert passing([Large()], [], dropped) == []


def test_a_gate_may_pass_a_sample_as_another():
    doubled = Labelled(lambda samples: [Sample("q", str(2 * int(sample.answer))) for sample in samples])
    dropped = Counter()
    assert passing([doubled, Large()], [Sample("q", "2"), Sample("q", "3")], dropped) == [Sample("q", "6")]
    assert dropped == {"gate large": 1}


def test_what_is_kept_and_why_the_rest_is_not(sums, scripted):
    texts = [
        written("1+4", 5),
        "no sample",
        written("1-4", 5),
        written("1+1", 2),
        written("5+4", 9),
        written("2+3 ", 5),
        written("1+4", 5),
        written("3+4", 7),
    ]
    engine, gate = scripted(lambda prompt, i, seed: texts[2 * int(prompt[0]["content"][-1]) + i]), Large()
    found = write(engine, sums, ASK, Sampling(n=2, seed=3), rows=8, gates=[gate], rounds=1)
    assert [sample.question for sample in found.rows] == ["1+4", "2+3", "3+4"]
    assert found.dropped == {
        "does not parse": 1,
        "no sum": 1,
        "gate large": 1,
        "gate large could not tell": 1,
        "repeats a question": 1,
    }
    assert (found.completions, found.rounds, found.wanted, found.incomplete) == (8, 1, 8, True)
    assert gate.archive == ["1+4", "2+3", "3+4"]


BAKER = "A baker sells 12 loaves in the morning and 19 loaves in the afternoon. How many loaves does he sell + give?"
COPIES = [
    f"Question 3: {BAKER}",
    BAKER.replace("baker", "ba\u200bker"),
    f"**{BAKER}**",
    BAKER.replace("afternoon", "after noon"),
    f"{BAKER} (2)",
]
OTHERS = [BAKER.replace("19", "21"), "A train takes 12 hours for one way. How many does it take for both + back again?"]


@pytest.mark.parametrize(("gates", "kept"), [([New()], []), ([], COPIES[3:4])])
def test_copies_within_one_round_are_dropped(sums, scripted, gates, kept):
    """Of a question and its disguised copies the first is kept, and without the gate ``new`` those with another normal
    form; a changed number makes another question."""
    texts = iter([written(question, 31) for question in (BAKER, *COPIES[:3], *OTHERS, *COPIES[3:])])
    engine = scripted(lambda prompt, i, seed: next(texts))
    found = write(engine, sums, ASK, Sampling(n=2), rows=8, rounds=1, gates=gates)
    assert [sample.question for sample in found.rows] == [BAKER, *OTHERS, *kept]
    assert found.dropped == {"repeats a question": 5 - len(kept)}


def test_earlier_questions_are_not_asked_again(sums, scripted):
    texts = iter([written(question, 31) for question in (COPIES[0], *OTHERS, "1+1")])
    engine = scripted(lambda prompt, i, seed: next(texts))
    asked = questions()
    asked.add([BAKER, "1+1"])
    found = write(engine, sums, ASK, Sampling(), rows=4, rounds=1, asked=asked)
    assert [sample.question for sample in found.rows] == OTHERS
    assert asked.texts() == [BAKER, "1+1", *OTHERS]
    assert found.dropped == {"repeats a question": 2}


def test_rounds_go_on_with_new_seeds_until_there_are_enough(sums, scripted):
    def says(prompt, i, seed):
        return written(f"{seed}+{prompt[0]['content'][-1]}", seed) if i == 0 else "no sample"

    engine = scripted(says)
    found = write(engine, sums, ASK, Sampling(n=2, seed=5), rows=7)
    assert len(found.rows) == 7
    assert not found.incomplete
    # First all four prompts, which keep half of their completions; at that rate three more are enough.
    assert [[p[0]["content"] for p in asked] for asked, _ in engine.calls] == [
        [f"prompt {i}" for i in (0, 1, 2, 3)],
        [f"prompt {i}" for i in (0, 1, 2)],
    ]
    others = scripted(says)
    write(others, sums, ASK, Sampling(n=2, seed=6), rows=7)
    assert len({sampling.seed for _, sampling in [*engine.calls, *others.calls]}) == 4
    assert found.completions == 14


def test_a_round_asks_no_more_prompts_than_it_needs(sums, scripted):
    engine = scripted(lambda prompt, i, seed: written(f"{i}+{prompt[0]['content'][-1]}", i + 5))
    asked, gate = questions(), Large()
    found = write(engine, sums, ASK, Sampling(n=3), rows=4, gates=[gate], asked=asked)
    assert [len(asked) for asked, _ in engine.calls] == [2]
    assert found.dropped == {"surplus": 2}
    # A surplus question may be asked again.
    assert asked.texts() == gate.archive == [sample.question for sample in found.rows]
    assert len(found.rows) == 4


def test_it_gives_up_and_says_so(sums, scripted, caplog):
    engine = scripted(lambda prompt, i, seed: "no sample")
    with caplog.at_level(logging.WARNING):
        found = write(engine, sums, ASK, Sampling(), rows=2, rounds=3)
    assert (found.rows, found.rounds, found.incomplete, found.completions) == ([], 3, True, 10)
    assert caplog.messages == ["0 of 2 rows after 3 rounds (10 does not parse)"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows: expected an int >= 1, got 0"),
        ({"rows": 1, "rounds": 0}, "rounds: expected an int >= 1, got 0"),
        ({"rows": 1, "prompts": []}, "prompts: expected at least one, got none"),
    ],
)
def test_nothing_to_do(sums, scripted, options, message):
    asked = options.pop("prompts", ASK)
    with pytest.raises(ValueError, match=message):
        write(scripted(str), sums, asked, Sampling(), **options)


# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(scripted):
    texts = [
        [written("1+1", 2), written("2+3", 5), "no sample"],
        [written("bad 9+9", 18), written("6+7", 13), written("2+2", 4)],
        [written("2 + 3", 5), written("1+2", 3), written("2+3", 6)],
    ]
    return scripted(lambda prompt, i, seed: texts[int(prompt[0]["content"][-1])][i])


def test_candidates_of_a_prompt_are_a_group(engine, answer_reward):
    groups = candidates(engine, ASK[:3], answer_reward, Sampling(n=3))
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


def test_a_reward_that_scores_no_candidates_is_refused(engine):
    with pytest.raises(TypeError, match="reward: expected one with score, such as ComposedReward, got"):
        best(engine, ASK, len, Sampling(n=2), rows=1)
    assert not engine.calls


def test_the_best_of_each_prompt(engine, answer_reward):
    found = best(engine, ASK[:3], answer_reward, Sampling(n=3), rows=3, rounds=1)
    assert [(scored.sample.question, scored.total) for scored in found.rows] == [("2+3", 5), ("2+2", 4)]
    assert found.dropped == {
        "not the best of its prompt": 3,
        "does not parse": 1,
        "gate good": 1,
        "a scorer failed": 1,
        "repeats a question": 1,
    }
    assert (found.completions, found.incomplete) == (9, True)


def test_the_best_of_two_prompts_are_no_near_copies(scripted, answer_reward):
    texts = dict(enumerate((COPIES[0], BAKER, *OTHERS)))
    engine = scripted(lambda prompt, i, seed: written(texts[int(prompt[0]["content"][-1])], 31))
    found = best(engine, ASK, answer_reward, Sampling(n=2), rows=4, rounds=1)
    assert [scored.sample.question for scored in found.rows] == [COPIES[0], *OTHERS]
    assert found.dropped == {"not the best of its prompt": 4, "repeats a question": 1}


def test_as_many_rows_as_wanted(engine, answer_reward):
    found = best(engine, ASK[:3], answer_reward, Sampling(n=3), rows=1)
    assert [scored.total for scored in found.rows] == [5]
    assert len(engine.calls) == 1
    assert len(engine.calls[0][0]) == 1
