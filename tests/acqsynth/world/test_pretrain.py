from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from acqsynth.domains.arithmetic import SKILLS, Arithmetic
from acqsynth.engines import load
from acqsynth.world import Settings, base_model, build_tokenizer, pretrain as module
from acqsynth.world.profile import profile

TINY = Settings(
    hidden_size=32, heads=1, layers=1, intermediate_size=32, steps=60, warmup=2, practice_rows=16, writing_rows=4
)
TOKENIZER = build_tokenizer()
WORLD = Arithmetic()


def test_a_few_steps_lower_both_losses_and_equal_seeds_give_equal_weights() -> None:
    model, curve = module.pretrain(TINY)
    assert [point["step"] for point in curve] == [50, 60]
    untrained = module.untrained(TINY, TOKENIZER)
    for kind, batches in (("practice", module.practice_batches), ("writing", module.writing_batches)):
        with torch.no_grad():
            before = module.loss_of(untrained, next(batches(TINY, TOKENIZER))).item()
        assert curve[-1][kind] < 0.8 * before
        assert curve[-1][kind] < curve[0][kind]
    assert not model.training

    again, same_curve = module.pretrain(TINY)
    assert same_curve == curve
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other, _ = module.pretrain(replace(TINY, seed=1, steps=3))
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_pretraining_leaves_the_global_random_state() -> None:
    torch.manual_seed(5)
    random.seed(5)
    module.pretrain(replace(TINY, steps=3))
    drawn = torch.rand(1), random.random()
    torch.manual_seed(5)
    random.seed(5)
    assert drawn == (torch.rand(1), random.random())


def test_no_test_question_is_trained_on() -> None:
    test = {question for skill in SKILLS.values() for question in skill.questions["test"]}
    for batch in itertools.chain(module.practice_batches(TINY, TOKENIZER), module.writing_batches(TINY, TOKENIZER)):
        for ids, _ in batch:
            text = TOKENIZER.decode(ids).replace("<|user|>", "\n").replace("<|assistant|>", "\n")
            for line in text.splitlines():
                written = WORLD.parse(line.removesuffix("<|end|>"))
                assert (written.question if written else line) not in test


def test_only_the_reply_is_trained() -> None:
    for ids, context in next(module.writing_batches(TINY, TOKENIZER)) + next(module.practice_batches(TINY, TOKENIZER)):
        text = TOKENIZER.decode(ids[:context])
        assert text.startswith("<|user|>")
        assert text.endswith("<|assistant|>")
        assert TOKENIZER.decode(ids[context:]).endswith("<|end|>")


def test_loss_is_the_mean_over_trained_tokens_however_rows_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = module.untrained(TINY, TOKENIZER).eval()
    batch = next(module.practice_batches(TINY, TOKENIZER)) + next(module.writing_batches(TINY, TOKENIZER))
    expected = []
    with torch.no_grad():
        for ids, context in batch:
            logits = model(input_ids=torch.tensor([ids])).logits[0, context - 1 : -1]
            expected += torch.nn.functional.cross_entropy(
                logits, torch.tensor(ids[context:]), reduction="none"
            ).tolist()
        mean = torch.tensor(expected).mean()
        for together in (1, 7, 100):
            monkeypatch.setattr(module, "_TOGETHER", together)
            torch.testing.assert_close(module.loss_of(model, batch), mean)


def test_the_cache_is_keyed_by_settings_and_filled_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACQCORE_CACHE", str(tmp_path))
    settings = replace(TINY, steps=2)
    path = base_model(settings)
    assert path.parent == tmp_path
    assert json.loads((path / "pretrain.json").read_text())["loss"][-1]["step"] == 2
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(module, "pretrain", lambda settings: pytest.fail("trained again"))
    assert base_model(settings) == path
    assert replace(settings, seed=1).key() != settings.key()
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer("add 47 5").input_ids == TOKENIZER("add 47 5").input_ids
    assert model.config.eos_token_id == tokenizer.eos_token_id == TOKENIZER.eos_token_id
    assert tokenizer.chat_template == TOKENIZER.chat_template


def test_a_run_that_fails_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(settings: Settings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("ACQCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "pretrain", fail)
    with pytest.raises(KeyboardInterrupt):
        base_model(TINY)
    assert list(tmp_path.iterdir()) == []


def test_the_default_model_is_of_the_size_promised() -> None:
    model = module.untrained(Settings(), TOKENIZER)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert model.config.head_dim >= 32


def test_profile_of_an_untrained_model_gives_every_skill_a_figure() -> None:
    measured = profile(
        load("transformers", module.untrained(TINY, TOKENIZER), tokenizer=TOKENIZER), questions=2, written=4
    )
    assert set(measured.accuracy) == set(measured.mix) == set(SKILLS)
    assert measured.parsed == measured.valid == 0
    assert measured.right == {}
