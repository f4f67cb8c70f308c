"""The report: metrics from answers and logs, and the page rendered from them."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from html.parser import HTMLParser
from importlib.metadata import version

import numpy as np
import pytest

import acqcore
from acqsynth.report import metrics as measures, page as pages, render
from acqsynth.report.metrics import Answers, Fits

SKILLS = ["add", "sort"] * 20
BOOTSTRAP = {"resamples": 400, "level": 0.95, "seed": 0}


def answers(n_right):
    return Answers(np.array([1.0] * n_right + [0.0] * (40 - n_right)), SKILLS)


def fits_of(right, learnt, generators=(0,)):
    seeds = list(range(len(right["in_distribution"])))
    return Fits([generators[seed % len(generators)] for seed in seeds], seeds, [learnt] * len(seeds), right)


def collected(generators=(0, 0, 0), **right):
    """Metrics of the given arms, with one number of right answers out of 40 per fit; on the other set all arms and the
    base student have 10. ``generators``: the generator of each fit."""
    arms = right or {"grpo": (30, 32, 31), "no_rl": (20, 20, 21)}
    found = {}
    for arm, numbers in arms.items():
        for rows in (10, 100):
            right = {"in_distribution": [answers(number - (rows == 10)).right for number in numbers]}
            right["other"] = [answers(10).right] * len(numbers)
            found[arm, "student", rows] = fits_of(right, 90 if (arm, rows) == ("no_rl", 100) else rows, generators)
    return measures.collect(
        sets={"in_distribution": "sums", "other": "letters"},
        main="grpo",
        descriptions={arm: f"the arm {arm}" for arm in arms},
        base={("student", "in_distribution"): answers(20), ("student", "other"): answers(10)},
        fits=found,
        level=0.95,
    )


LOG = [
    {
        "step": step,
        "reward": 0.2 + 0.1 * step,
        "reward_std": 0.1,
        "reward/entropy/mean": float(step),
        "reward/total/mean": 0.5,
        "reward/entropy/length_correlation": 0.3,
        "reward/gated/parses": 0.5,
        "reward/gated/new": 0.0,
        "reward/archive/new": 10.0 * step,
        "reward/masked": 0.0,
        "completions/mean_length": 30.0,
        "seconds": 10.0,
        "reward_seconds": 0.5,
        "reward_share": 0.05,
    }
    for step in (1, 2, 3)
] + [{"step": 3, "train_runtime": 1.0}]

COUNTS = {"wanted": 10, "kept": 9, "completions": 30, "dropped": {"gate new": 9, "does not parse": 12}}
LABELS = {"asked": 9, "labelled": 8, "truth_known": 4, "right": 3, "refuted": 1}


def whole():
    found = collected()
    found["recipe"] = {
        "domain": "sums",
        "seed": 0,
        "rounds": 1,
        "generator": {"model": "a/<generator>", "method": "grpo"},
        "student": {"model": "a/student", "seeds": [0, 1, 2]},
    }
    found["machine"] = measures.machine()
    for arm in found["arms"].values():
        arm |= {
            "written": COUNTS,
            "labelled": LABELS,
            "seconds": {"train": 200.0, "write": 3.0, "label": 0.0, "fit": 7.0},
        }
    found["training"] = measures.training([LOG])
    table = {
        "step": list(range(8)),
        "completion": [f"text <{i}> & more" for i in range(8)],
        "reward": [i / 10 for i in range(8)],
        "reward_gate": ["parses"] + [""] * 7,
        "reward_x": [1.0] * 8,
    }
    found["samples"] = measures.samples([table], 2)
    batches = [
        {"skill": "ab"[i % 2], "rows": 8, "scores": {"x": float(i), "flat": 1.0}, "gain": i / 9} for i in range(6)
    ]
    found["validity"] = measures.validity(batches, **BOOTSTRAP)
    return found


class Page(HTMLParser):
    """The text, tags, ids, addresses and unclosed tags of an HTML page."""

    void = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, html):
        super().__init__()
        self.open = []
        self.tags = []
        self.ids = []
        self.addresses = []
        self.words = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        values = dict(attributes)
        self.ids += [str(values["id"])] if "id" in values else []
        self.addresses += [str(values[name]) for name in ("href", "src", "action", "data") if name in values]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page(found, figures=False):
    """The parsed page; figures take a second or two, so they are rendered only on request."""
    with pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setattr(pages, "_figures", lambda *given: defaultdict(lambda: None))
        return Page(render(json.loads(json.dumps(found))))


@pytest.fixture(scope="module")
def html():
    return render(json.loads(json.dumps(whole())))


def test_the_page_is_whole_and_needs_nothing_else(html):
    found = Page(html)
    assert not found.open
    assert found.tags.count("script") == 1  # for sorting tables
    assert "link" not in found.tags
    assert all(address.startswith("#") for address in found.addresses)
    assert "http" not in html
    assert "@import" not in html
    assert len(set(found.ids)) == len(found.ids)
    assert {address.removeprefix("#") for address in found.addresses} <= set(found.ids)


def test_every_section_and_figure_is_there(html):
    found = Page(html)
    sections = ("accuracy", "forgetting", "training", "written", "signals", "samples", "cost", "recipe")
    assert set(sections) <= set(found.ids)
    # accuracy, sizes, reward, gates, lengths, length correlation, archives, validity, cost
    assert found.tags.count("svg") == 9
    for words in (
        "reward \u00b1 deviation",
        "entropy",
        "5.0 % of a step's time for the reward",
        "text <7> & more",
        "rejected by the gate parses",
        "does not parse (12), gate new (9)",
        "75.0 % of 4",
        "3 min",
        "a/<generator>",
    ):
        assert words in found.text, words


def test_skills_stand_first_and_the_most_forgotten_before_all():
    found = whole()
    skills = found["base"]["student"]["in_distribution"]["skills"]
    skills["sort"]["accuracy"] = 1.0  # so sorting counts as forgotten
    made = page(found)
    assert made.ids.index("skills") < made.ids.index("accuracy")
    assert made.text.index("sort 100.0 \u2192 76.7") < made.text.index("add 50.0 \u2192 78.3")


def test_the_page_says_what_made_it():
    text = page(whole()).text
    for words in (f"torch {version('torch')}", f"acqcore {acqcore.__version__}", f"Python {platform.python_version()}"):
        assert words in text
    assert "seeds 0; fits 0, 1, 2" in text


def test_dark_and_light_are_told_by_the_system(html):
    assert "prefers-color-scheme: dark" in html
    assert "background: #fff" not in html


def test_what_was_not_run_is_said():
    found = whole()
    found |= {"training": None, "samples": None, "validity": None}
    found["arms"]["no_rl"]["written"] = found["arms"]["no_rl"]["labelled"] = None
    text = page(found).text
    assert "No generator was trained" in text
    assert "trained with" not in text
    assert "No score of a single completion was logged" in text
    assert "evaluation.validity.batches is 0" in text
    best = {"question": ["1+1"], "reasoning": [""], "answer": ["2"], "reward": [0.5]}
    found["samples"] = measures.samples([best])
    assert "Of 1 scored samples of grpo, each the best of its prompt" in page(found).text


def test_a_log_without_rewards_is_said():
    found = whole() | {"training": measures.training([[{"step": 1, "loss": 0.5}]])}
    assert found["training"]["cost"] is None
    told = page(found, figures=True).text
    assert "The trainer logged no reward per step." in told
    assert "scores before it trains" not in told
    found["recipe"]["generator"]["method"] = "dpo"
    assert "no reward per step: dpo scores before it trains." in page(found, figures=True).text


def test_one_set_and_one_size_leave_no_empty_places():
    found = whole()
    del found["sets"]["other"]
    for entry in found["arms"].values():
        entry["results"] = entry["results"][:1]
    made = page(found, figures=True)
    assert made.tags.count("svg") == 8
    assert "so forgetting elsewhere was not measured" in made.text


def test_gain_loss_and_neither_are_said_plainly():
    said = collected(grpo=(34, 36, 35), no_rl=(20, 20, 20))["verdict"]
    assert [entry["kind"] for entry in said] == ["gain", "gain", "none", "note"]
    assert said[0]["text"].startswith(
        "Gain: grpo over the base student in distribution: 50.0 % to 87.5 % after 100 rows, +37.5 points, interval +"
    )
    assert said[2]["text"] == "No change shown: grpo over the base student on other, +0.0 points, no interval."
    assert said[3]["text"] == "no_rl had 90 of 100 rows, so its fits are not at equal rows."
    assert collected(grpo=(2, 3, 2))["verdict"][0]["text"].startswith("Loss: grpo over the base student")
    assert collected(grpo=(20,) * 3)["verdict"][0]["text"].startswith("No gain shown: grpo over the base student")
    assert collected(grpo=(24, 25, 24), no_rl=(20, 20, 20))["verdict"][1]["text"] == (
        "No gain shown: grpo over no_rl at equal rows, +10.8 points, interval +0.9 to +20.7; not significant after "
        "Holm's correction for 3 comparisons."
    )


@pytest.mark.parametrize("fits", [1, 2])
def test_fewer_than_three_fits_call_nothing(fits):
    said = collected(grpo=(39, 40)[:fits], no_rl=(10, 10, 10))["verdict"]
    assert [entry["kind"] for entry in said if entry["kind"] != "note"] == ["none"] * 3
    assert said[0]["text"].endswith(f"; a gain or a loss needs 3 fits, but this run has {fits}.")


@pytest.mark.parametrize(("rows", "kind"), [(1, "none"), (2, "none"), (5, "none"), (6, "gain"), (40, "gain")])
def test_identical_values_give_no_interval(rows, kind):
    [said] = measures.collect(
        sets={"in_distribution": "sums"},
        main="grpo",
        descriptions={"grpo": "grpo"},
        base={("student", "in_distribution"): Answers([0.0] * rows, [None] * rows)},
        fits={("grpo", "student", 9): fits_of({"in_distribution": [[1.0] * rows] * 3}, 9)},
        level=0.95,
    )["verdict"]
    assert said["kind"] == kind
    assert said["text"].endswith("0.0 % to 100.0 % after 9 rows, +100.0 points, no interval.")


def test_comparisons_are_judged_together():
    """A comparison with p below 0.05 counts only if it survives Holm's procedure over all comparisons."""
    alone = collected(grpo=(24, 26, 25))
    p = [alone["arms"]["grpo"]["results"][1]["sets"][name]["change"]["p"] for name in ("in_distribution", "other")]
    assert p[0] < 0.05 < p[1]
    assert alone["verdict"][0]["kind"] == "gain"
    many = collected(grpo=(24, 26, 25), **{f"arm_{i}": (25, 24, 26) for i in range(30)})
    assert many["arms"]["grpo"]["results"][1]["sets"]["in_distribution"]["change"]["p"] == p[0]
    assert many["verdict"][0]["kind"] == ("gain" if p[0] < 0.05 / 32 else "none")


def test_labels_that_can_only_be_refuted_have_no_share_that_is_right():
    found = json.loads(json.dumps(whole()))
    found["arms"]["grpo"]["labelled"] = {"asked": 9, "labelled": 8, "truth_known": 0, "right": 0, "refuted": 2}
    assert '<td class="number">2 refuted</td>' in render(found)


@pytest.mark.parametrize(("generators", "said"), [((0, 0, 0), True), ((0, 0, 1, 1), True), ((0, 1, 2), False)])
def test_the_page_says_when_few_generators_wrote_all_rows(generators, said):
    found = json.loads(json.dumps(whole()))
    for arm in found["arms"].values():
        for result in arm["results"]:
            result["generators"] = list(generators)
    assert ("Each arm has fewer than 3 generators" in render(found)) == said


def test_fits_of_one_generator_are_one_draw():
    """Six fits of three generators count as three draws, which widens the intervals."""
    right = (24, 24, 27, 27, 33, 33)
    fits, drawn = (
        collected(generators=generators, grpo=right, no_rl=(20,) * 6)["arms"]["grpo"]["results"][1]
        for generators in ((0,) * 6, (0, 0, 1, 1, 2, 2))
    )
    assert drawn["generators"] == [0, 0, 1, 1, 2, 2]
    assert drawn["sets"]["in_distribution"]["per_seed"] == [n / 40 for n in right]
    for measure in ("change", "accuracy"):
        narrow, wide = fits["sets"]["in_distribution"][measure], drawn["sets"]["in_distribution"][measure]
        assert wide["mean"] == narrow["mean"]
        assert wide["low"] < narrow["low"]


def test_what_the_base_student_knew_is_shown_for_every_arm():
    """Every arm is shown on skills in which the base student scored at least 80 %; only those can be forgotten."""
    strong = Answers(np.array([1.0, 0.0] * 20), SKILLS)  # can add, cannot sort

    def fitted(adds):
        return np.array([1.0 if i < adds else 0.0 for i in range(20)]).repeat(2)

    arms = {"grpo": (8, 9, 10), "no_rl": (20, 20, 20)}
    found = measures.collect(
        sets={"in_distribution": "sums"},
        main="grpo",
        descriptions={arm: arm for arm in arms},
        base={("student", "in_distribution"): strong},
        fits={
            (arm, "student", 10): fits_of({"in_distribution": list(map(fitted, numbers))}, 10)
            for arm, numbers in arms.items()
        },
        level=0.95,
    )
    known = {arm: found["arms"][arm]["results"][0]["sets"]["in_distribution"]["known"] for arm in arms}
    assert known["grpo"]["skills"] == {"add": (1.0, pytest.approx(9 / 20))}
    assert known["no_rl"]["skills"] == {"add": (1.0, 1.0)}
    assert known["grpo"]["change"]["mean"] == pytest.approx(9 / 20 - 1)
    [said] = [entry for entry in found["verdict"] if "knew" in entry["text"]]
    assert said["kind"] == "loss"
    assert said["text"].startswith(
        "Forgetting: grpo on the skills the base student knew (add 100.0 % to 45.0 %), -55.0 points, interval -"
    )
    base = whole()
    for arm in base["arms"].values():
        for result in arm["results"]:
            result["sets"]["in_distribution"]["known"] = known["grpo"]
    text = page(base).text
    assert "What the base student knew" in text
    assert "add 100.0 45.0 45.0" in text


def test_a_signal_of_one_value_is_named():
    tables = [
        {"reward": [0.1, 0.2], "reward_x": [0.0, 0.0], "reward_y": [0.5, 0.25], "reward_gate": ["", "new"]},
        {"reward": [0.3], "reward_x": [0.0], "reward_y": [float("nan")], "reward_gate": [""]},
    ]
    assert measures.constant_signals(tables) == ["x"]
    assert measures.constant_signals([{"reward": [0.1], "reward_x": [0.0]}]) == []
    gated = {"reward": [0.1, -1.0], "reward_x": [0.5, None], "reward_gate": ["", "parses"]}
    assert measures.constant_signals([gated]) == []
    assert measures.constant_signals([{"question": ["1+1"]}]) == []


def test_the_share_without_a_score():
    assert measures.unscored({"completions": 8, "masked": 2}) == 0.25
    assert measures.unscored({"completions": 8, "dropped": {"a scorer failed": 4, "gate new": 1}}) == 0.5
    assert measures.unscored({"completions": 8}) == measures.unscored({}) == 0.0


def test_metrics_are_those_of_the_answers():
    found = collected()
    [small, large] = found["arms"]["grpo"]["results"]
    assert (small["rows_wanted"], large["rows_wanted"]) == (10, 100)
    here = large["sets"]["in_distribution"]
    assert here["accuracy"]["mean"] == 31 / 40
    assert here["per_seed"] == [30 / 40, 32 / 40, 31 / 40]
    assert here["change"]["mean"] == pytest.approx(11 / 40)
    assert here["skills"] == {
        "add": {"accuracy": (15 + 16 + 16) / 60, "rows": 20},
        "sort": {"accuracy": (15 + 16 + 15) / 60, "rows": 20},
    }
    assert [c["against"] for c in found["comparisons"]] == ["no_rl", "no_rl"]
    assert found["comparisons"][1]["difference"]["mean"] == pytest.approx(31 / 40 - 61 / 120)


def test_rounds_are_logged_one_after_the_other():
    """Without the trainer's closing totals, which a resumed run has for its last start only."""
    found = measures.training([LOG, LOG])
    assert [(entry["round"], entry["step"]) for entry in found["log"]] == [
        (1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6),
    ]  # fmt: skip
    cost = {"steps": 6, "seconds_per_step": 10.0, "reward_seconds_per_step": 0.5, "share": pytest.approx(0.05)}
    assert found["cost"] == cost
    seldom = [LOG[1], LOG[2] | {"seconds": 7.0, "reward_seconds": 2.0}]  # logged after two steps and after one more
    cost = {"steps": 3, "seconds_per_step": 9.0, "reward_seconds_per_step": 1.0, "share": pytest.approx(1 / 9)}
    assert measures.training([seldom])["cost"] == cost


def test_best_and_worst_samples_take_each_text_once_and_never_a_gated_one():
    trained = {
        "completion": ["a", [{"role": "assistant", "content": "a"}], "b", "c", "d", "e"],
        "reward": [0.9, 0.9, 0.5, 0.1, 0.0, float("nan")],
        "reward_gate": ["", "", "", "", "new", ""],
        "reward_x": [1.0, 1.0, 2.0, float("nan"), 4.0, 5.0],
    }
    found = measures.samples([trained, trained | {"step": [2] * 6}], 2)  # a generation, logged at two steps
    assert [r["text"] for r in found["best"]] == ["a", "b"]
    assert [r["text"] for r in found["worst"]] == ["c"]
    assert [r["text"] for r in found["rejected"]] == ["d"]
    assert (found["scored"], found["gates"]) == (6, {"new": 1})
    assert [r["parts"] for r in found["best"] + found["worst"]] == [{"x": 1.0}, {"x": 2.0}, {}]
    selected = {"question": ["1+1"], "reasoning": [""], "answer": ["2"], "reward": [0.5], "reward_x": [0.25]}
    [row] = measures.samples([selected])["best"]
    assert row == {"step": None, "text": "1+1\n2", "reward": 0.5, "gate": "", "parts": {"x": 0.25}}
    assert measures.samples([{"question": ["1+1"], "reasoning": [""], "answer": ["2"]}]) is None


def test_counts_of_rounds_are_added():
    assert measures.sum_counts([COUNTS, COUNTS]) == {
        "wanted": 20,
        "kept": 18,
        "completions": 60,
        "dropped": {"does not parse": 24, "gate new": 18},
    }


def test_validity_leaves_out_what_could_not_be_scored():
    batches = [
        {"skill": "a", "rows": 4, "scores": {"x": 1.0, "y": None, "z": None}, "gain": 0.1},
        {"skill": "b", "rows": 4, "scores": {"x": 3.0, "y": 2.0, "z": None}, "gain": 0.3},
        {"skill": "c", "rows": 4, "scores": {"x": 2.0, "y": 1.0, "z": None}, "gain": 0.2},
    ]
    found = measures.validity(batches, **BOOTSTRAP)["signals"]
    assert found["x"]["correlation"]["mean"] == pytest.approx(1.0)
    assert found["x"]["first"] == "b"
    assert found["y"] == {"correlation": None, "batches": 2, "first": "b"}
    assert found["z"] == {"correlation": None, "batches": 0, "first": None}
