from __future__ import annotations

import string

import pytest

from acqsynth.domains.arithmetic import SKILLS, Arithmetic
from acqsynth.world.pretrain import chat
from acqsynth.world.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
WORLD = Arithmetic()


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
def test_text_comes_back_as_it_was(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_every_word_tag_and_digit_is_one_token() -> None:
    row = WORLD.rows(1, 0, skills=["median"])[0]
    tokens = TOKENIZER.tokenize(WORLD.tagged(row))
    digits = row.question.split()[1:]
    assert tokens[:6] == ["<question>", "median", *(f" {d}" for d in digits), "</question>"]
    assert TOKENIZER.tokenize("add 47 5") == ["add", " 4", "7", " 5"]
    for name in SKILLS:
        assert TOKENIZER.tokenize(name) == [name]


def test_unknown_characters_are_one_unknown_token_each() -> None:
    assert TOKENIZER("é日").input_ids == [TOKENIZER.unk_token_id] * 2


def test_the_chat_template_is_what_pretraining_writes() -> None:
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
