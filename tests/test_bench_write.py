"""``bench_write`` on a tiny student: draws and steps against transformers, arms, resuming after a stop, tables."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from acqsynth.rewards.texts import NgramEmbedder
from benchmarks import bench_write, paired, resumable, write_report, write_signals
from benchmarks.bench_write import AS_IT_IS, BEST, GRPO, TRUSTED, Bench, Choices, Scale, Seed
from benchmarks.pool_fit import Fitter
from benchmarks.pool_signals import distinct
from benchmarks.resumable import Encoder, Log
from benchmarks.write_signals import ANSWERABLE, CANDIDATES, DEFAULT
from benchmarks.writer import Writer

STOPS = [2, *range(300, 320)]  # a random model rarely ends a line
SCALE = Scale(
    intents=3, each=2, test=10, batch=4, warm_epochs=2.0, length=80, label_length=16, prompt_length=150, new_tokens=20,
    steps=2, prompts=2, rows_at_once=16, tuning_seeds=(100,), rates=(1e-3,), epochs=(1.0,), grpo_rates=(1e-4, 1e-3),
)  # fmt: skip
TOPICS = ("card_arrival", "exchange_rate", "top_up", "cash_fee")


@pytest.fixture(autouse=True)
def few_probes(monkeypatch):
    monkeypatch.setattr(write_signals, "MUTUAL_INFORMATION", {"form": "linear", "probes": 2})


@pytest.fixture
def folder(tmp_path):
    rng = random.Random(0)

    def rows(n, part):
        made = []
        for i in range(n):
            topic = TOPICS[i % len(TOPICS)]
            made.append({"text": f"{rng.randrange(10**6)} {topic[:4]}{part[:2]}", "intent": topic})
        return "".join(json.dumps(row) + "\n" for row in made)

    for name in ("banking77", "clinc150"):
        for part, n in (("train", 48), ("test", 24)):
            (tmp_path / f"{name}_{part}.jsonl").write_text(rows(n, part))
    for part in ("train", "val", "test"):
        (tmp_path / f"clinc150_oos_{part}.jsonl").write_text(rows(4, "oos"))
    return tmp_path


@pytest.fixture
def bench(folder, tmp_path, tiny_model, tokenizer):
    def build(seconds=math.inf, scale=SCALE):
        models = [tiny_model("Llama", tie_word_embeddings=True, max_position_embeddings=256) for _ in range(2)]
        writer = Writer(
            models[1], STOPS, prompt_length=scale.prompt_length, new_tokens=scale.new_tokens, rows_at_once=16
        )
        fitter = Fitter(models[0], batch=scale.batch, length=scale.length, label_length=scale.label_length)
        encode = Encoder(tokenizer, scale.length, scale.label_length)
        log = Log(tmp_path / "out" / "write.jsonl")
        return Bench(fitter, encode, folder, scale, log, time.monotonic() + seconds, writer=writer)

    return build


@pytest.fixture
def model(tiny_model):
    return tiny_model("Llama", tie_word_embeddings=True, max_position_embeddings=256)


PROMPTS = [[5, 17, 40, 9], [88, 3, 3, 60, 71, 12, 250], [9]]


class TestWriter:
    def test_cold_draws_are_greedy_decoding(self, model):
        writer = Writer(model, [2], prompt_length=8, new_tokens=6)
        draws = writer.draw(PROMPTS, 2, temperature=1e-6, seed=0)
        for i, prompt in enumerate(PROMPTS):
            expected = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2,
            )[0, len(prompt) :]  # fmt: skip
            for row in (2 * i, 2 * i + 1):
                kept = draws.ids[row][draws.kept[row]]
                assert kept.tolist() == expected.tolist()
                assert bool(draws.finished[row]) == (expected[-1] == 2)

    def test_draws_follow_the_models_probabilities(self, model):
        writer = Writer(model, [2], prompt_length=8, new_tokens=1, rows_at_once=256)
        temperature = 2.0
        draws = writer.draw([PROMPTS[1]] * 8, 1000, temperature=temperature, seed=0)
        with torch.no_grad():
            p = (model(torch.tensor([PROMPTS[1]])).logits[0, -1] / temperature).softmax(dim=0)
        share = torch.bincount(draws.ids[:, 0], minlength=320) / 8000
        assert (share - p).abs().max() < 4 * (p * (1 - p) / 8000).sqrt().max()
        again = writer.draw([PROMPTS[1]] * 8, 1000, temperature=temperature, seed=0)
        assert torch.equal(draws.ids, again.ids)
        assert not torch.equal(draws.ids, writer.draw([PROMPTS[1]] * 8, 1000, temperature=temperature, seed=1).ids)

    def test_a_draw_ends_with_its_stop(self, model, tokenizer):
        writer = Writer(model, STOPS, prompt_length=8, new_tokens=12)
        draws = writer.draw(PROMPTS, 30, temperature=1.0, seed=0)
        assert draws.finished.any()
        assert not draws.finished.all()
        texts = draws.texts(tokenizer)
        for ids, kept, finished, text in zip(draws.ids, draws.kept, draws.finished, texts, strict=True):
            stopped = torch.isin(ids[kept], torch.tensor(STOPS))
            assert bool(stopped[-1]) == bool(finished)
            assert not stopped[:-1].any()
            body = ids[kept][:-1] if finished else ids[kept]
            assert text == tokenizer.decode(body).strip()

    def test_a_step_follows_the_policy_gradient(self, model):
        """The gradient's norm and the clipped gradient match a loop over unpadded rows."""
        writer = Writer(model, STOPS, prompt_length=8, new_tokens=5, rows_at_once=8)
        draws = writer.draw(PROMPTS, 4, temperature=0.7, seed=0)
        a = torch.tensor([0.5, -1.0, 0.0, 2.0] * 3)
        for p in model.parameters():
            p.requires_grad_()
        total = torch.zeros(())
        for i, advantage in enumerate(a):
            own = draws.ids[i][draws.kept[i]]
            prompt = torch.tensor(PROMPTS[i // 4])
            logits = model(torch.cat([prompt, own])[None]).logits[0, len(prompt) - 1 : -1] / 0.7
            total = total - advantage * logits.log_softmax(dim=1).gather(1, own[:, None]).sum() / 5 / len(a)
        expected = torch.autograd.grad(total, list(model.parameters()))
        norm = writer.learn(draws, a, temperature=0.7, rate=0.0)
        assert norm == pytest.approx(float(torch.stack([g.norm() for g in expected]).norm()), rel=1e-4)
        scale = min(1.0, 1.0 / norm)
        for p, g in zip(writer.masters, expected, strict=True):
            torch.testing.assert_close(p.grad, g * scale, rtol=1e-3, atol=1e-6)

    def test_rounded_weights_follow_the_masters(self, model):
        """As on a GPU, the forward runs in bfloat16 and the step in float32."""
        exact, rounded = (
            Writer(model, STOPS, prompt_length=8, new_tokens=5, dtype=dtype) for dtype in (None, torch.bfloat16)
        )
        draws = rounded.draw(PROMPTS, 4, temperature=1.0, seed=0)
        assert draws.kept.any()
        a = torch.tensor([0.5, -1.0, 0.0, 2.0] * 3)
        norms = [writer.learn(draws, a, temperature=1.0, rate=1e-3) for writer in (exact, rounded)]
        assert norms[1] == pytest.approx(norms[0], rel=0.03)
        for master, weight in zip(rounded.masters, rounded._weights, strict=True):
            assert master.dtype == torch.float32
            assert torch.equal(weight, master.to(torch.bfloat16))

    def test_learning_makes_the_rewarded_likelier(self, model):
        writer = Writer(model, STOPS, prompt_length=8, new_tokens=4)
        before = writer.weights()

        def even(draws):
            return (draws.ids[:, 0] % 2 == 0).float()

        shares = []
        for step in range(12):
            draws = writer.draw(PROMPTS, 32, temperature=1.0, seed=step)
            shares.append(float(even(draws).mean()))
            writer.learn(draws, even(draws) - 0.5, temperature=1.0, rate=3e-3)
        assert shares[-1] > shares[0] + 0.2
        writer.restore(before)
        again = writer.draw(PROMPTS, 32, temperature=1.0, seed=0)
        assert float(even(again).mean()) == shares[0]

    def test_a_prompt_too_long_is_refused(self, model):
        with pytest.raises(ValueError, match="prompts: expected at most 3 tokens, got 7"):
            Writer(model, [2], prompt_length=3, new_tokens=2).draw(PROMPTS, 1, temperature=1.0, seed=0)


def test_advantages_are_within_groups():
    totals = [1.0, 3.0, None, *[2.0] * 5, *range(8)]
    found = bench_write.advantages(totals)
    assert found[2] == 0
    assert found[:2].tolist() == pytest.approx([1 - 14 / 7, 3 - 14 / 7])
    assert found[8:].tolist() == pytest.approx([i - 3.5 for i in range(8)])
    assert bench_write.advantages([None] * 8).tolist() == [0.0] * 8


class TestArms:
    @pytest.fixture
    def seed(self, bench):
        return Seed(bench(), "banking77", 0, Choices(temperature=1.0, rate=1e-3, epochs=1.0))

    def test_no_row_is_shown_taught_and_tested(self, seed):
        shown = [row.text for rows in seed.shown.values() for row in rows]
        parts = [shown, [row.text for row in seed.real], [row.text for row in seed.test]]
        assert [len(part) for part in parts] == [6, 6, 10]
        assert len({text for part in parts for text in part}) == 22
        assert len(seed.requests) == 6
        assert {seed.requests.count(intent) for intent in seed.shown} == {2}

    def test_a_prompt_shows_the_two_rows_of_its_intent(self, seed):
        for intent, rows in seed.shown.items():
            text = seed.bench.encode.tokenizer.decode(seed.prompt(intent))
            name = intent.replace("_", " ")
            assert text.count(f"Intent: {name}\n") == 3
            assert all(f"Message: {row.text}\n" in text for row in rows)
            assert text.endswith("Message:")

    @pytest.mark.parametrize("arm", [AS_IT_IS, *(BEST + name for name in bench_write.RANKED)])
    def test_each_request_gives_one_row_of_its_intent(self, arm, seed):
        rows = seed.rows_of(arm)
        assert [row.intent for row in rows] == seed.requests
        texts = {sample.question for sample in seed.candidates.samples if sample}
        shown = {row.text for rows in seed.shown.values() for row in rows}
        assert {row.text for row in rows} <= texts | shown

    def test_the_best_is_the_highest_that_passes(self, seed):
        candidates = seed.candidates
        values = candidates._values("agreement")
        students = write_signals.StudentSignals(seed)
        passing = [i for i, value in enumerate(values) if value is not None]
        assert passing
        samples = [candidates.samples[i] for i in passing]
        p = students.probability(samples)
        assert p.tolist() == pytest.approx([values[i] for i in passing])
        for sample, own in zip(samples, p.tolist(), strict=True):  # against the model's own logits
            prompt, label = seed.bench.encode.tokens(bench_write.Message(sample.question, sample.answer))
            with torch.no_grad():
                logits = seed.bench.fitter.model(torch.tensor([prompt + label])).logits[0, len(prompt) - 1 : -1]
            assert -F.cross_entropy(logits, torch.tensor(label), reduction="sum") == pytest.approx(
                math.log(own), abs=1e-3
            )
        chosen = candidates.best("agreement")
        first = next(i for i in passing)  # the first request that has one
        group = first // CANDIDATES
        best = max((i for i in passing if i // CANDIDATES == group), key=lambda i: values[i])
        assert chosen[group].text == candidates.samples[best].question

    def test_trusted_labels_come_first_and_then_the_highest_loss(self, seed, monkeypatch):
        candidates = seed.candidates
        passed = [i for i, value in enumerate(candidates._values("random")) if value is not None]
        texts = [candidates.samples[i].question for i in passed]
        held = distinct(list(range(len(passed))), NgramEmbedder()(texts))
        assert len(held) > len(seed.requests)
        messages = [bench_write.Message(texts[i], candidates.samples[passed[i]].answer) for i in range(len(passed))]
        loss = seed.bench.fitter.losses(seed.bench.placed(messages))[0].tolist()
        given = []

        def trust(states, labels):
            given.append((states, labels))
            return torch.tensor([1.0] * len(seed.seeds) + [1.0 if i < 4 else -float(i) for i in range(len(passed))])

        monkeypatch.setattr(write_signals.acqcore, "label_trust", trust)
        chosen = candidates.trusted()
        # Four rows are trusted; the next most trusted fill the places that are left.
        expected = [messages[i] for i in held[: max(len(seed.requests), sum(i < 4 for i in held))]]
        assert sorted(row.text for row in chosen) == sorted(row.text for row in expected)
        of_label: dict[str, list[float]] = {}
        for row in chosen:
            of_label.setdefault(row.intent, []).append(loss[texts.index(row.text)])
        assert all(values == sorted(values, reverse=True) for values in of_label.values())
        (states, labels), count = given[0], len(seed.seeds)
        assert torch.equal(states[:count], seed.bench.fitter.states(seed.warm_rows)[1])
        assert [list(seed.shown)[i] for i in labels] == [row.answer for row in seed.seeds] + [
            row.intent for row in messages
        ]

    def test_the_default_asks_that_the_label_be_answerable(self, seed, monkeypatch):
        candidates = seed.candidates
        assert all(value is None for value in candidates._values(DEFAULT))  # a tiny student is never confident
        p = candidates._of_signal("agreement", [sample is not None for sample in candidates.samples])
        assert max(value for value in p if value is not None) < ANSWERABLE
        rows = candidates.best(DEFAULT)  # falls back to each request's likeliest
        for group, row in enumerate(rows):
            own = range(group * CANDIDATES, (group + 1) * CANDIDATES)
            there = [i for i in own if candidates.samples[i] is not None]
            assert row.text == candidates.samples[max(there, key=lambda i: p[i])].question
        monkeypatch.setattr(write_signals, "ANSWERABLE", 0.0)
        assert any(value is not None for value in candidates._values(DEFAULT))

    def test_signals_are_finite_and_differ(self, seed):
        students = write_signals.StudentSignals(seed)
        for name in ("agreement", "learnability", "entropy", "varentropy", "mutual information", "influence"):
            values = students.values(name, seed.seeds)
            assert values.shape == (6,)
            assert values.isfinite().all()
            assert len(set(values.tolist())) > 1, name

    @pytest.mark.parametrize("name", bench_write.TAUGHT)
    def test_grpo_moves_the_generator_and_nothing_else(self, name, seed, monkeypatch):
        monkeypatch.setattr(write_signals, "ANSWERABLE", 0.0)
        bench = seed.bench
        before = bench.fitter.weights()
        seed.choices = replace(seed.choices, grpo_rate=1e-3)
        seed.teach(name)
        assert len(seed.steps) == SCALE.steps
        assert any(step["norm"] > 0 for step in seed.steps)
        assert all(0 <= step["passed"] <= 1 for step in seed.steps)
        moved = zip(bench.writer.weights(), bench.generator, strict=True)
        assert any(not torch.equal(a, b) for a, b in moved)
        assert all(torch.equal(a, b) for a, b in zip(bench.fitter.weights(), before, strict=True))


class TestRun:
    def test_everything_runs_and_a_rerun_does_nothing(self, bench, tmp_path, capsys):
        first = bench()
        choices = bench_write.tune(first)
        assert choices.grpo_rate in SCALE.grpo_rates
        bench_write.run(first, choices, seeds=2, grpo_seeds=1)
        done = (tmp_path / "out" / "write.jsonl").read_text()
        arms = [AS_IT_IS, *(BEST + n for n in bench_write.RANKED), *(GRPO + n for n in bench_write.TAUGHT)]
        arms.append(TRUSTED)
        report = [row for row in first.log.rows if row["stage"] == "report"]
        assert not [row for row in report if "failed" in row]
        assert {row["arm"] for row in report} == {*arms, *bench_write.ORIENTATION}
        assert {row["rows"] for row in report if row["arm"] in arms} == {6}
        assert [row["seed"] for row in report if row["arm"] == TRUSTED] == [2, 3]  # on seeds that no other arm used
        assert [row["seed"] for row in report if row["arm"] == AS_IT_IS] == [0, 1, 2, 3]
        again = bench()
        assert bench_write.tune(again) == choices
        bench_write.run(again, choices, seeds=2, grpo_seeds=1)
        assert (tmp_path / "out" / "write.jsonl").read_text() == done
        write_report.write(again.log.rows, tmp_path / "none.json", tmp_path / "out", small=True)
        out = capsys.readouterr().out
        assert "**Primary: best of 8: default minus as it is:" in out
        assert "| GRPO: default | 1 |" in out
        content = json.loads((tmp_path / "out" / "write.json").read_text())
        assert len(content["units"]) == len(again.log.rows)
        assert (tmp_path / "out" / "evidence-write.png").stat().st_size > 1000

    def test_a_stop_loses_no_unit_and_the_rest_is_as_if_uncut(self, bench):
        choices = Choices(rate=1e-3, epochs=1.0)
        stopped = bench()
        limit = iter(range(5))
        check = stopped.check_time

        def counted():
            if next(limit, None) is None:
                raise resumable.Stopped
            check()

        stopped.check_time = counted
        with pytest.raises(resumable.Stopped):
            bench_write.run(stopped, choices, seeds=1, grpo_seeds=0)
        assert [row["arm"] for row in stopped.log.rows] == [
            "warm",
            "real rows",
            AS_IT_IS,
            BEST + "random",
            BEST + "agreement",
        ]
        resumed = bench()
        bench_write.run(resumed, choices, seeds=1, grpo_seeds=0)
        kept = {(row["arm"], row["seed"]): row["accuracy"] for row in resumed.log.rows}
        (resumed.log.path).unlink()
        whole = bench()
        bench_write.run(whole, choices, seeds=1, grpo_seeds=0)
        assert {(row["arm"], row["seed"]): row["accuracy"] for row in whole.log.rows} == kept

    def test_no_time_is_left(self, bench):
        late = bench(seconds=-1.0)
        with pytest.raises(resumable.Stopped):
            bench_write.run(late, Choices(), seeds=1, grpo_seeds=1)
        assert not late.log.rows

    def test_an_arm_that_fails_costs_no_other(self, bench, monkeypatch, tmp_path):
        values = write_signals.StudentSignals.values

        def broken(self, name, samples):
            if name == "varentropy":
                raise RuntimeError("out of memory")
            return values(self, name, samples)

        monkeypatch.setattr(write_signals.StudentSignals, "values", broken)
        made = bench()
        bench_write.run(made, Choices(rate=1e-3, epochs=1.0), seeds=2, grpo_seeds=0)
        failed = [row for row in made.log.rows if "failed" in row]
        assert {row["arm"] for row in failed} <= {BEST + "varentropy"}
        assert {row["arm"] for row in made.log.rows if "accuracy" in row} >= {
            AS_IT_IS,
            BEST + DEFAULT,
            BEST + "entropy",
        }


class TestReport:
    def rows(self, gain: float) -> list[dict[str, Any]]:
        """Six seeds, three with GRPO; arms differ from ``as it is`` by per-seed noise around a shift."""
        rng = random.Random(1)
        found = []
        for seed in range(6):
            base = rng.uniform(0.5, 0.6)
            arms = {AS_IT_IS: 0.0, BEST + DEFAULT: gain, BEST + "random": 0.0, "warm": -0.1}
            if seed < 3:
                arms |= {GRPO + DEFAULT: gain, GRPO + "entropy": -gain}
            for arm, shift in arms.items():
                accuracy = base + shift + rng.gauss(0, 0.005) * (arm != AS_IT_IS)
                found.append(
                    {"stage": "report", "seed": seed, "pool": "", "arm": arm, "accuracy": accuracy, "loss": 1.0,
                     "agreed": 0.5, "writing": 2.0, "fitting": 1.0}
                )  # fmt: skip
        return found

    def test_gains_are_paired_and_corrected(self):
        results = write_report.Results(self.rows(0.04))
        primary = results.minus(BEST + DEFAULT, AS_IT_IS)
        pairs = [[100 * results.found[a][s]["accuracy"] for s in range(6)] for a in (BEST + DEFAULT, AS_IT_IS)]
        assert primary == paired.difference(*pairs)
        compared = results.comparisons()
        assert set(compared) == {
            (BEST + "random", AS_IT_IS), (GRPO + DEFAULT, AS_IT_IS), (GRPO + "entropy", AS_IT_IS),
            (GRPO + DEFAULT, GRPO + "entropy"),
        }  # fmt: skip
        assert compared[GRPO + DEFAULT, AS_IT_IS][0].n == 3
        assert all(p >= one.p for one, p in compared.values())
        text = write_report.tables(results, {})
        assert "gain shown" in text
        assert "no gain shown" in text  # for best of 8: random

    def test_no_gain_is_said(self):
        text = write_report.tables(write_report.Results(self.rows(0.0)), {})
        assert text.splitlines()[0].count("no gain shown") == 1
        assert "would be found in 80 % of such runs" in text

    def test_one_seed_is_no_seeds(self, tmp_path):
        pytest.importorskip("matplotlib")
        one = write_report.Results([row for row in self.rows(0.04) if row["seed"] == 0])
        assert "over 1 paired seed (" in write_report.tables(one, {})
        write_report.picture(one, tmp_path / "one.svg")
        assert "(1 seed)" in (tmp_path / "one.svg").read_text()

    def test_an_unfinished_run_prints_no_table(self, tmp_path, capsys):
        write_report.write(self.rows(0.1)[:1], tmp_path / "none.json", tmp_path)
        assert capsys.readouterr().out == "units done: 1; no seed of the report is complete yet\n"
        assert not (tmp_path / "write.json").exists()

    def test_the_protocol_stands_in_the_docs(self):
        page = write_report.PAGE.read_text()
        begin, end = map(page.index, write_report.SECTION)
        assert begin < end
        flat = " ".join(page.split())
        for words in ("before any run on BANKING77", "best of 8: default", "Holm", "no gain shown"):
            assert words in flat
