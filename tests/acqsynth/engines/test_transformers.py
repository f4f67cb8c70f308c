from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from acqsynth.engines import Completion, Sampling
from acqsynth.engines.transformers import TransformersEngine, batches

PROMPTS = ["a", "What is 6 * 7?", "Name a prime that is larger than one hundred.", [{"role": "user", "content": "Hi"}]]
GREEDY = Sampling(temperature=0.0, max_tokens=12)


@pytest.fixture
def engine(model, tokenizer):
    return TransformersEngine(model.eval(), tokenizer, batch_tokens=10_000)


def texts(groups):
    return [[draw.text for draw in group] for group in groups]


def alone(engine, prompt, tokens):
    """Token ids that ``model.generate`` returns for one unpadded prompt, without the end token."""
    tokenizer = engine.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    with torch.no_grad():
        out = engine.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=tokens)[0, len(ids) :].tolist()
    end = tokenizer.eos_token_id
    return out[: out.index(end)] if end in out else out


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_greedy_equals_one_prompt_at_a_time(engine, budget):
    engine.batch_tokens = budget
    groups = engine.generate(PROMPTS, GREEDY)
    assert [group[0].token_ids for group in groups] == [alone(engine, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["GPT2", "Gemma3", "Qwen2"])
def test_learned_positions_sliding_windows_and_tied_heads(tiny_model, tokenizer, kind):
    engine = TransformersEngine(tiny_model(kind, eos_token_id=tokenizer.eos_token_id), tokenizer)
    prompts = ["a", "What is 6 * 7?", "b" * 57]  # the last prompt leaves 7 of 64 positions
    groups = engine.generate(prompts, GREEDY)
    assert [g[0].token_ids for g in groups] == [alone(engine, p, min(12, 64 - len(p))) for p in prompts]


@pytest.mark.parametrize("at_once", [1, 2, 32])
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Gemma3", "Qwen2", "mamba", "falcon_h1", "lfm2_moe"])
def test_logprobs_of_texts(tiny_model, small_model, tokenizer, kind, at_once):
    """Values match one forward pass without padding or cache, also for a text that is a prefix of another. Logits of
    the prompt's other tokens are never computed."""
    ids = {"vocab_size": len(tokenizer)} if kind.islower() else {}
    model = (small_model if kind.islower() else tiny_model)(kind, eos_token_id=tokenizer.eos_token_id, **ids)
    engine = TransformersEngine(model, tokenizer)
    prompts, answers = ["a", "What is 6 * 7?"], ["card", "card arrival", 'say "hi", then go']
    widths = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, logits: widths.append(logits.shape[1]))
    found = engine.logprobs(prompts, answers, at_once)
    hook.remove()
    assert widths[0] == 1
    assert max(widths) == max(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers)
    for prompt, row in zip(prompts, found, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for answer, value in zip(answers, row, strict=True):
            own = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = engine.model(torch.tensor([ids + own])).logits[0, len(ids) - 1 : -1].float()
            expected = logits.log_softmax(dim=1).gather(1, torch.tensor(own)[:, None]).sum()
            assert value == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("answers", [[""], ["card", ""], ["b" * 5000]])
def test_logprobs_of_an_empty_or_too_long_text(engine, answers):
    with pytest.raises(ValueError, match="texts: expected"):
        engine.logprobs(["a"], answers)


def test_greedy_draws_are_one_text(engine):
    groups = engine.generate(PROMPTS[:2], replace(GREEDY, n=3))
    assert [len(group) for group in groups] == [3, 3]
    assert all(draw == group[0] for group in groups for draw in group)


def test_seeds_decide_the_draws(engine):
    sampling = Sampling(n=3, max_tokens=12, seed=5)
    first = texts(engine.generate(PROMPTS, sampling))
    torch.rand(3)  # the global random state has no effect
    assert texts(engine.generate(PROMPTS, sampling)) == first
    assert texts(engine.generate(PROMPTS, replace(sampling, seed=6))) != first
    assert all(len(set(group)) == 3 for group in first)
    engine.batch_tokens = 1  # equal prompts in separate batches still draw differently
    assert len(set(texts(engine.generate(["a"], sampling))[0])) == 3


def test_a_small_nucleus_is_the_greedy_text(engine):
    sampled = engine.generate(PROMPTS, Sampling(top_p=1e-6, max_tokens=12))
    assert texts(sampled) == texts(engine.generate(PROMPTS, GREEDY))


def test_temperature_flattens(engine):
    greedy = engine.generate(["a"], GREEDY)[0][0].token_ids
    cold = engine.generate(["a"], Sampling(temperature=1e-3, max_tokens=12))[0][0].token_ids
    hot = engine.generate(["a"], Sampling(temperature=50.0, max_tokens=12))[0][0].token_ids
    assert cold == greedy != hot


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 5.0, "top_k": 1, "temperature": 0.1},
        {"min_p": 0.9},
        {"typical_p": 0.01},
        {"num_beams": 2},
        {"num_return_sequences": 2},
        {"suppress_tokens": list(range(2, 250))},
        {"guidance_scale": 3.0},
        {"stop_strings": ["a", "e"]},
        {"return_dict_in_generate": True},
    ],
)
def test_the_generation_configuration_does_not_change_sampling(engine, asked):
    before = texts(engine.generate(PROMPTS, Sampling(n=2, max_tokens=12)))
    own = engine.model.generation_config
    for name, value in asked.items():
        setattr(own, name, value)
    assert texts(engine.generate(PROMPTS, Sampling(n=2, max_tokens=12))) == before
    assert engine.model.generation_config is own


def test_an_adapter_keeps_its_generation_configuration(engine):
    before = texts(engine.generate(PROMPTS, Sampling(max_tokens=12)))
    engine.model.generation_config.min_p = 0.9
    engine.model = get_peft_model(engine.model, LoraConfig(target_modules=["q_proj"]))
    assert texts(engine.generate(PROMPTS, Sampling(max_tokens=12))) == before
    assert engine.model.generation_config.min_p == engine.model.get_base_model().generation_config.min_p == 0.9


def test_any_of_several_end_tokens_ends(engine):
    whole = alone(engine, "a", 12)
    engine.model.generation_config.eos_token_id = [engine.tokenizer.eos_token_id, whole[4]]
    [[cut]] = engine.generate(["a"], GREEDY)
    assert cut.token_ids == whole[: whole.index(whole[4])]
    assert cut.finished
    engine.model.generation_config.eos_token_id = None
    engine.tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine.tokenizer.backend_tokenizer)
    [[endless]] = engine.generate(["a"], GREEDY)  # neither an end nor a padding token
    assert len(endless.token_ids) == 12
    assert not endless.finished


def test_logprobs_are_those_of_a_full_forward(engine):
    sampling = Sampling(n=2, temperature=0.5, top_p=0.9, max_tokens=12, top2=True)
    groups = engine.generate(PROMPTS[:3], sampling)
    for prompt, group in zip(PROMPTS, groups, strict=False):
        ids = engine.tokenizer(prompt)["input_ids"]
        for draw in group:
            with torch.no_grad():
                logits = engine.model(torch.tensor([ids + draw.token_ids])).logits[0, len(ids) - 1 : -1]
            logprobs = logits.float().log_softmax(-1)
            drawn = logprobs.gather(1, torch.tensor(draw.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(draw.top2_logprobs), logprobs.topk(2).values, atol=1e-5, rtol=0)
            torch.testing.assert_close(torch.tensor(draw.token_logprobs), drawn, atol=1e-5, rtol=0)
    assert texts(engine.generate(PROMPTS[:3], replace(sampling, top2=False))) == texts(groups)
    [[plain]] = engine.generate(["a"], GREEDY)
    assert plain.top2_logprobs is None
    assert plain.token_logprobs is None


def test_the_model_in_training_is_left_as_found(engine):
    model = engine.model
    written = texts(engine.generate(PROMPTS, GREEDY))
    model.train()
    model.model.norm.eval()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    configuration = model.generation_config.to_dict()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert texts(engine.generate(PROMPTS, GREEDY)) == written
    assert torch.rand(2).equal(expected)
    assert model.training
    assert not model.model.norm.training
    assert model.lm_head.weight.grad.eq(1).all()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.generation_config.to_dict() == configuration
    with pytest.raises(ValueError, match="empty prompt"):
        engine.generate([""], GREEDY)
    assert model.training


def test_completions_end_where_the_positions_end(engine):
    engine.model.config.max_position_embeddings = 20
    short, long = engine.generate(["a", "a" * 15], Sampling(temperature=0.0, max_tokens=12))
    assert long[0].token_ids == alone(engine, "a" * 15, 5)
    assert short[0].token_ids == alone(engine, "a", 12)


def test_a_prompt_without_room_gets_empty_completions(engine, caplog):
    """One long question must not end a run: it is logged, and answered by nothing."""
    engine.model.config.max_position_embeddings = 20
    sampling = Sampling(n=2, max_tokens=4, seed=3, top2=True)
    first, long, last = engine.generate(["a", "a" * 20, "b"], sampling)
    assert long == [Completion("", [], False, [], [])] * 2
    assert [first, last] == engine.generate(["a", "b"], sampling)
    assert engine.generate(["a" * 20], GREEDY) == [[Completion("", [], False)]]
    assert "1 of 3 prompts, first prompts[1], are too long for a model of 20 tokens" in caplog.text
    scored, unscored = engine.logprobs(["a", "a" * 16], ["1234", "12"])
    assert unscored == [-math.inf, -math.inf]
    assert [scored] == engine.logprobs(["a"], ["1234", "12"])


def test_a_token_without_an_embedding_is_named(engine):
    size = engine.model.config.vocab_size
    engine.tokenizer = copy.deepcopy(engine.tokenizer)
    engine.tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    said = f"prompts: token id {size} is outside the model's vocabulary of {size}"
    for ask in (lambda: engine.generate(["a", "<new>"], GREEDY), lambda: engine.logprobs(["<new>"], ["a"])):
        with pytest.raises(ValueError, match=said):
            ask()
    engine.tokenizer.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(ValueError, match=said):
        engine.generate(["a", "ab"], GREEDY)


def test_nothing_asked_nothing_written(engine):
    assert engine.generate([], GREEDY) == []


def test_batches_keep_to_the_budget():
    lengths, room = [3, 9, 5, 5, 30], [10, 10, 10, 10, 2]
    assert list(batches(lengths, room, 40)) == [[4], [1, 2], [3, 0]]
    assert list(batches(lengths, room, 1)) == [[4], [1], [2], [3], [0]]
    assert list(batches([], [], 40)) == []


def test_reload_from_a_state_dict_and_a_folder(engine, tmp_path):
    before = texts(engine.generate(PROMPTS, GREEDY))
    old = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    new = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in old.items()}
    engine.reload(new)
    after = texts(engine.generate(PROMPTS, GREEDY))
    assert after != before
    engine.model.save_pretrained(tmp_path)
    engine.reload(old)
    assert texts(engine.generate(PROMPTS, GREEDY)) == before
    engine.reload(tmp_path)
    assert texts(engine.generate(PROMPTS, GREEDY)) == after


def test_a_wrong_state_changes_nothing(engine, tmp_path):
    old = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    wrong = {name: tensor + 1 for name, tensor in old.items()}
    wrong["lm_head.weight"] = wrong["lm_head.weight"][:5]
    del wrong["model.norm.weight"]
    wrong["extra"] = torch.zeros(1)
    message = "missing: model.norm.weight; unknown: extra; of another shape: lm_head.weight"
    with pytest.raises(ValueError, match=f"weights: expected those of LlamaForCausalLM, {message}"):
        engine.reload(wrong)
    assert all(tensor.equal(old[name]) for name, tensor in engine.model.state_dict().items())
    with pytest.raises(FileNotFoundError, match="weights: expected a folder with a model"):
        engine.reload(tmp_path / "none")


def test_a_tied_head_may_be_missing(tiny_model, tokenizer):
    engine = TransformersEngine(tiny_model("Qwen2"), tokenizer)
    state = {n: t.clone() for n, t in engine.model.state_dict().items() if n != "lm_head.weight"}
    state["model.embed_tokens.weight"] += 1
    engine.reload(state)
    assert engine.model.lm_head.weight.equal(state["model.embed_tokens.weight"])


def test_a_path_brings_its_tokenizer(student_path, engine):
    loaded = TransformersEngine(student_path, device="cpu")
    assert not loaded.model.training
    assert texts(loaded.generate(PROMPTS, GREEDY)) == texts(engine.generate(PROMPTS, GREEDY))


def test_wrong_arguments(model, tokenizer):
    with pytest.raises(ValueError, match="tokenizer: expected the model's"):
        TransformersEngine(model)
    with pytest.raises(ValueError, match="device, dtype: expected None"):
        TransformersEngine(model, tokenizer, device="cpu")
    with pytest.raises(ValueError, match="batch_tokens: expected an int >= 1, got 0"):
        TransformersEngine(model, tokenizer, batch_tokens=0)
