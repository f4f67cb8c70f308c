"""Training through TRL: what is learnt, the files it leaves, and recovery from kills."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import json
import math
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pandas
import pytest
import torch
from fakes import written
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig

from acqsynth import train
from acqsynth.callbacks import Progress, Refresh
from acqsynth.domains import Sample
from acqsynth.engines import Sampling
from acqsynth.engines.transformers import TransformersEngine
from acqsynth.parsing import as_text
from acqsynth.rewards import AcquisitionReward
from acqsynth.train import read_log
from acqsynth.write import Candidate

SAMPLES = [Sample(f"{a}+{b}", str(a + b), f"{a} and {b}") for a in range(4) for b in range(4)]
ASK = [[{"role": "user", "content": f"prompt {i}"}] for i in range(8)]
REPLAY = [
    {"prompt": [{"role": "user", "content": f"greet {i}"}], "completion": [{"role": "assistant", "content": "hello"}]}
    for i in range(9)
]
QUICK = {"gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True}
ONE = QUICK | {"max_steps": 1, "save_strategy": "no"}
SHORT = QUICK | {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
GRPO = SHORT | {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6}
DPO = SHORT | {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2}


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def changed(before, after):
    """Names of the parameters that differ."""
    before, after = weights(before), weights(after)
    return {name for name in before if not before[name].equal(after[name])}


class KillAt(TrainerCallback):
    """Interrupts the run after a step, as a signal would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **rest):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# --- configuration ----------------------------------------------------------------------------------------------------


def test_options_win_over_defaults(tmp_path):
    given = {"learning_rate": 3.0, "use_cpu": True, "lora": {"r": 3}}
    config, lora = train.configuration("sft", given, tmp_path)
    assert (config.learning_rate, config.max_length, config.output_dir) == (3.0, 2048, str(tmp_path))
    assert (config.report_to, config.logging_steps, lora.r, lora.task_type) == ([], 1, 3, "CAUSAL_LM")
    assert isinstance(config, SFTConfig)
    assert given == {"learning_rate": 3.0, "use_cpu": True, "lora": {"r": 3}}
    assert train.configuration("dpo", {"use_cpu": True}, tmp_path)[1] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("method", ["sft", "grpo", "dpo"])
def test_bfloat16_is_for_cpus_too(tmp_path, method):
    config, _ = train.configuration(method, {"bf16": True}, tmp_path)
    assert config.bf16
    assert config.use_cpu


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dpo", {"zzz": 1}, "options: DPOConfig has no field 'zzz'$"),
        ("sft", {"seed": 2**32}, "seed: expected an integer at least 0 and at most 4294967295, got 4294967296"),
        ("sft", {"output_dir": "x"}, "options: output_dir is set by the argument output"),
    ],
)
def test_wrong_options(tmp_path, method, options, message):
    with pytest.raises(ValueError, match=message):
        train.configuration(method, options, tmp_path)


@pytest.mark.parametrize("batch", [None, 8, 2])
def test_the_published_settings_by_default(tmp_path, batch):
    options = {} if batch is None else {"per_device_train_batch_size": batch}
    config, _ = train.configuration("sft", options, tmp_path)
    assert (config.num_train_epochs, config.learning_rate, config.lr_scheduler_type) == (5, 2e-5, "cosine")
    assert config.get_warmup_steps(1000) == 50
    assert config.completion_only_loss
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 16


# --- the student ------------------------------------------------------------------------------------------------------


def test_rows_are_what_a_student_is_asked_and_says(sums):
    assert train.training_rows(sums, SAMPLES[5:6]) == [
        {"prompt": [{"role": "user", "content": "1+1"}], "completion": [{"role": "assistant", "content": "1 and 1\n2"}]}
    ]


def test_replay_is_a_share_of_all_rows(sums):
    rows = train.training_rows(sums, SAMPLES)
    drawn = train.sample_replay(REPLAY, 0.2, rows, seed=0)
    assert len(drawn) == 4
    assert all(row in REPLAY for row in drawn)
    assert drawn == train.sample_replay(REPLAY, 0.2, rows, seed=0) != train.sample_replay(REPLAY, 0.2, rows, seed=1)
    with pytest.raises(ValueError, match=r"replay_share: expected a share in \[0, 1\), got 1.0"):
        train.sample_replay(REPLAY, 1.0, rows, seed=0)
    with pytest.raises(ValueError, match=r"replay: expected 16 rows for a share of 0.5 beside 16 samples, got 9"):
        train.sample_replay(REPLAY, 0.5, rows, seed=0)
    # Rows learnt anyway are repeated only if there are no others.
    for seed in range(5):
        beside = random.Random(seed).sample(REPLAY, 5)  # as the arm of random real rows draws them
        assert not any(row in beside for row in train.sample_replay(REPLAY, 0.4, beside, seed))
        assert sum(row in beside for row in train.sample_replay(REPLAY, 0.5, beside, seed)) == 1


def test_a_student_learns_and_its_folder_is_a_model(sums, student_path, tmp_path):
    options = QUICK | {"num_train_epochs": 80, "learning_rate": 1e-2, "save_strategy": "no"}
    output, said, shown = tmp_path / "out", [], []
    callbacks = [Progress(said.append, shown.append)]
    assert train.sft(student_path, sums, SAMPLES, output, options, callbacks=callbacks) == output
    losses = [row["loss"] for row in read_log(output) if "loss" in row]
    assert losses[-1] < 0.1 < 4 < losses[0]
    engine = TransformersEngine(output)
    asked = [sums.student_prompt(sample.question) for sample in SAMPLES]
    answers = [sums.answer_of(g[0].text) for g in engine.generate(asked, Sampling(temperature=0, max_tokens=16))]
    assert sums.equivalent(SAMPLES, answers).count(True) >= 14
    card = (output / "README.md").read_text()
    assert "- sft" in card
    assert len(shown) == 80
    assert [line.partition(":")[0] for line in said] == [f"step {step} of 80" for step in range(8, 81, 8)]
    assert said[-1].startswith("step 80 of 80: loss ")


PACKS = {"none": {}, "bfd": {"packing": True}, "wrapped": {"packing": True, "packing_strategy": "wrapped"}}


@pytest.mark.parametrize("packs", PACKS)
def test_samples_that_do_not_fit_are_counted(sums, student_path, tmp_path, packs):
    """Bytes are tokens. TRL learns no row whose prompt alone fills max_length, unless packs go on with it. Replay does
    not count."""
    rows = [*SAMPLES[:6], Sample("1+" * 30 + "1", "31"), Sample("1+1", "2", "and so on " * 6)]
    options = ONE | PACKS[packs] | {"max_length": 50}
    output = train.sft(str(student_path), sums, rows, tmp_path, options, replay=REPLAY, replay_share=0.5)
    counts = json.loads((output / "rows.json").read_text())
    lost = packs != "wrapped"
    assert counts == {"learnt": 8 - lost, "dropped": lost, "cut": lost, "max_length": 50, "endless": False}
    with pytest.raises(ValueError, match="leaves room in max_length = 50 tokens") if lost else nullcontext():
        train.sft(str(student_path), sums, rows[6:7], tmp_path, options)


def test_a_student_with_few_positions_learns_what_fits(sums, tiny_model, tokenizer, tmp_path, caplog):
    tiny_model("GPT2", eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "student")  # 64 positions
    tokenizer.save_pretrained(tmp_path / "student")
    rows = [*SAMPLES[:3], Sample("1+1", "2", "and so on " * 9)]
    output = train.sft(str(tmp_path / "student"), sums, rows, tmp_path / "out", ONE)
    counts = json.loads((output / "rows.json").read_text())
    assert counts == {"learnt": 4, "dropped": 0, "cut": 1, "max_length": 64, "endless": False}
    assert "max_length is 64 instead of 2048: 64 positions, 0 of them taken" in caplog.text


def test_a_processor_is_asked_through_its_tokenizer(sums, student_path, tmp_path, monkeypatch):
    """As of a multimodal student; it has no tokens itself."""

    class Processed(train.SFTTrainer):
        def __init__(self, **options):
            super().__init__(**options)
            held = self.processing_class
            self.processing_class = SimpleNamespace(tokenizer=held, save_pretrained=held.save_pretrained)

    monkeypatch.setattr(train, "SFTTrainer", Processed)
    output = train.sft(str(student_path), sums, SAMPLES[:2], tmp_path, ONE)
    counts = json.loads((output / "rows.json").read_text())
    assert counts == {"learnt": 2, "dropped": 0, "cut": 0, "max_length": counts["max_length"], "endless": False}


def test_an_answer_without_an_end_is_told(sums, model, tokenizer, tmp_path, caplog):
    model.save_pretrained(tmp_path / "student")
    spoken = copy.deepcopy(tokenizer)
    spoken.chat_template = tokenizer.chat_template.replace("</s>", "\n")
    spoken.save_pretrained(tmp_path / "student")
    output = train.sft(str(tmp_path / "student"), sums, SAMPLES[:2], tmp_path / "out", ONE)
    assert json.loads((output / "rows.json").read_text())["endless"] is True
    assert "closes answers with no token that stops the student" in caplog.text


@pytest.mark.parametrize("warmup", [0.05, 7])
def test_a_warm_up_never_takes_all_steps(sums, student_path, tmp_path, caplog, warmup):
    """The learning rate of a warm-up's first step is 0."""
    options = ONE | {"warmup_steps": warmup, "learning_rate": 1e-2}
    output = train.sft(str(student_path), sums, SAMPLES[:2], tmp_path / "out", options)
    assert read_log(output)[0]["learning_rate"] == 1e-2
    assert f"warmup_steps is 0 instead of {warmup}, which takes all 1 steps" in caplog.text


def test_the_loss_is_that_of_the_completion(sums, student_path, tmp_path):
    train.sft(str(student_path), sums, SAMPLES[:1], tmp_path, ONE)
    tokenizer, model = AutoTokenizer.from_pretrained(student_path), AutoModelForCausalLM.from_pretrained(student_path)
    [row] = train.training_rows(sums, SAMPLES[:1])
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
    first = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"])
    with torch.no_grad():
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = -torch.stack([logprobs[t - 1, whole[t]] for t in range(first, len(whole))]).mean()
    assert read_log(tmp_path)[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert whole[-1] == tokenizer.eos_token_id  # the end token is trained too


@pytest.mark.parametrize("only_model", [False, True])
def test_a_killed_fit_with_lora_and_replay_ends_as_if_it_had_not_been(sums, student_path, tmp_path, only_model):
    """Without the optimizer in its checkpoint, it starts again."""
    options = QUICK | {"num_train_epochs": 2, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    options["save_only_model"] = only_model
    options["lora"] = {"r": 2, "target_modules": ["up_proj"]}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    learnt = (str(student_path), sums, SAMPLES[:12])
    replayed = {"replay": REPLAY, "replay_share": 0.25}
    train.sft(*learnt, whole, options, **replayed)
    with pytest.raises(KeyboardInterrupt):
        train.sft(*learnt, cut, options, **replayed, callbacks=[KillAt(3)])
    assert [folder.name for folder in cut.glob("checkpoint-*")] == ["checkpoint-2"]
    train.sft(*learnt, cut, options, **replayed)
    assert not changed(whole, cut)
    assert [row["step"] for row in read_log(cut)] == [row["step"] for row in read_log(whole)] == [1, 2, 3, 4, 4]
    assert changed(student_path, whole) == {f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)}
    assert (whole / "adapter" / "adapter_config.json").is_file()


def test_a_fit_killed_while_it_removes_its_checkpoints_can_be_repeated(sums, student_path, tmp_path, monkeypatch):
    learnt = (str(student_path), sums, SAMPLES[:4])
    options = QUICK | {"num_train_epochs": 1}
    train.sft(*learnt, tmp_path / "whole", options)

    def killed(folder):
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train.sft(*learnt, tmp_path / "cut", options)
    train.sft(*learnt, tmp_path / "cut", options)
    assert not changed(tmp_path / "whole", tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("checkpoint-*"))


def test_wrong_arguments(sums, student_path, answer_reward, tmp_path):
    with pytest.raises(ValueError, match="samples: expected at least one"):
        train.sft(str(student_path), sums, [], tmp_path)
    with pytest.raises(ValueError, match="prompts: expected at least 10, as many as a generation takes, got 8"):
        train.grpo(str(student_path), ASK, answer_reward, tmp_path, GRPO | {"per_device_train_batch_size": 20})
    with pytest.raises(TypeError, match=r"samples\[0\]: expected acqsynth.domains.Sample"):
        train.sft(str(student_path), sums, [{"question": "0", "answer": "0"}], tmp_path)
    for reward in ("entropy", None, [answer_reward, "entropy"]):
        with pytest.raises(TypeError, match="reward: expected a function or a list of functions, got"):
            train.grpo(student_path, ASK, reward, tmp_path, GRPO)
    with pytest.raises(ValueError, match="sampling: expected n of at least 2 candidates to choose from, got 1"):
        train.dpo(student_path, ASK, answer_reward, tmp_path, sampling=Sampling(), engine=None)


def test_a_generator_that_cannot_end_is_refused(model, tokenizer, answer_reward, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="generator: expected a tokenizer with an end-of-sequence token"):
        train.grpo(tmp_path / "model", ASK, answer_reward, tmp_path, GRPO)


def test_a_token_without_an_embedding_is_named(sums, model, tokenizer, answer_reward, tmp_path):
    [space] = tokenizer(" ")["input_ids"]
    model.resize_token_embeddings(space)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    said = f"token id {space} is outside the model's vocabulary of {space}; is this the model's tokenizer"
    with pytest.raises(ValueError, match=f"^samples: {said}"):
        train.sft(str(tmp_path / "model"), sums, [Sample("0", " 0")], tmp_path / "out", QUICK)
    with pytest.raises(ValueError, match=f"^prompts: {said}"):
        train.grpo(str(tmp_path / "model"), ASK, answer_reward, tmp_path / "out", GRPO)


def test_completions_stay_within_the_positions(model, tokenizer, answer_reward, tmp_path):
    model.config.max_position_embeddings = 40
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = (answer_reward, tmp_path / "out", SHORT | {"max_steps": 1, "save_strategy": "no"})
    taken = len(train.encode(tokenizer, ASK[:1])[0])
    long = [[{"role": "user", "content": "x" * (8 + 40 - taken - 3)}]]
    output = train.grpo(str(tmp_path / "model"), long, *arguments)
    assert max(row.get("completions/max_length", 0) for row in read_log(output)) == 3
    with pytest.raises(ValueError, match=r"prompts: expected fewer than 40 tokens, the model's positions, got 40"):
        train.grpo(str(tmp_path / "model"), [[{"role": "user", "content": "x" * (8 + 40 - taken)}]], *arguments)


# --- GRPO -------------------------------------------------------------------------------------------------------------


def test_two_steps_of_grpo_and_what_they_leave(student_path, tokenizer, model, tmp_path):
    """Uses two rewards of this package, TRL's default activation checkpointing and gradient accumulation."""
    entropy = AcquisitionReward(model, tokenizer=tokenizer, parse=as_text)
    rewards = [entropy, AcquisitionReward(model, "loss", tokenizer=tokenizer)]
    options = GRPO | {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options["gradient_checkpointing"] = True
    output = tmp_path / "out"
    assert train.grpo(str(student_path), ASK, rewards, output, options) == output
    steps = [row for row in read_log(output) if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert row["rewards/acquisition_entropy/mean"] == pytest.approx(row["reward"])  # the other reward is 0
        assert row["acquisition_loss/parsed"] == 0
        assert 0 < row["reward_seconds"] < row["seconds"]
        assert row["reward_share"] == pytest.approx(row["reward_seconds"] / row["seconds"])
        assert row["completions/mean_length"] <= 6
    table = pandas.read_parquet(output / "completions" / "completions_00002.parquet")
    assert len(table) == 4
    assert {"prompt", "completion", "advantage", "acquisition_entropy", "acquisition_entropy_value"} <= set(table)
    assert table["acquisition_entropy"].tolist() == pytest.approx(table["acquisition_entropy_value"].tolist())
    assert changed(student_path, output)
    assert json.loads((output / "config.json").read_text())["use_cache"] is True
    assert AutoTokenizer.from_pretrained(output).chat_template == tokenizer.chat_template
    assert "GRPO" in (output / "README.md").read_text()
    assert not list(output.glob("checkpoint-*"))


@pytest.mark.parametrize(("more", "calls"), [({}, 4), ({"num_iterations": 2, "save_steps": 1}, 2)])
def test_a_killed_grpo_ends_as_if_it_had_not_been(student_path, answer_reward, tmp_path, more, calls):
    """Even if killed between two steps that learn the same completions."""
    whole, cut, options = tmp_path / "whole", tmp_path / "cut", GRPO | more
    train.grpo(str(student_path), ASK, answer_reward, whole, options)
    reward = type(answer_reward)()
    with pytest.raises(KeyboardInterrupt):
        train.grpo(str(student_path), ASK, reward, cut, options, callbacks=[KillAt(4 if more else 3)])
    assert [folder.name for folder in cut.glob("checkpoint-*")] == ["checkpoint-2"]
    (cut / "checkpoint-3").mkdir()  # interrupted while being written
    (cut / "checkpoint-3" / "model.safetensors").write_text("half")
    reward = type(answer_reward)()  # as in a new process
    train.grpo(str(student_path), ASK, reward, cut, options)
    assert reward.calls == calls  # state restored from the checkpoint, then two steps
    assert not changed(whole, cut)
    logs = [
        [{key: row[key] for key in ("step", "reward", "calls", "loss")} for row in read_log(path) if "reward" in row]
        for path in (whole, cut)
    ]
    assert logs[0] == logs[1]
    assert [row["calls"] for row in logs[0]] == list(range(1, calls + 1))
    for step in range(1, 5):
        name = f"completions/completions_{step:05d}.parquet"
        assert pandas.read_parquet(whole / name).equals(pandas.read_parquet(cut / name))


def test_lora_is_trained_and_merged(student_path, answer_reward, tmp_path):
    options = GRPO | {"max_steps": 1, "lora": {"r": 2, "target_modules": ["q_proj"]}}
    train.grpo(str(student_path), ASK, answer_reward, tmp_path, options)
    assert changed(student_path, tmp_path) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    base = AutoModelForCausalLM.from_pretrained(student_path)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    assert all(merged[name].allclose(value, atol=1e-6) for name, value in weights(tmp_path).items())


class Tracker(TrainerCallback):
    """A tracker like those of transformers, which receives the logs in ``on_log``."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **rest):
        self.seen.append(dict(logs))


def test_the_student_is_refreshed_and_log_and_trackers_have_its_staleness(student_path, answer_reward, tmp_path):
    students, tracker = [], Tracker()

    def probe():
        order = {0: [1.0, 2.0, 3.0, 4.0], 1: [2.0, 1.0, 3.0, 4.0], 2: [2.0, 1.0, 4.0, 3.0]}[len(students)]
        return [*order, None]

    output = tmp_path / "out"
    refresh = Refresh(1, output, tmp_path / "students", students.append, probe)
    boards = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    options = GRPO | {"save_steps": 1, "report_to": boards}
    train.grpo(str(student_path), ASK, answer_reward, output, options, refresh=refresh, callbacks=[tracker])
    # No checkpoint precedes the first step, and no refresh follows the last.
    assert students == [tmp_path / "students/checkpoint-1", tmp_path / "students/checkpoint-2"]
    entries = [row for row in read_log(output) if "student_refreshed" in row]
    assert [(row["step"], row["staleness"]) for row in entries] == [(2, pytest.approx(0.8)), (3, pytest.approx(0.8))]
    assert [row["staleness_since_start"] for row in entries] == [pytest.approx(0.8), pytest.approx(0.6)]
    steps = [row for row in tracker.seen if "reward" in row]
    shares = [row["reward_share"] for row in read_log(output) if "reward" in row]
    assert [row["reward_share"] for row in steps] == shares
    assert [row.get("staleness") for row in steps] == [None, pytest.approx(0.8), pytest.approx(0.8), None]
    if boards:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (file,) = tmp_path.rglob("events.out.tfevents.*")
        events = EventAccumulator(str(file))
        events.Reload()
        found = events.Scalars("train/reward_share")
        assert [event.step for event in found] == [1, 2, 3, 4]
        assert [event.value for event in found] == pytest.approx(shares)
        assert all(0 < share < 1 for share in shares)
        assert [event.value for event in events.Scalars("train/staleness")] == [pytest.approx(0.8)] * 2


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj"]}])
def test_a_resumed_run_continues_with_its_student_after_the_checkpoint_is_gone(
    student_path, answer_reward, tmp_path, lora
):
    used = []
    options = GRPO | {"max_steps": 6, "save_steps": 1, "save_total_limit": 1} | ({"lora": lora} if lora else {})

    def student(path):
        used.append((path.name, weights(path)))
        AutoTokenizer.from_pretrained(path)

    def arguments():
        refresh = Refresh(3, tmp_path / "out", tmp_path / "students", student, lambda: [3.0, 1.0, None, 2.0])
        return {"prompts": ASK, "reward": answer_reward, "output": tmp_path / "out", "refresh": refresh}

    with pytest.raises(KeyboardInterrupt):
        train.grpo(str(student_path), options=options, callbacks=[KillAt(5)], **arguments())
    assert not (tmp_path / "out/checkpoint-2").exists()
    assert changed(student_path, tmp_path / "students/checkpoint-2")
    assert not list((tmp_path / "students/checkpoint-2").glob("optimizer*"))
    train.grpo(str(student_path), options=options, **arguments())
    assert [name for name, _ in used] == ["checkpoint-2", "checkpoint-2"]
    assert all(value.equal(used[1][1][name]) for name, value in used[0][1].items())
    [entry] = [row for row in read_log(tmp_path / "out") if "student_refreshed" in row]
    assert (entry["step"], entry["staleness_since_start"]) == (3, pytest.approx(1.0))


@pytest.mark.parametrize("every", [1, 2])
def test_an_async_reward_is_timed_in_all_steps_that_learn_its_completions(student_path, tmp_path, every):
    class Slow:
        async def __call__(self, completions, **columns):
            await asyncio.sleep(0.05)
            return [float(i) for i in range(len(completions))]

    options = GRPO | {"max_steps": 2, "steps_per_generation": 2, "logging_steps": every}
    train.grpo(str(student_path), ASK, Slow(), tmp_path, options)
    rows = [row for row in read_log(tmp_path) if "loss" in row]
    assert rows[0]["rewards/Slow/mean"] == pytest.approx(3.5)
    assert 0.05 <= rows[0]["reward_seconds"] * every < rows[0]["seconds"] * every
    assert [(row["reward_seconds"], row["seconds"] > 0) for row in rows[1:]] == [(0, True)] * (2 - every)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="it would start vllm")
def test_vllm_modes_pass_through(student_path, answer_reward, tmp_path):
    options = GRPO | {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.2}
    with pytest.raises(ImportError, match="vLLM is not available"):
        train.grpo(str(student_path), ASK, answer_reward, tmp_path, options)


# --- DPO --------------------------------------------------------------------------------------------------------------


def scored(total, passes=True, sample=True):
    return Candidate(ASK[0], f"text {total}", Sample("1+1", "2") if sample else None, total, {}, {"good": passes})


def test_pairs_of_best_and_worst():
    groups = [
        [scored(1.0), scored(3.0), scored(2.0), scored(None)],
        [scored(4.0, passes=False), scored(1.0), scored(0.0, sample=False)],  # best is gated, worst does not parse
        [scored(1.0), scored(1.0)],
        [scored(5.0, passes=False), scored(0.0, sample=False)],
        [scored(None), scored(2.0)],
        [scored(1.0), scored(1.25)],
    ]
    totals = [(row["chosen_total"], row["rejected_total"]) for row in train.pairs(groups)]
    assert totals == [(3.0, 1.0), (1.0, 0.0), (1.25, 1.0)]
    assert train.pairs(groups)[0] == {
        "prompt": ASK[0],
        "chosen": [{"role": "assistant", "content": "text 3.0"}],
        "rejected": [{"role": "assistant", "content": "text 1.0"}],
        "chosen_total": 3.0,
        "rejected_total": 1.0,
    }


@pytest.fixture
def engine(scripted):
    return scripted(lambda prompt, i, seed: written(f"{i}+{prompt[0]['content'][-1]}", i) if i else "no sample")


def test_two_steps_of_dpo_and_what_they_leave(student_path, engine, answer_reward, tmp_path):
    output = tmp_path / "out"
    options = DPO | {"lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
    found = train.dpo(
        str(student_path), ASK[:4], answer_reward, output, options, sampling=Sampling(n=3), engine=lambda: engine
    )
    assert found == output
    table = pandas.read_parquet(output / "pairs.parquet")
    assert table["chosen_total"].tolist() == [2.0] * 4
    assert table["rejected_total"].tolist() == [0.0] * 4
    assert table["rejected"][0][0]["content"] == "no sample"
    assert [row["step"] for row in read_log(output) if "rewards/margins" in row] == [1, 2]
    assert changed(student_path, output) == {
        f"model.layers.{i}.self_attn.{m}_proj.weight" for i in range(2) for m in "qv"
    }
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert not list(output.glob("checkpoint-*"))
    assert "DPO" in (output / "README.md").read_text()


def test_a_killed_run_keeps_its_pairs(student_path, engine, answer_reward, tmp_path):
    arguments = (str(student_path), ASK[:4], answer_reward, tmp_path / "out", DPO)
    with pytest.raises(KeyboardInterrupt):
        train.dpo(*arguments, sampling=Sampling(n=14), engine=lambda: engine, callbacks=[KillAt(1)])
    train.dpo(*arguments, sampling=Sampling(n=14), engine=lambda: engine)
    assert len(engine.calls) == 1
    assert json.loads((tmp_path / "out" / train.PAIRS).read_text()) == {"pairs": 4, "masked": 4}
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_pairs_whose_prompts_fill_the_length_are_told(student_path, engine, answer_reward, tmp_path, caplog):
    asks = [[{"role": "user", "content": "p" * 60 + "1"}], *ASK[:2]]
    arguments = {"sampling": Sampling(n=3), "engine": lambda: engine}
    train.dpo(str(student_path), asks, answer_reward, tmp_path / "out", DPO | {"max_length": 60}, **arguments)
    assert "1 of 3 pairs are not learnt: their prompts fill max_length" in caplog.text
    with pytest.raises(ValueError, match=r"prompts: expected one that leaves room in max_length = 10 tokens"):
        train.dpo(str(student_path), ASK, answer_reward, tmp_path / "none", DPO | {"max_length": 10}, **arguments)


def test_no_pairs(student_path, scripted, answer_reward, tmp_path):
    with pytest.raises(ValueError, match=r"prompts: expected a prompt whose best candidate .* found none among 4"):
        train.dpo(
            str(student_path),
            ASK[:4],
            answer_reward,
            tmp_path,
            DPO,
            sampling=Sampling(n=2),
            engine=lambda: scripted(lambda *_: "no sample"),
        )


def test_numbers_that_are_not_finite_are_none_in_the_log(tmp_path):
    log = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": math.nan}, {"step": 3, "reward": math.inf}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert [row["reward"] for row in read_log(tmp_path)] == [0.5, None, None]
