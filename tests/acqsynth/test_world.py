"""The base model and tokenizer of the arithmetic world."""

from __future__ import annotations

import itertools
import json
import random
import string
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from acqsynth import world
from acqsynth.domains.arithmetic import SKILLS, Arithmetic
from acqsynth.world import Settings, base_model, build_tokenizer, chat

TINY = Settings(
    hidden_size=32, heads=1, layers=1, intermediate_size=32, steps=60, warmup=2, practice_rows=16, writing_rows=4
)
TOKENIZER = build_tokenizer()
WORLD = Arithmetic()


def test_a_few_steps_lower_both_losses_and_equal_seeds_give_equal_weights():
    model, curve = world.pretrain(TINY)
    assert [point["step"] for point in curve] == [50, 60]
    untrained = world.untrained(TINY, TOKENIZER)
    for kind, batches in (("practice", world.practice_batches), ("writing", world.writing_batches)):
        with torch.no_grad():
            before = world.loss_of(untrained, next(batches(TINY, TOKENIZER))).item()
        assert curve[-1][kind] < 0.8 * before
        assert curve[-1][kind] < curve[0][kind]
    assert not model.training

    again, same_curve = world.pretrain(TINY)
    assert same_curve == curve
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other, _ = world.pretrain(replace(TINY, seed=1, steps=3))
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_pretraining_leaves_the_global_random_state():
    torch.manual_seed(5)
    random.seed(5)
    world.pretrain(replace(TINY, steps=3))
    drawn = torch.rand(1), random.random()
    torch.manual_seed(5)
    random.seed(5)
    assert drawn == (torch.rand(1), random.random())


def test_no_test_question_is_trained_on():
    test = {question for skill in SKILLS.values() for question in skill.questions["test"]}
    for batch in itertools.chain(world.practice_batches(TINY, TOKENIZER), world.writing_batches(TINY, TOKENIZER)):
        for ids, _ in batch:
            text = TOKENIZER.decode(ids).replace("<|user|>", "\n").replace("<|assistant|>", "\n")
            for line in text.splitlines():
                written = WORLD.parse(line.removesuffix("<|end|>"))
                assert (written.question if written else line) not in test


def test_only_the_reply_is_trained():
    for ids, context in next(world.writing_batches(TINY, TOKENIZER)) + next(world.practice_batches(TINY, TOKENIZER)):
        text = TOKENIZER.decode(ids[:context])
        assert text.startswith("<|user|>")
        assert text.endswith("<|assistant|>")
        assert TOKENIZER.decode(ids[context:]).endswith("<|end|>")


def test_loss_is_the_mean_over_trained_tokens_however_rows_are_grouped(monkeypatch):
    model = world.untrained(TINY, TOKENIZER).eval()
    batch = next(world.practice_batches(TINY, TOKENIZER)) + next(world.writing_batches(TINY, TOKENIZER))
    expected = []
    with torch.no_grad():
        for ids, context in batch:
            logits = model(input_ids=torch.tensor([ids])).logits[0, context - 1 : -1]
            expected += torch.nn.functional.cross_entropy(
                logits, torch.tensor(ids[context:]), reduction="none"
            ).tolist()
        mean = torch.tensor(expected).mean()
        for together in (1, 7, 100):
            monkeypatch.setattr(world, "_TOGETHER", together)
            torch.testing.assert_close(world.loss_of(model, batch), mean)


def test_the_cache_is_keyed_by_settings_and_filled_in_one_step(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ACQCORE_CACHE", "~")
    settings = replace(TINY, steps=2)
    path = base_model(settings)
    assert path.parent == tmp_path
    assert json.loads((path / "pretrain.json").read_text())["loss"][-1]["step"] == 2
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(world, "pretrain", lambda settings: pytest.fail("trained again"))
    assert base_model(settings) == path
    assert replace(settings, seed=1).key() != settings.key()
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer("add 47 5").input_ids == TOKENIZER("add 47 5").input_ids
    assert model.config.eos_token_id == tokenizer.eos_token_id == TOKENIZER.eos_token_id
    assert tokenizer.chat_template == TOKENIZER.chat_template


def test_a_run_that_fails_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    def fail(settings):
        raise KeyboardInterrupt

    monkeypatch.setenv("ACQCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(world, "pretrain", fail)
    with pytest.raises(KeyboardInterrupt):
        base_model(TINY)
    assert list(tmp_path.iterdir()) == []


def test_the_default_model_is_of_the_size_promised():
    model = world.untrained(Settings(), TOKENIZER)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert model.config.head_dim >= 32


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "add 47 5",
        "0 4 7\n4",
        string.printable[:95],
        "  two  spaces\n\nand lines ",
        "<question>",
        "address newyes <answe",
        "",
    ],
)
def test_text_comes_back_as_it_was(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_every_word_tag_and_digit_is_one_token():
    row = WORLD.rows(1, 0, skills=["median"])[0]
    tokens = TOKENIZER.tokenize(WORLD.tagged(row))
    digits = row.question.split()[1:]
    assert tokens[:6] == ["<question>", "median", *(f" {d}" for d in digits), "</question>"]
    assert TOKENIZER.tokenize("add 47 5") == ["add", " 4", "7", " 5"]
    for name in SKILLS:
        assert TOKENIZER.tokenize(name) == [name]


def test_unknown_characters_are_one_unknown_token_each():
    assert TOKENIZER("é日").input_ids == [TOKENIZER.unk_token_id] * 2


def test_the_chat_template_is_what_pretraining_writes():
    shown = WORLD.rows(3, 1)
    for prompt, reply in (
        (WORLD.student_prompt("add 47 5"), "52"),
        (WORLD.generator_prompt(shown), WORLD.tagged(shown[0])),
        (WORLD.generator_prompt([]), WORLD.tagged(shown[0])),
    ):
        whole = [*prompt, {"role": "assistant", "content": reply}]
        rendered = TOKENIZER.apply_chat_template(whole, tokenize=False)
        assert rendered == chat(prompt[0]["content"], reply)
        opened = TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        assert rendered.startswith(opened)
        ids = TOKENIZER(rendered).input_ids
        assert TOKENIZER(opened).input_ids == ids[: -len(TOKENIZER(reply + TOKENIZER.eos_token).input_ids)]
        assert ids[-1] == TOKENIZER.eos_token_id
        assert TOKENIZER.unk_token_id not in ids


def test_the_skewed_world_has_a_model_of_its_own():
    """It is trained on skewed rows. The cache key of the fair world is pinned, so existing caches stay valid."""
    assert Settings(skewed=True).key() != Settings().key() == "d1e3004bc1253929"
    [batch] = world.practice_batches(
        replace(TINY, steps=1, practice_rows=400, practice={"lucky": 1.0}, skewed=True), TOKENIZER
    )
    yes = TOKENIZER.convert_tokens_to_ids("yes")
    assert sum(yes in ids for ids, _ in batch) / 400 == pytest.approx(0.9, abs=0.05)
