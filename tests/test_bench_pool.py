"""``bench_pool`` on a tiny student: pools, choosers against brute force, fits, and resuming after a stop."""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import ttest_rel
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaConfig, LlamaForCausalLM

import acqcore
from benchmarks import bench_pool, paired, pool_data, pool_fit, pool_report, pool_signals, real_rows, resumable
from benchmarks.bench_pool import Bench, Choices, Scale
from benchmarks.pool_data import KINDS, Message, Nearest, Sizes
from benchmarks.pool_signals import Recipe
from benchmarks.resumable import Encoder, Log

VOCABULARY, LENGTH, LABEL_LENGTH = 211, 20, 3
SIZES = Sizes(intents=4, warm=2, development=8, pool=60, test=16)
TOPICS = ("card lost", "card late", "rate today", "pin change", "cash fee", "top up")


class Tokenizer:
    """One token per word."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = [3 + sum(map(ord, word)) * 7919 % (VOCABULARY - 3) for word in text.split()]
        return type("Encoding", (), {"input_ids": ids})


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path):
    rng = random.Random(0)
    filler = [f"word{i}" for i in range(40)]

    def rows(n, intents):
        made = []
        for i in range(n):
            topic = TOPICS[i % len(TOPICS)]
            text = " ".join(
                [*rng.sample(filler, 4), *(topic.split() if intents else ["stray"]), str(rng.random())[2:9]]
            )
            made.append({"text": text, "intent": topic.replace(" ", "_") if intents else "oos"})
        return made

    for name in ("banking77", "clinc150"):
        for part, n in (("train", 240), ("test", 60)):
            write(tmp_path / f"{name}_{part}.jsonl", rows(n, True))
    for part in ("train", "val", "test"):
        write(tmp_path / f"clinc150_oos_{part}.jsonl", rows(20, False))
    return tmp_path


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class TestPool:
    def test_kinds_have_their_shares_and_the_rest_is_untouched(self, folder):
        task = pool_data.task(*pool_data.load(folder, "banking77"), SIZES, seed=1)
        a, b = task.pools["A"], task.pools["B"]
        assert Counter(row.kind for row in b) == {
            "clean": 33, "random label": 9, "ambiguous": 6, "near duplicate": 6, "out of scope": 6,
        }  # fmt: skip
        for before, after in zip(a, b, strict=True):
            assert before.kind == "clean"
            if after.kind == "clean":
                assert after == before
            elif after.kind == "random label":
                assert (after.text, after.intent != before.intent) == (before.text, True)
            elif after.kind == "ambiguous":
                assert after.text == before.text
            elif after.kind == "out of scope":
                assert "stray" in after.text
        clean = {row.text: row.intent for row in b if row.kind == "clean"}
        for row in b:
            assert row.intent in task.intents
            if row.kind == "near duplicate":
                held = set(pool_data.words(row.text))
                (source,) = [text for text in clean if set(pool_data.words(text)) <= held]
                assert row.text != source
                assert row.intent == clean[source]

    def test_no_row_is_in_two_parts(self, folder):
        task = pool_data.task(*pool_data.load(folder, "banking77"), SIZES, seed=1)
        texts = [row.text for part in (task.warm, task.development, task.pools["A"], task.test) for row in part]
        assert len(texts) == len(set(texts))
        assert Counter(Counter(row.intent for row in task.warm).values()) == {2: 4}

    def test_a_seed_decides_everything(self, folder):
        data = pool_data.load(folder, "banking77")
        assert pool_data.task(*data, SIZES, 3) == pool_data.task(*data, SIZES, 3)
        assert pool_data.task(*data, SIZES, 3).pools != pool_data.task(*data, SIZES, 4).pools

    def test_a_training_row_that_repeats_a_test_row_is_left_out(self, folder):
        train, test, _ = pool_data.load(folder, "banking77")
        leak = {"text": f"  {test[0].text.upper()}!", "intent": test[0].intent}
        with (folder / "banking77_train.jsonl").open("a") as file:
            file.write(json.dumps(leak) + "\n")
        assert pool_data.load(folder, "banking77")[0] == train

    def test_too_few_rows_are_refused(self, folder):
        with pytest.raises(ValueError, match="sizes: 5008 rows beyond the warm start"):
            pool_data.task(*pool_data.load(folder, "banking77"), Sizes(4, 2, 8, 5000, 16), seed=0)

    def test_confusable_intents_share_words(self):
        rows = [Message(text, text.replace(" ", "_")) for text in ("card lost", "card stolen", "rate today")] * 2
        nearest = Nearest(rows)
        assert nearest.confusable("card_lost") == "card_stolen"
        assert nearest.of_text("what is the rate") == "rate_today"
        assert nearest.of_text("unheard of") is None

    def test_messages_of_the_files_as_published(self):
        """The published files, if present, have every intent and enough rows to draw 77 x 2 + 96 + 3,000."""
        source = real_rows.FOLDER / "intents"
        if not source.is_dir():
            pytest.skip("the intent files are absent")
        train, test, stray = pool_data.load(source, "clinc150")
        task = pool_data.task(train, test, stray, Sizes(), seed=100)
        assert len(task.warm) == 154
        assert len(set(task.intents)) == 77
        assert Counter(row.kind for row in task.pools["B"]).most_common(1)[0] == ("clean", 1650)


class TestChoosers:
    def test_sift_lowers_the_posterior_variance_most(self):
        g = torch.Generator().manual_seed(0)
        candidates, prompts = torch.randn(14, 4, generator=g), torch.randn(3, 4, generator=g)
        candidates[5] = candidates[2]
        x, t = F.normalize(candidates.double(), dim=1), F.normalize(prompts.double(), dim=1)

        def variance(s):
            inner = x[s] @ x[s].T + pool_signals.SIFT_NOISE * torch.eye(len(s), dtype=torch.float64)
            return float((t.square().sum(1) - (t @ x[s].T @ torch.linalg.inv(inner) * (t @ x[s].T)).sum(1)).sum())

        chosen: list[int] = []
        for _ in range(9):
            left = [i for i in range(14) if i not in chosen]
            chosen.append(min(left, key=lambda i: variance([*chosen, i])))
        assert pool_signals.sift(candidates, prompts, 9).tolist() == chosen

    def test_huds_by_loops(self):
        g = torch.Generator().manual_seed(1)
        uncertainty, vectors = 3 * torch.rand(40, generator=g), torch.randn(40, 6, generator=g)
        low, high = float(uncertainty.min()), float(uncertainty.max())
        scores = []
        for i in range(40):
            stratum = [min(9, int((float(u) - low) / (high - low) * 10)) for u in uncertainty]
            own = vectors[[j for j in range(40) if stratum[j] == stratum[i]]]
            cosine = F.cosine_similarity(vectors[i], own.mean(dim=0), dim=0)
            scores.append(0.5 * (1 - float(cosine)) + 0.5 * float(uncertainty[i]))
        expected = sorted(range(40), key=lambda i: -scores[i])[:12]
        assert pool_signals.huds(uncertainty, vectors, 12).tolist() == expected

    def test_huds_of_equal_uncertainties(self):
        vectors = torch.eye(4)
        vectors[3] = -1.0
        chosen = pool_signals.huds(torch.ones(4), vectors, 4)  # one stratum; only 3 points along its mean
        assert chosen.tolist() == [0, 1, 2, 3]

    def test_distinct_keeps_the_first_of_near_copies(self):
        vectors = torch.tensor([[1.0, 0.0], [0.99, 0.05], [0.0, 2.0], [0.05, 1.0], [1.0, 1.0]])
        assert pool_signals.distinct([4, 1, 0, 3, 2], vectors, threshold=0.95) == [4, 1, 3]
        assert pool_signals.distinct([0, 2], vectors, threshold=0.95) == [0, 2]

    def test_the_oracle_chooses_clean_rows_in_the_order_of_random(self):
        kinds = ["clean", "out of scope"] * 10
        chosen = pool_signals.clean_oracle(kinds, 6, seed=3)
        assert len(set(chosen)) == 6
        assert {kinds[i] for i in chosen} == {"clean"}
        order = random.Random(3).sample(range(20), 20)
        assert [i for i in order if i in chosen] == chosen


class TestPaired:
    def test_is_the_paired_t_test(self):
        a, b = [3.0, 5.0, 4.5, 6.0], [2.5, 4.0, 4.4, 4.0]
        expected = ttest_rel(a, b)
        d = paired.difference(a, b)
        interval = expected.confidence_interval(0.95)
        assert d.p == pytest.approx(expected.pvalue)
        assert (d.low, d.high) == pytest.approx((interval.low, interval.high))

    def test_a_difference_that_can_be_detected(self):
        """In simulation, a true difference of the detectable size is found in about 80 % of runs."""
        g = torch.Generator().manual_seed(0)
        noise = torch.randn(2000, 8, generator=g, dtype=torch.float64)
        unit = noise[0] / noise[0].std()
        size = paired.difference(unit.tolist(), [0.0] * 8).detectable
        found = sum(paired.difference((row + size).tolist(), [0.0] * 8).p < 0.05 for row in noise)
        assert found / 2000 == pytest.approx(0.8, abs=0.06)

    def test_holm_by_hand(self):
        adjusted = paired.holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.5})
        assert adjusted == pytest.approx({"a": 0.09, "b": 0.04, "c": 0.09, "d": 0.5})
        assert paired.holm({}) == {}

    def test_one_pair_shows_nothing(self):
        d = paired.difference([1.0], [0.0])
        assert d.verdict() == "no gain shown"
        assert (d.low, d.high) == (-math.inf, math.inf)

    @pytest.mark.parametrize(("n", "shown"), [(2, False), (5, False), (6, True)])
    def test_equal_differences_are_judged_by_their_signs(self, n, shown):
        d = paired.difference([0.3, 0.2, 0.4, 0.3, 0.2, 0.4][:n], [0.2, 0.1, 0.3, 0.2, 0.1, 0.3][:n])
        assert d.p == pytest.approx(2 * 0.5**n)
        assert d.verdict().startswith("gain shown") == shown

    def test_no_or_unequal_pairs_are_refused(self):
        with pytest.raises(ValueError, match="equally many values"):
            paired.difference([1.0], [])


@pytest.fixture
def fitter():
    return pool_fit.Fitter(llama(), batch=4, length=LENGTH, label_length=LABEL_LENGTH)


def some_rows(n: int, seed: int = 0) -> pool_fit.Rows:
    rng = random.Random(seed)
    pairs = [
        ([rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(4, 12))],
         [*(rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(1, LABEL_LENGTH))), 2])
        for _ in range(n)
    ]  # fmt: skip
    return pool_fit.pad(pairs, LENGTH, LABEL_LENGTH)


def plain_losses(model: Any, rows: pool_fit.Rows) -> torch.Tensor:
    """The model's own losses, one row at a time."""
    found = []
    for row in pool_signals.samples(rows):
        logits = model(input_ids=row.ids[None]).logits[0]
        scored = (row.targets != -100).nonzero()[:, 0]
        found.append(F.cross_entropy(logits[scored - 1], row.targets[scored], reduction="sum"))
    return torch.stack(found)


class TestFitter:
    def test_losses_and_accuracy_are_the_models(self, fitter):
        rows = some_rows(7)
        with torch.no_grad():
            torch.testing.assert_close(fitter.losses(rows, at_once=3)[0], plain_losses(fitter.model, rows))
        tested = fitter.test(rows)
        assert tested.accuracy == 0.0
        counted = rows.targets.ne(-100).sum()
        assert tested.loss == pytest.approx(float(fitter.losses(rows)[0].sum() / counted))

    def test_accuracy_is_that_of_greedy_decoding(self, fitter):
        rows = some_rows(8)
        fitter.fit(rows, epochs=30, rate=2e-2, seed=0)
        right = []
        for i, row in enumerate(pool_signals.samples(rows)):
            prompt = int(rows.prompt[i])
            written = fitter.model.generate(
                row.ids[None, :prompt], max_new_tokens=len(row.ids) - prompt, do_sample=False, eos_token_id=2,
                pad_token_id=0,
            )[0]  # fmt: skip
            right.append(written.tolist() == row.ids.tolist())
        assert fitter.losses(rows)[1].tolist() == right
        assert sum(right) >= 4

    def test_one_step_is_adamw_on_the_clipped_gradient(self, fitter):
        rows, other = some_rows(4), llama()
        optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, betas=pool_fit.BETAS, weight_decay=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            (plain_losses(other, rows).sum() / rows.targets.ne(-100).sum()).backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), pool_fit.CLIP)
            optimizer.step()
        fitter._ids.copy_(rows.ids)
        fitter._places.copy_(rows.places)
        fitter._targets.copy_(rows.targets)
        fitter._rate.fill_(1e-2)
        for _ in range(2):
            fitter._compute()
        for mine, theirs in zip(fitter.masters, other.parameters(), strict=True):
            torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-3, atol=1e-4)

    def test_restored_fits_repeat(self, fitter):
        before, rows = fitter.weights(), some_rows(10)
        results = []
        for seed in (0, 1, 0):
            fitter.restore(before)
            assert fitter.fit(rows, epochs=3, rate=1e-2, seed=seed) == 7
            results.append(fitter.test(rows).loss)
        assert results[0] == results[2] != results[1]

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.bfloat16, 0.1)], ids=str)
    def test_a_gpus_copies_of_the_weights(self, dtype, tolerance, fitter):
        """The GPU path without graph capture: separate masters, a rehearsal, weights and moments restored."""
        apart = pool_fit.Fitter(llama(), batch=4, length=LENGTH, label_length=LABEL_LENGTH, dtype=dtype)
        assert next(apart.model.parameters()).dtype == dtype
        before, rows = apart.weights(), some_rows(10)
        apart._rehearse()
        apart.restore(before)
        results = []
        for one in (fitter, apart):
            one.fit(rows, epochs=4, rate=1e-2, seed=0)
            results.append(one.test(rows).loss)
        assert results[0] == pytest.approx(results[1], rel=tolerance, abs=1e-6)
        assert results[0] < 0.9 * math.log(VOCABULARY)
        samples = pool_signals.samples(rows)
        scored = acqcore.score(apart.model, samples, "loss")["loss"]  # the model is the fitted student
        counted = rows.targets.ne(-100).sum(dim=1)
        torch.testing.assert_close(scored, apart.losses(rows)[0] / counted, rtol=max(tolerance, 1e-4), atol=1e-4)

    def test_inner_products_of_gradients_are_autograds(self, fitter):
        rows, reference = some_rows(6), some_rows(5, seed=1)
        model = llama()

        def gradient(row):
            loss = plain_losses(model, row).sum() / row.targets.ne(-100).sum()
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

        each = torch.stack([gradient(rows[slice(i, i + 1)]) for i in range(6)])
        mean = torch.stack([gradient(reference[slice(i, i + 1)]) for i in range(5)]).mean(dim=0)
        before = fitter.weights()
        torch.testing.assert_close(fitter.along(reference, rows), each @ mean, rtol=2e-2, atol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(before, fitter.weights(), strict=True))

    def test_own_answers(self, fitter):
        rows = some_rows(5)
        fitter.fit(rows, epochs=20, rate=2e-2, seed=0)
        expected = []
        for i, row in enumerate(pool_signals.samples(rows)):
            ids, total = row.ids[: int(rows.prompt[i])], []
            for _ in range(LABEL_LENGTH):
                logp = fitter.model(input_ids=ids[None]).logits[0, -1].log_softmax(dim=0)
                total.append(-float(logp.max()))
                ids = torch.cat([ids, logp.argmax()[None]])
                if int(ids[-1]) == 2:
                    break
            expected.append(sum(total) / len(total))
        torch.testing.assert_close(fitter.greedy(rows, 2, at_once=2), torch.tensor(expected), rtol=1e-4, atol=1e-5)

    def test_a_model_that_is_no_plain_llama_is_refused(self):
        model = llama()
        model.model.layers[0].mlp.act_fn = torch.nn.GELU()
        with pytest.raises(ValueError, match="not those of the Llama forward"):
            pool_fit.Fitter(model, batch=2, length=LENGTH, label_length=LABEL_LENGTH)


ARMS = bench_pool.ARMS
SCALE = Scale(SIZES, chosen=12, batch=4, warm_epochs=20.0, rates=(5e-3, 1e-2), epochs=(1.0,), arms=ARMS)


def bench(folder: Path, log: Log, scale: Scale = SCALE, seconds: float = math.inf) -> Bench:
    fitter = pool_fit.Fitter(llama(), batch=scale.batch, length=LENGTH, label_length=LABEL_LENGTH)
    encode = Encoder(Tokenizer(), LENGTH, LABEL_LENGTH)
    return Bench(fitter, encode, folder, scale, log, time.monotonic() + seconds)


CHOICES = Choices(rate=1e-2, epochs=2.0, default=Recipe("agree", "none", "cover"))


class TestBench:
    def test_every_arm_chooses_and_the_report_follows(self, folder, tmp_path):
        log = Log(tmp_path / "pool.jsonl")
        bench_pool.run(bench(folder, log), CHOICES, seeds=(0, 1))
        assert {row["arm"]: row["failed"] for row in log.rows if "failed" in row} == {}
        report = [row for row in log.rows if row["stage"] == "report"]
        assert {(row["seed"], row["pool"], row["arm"]) for row in report} == {
            (seed, pool, arm) for seed in (0, 1) for pool in "AB" for arm in ARMS
        }
        by_arm = {(row["seed"], row["pool"], row["arm"]): row for row in report}
        assert by_arm[0, "B", "clean oracle"]["junk"] == 0.0
        assert by_arm[0, "A", "clean oracle"]["rows"] == by_arm[0, "A", "random"]["rows"]
        assert by_arm[0, "A", "clean oracle"]["fitting"] == 0.0
        assert all(math.isclose(sum(row["kinds"].values()), 1.0) for row in report)
        (tmp_path / "choices.json").write_text(json.dumps({"choices": asdict(CHOICES)}))
        pool_report.write(log.rows, tmp_path / "choices.json", tmp_path, small=True)
        content = json.loads((tmp_path / "pool.json").read_text())
        results = pool_report.Results(log.rows)
        expected = [
            100 * (by_arm[seed, "B", "default"]["accuracy"] - by_arm[seed, "B", "random"]["accuracy"])
            for seed in (0, 1)
        ]
        assert content["primary"]["mean"] == pytest.approx(sum(expected) / 2)
        assert set(results.reliability) == set(pool_signals.STOCHASTIC)
        assert (tmp_path / "evidence-pool.png").stat().st_size > 10_000

    def test_an_arm_on_fewer_seeds_is_compared_on_those(self):
        def unit(seed, arm, accuracy):
            own = {"stage": "report", "seed": seed, "pool": "B", "arm": arm, "accuracy": accuracy}
            return {**own, "junk": 0.25, "kinds": {"clean": 0.75, "ambiguous": 0.25}}

        rows = [unit(seed, "random", 0.5 + seed / 10) for seed in range(3)]
        rows += [unit(seed, "default", 0.6 + seed / 5) for seed in range(3)]
        rows += [unit(seed, "loss", 0.4) for seed in (1, 2)] + [unit(5, "loss", 0.9)]
        results = pool_report.Results(rows)
        assert results.seeds == {"B": [0, 1, 2]}
        assert results.minus("B", "default", "random").mean == pytest.approx(20)
        assert results.minus("B", "loss", "random").mean == pytest.approx(-25)
        assert results.minus("B", "default", "loss").mean == pytest.approx(50)
        assert "| loss | 2 | 40.0 | -25.0 " in pool_report.tables(results, {})
        of_two = pool_report.families(results)["B: minus random"]["loss"]
        results = pool_report.Results([*rows, unit(1, "entropy", 0.7)])
        assert "| entropy | 1 | 70.0 | +10.0, one seed |  | +10.0, one seed |  |" in pool_report.tables(results, {})
        assert pool_report.families(results)["B: minus random"]["loss"] == of_two

    def test_takes_up_where_it_was_stopped(self, folder, tmp_path):
        arms = ("random", "default", "loss", "clean oracle")
        scale = Scale(SIZES, chosen=12, batch=4, warm_epochs=20.0, arms=arms)
        whole = Log(tmp_path / "whole.jsonl")
        bench_pool.run(bench(folder, whole, scale), CHOICES, seeds=(0, 1))
        path = tmp_path / "cut.jsonl"
        lines = whole.path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:6]) + lines[6][:20])  # killed while writing
        cut = Log(path)
        with path.open("a") as file:
            file.write("\n")
        bench_pool.run(bench(folder, cut, scale), CHOICES, seeds=(0, 1))
        again = Log(path)

        def outcomes(log):
            return {log._key(row): (row.get("rows"), row["accuracy"]) for row in log.rows}

        assert outcomes(again) == outcomes(whole)
        assert len(again.rows) == len(whole.rows)
        before = path.read_text()
        bench_pool.run(bench(folder, again, scale), CHOICES, seeds=(0, 1))
        assert path.read_text() == before

    def test_stops_by_the_clock_between_units(self, folder, tmp_path):
        log = Log(tmp_path / "pool.jsonl")
        with pytest.raises(resumable.Stopped):
            bench_pool.run(bench(folder, log, seconds=0.0), CHOICES, seeds=(0,))
        assert log.rows == []

    def test_an_arm_that_fails_costs_no_other(self, folder, tmp_path, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("no kernel")

        monkeypatch.setattr(acqcore, "badge_embedding", fail)
        log = Log(tmp_path / "pool.jsonl")
        scale = Scale(SIZES, chosen=12, batch=4, warm_epochs=20.0, arms=("random", "badge", "default"))
        bench_pool.run(bench(folder, log, scale), CHOICES, seeds=(0, 1))
        results = pool_report.Results(log.rows)
        assert results.failed == {"badge": "RuntimeError: no kernel"}
        assert results.arms == ["random", "default"]
        assert results.seeds == {"A": [0, 1], "B": [0, 1]}

    def test_tuning_follows_the_highest_accuracy(self, folder, tmp_path):
        arms = ("random", "default", "loss", "facility location")
        recipes = (Recipe("agree", "none", "top"), Recipe("half", "none", "balanced"))
        scale = Scale(SIZES, 12, 4, 20.0, (5e-3, 1e-2), (2.0,), recipes, arms)
        log = Log(tmp_path / "pool.jsonl")
        choices = bench_pool.tune(bench(folder, log, scale), seeds=(100,))
        stages: dict[str, dict[str, float]] = {}
        for row in log.rows:
            stages.setdefault(row["stage"], {})[row["arm"]] = row["accuracy"]

        def first_best(stage, names):
            return max(names, key=lambda name: stages[stage][name])

        rate, _, start = first_best("training", list(stages["training"])).split(", ")
        assert (f"rate {choices.rate:g}", choices.start) == (rate, start)
        assert f"facility location, {choices.state}" == first_best("states", list(stages["states"]))
        names = ["default: agree, none, top", "default: half, none, balanced"]
        assert choices.default == recipes[names.index(first_best("recipes", names))]
        assert set(choices.spreads or {}) == {"loss"}
        before = log.path.read_text()
        assert bench_pool.tune(bench(folder, Log(log.path), scale), seeds=(100,)) == choices
        assert log.path.read_text() == before

    def test_seeds_do_not_see_each_other(self, folder, tmp_path):
        """Seeds take turns with one student; another seed's fits change neither signals nor outcomes."""
        alone = bench(folder, Log(tmp_path / "alone.jsonl")).seed("clinc150", 100, CHOICES, ("B",))
        expected = alone.signals("B").value("loss"), alone.tested("B", range(12))
        shared = bench(folder, Log(tmp_path / "shared.jsonl"))
        first, second = (shared.seed("clinc150", seed, CHOICES, ("B",)) for seed in (100, 101))
        first.signals("B")
        second.tested("B", range(12))
        found = first.signals("B").value("loss"), first.tested("B", range(12))
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
        assert found[1] == expected[1]


def test_the_page_has_the_places_that_the_bench_writes_to():
    page = pool_report.PAGE.read_text()
    begin, end = map(page.index, pool_report.SECTION)
    assert begin < end
    for kind in KINDS[1:]:
        assert kind.split()[-1] in page
