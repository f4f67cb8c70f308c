"""``prompt_embedding`` against one forward per sample."""

from __future__ import annotations

import pytest
import torch

import acqcore

SAMPLES = [
    {"prompt": "The quick brown", "completion": " fox"},
    {"prompt": "What is 2 + 3? Think of a dog.", "completion": " 5"},
    {"prompt": "which drug helps?", "completion": " none of them helps"},
]


@pytest.fixture(params=["Llama", "GPT2"])
def model(request, tiny_model):
    return tiny_model(request.param)


def by_hand(model, ids):
    with torch.no_grad():
        return model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0)


@pytest.mark.parametrize("batch_tokens", [1, 8192])
def test_is_the_mean_over_the_prompt(batch_tokens, model, tokenizer):
    found = acqcore.prompt_embedding(model, SAMPLES, tokenizer=tokenizer, batch_tokens=batch_tokens)
    expected = [by_hand(model, tokenizer(sample["prompt"]).input_ids) for sample in SAMPLES]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_the_completion_is_not_read(model, tokenizer):
    other = [{**sample, "completion": " a patient"} for sample in SAMPLES]
    found, again = (acqcore.prompt_embedding(model, x, tokenizer=tokenizer) for x in (SAMPLES, other))
    torch.testing.assert_close(found, again, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prompt", ["", "a", "a fox jumps over the dog"])
@pytest.mark.parametrize("max_length", [None, 2, 12])
def test_neither_truncation_nor_a_short_prompt_lets_the_completion_in(prompt, max_length, model, tokenizer):
    texts = [{"prompt": prompt, "completion": end} for end in (" even", " an odd number, as 1 and 3 are")]
    first = [len(tokenizer(prompt).input_ids)] * 2
    ids = [tokenizer(text["prompt"] + text["completion"]).input_ids for text in texts]
    size = max(map(len, ids))
    tensors = {
        "input_ids": torch.tensor([row + [0] * (size - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in ids]),
    }
    tensors["labels"] = tensors["input_ids"].masked_fill(torch.arange(size) < torch.tensor(first)[:, None], -100)
    for samples in (texts, tensors) if prompt else (texts,):
        found = acqcore.prompt_embedding(model, samples, tokenizer=tokenizer, max_length=max_length)
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
        kept = tokenizer(prompt).input_ids[-(max_length or 99) :]
        expected = by_hand(model, kept) if kept else torch.zeros(32)
        torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", [None, "input_ids"])
def test_of_tensors_without_a_prompt_all_tokens_are_read(labels, model):
    tensors = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    if labels:
        tensors["labels"] = tensors["input_ids"]
    found = acqcore.prompt_embedding(model, tensors)
    torch.testing.assert_close(found[0], by_hand(model, [5, 6, 7, 8]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_length", [None, 3])
def test_of_a_text_the_beginning_or_all_is_read(max_length, model, tokenizer):
    found = acqcore.prompt_embedding(model, ["The quick brown fox"], tokenizer=tokenizer, max_length=max_length)
    expected = by_hand(model, tokenizer("The quick brown fox").input_ids[:max_length])
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


def test_no_samples_and_wrong_ones(model, tokenizer):
    assert acqcore.prompt_embedding(model, [], tokenizer=tokenizer).shape == (0, 32)
    with pytest.raises(ValueError, match="batch_tokens: expected an int >= 1, got 0"):
        acqcore.prompt_embedding(model, SAMPLES, tokenizer=tokenizer, batch_tokens=0)
    with pytest.raises(ValueError, match=r"samples\[1\]"):
        acqcore.prompt_embedding(model, [*SAMPLES[:1], {"prompt": "x", "completion": ""}], tokenizer=tokenizer)
