from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from acqsynth import engines
from acqsynth.engines import Sampling, completion, encode, eos_ids


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, ValueError, "n: expected at least 1, got 0"),
        ({"temperature": -1.0}, ValueError, r"temperature: expected at least 0, got -1\.0"),
        ({"top_p": 0.0}, ValueError, r"top_p: expected above 0 and at most 1, got 0\.0"),
        ({"top_p": 1.5}, ValueError, "top_p: expected above 0 and at most 1"),
        ({"max_tokens": 0}, ValueError, "max_tokens: expected at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"max_tokens": "x"}, TypeError, "max_tokens: expected an integer, got 'x'"),
        ({"max_tokens": 2.5}, TypeError, r"max_tokens: expected an integer, got 2\.5"),
        ({"n": None}, TypeError, "n: expected an integer, got None"),
        ({"seed": True}, TypeError, "seed: expected an integer, got True"),
        ({"temperature": "warm"}, TypeError, "temperature: expected a number, got 'warm'"),
        ({"top_p": [1]}, TypeError, r"top_p: expected a number, got \[1\]"),
    ],
)
def test_sampling_rejects(options, error, message):
    with pytest.raises(error, match=message):
        Sampling(**options)


def test_sampling_takes_numbers_of_any_type():
    Sampling(n=np.int64(2), temperature=np.float32(0.5), top_p=1, seed=np.int32(3))


def test_load_by_name(model, tokenizer):
    engine = engines.load("transformers", model, tokenizer=tokenizer, batch_tokens=64)
    assert (engine.name, engine.model, engine.batch_tokens) == ("transformers", model, 64)
    with pytest.raises(ValueError, match="name: unknown engine 'sglang', expected one of transformers, vllm"):
        engines.load("sglang", model)


def test_encode_messages_and_strings(tokenizer):
    chat, text = encode(tokenizer, [[{"role": "user", "content": "Hi"}], "Hi"])
    assert tokenizer.decode(chat) == "<|user|>Hi</s><|assistant|>"
    assert tokenizer.decode(text) == "Hi"
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected at least one token"):
        encode(tokenizer, ["a", ""])
    assert encode(tokenizer, iter(["Hi"])) == encode(tokenizer, ["Hi"])
    for single in ("Hi", {"role": "user", "content": "Hi"}, [{"role": "user", "content": "Hi"}]):
        with pytest.raises(TypeError, match="prompts: expected a list of prompts, got a single one"):
            encode(tokenizer, single)


def test_messages_need_a_template(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected a string, as the tokenizer has no chat template"):
        encode(bare, [[{"role": "user", "content": "Hi"}]])


def test_every_end_token_counts(model, tokenizer):
    end = tokenizer.eos_token_id
    assert eos_ids(tokenizer, None) == [end]
    model.generation_config.eos_token_id = [7, 9]
    assert eos_ids(tokenizer, model.generation_config) == [end, 7, 9]
    ids = tokenizer("abcd")["input_ids"]
    cut = completion(tokenizer, ids, [ids[2], ids[3]], [(-0.1, -3.0)] * 4, [-0.1, -3.0, -3.0, -0.1])
    assert (cut.text, cut.token_ids, cut.finished) == ("ab", ids[:2], True)
    assert (cut.top2_logprobs, cut.token_logprobs) == ([(-0.1, -3.0)] * 2, [-0.1, -3.0])
    whole = completion(tokenizer, ids, [end])
    assert (whole.text, whole.token_ids, whole.finished, whole.top2_logprobs) == ("abcd", ids, False, None)
