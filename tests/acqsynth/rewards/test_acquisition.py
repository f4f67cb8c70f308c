from __future__ import annotations

import dataclasses
import json
import pickle
import sys
import threading

import datasets
import pandas
import pytest
import torch
import trl
from fakes import GOOD, LONGER, Log, trained
from transformers import AutoModelForCausalLM
from trl.scripts import grpo
from trl.trainer.utils import get_callable_name, is_async_callable

import acqcore
from acqcore.acquisitions import REGISTRY
from acqsynth import rewards
from acqsynth.domains import domain
from acqsynth.parsing import as_text, parse_chat_sample, parse_sample
from acqsynth.rewards import AcquisitionReward, Scorer

BROKEN = "<question>What is 6 * 7?</question> It is 42."
COMPLETIONS = [GOOD, BROKEN, LONGER]


@pytest.fixture(autouse=True)
def _no_student_of_the_environment(monkeypatch):
    monkeypatch.delenv(rewards.STUDENT_VARIABLE, raising=False)


def test_reward_is_the_score_times_the_gate(model, tokenizer):
    values = Log().call(AcquisitionReward(model, "loss", tokenizer=tokenizer), COMPLETIONS)
    expected = acqcore.score(model, [parse_sample(GOOD), parse_sample(LONGER)], ("loss",), tokenizer=tokenizer)
    assert values == [expected["loss"][0].item(), 0.0, expected["loss"][1].item()]
    assert min(values[0], values[2]) > 0


def test_broken_text_is_below_negative_values(model, tokenizer):
    """Influence can be negative, so a reward of 0 for broken text would rank above a valid sample."""
    samples = [parse_sample(GOOD), parse_sample(LONGER)]
    reference = acqcore.influence_reference(model, samples[:1], tokenizer=tokenizer)
    against = dataclasses.replace(reference, mean=-reference.mean)
    reward = AcquisitionReward(model, "influence", arguments={"reference": against}, tokenizer=tokenizer)
    values = Log().call(reward, COMPLETIONS)
    assert values[0] == pytest.approx(-1, abs=1e-4)
    assert values[1] == values[0] < values[2]


def test_one_score_call_for_all_completions(model, tokenizer, counted):
    Log().call(AcquisitionReward(model, tokenizer=tokenizer), COMPLETIONS * 4)
    assert counted == [(("entropy",), 8)]


def test_conversational_completions_score_as_their_text(model, tokenizer):
    reward = AcquisitionReward(model, tokenizer=tokenizer)
    turns = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    assert Log().call(reward, turns) == Log().call(reward, COMPLETIONS)
    blocks = [[{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}]]
    assert Log().call(reward, blocks) == Log().call(reward, [GOOD])


def test_a_completion_without_text_is_not_a_sample(model, tokenizer):
    tool_call = [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": GOOD}]
    reward = AcquisitionReward(model, tokenizer=tokenizer)
    block = [{"role": "assistant", "content": [{"type": "text", "text": None}, "a"]}]
    odd = [tool_call, [], BROKEN, "", None, 5, block, [None], {"role": "assistant", "content": GOOD}]
    assert Log().call(reward, [*odd, GOOD]) == [*[0.0] * len(odd), *Log().call(reward, [GOOD])]
    assert Log().call(reward, []) == []


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ("a", [GOOD], "prompts: expected a list with one entry for each completion, got a string"),
        (["a"], GOOD, "completions: expected a list with one entry for each completion, got a string"),
        (["a"], [GOOD, GOOD], "prompts: expected 2, one for each completion, got 1"),
    ],
)
def test_one_prompt_for_each_completion(prompts, completions, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AcquisitionReward("student")(prompts, completions)


def test_log_functions_get_values_and_metrics(model, tokenizer):
    reward, log = AcquisitionReward(model, tokenizer=tokenizer), Log()
    values = log.call(reward, COMPLETIONS)
    assert log.columns == {
        "acquisition_entropy_value": [values[0], None, values[2]],
        "acquisition_entropy_parsed": [True, False, True],
    }
    assert log.metrics["acquisition_entropy/parsed"] == pytest.approx(2 / 3)
    assert log.metrics["acquisition_entropy/masked"] == 0
    assert log.metrics["acquisition_entropy/mean"] == pytest.approx((values[0] + values[2]) / 2)
    assert abs(log.metrics["acquisition_entropy/length_correlation"]) == pytest.approx(1)  # only two points


def test_undefined_metrics_are_left_out(model, tokenizer):
    reward, log = AcquisitionReward(model, tokenizer=tokenizer), Log()
    log.call(reward, [BROKEN])
    assert set(log.metrics) == {f"acquisition_entropy/{key}" for key in ("parsed", "masked")}
    log.call(reward, [GOOD, GOOD])
    assert "acquisition_entropy/length_correlation" not in log.metrics


class FailingTrunk(torch.nn.Module):
    """Returns NaN hidden states for rows that contain the token ``bad``."""

    def __init__(self, vocab_size, bad):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(vocab_size, 8)
        self.bad = bad

    def forward(
        self,
        input_ids,  # [B, T]
    ):
        rows = (input_ids == self.bad).any(dim=1)[:, None, None]
        return self.embedding(input_ids).masked_fill(rows, torch.nan)


def test_a_failure_of_the_scorer_masks_the_sample(tokenizer):
    trunk = FailingTrunk(len(tokenizer), tokenizer("#")["input_ids"][0])
    student = acqcore.Student(trunk, acqcore.Head(trunk.embedding.weight.detach()), tokenizer=tokenizer)
    reward, log = AcquisitionReward(student), Log()
    values = log.call(reward, [GOOD, GOOD.replace("42", "#"), BROKEN])
    assert values[1] is None
    assert values[0] > 0
    assert values[2] == 0.0
    assert log.columns["acquisition_entropy_value"] == [values[0], None, None]
    assert log.metrics["acquisition_entropy/masked"] == pytest.approx(1 / 3)
    log.call(reward, [GOOD.replace("42", "#")])
    assert reward.masked == 2


def test_a_text_with_nothing_to_score_is_masked(model, tokenizer):
    reward = AcquisitionReward(model, tokenizer=tokenizer, parse=as_text)
    values = Log().call(reward, ["a", "ab", " "])
    assert (values[0], values[2]) == (None, 0.0)
    assert values[1] > 0


def test_long_samples_are_cut(model, tokenizer):
    long = GOOD.replace("42", "4" * 5000)  # the student accepts 4096 tokens
    assert Log().call(AcquisitionReward(model, tokenizer=tokenizer, max_length=10**6), [long])[0] > 0
    log = Log()
    reward = AcquisitionReward(model, tokenizer=tokenizer, max_length=12)
    assert all(value > 0 for value in log.call(reward, [GOOD, long]))


def test_chat_samples_and_other_options(model, tokenizer):
    reward = AcquisitionReward(
        model, "margin", tokenizer=tokenizer, parse=parse_chat_sample, reduction="max", backend="eager"
    )
    expected = acqcore.score(
        model, [parse_chat_sample(GOOD)], ("margin",), tokenizer=tokenizer, reduction="max", backend="eager"
    )
    assert Log().call(reward, [GOOD]) == expected["margin"].tolist()


def test_the_student_is_left_as_found(model, tokenizer):
    model.train()
    model.model.norm.eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Log().call(AcquisitionReward(model, tokenizer=tokenizer), COMPLETIONS)
    assert model.training
    assert not model.model.norm.training
    assert model.lm_head.weight.grad.eq(1).all()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_missing_student_is_reported_at_the_first_call():
    for reward, completion in ((AcquisitionReward(), BROKEN), (rewards.entropy, GOOD)):
        with pytest.raises(RuntimeError, match="ACQSYNTH_STUDENT is not set: 'acquisition_entropy' expects"):
            Log().call(reward, [completion])


@pytest.mark.parametrize("completions", [[BROKEN], [BROKEN, "", "Six."], [[{"role": "assistant", "content": "x"}]]])
def test_completions_of_another_form_are_reported_once(completions, student_path, caplog):
    reward = AcquisitionReward(student_path)
    for _ in range(3):
        assert Log().call(reward, completions) == [0.0] * len(completions)
    [record] = [r for r in caplog.records if "parse=acqsynth.parsing.as_text" in r.getMessage()]
    assert "ask for <question>...</question><answer>...</answer>" in record.getMessage()
    caplog.clear()
    Log().call(AcquisitionReward(student_path), [GOOD, *completions])
    assert caplog.records == []


@pytest.mark.parametrize("bad", [{"text": "c \ud83d d"}, {"text": 5.5, "prompt": "a"}, {"text": None}, 7])
def test_a_bad_sample_masks_only_itself(bad, student_path, caplog):
    samples = {GOOD: {"text": "What is six times seven?"}, "bad": bad}
    reward = AcquisitionReward(student_path, parse=samples.get)
    rewards = Log().call(reward, [GOOD, "bad", GOOD, "broken"])
    assert rewards[0] == pytest.approx(rewards[2])
    assert rewards[1] is None or bad == {"text": 5.5, "prompt": "a"}
    assert rewards[3] == 0.0
    assert reward.masked == rewards.count(None)


def test_a_parser_that_fails_masks_only_its_text(student_path):
    def parse(text):
        if "bad" in text:
            raise KeyError(text)
        return text

    rewards = Log().call(AcquisitionReward(student_path, parse=parse), ["What is six?", "bad", "What is two?"])
    assert [reward is None for reward in rewards] == [False, True, False]


@pytest.mark.parametrize("parse", [domain("math").parse, str.encode, len, lambda text: text["question"]])
def test_a_parser_that_never_works_raises(parse, student_path):
    with pytest.raises(RuntimeError, match="'parse' failed on each of the 3 samples tried: TypeError"):
        AcquisitionReward(student_path, parse=parse)(["a"] * 3, [GOOD] * 3)


def test_a_parser_that_works_once_masks_the_other_texts(student_path, caplog):
    """Also if it fails on the first texts of the first call, as those of an untrained generator; logged once a call."""
    reward = AcquisitionReward(student_path, parse=lambda text: json.loads(text)["text"])
    texts = ["not JSON"] * 4 + ['{"text": "What is six times seven?"}'] + ["not JSON"] * 4
    for _ in range(2):
        assert [value is None for value in reward(["a"] * 9, texts)] == [True] * 4 + [False] + [True] * 4
    failed = "acquisition_entropy: 'parse' failed on 8 of 9 texts"
    assert [record.getMessage() for record in caplog.records] == [failed] * 2
    assert "JSONDecodeError" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acquisition": "grad_norm", "arguments": {"parameters": "foo"}}, "parameters: unknown 'foo'"),
        ({"acquisition": "mutual_information", "arguments": {"draws": 1}}, "draws"),
        ({"acquisition": "mutual_information", "arguments": {"layer": 1}}, "layer"),
        ({"acquisition": "influence", "arguments": {"reference": [GOOD], "similarity": "l2"}}, "similarity: unknown"),
        ({"acquisition": "influence", "arguments": {"reference": [GOOD], "dim": 0}}, "dim: expected"),
        ({"acquisition": "influence", "arguments": {"reference": [GOOD], "size": 3}}, "unknown 'size'"),
        ({"acquisition": "influence"}, "acquisition_args: 'influence' needs 'reference'"),
        ({"acquisition": "epig"}, "acquisition_args: 'epig' needs 'reference'"),
        ({"acquisition": "influence", "arguments": {"reference": None}}, "reference: samples: expected a list"),
        ({"acquisition": "influence", "arguments": {"reference": []}}, "reference: expected at least one sample"),
        ({"reduction": "median"}, "reduction: unknown 'median'"),
        ({"batch_tokens": 0}, "batch_tokens: expected an int >= 1"),
        ({"backend": "gpu"}, "backend: unknown 'gpu'"),
        ({"device": "gpu"}, "device: expected cpu"),
        ({"acquisition": "entrpy"}, "acquisition: unknown 'entrpy', expected one of loss"),
        ({"acquisition": ["entropy"]}, r"acquisition: unknown \['entropy'\]"),
        ({"parse": "tags"}, "parse: expected a function of a text, got str"),
        ({"max_length": 1}, "max_length: expected at least 2 tokens, got 1"),
    ],
)
def test_invalid_arguments_are_refused_before_the_first_call(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        AcquisitionReward("student", **options)


def test_a_reference_may_be_a_table(model, tokenizer):
    rows = [{"prompt": "What is six?\n", "completion": "It is six."}, {"prompt": "And two?\n", "completion": "Two."}]
    tables = rows, {key: [row[key] for row in rows] for key in rows[0]}, pandas.DataFrame(rows)
    made = [
        AcquisitionReward(model, "influence", arguments={"reference": table}, tokenizer=tokenizer) for table in tables
    ]
    first, *others = [Log().call(reward, [GOOD]) for reward in made]
    assert others == [first, first]
    scored = [Scorer(model, ["loss"], tokenizer=tokenizer)(table) for table in tables]
    assert scored[1:] == scored[:1] * 2


def test_an_acquisition_with_required_arguments_is_not_ready_made():
    with pytest.raises(
        AttributeError, match="influence is not ready-made: acquisition_args: 'influence' needs 'refere"
    ):
        _ = rewards.influence


def test_a_path_is_loaded_once_and_late(student_path, monkeypatch):
    loads = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda path, **o: loads.append(path) or load(path, **o)
    )
    first, second = AcquisitionReward(student_path), AcquisitionReward(str(student_path), "margin")
    assert loads == []
    Log().call(first, [BROKEN])  # loaded even if nothing parses, so a missing student is reported at once
    assert len(loads) == 1
    Log().call(first, [GOOD])
    Log().call(second, [GOOD])
    assert len(loads) == 1


def test_pickles_before_and_after_a_call(student_path):
    reward = AcquisitionReward(student_path, "el2n", name="hard")
    fresh = pickle.dumps(reward)
    values = Log().call(reward, COMPLETIONS)
    used = pickle.dumps(reward)
    assert max(len(fresh), len(used)) < 2000  # the student is not pickled
    for data in (fresh, used):
        copy = pickle.loads(data)
        assert copy.__name__ == "hard"
        assert Log().call(copy, COMPLETIONS) == values


def test_threads_take_turns(model, tokenizer):
    model.train()
    reward = AcquisitionReward(model, tokenizer=tokenizer)
    expected = Log().call(reward, COMPLETIONS)
    results = []
    threads = [threading.Thread(target=lambda: results.append(Log().call(reward, COMPLETIONS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4
    assert all(module.training for module in model.modules())


def test_a_student_is_whole_under_zero3(student_path, zero3):
    from transformers.integrations import deepspeed

    assert Log().call(AcquisitionReward(student_path), [GOOD])[0] > 0
    assert deepspeed.is_deepspeed_zero3_enabled()


def test_trl_sees_a_function_with_a_name(student_path):
    reward = AcquisitionReward(student_path, "varentropy")
    assert get_callable_name(reward) == "acquisition_varentropy"
    assert not is_async_callable(reward)
    assert not isinstance(reward, torch.nn.Module)
    assert get_callable_name(AcquisitionReward(student_path, name="mine")) == "mine"
    assert repr(reward) == "AcquisitionReward('varentropy', name='acquisition_varentropy')"


def test_a_model_needs_its_tokenizer(model):
    with pytest.raises(ValueError, match="tokenizer: expected the student's"):
        AcquisitionReward(model)


def resolve(names, tmp_path, monkeypatch):
    """The rewards that ``trl grpo --reward_funcs ...`` passes to its trainer."""
    handed = []

    class Stop(Exception):  # noqa: N818
        pass

    def trainer(*args, reward_funcs, **options):
        handed.extend(reward_funcs)
        raise Stop

    data = {"train": datasets.Dataset.from_dict({"prompt": ["a"]})}
    monkeypatch.setattr(trl, "GRPOTrainer", trainer)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: data)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds the working directory
    line = ["--model_name_or_path", "none", "--dataset_name", "none", "--output_dir", str(tmp_path)]
    parsed = grpo.make_parser().parse_args_and_config(
        [*line, "--bf16", "False", "--use_cpu", "True", "--reward_funcs", *names]
    )
    with pytest.raises(Stop):
        grpo.main(*parsed)
    return handed


def test_every_acquisition_is_a_ready_made_reward(student_path, tmp_path, monkeypatch):
    names = [name for name in acqcore.acquisitions() if not REGISTRY[name].options.required()]
    assert len(names) >= 10
    found = resolve([f"acqsynth.rewards.{name}" for name in names], tmp_path, monkeypatch)
    assert [get_callable_name(reward) for reward in found] == [f"acquisition_{name}" for name in names]
    monkeypatch.setenv(rewards.STUDENT_VARIABLE, str(student_path))
    for name, reward in zip(names, found, strict=True):
        reward = pickle.loads(pickle.dumps(reward))
        assert Log().call(reward, [GOOD]) == Log().call(AcquisitionReward(student_path, name), [GOOD])
    assert {name for name in dir(rewards) if name in REGISTRY} == set(names)


def test_arguments_reach_the_acquisition(student_path):
    student = acqcore.Student.load(student_path)
    sample = parse_sample(GOOD)
    reference = acqcore.influence_reference(student, [sample])
    [value] = Log().call(AcquisitionReward(student, "influence", arguments={"reference": reference}), [GOOD])
    assert value == pytest.approx(1.0, abs=1e-4)  # the reference is the sample itself
    [norm] = Log().call(AcquisitionReward(student, "grad_norm", arguments={"parameters": "all"}), [GOOD])
    assert norm == pytest.approx(acqcore.grad_norm(student, [sample], "all").item(), rel=1e-5)


def test_other_attributes_are_missing():
    with pytest.raises(AttributeError, match="has no attribute 'entrpy'"):
        _ = rewards.entrpy


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_two_steps_of_training(method, model, tokenizer, tmp_path):
    """Runs real TRL with the trained model as its own student."""
    entropy = AcquisitionReward(model, tokenizer=tokenizer, parse=as_text)
    gated = AcquisitionReward(model, "loss", tokenizer=tokenizer)
    steps = trained(model, tokenizer, [entropy, gated], tmp_path, method)
    assert len(steps) == 2
    for row in steps:
        assert row["rewards/acquisition_entropy/mean"] > 0
        assert row["rewards/acquisition_loss/mean"] == 0  # random bytes do not parse
        assert row["acquisition_loss/parsed"] == 0
    assert model.training
