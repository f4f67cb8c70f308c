from __future__ import annotations

import pytest

from acqsynth.parsing import as_text, fields, parse_chat_sample, parse_sample

WHOLE = "<question>2 + 2?</question> <reasoning>Count on.</reasoning>\n<answer>4</answer>"
SHORT = "<question> 2 + 2? </question><answer>\n4\n</answer>"


def test_the_question_is_context_and_the_rest_is_scored():
    assert parse_sample(WHOLE) == {"prompt": "2 + 2?\n", "completion": "Count on.\n4"}


def test_reasoning_is_optional_and_contents_are_stripped():
    assert parse_sample(SHORT) == {"prompt": "2 + 2?\n", "completion": "4"}


def test_text_around_the_tags_is_not_part_of_the_sample():
    assert parse_sample(f"Sure!\n{SHORT}\nHope it helps.") == parse_sample(SHORT)


@pytest.mark.parametrize("blank", ["\u200b", "\u00ad\u00ad", " \ufeff ", "\u2060", "\u202e", "\u3164"])
def test_contents_that_show_nothing_are_empty(blank):
    assert fields(f"<question>{blank}</question><answer>4</answer>") is None
    assert fields(f"<question>2 + 2?</question><answer>{blank}</answer>") is None
    assert fields(f"<question>2 {blank}+ 2?</question><answer>4</answer>") is not None
    assert as_text(blank) is None


def test_contents_keep_their_lines_and_other_tags():
    sample = fields("<question>a\n\n<b>c</b> if x < y</question><answer>d</answer>")
    assert sample == {"question": "a\n\n<b>c</b> if x < y", "answer": "d"}


def test_a_chat_sample_has_the_same_parts():
    assert parse_chat_sample(WHOLE) == {
        "messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Count on.\n4"}]
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "<question>2 + 2?</question>",
        "<answer>4</answer>",
        "<question>2 + 2?</question><answer>4",
        "<question>2 + 2?<answer>4</answer>",
        "<question>2 + 2?</question><answer> \n </answer>",
        "<question></question><answer>4</answer>",
        "<question>a</question><reasoning></reasoning><answer>4</answer>",
        "<question>a</question><answer>4</answer><answer>5</answer>",
        "<question>a</question><question>b</question><answer>4</answer>",
        "<question>a</question><answer>4</answer></answer>",
        "<question>a</question><answer>4</answer><answer>",
        "<question>a<answer>4</answer></question>",
        "<question>a</question><answer><reasoning>r</reasoning>4</answer>",
        "<answer>4</answer><question>a</question>",
        "<question>a</question><answer>4</answer><reasoning>r</reasoning>",
        "</question>a<question><answer>4</answer>",
        "<question>a \ud83d</question><answer>4</answer>",
    ],
)
def test_a_broken_format_is_none(text):
    assert parse_sample(text) is None
    assert parse_chat_sample(text) is None


def test_as_text():
    assert as_text("  two words\n") == "two words"
    assert as_text(" \n") is None
