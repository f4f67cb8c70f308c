"""The engine with the real vLLM where it is installed, and the error where it is not."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from acqsynth import engines
from acqsynth.engines import Sampling
from acqsynth.engines.vllm import VllmEngine, _logprobs

PROMPTS: list[Any] = [[{"role": "user", "content": "What is the capital of France?"}], "Once upon a time there was a"]
GREEDY = Sampling(temperature=0.0, max_tokens=12)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RuntimeError, match=r'needs the package vllm .*run pip install "acqcore\[vllm\]"'):
        engines.load("vllm", "some/model")


def test_a_model_object_is_refused(model, tokenizer):
    with pytest.raises(TypeError, match=r"model: expected a path or hub id, .* got LlamaForCausalLM"):
        engines.load("vllm", model, tokenizer=tokenizer)


def test_the_drawn_token_does_not_pass_for_the_top_one():
    entry = type("Logprob", (), {"__init__": lambda self, logprob: setattr(self, "logprob", logprob)})
    drawn_first = {5: entry(-4.0), 1: entry(-0.2), 2: entry(-1.9)}
    drawn_is_top = {1: entry(-0.2), 2: entry(-1.9)}
    assert _logprobs([5, 1], [drawn_first, drawn_is_top]) == ([(-0.2, -1.9)] * 2, [-4.0, -0.2])
    assert _logprobs([5, 1], None) == (None, None)


@pytest.fixture(scope="module")
def path():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    from acqsynth.models import smollm2_path

    try:
        return smollm2_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def engine(path):
    engine = VllmEngine(path, dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=16)
    yield engine
    engine.llm.llm_engine.engine_core.shutdown()


def ids(groups):
    return [[draw.token_ids for draw in group] for group in groups]


@pytest.mark.network
def test_greedy_and_top2_are_those_of_transformers(engine, path):
    sampling = replace(GREEDY, top2=True)
    ours = engine.generate(PROMPTS, sampling)
    theirs = engines.load("transformers", path, device="cpu").generate(PROMPTS, sampling)
    assert ids(ours) == ids(theirs)
    assert [g[0].finished for g in ours] == [g[0].finished for g in theirs]
    assert [g[0].text for g in ours] == [g[0].text for g in theirs]
    for [mine], [other] in zip(ours, theirs, strict=True):
        for kind in ("top2_logprobs", "token_logprobs"):
            values = (torch.tensor(getattr(draw, kind)) for draw in (mine, other))
            torch.testing.assert_close(*values, atol=1e-3, rtol=0)


@pytest.mark.network
def test_several_draws_and_seeds(engine):
    sampling = Sampling(n=3, max_tokens=12, seed=5)
    prompts = [PROMPTS[1], PROMPTS[1]]  # equal prompts draw differently
    first = ids(engine.generate(prompts, sampling))
    assert len({tuple(draw) for group in first for draw in group}) == 6
    assert ids(engine.generate(prompts, sampling)) == first
    assert ids(engine.generate(prompts, replace(sampling, seed=6))) != first
    assert ids(engine.generate([PROMPTS[0]], replace(GREEDY, n=2)))[0][0]
    assert engine.generate([], sampling) == []


@pytest.mark.network
def test_reload_takes_new_weights(engine, path, tmp_path):
    from transformers import AutoModelForCausalLM

    before = ids(engine.generate(PROMPTS, GREEDY))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    engine.reload(tmp_path)
    expected = engines.load("transformers", tmp_path, device="cpu", tokenizer=engine.tokenizer)
    after = ids(engine.generate(PROMPTS, GREEDY))
    assert after == ids(expected.generate(PROMPTS, GREEDY)) != before
    engine.reload(old)
    assert ids(engine.generate(PROMPTS, GREEDY)) == before
    with pytest.raises(FileNotFoundError, match="weights: expected a folder"):
        engine.reload(tmp_path / "none")


@pytest.mark.network
def test_an_adapter_is_used(path, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path)
    expected = engines.load("transformers", adapted.eval(), tokenizer=AutoTokenizer.from_pretrained(path))
    engine = VllmEngine(path, lora=tmp_path, dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=16)
    try:
        assert ids(engine.generate(PROMPTS, GREEDY)) == ids(expected.generate(PROMPTS, GREEDY))
    finally:
        engine.llm.llm_engine.engine_core.shutdown()
