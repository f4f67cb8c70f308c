from __future__ import annotations

import re
from collections import Counter

import pytest

from acqsynth.config import Source
from acqsynth.domains import domain
from acqsynth.parsing import parse_sample
from acqsynth.seeds import DOMAINS, KINDS, load_seeds, load_source, load_word_problems


def test_sixty_samples_twenty_a_domain_and_each_kind_in_each():
    seeds = load_seeds()
    assert len(seeds) == 60
    assert Counter(seed["domain"] for seed in seeds) == dict.fromkeys(DOMAINS, 20)
    assert {(seed["domain"], seed["kind"]) for seed in seeds} == {(d, k) for d in DOMAINS for k in KINDS}
    assert sum(seed["kind"] == "ordinary" for seed in seeds) > 30


def test_each_row_is_whole_and_unique():
    seeds = load_seeds()
    for seed in seeds:
        assert set(seed) - {"answer"} == {"id", "domain", "kind", "prompt", "completion"}
        assert seed["prompt"].strip() + "\n" == seed["prompt"]
        assert seed["completion"].strip() == seed["completion"] != ""
    for field in ("id", "prompt", "completion"):
        assert len({seed[field] for seed in seeds}) == len(seeds)


def test_a_seed_survives_the_sample_format():
    for seed in load_seeds():
        text = f"<question>{seed['prompt']}</question><answer>{seed['completion']}</answer>"
        assert parse_sample(text) == {"prompt": seed["prompt"], "completion": seed["completion"]}


def test_final_answers_stand_in_the_completion():
    answered = [seed for seed in load_seeds() if "answer" in seed]
    assert {seed["domain"] for seed in answered} == {"mathematics"}
    assert len(answered) == 13
    assert all(seed["kind"] in ("ordinary", "trivial") and seed["answer"] in seed["completion"] for seed in answered)


def test_word_problems_differ_and_end_their_reasoning_in_the_answer():
    problems = load_word_problems()
    assert len({problem["question"] for problem in problems}) == len(problems) == 96
    for problem in problems:
        assert re.findall(r"[0-9]+", problem["reasoning"])[-1] == problem["answer"]


def test_selection():
    assert {seed["id"] for seed in load_seeds("code", "garbled")} == {"code-19", "code-20"}
    assert len(load_seeds("medicine")) == 20


@pytest.mark.parametrize(("arguments", "name"), [(("physics", None), "domain"), ((None, "easy"), "kind")])
def test_an_unknown_selection_names_the_argument(arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}: unknown .* expected one of"):
        load_seeds(*arguments)


@pytest.mark.parametrize("options", [{"columns": {"question": "q"}}, {"split": "test"}])
def test_packaged_rows_have_neither_columns_nor_splits(options):
    with pytest.raises(ValueError, match=r"^columns, split: expected none for bundled:mathematics"):
        load_source(domain("math"), Source(source="bundled:mathematics", **options))


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic-skewed"])
def test_parts_of_a_generated_world_do_not_overlap(name):
    parts = [(0, 560), (0, 280), (280, 280)]
    whole, *halves = (
        load_source(domain(name), Source(source="world:1", skip=skip, limit=limit)) for skip, limit in parts
    )
    assert halves == [whole[:280], whole[280:]]
    assert len({row.question for row in whole}) == 560
