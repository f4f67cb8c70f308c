"""Of a conversation, the assistant's reply is scored, whatever the chat template does."""

from __future__ import annotations

import json
import re

import pytest

USER = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}


def test_a_template_that_rewrites_the_opening(encoded, tokenizer, with_template):
    """The generation prompt opens a block that finished turns do not have."""
    other = with_template(tokenizer.chat_template.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"))
    messages = [USER, YES]
    assert other.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True).endswith("<think>")
    (row,) = encoded([{"messages": messages}], other)
    assert tokenizer.decode(row.scored.tolist()) == "yes<|im_end|>\n"


def test_a_list_of_texts_for_a_template_of_strings(encoded):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "fox?"}]
    [row], [expected] = (encoded([{"messages": [USER | {"content": c}, YES]}]) for c in (parts, "a fox?"))
    assert row.ids.tolist() == expected.ids.tolist()
    assert row.targets.tolist() == expected.targets.tolist()


def test_parts_that_a_template_of_strings_cannot_take(encoded):
    user = USER | {"content": [{"type": "file", "file": "x"}, "a fox?"]}
    with pytest.raises(ValueError, match=r"content: expected text, .* nothing else, got parts \['file', 'str'\]"):
        encoded([{"messages": [user, YES]}])


def test_a_template_of_lists_gets_lists(encoded, with_template):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for part in m['content'] %}"
        "{{ '<image>' if part['type'] in ('image', 'video') else '(' + part['text'] + ')' }}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    other = with_template(template)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "fox?"}]
    (row,) = encoded([{"messages": [USER | {"content": parts}, YES]}], other)
    assert "(a)(fox?)" in other.decode(row.ids)
    for unseen in ({"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "video"}):
        message = USER | {"content": [unseen, *parts]}
        for sample in ({"messages": [message, YES]}, {"prompt": [message], "completion": [YES]}):
            with pytest.raises(ValueError, match=r"samples\[0\]: content: expected text, as only text is sco"):
                encoded([sample], other)


@pytest.mark.parametrize("test", ["{% if part['type'] == 'text' %}", "{% if part.type == 'text' %}"])
def test_a_string_for_a_template_of_lists(test, encoded, with_template):
    """SmolVLM's template drops strings, Llava-NeXT's raises."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
        f"{test}{{{{ part['text'] }}}}{{% endif %}}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    other = with_template(template)
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in (USER, YES)]
    (expected,) = encoded([{"messages": parts}], other)
    assert other.decode(expected.scored.tolist()) == "yes<|im_end|>\n"
    for messages in ([USER, YES], [USER, parts[1]], [parts[0], YES]):
        (row,) = encoded([{"messages": messages}], other)
        assert row.ids.tolist() == expected.ids.tolist()
        assert row.targets.tolist() == expected.targets.tolist()


@pytest.mark.parametrize("turn", [0, 1])
def test_no_template_writes_content_as_python_does(turn, encoded):
    messages = [USER, YES]
    messages[turn] = messages[turn] | {"content": {"a": 1}}
    with pytest.raises(ValueError, match=r"samples\[0\]: content: expected text, the chat template writes a dict"):
        encoded([{"messages": messages}])


@pytest.mark.parametrize("extra", [{}, {"content": None}, {"content": ""}])
def test_tool_calls_need_no_content(extra, encoded, tokenizer, with_template):
    calls = "{{ m['content'] }}{% for c in m['tool_calls'] %}{{ c['function']['name'] }}{% endfor %}"
    other = with_template(tokenizer.chat_template.replace("{{ m['content'] }}", calls))
    call = {"type": "function", "function": {"name": "fox", "arguments": {"x": 1}}}
    (row,) = encoded([{"messages": [USER, {"role": "assistant", "tool_calls": [call], **extra}]}], other)
    assert tokenizer.decode(row.scored.tolist()) == "fox<|im_end|>\n"


TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which city has the Colosseum?"}]
REPLY = {"role": "assistant", "content": "Rome"}
CONVERSATION = {"messages": [*TURNS, REPLY]}

# Like Pixtral's: puts the system text into the user's turn if that is the last message.
MOVES = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST]"
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n{% endif %}"
    "{{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{% endfor %}"
)
# Begins with the number of turns.
COUNTS = (
    "{{ messages | length }} turns {% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Writes only the last turn in full.
SHORTENS = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'][:5] }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Has no generation prompt, and writes neither calls nor reasoning nor more than one part of the content.
IGNORES = (
    "{% for m in messages %}{% set c = m['content'] or '' %}{% set c = c if c is string else c[0]['text'] %}"
    "{{ m['role'] }}: {{ c.split('</think>')[-1] | trim }}<|im_end|>{% endfor %}"
)


@pytest.mark.parametrize("template", [MOVES, COUNTS, SHORTENS, IGNORES])
@pytest.mark.parametrize("reply", ["Rome", "  Rome ", "Which city has the Colosseum? Rome"])
def test_templates_that_do_not_only_append(template, reply, encoded, with_template):
    other = with_template(template)
    message = {"role": "assistant", "content": reply}
    shown = reply.strip() if template == IGNORES else reply
    for sample in ({"messages": [*TURNS, message]}, {"prompt": TURNS, "completion": [message]}):
        (row,) = encoded([sample], other, limit=None)
        assert other.decode(row.scored.tolist()) == f"{shown}<|im_end|>"
        assert other.decode(row.ids) == other.apply_chat_template([*TURNS, message], tokenize=False)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}.",
        "{% for m in messages | reverse %}{{ m['content'] }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}About: {{ messages[0]['content'] }}",
    ],
    ids=["leaves it out", "writes it first", "changes it", "the first turn after it"],
)
def test_templates_that_do_not_write_the_reply_last_are_refused(template, encoded, with_template):
    with pytest.raises(ValueError, match=r"samples\[0\]: the chat template does not render the reply in the"):
        encoded([CONVERSATION], with_template(template), limit=None)


CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"reasoning_content": "old town"}, "old town"),
        ({"thinking": "old town"}, "old town"),
        ({"tool_calls": [CALL], "content": None}, "look_up"),
        ({"content": "  "}, "  "),
        ({"tool_calls": [CALL, {"function": {"name": "walk"}}], "content": None}, "look_up"),
        ({"content": [{"type": "text", "text": "Rome"}, {"type": "text", "text": ", Italy"}]}, ", Italy"),
        ({"content": "<think>\nold town\n</think>\n\nRome"}, "old town"),
    ],
)
def test_a_part_of_the_reply_that_is_left_out_is_refused(extra, expected, encoded, with_template):
    tokenizer = with_template(IGNORES)
    with pytest.raises(ValueError, match=f"does not render the reply in the scored part: expected '{expected}'"):
        encoded([{"messages": [*TURNS, REPLY | extra]}], tokenizer, limit=None)
    # The template may leave out parts of turns that are not scored.
    if "content" not in extra:
        history = [*TURNS, REPLY | extra, {"role": "user", "content": "and?"}, REPLY]
        (row,) = encoded([{"messages": history}], tokenizer, limit=None)
        assert tokenizer.decode(row.scored.tolist()) == "Rome<|im_end|>"


def test_each_call_of_a_reply_is_scored(encoded, tokenizer, with_template):
    calls = "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}"
    every = with_template(tokenizer.chat_template.replace("{{ m['content'] }}", calls))
    # As gpt-oss's, writes only the first call.
    first = with_template(every.chat_template.replace("m['tool_calls'] or []", "(m['tool_calls'] or [])[:1]"))
    twice = {"role": "assistant", "tool_calls": [CALL, {"function": {"name": "look_up", "arguments": {"x": 2}}}]}
    (row,) = encoded([{"messages": [*TURNS, twice]}], every, limit=None)
    assert '"x": 1' in tokenizer.decode(row.scored.tolist())
    assert '"x": 2' in tokenizer.decode(row.scored.tolist())
    with pytest.raises(ValueError, match="in the scored part: expected 'look_up' 2 times in "):
        encoded([{"messages": [*TURNS, twice]}], first, limit=None)


def test_marks_of_what_the_assistant_generates(encoded, with_template):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>"
        "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = with_template(template)
    (row,) = encoded([CONVERSATION], tokenizer, limit=None)
    assert tokenizer.decode(row.scored.tolist()) == "Rome<|im_end|>"  # the newline after it belongs to the template
    tool = {"role": "tool", "content": "Italy"}
    completion = [{"role": "assistant", "content": "where?"}, tool, REPLY]
    (row,) = encoded([{"prompt": TURNS, "completion": completion}], tokenizer, limit=None)
    assert tokenizer.decode(row.scored.tolist()) == "where?<|im_end|>Rome<|im_end|>"
    history = [*TURNS, REPLY, {"role": "user", "content": "and?"}]
    (row,) = encoded([{"messages": [*history, {"role": "assistant", "content": "Nîmes"}]}], tokenizer, limit=None)
    assert tokenizer.decode(row.scored.tolist()) == "Nîmes<|im_end|>"

    (row,) = encoded([CONVERSATION], tokenizer, limit=None)
    turns = CONVERSATION["messages"]
    in_parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    for write in ("m['content']", "'' + m['content']"):  # the second one rejects lists
        tokenizer = with_template(template.replace("m['content']", write))
        for messages in (in_parts, [*in_parts[:-1], turns[-1]]):
            (same,) = encoded([{"messages": messages}], tokenizer, limit=None)
            assert same.targets.tolist() == row.targets.tolist()

    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda messages, tokenize, **options: apply(
        [*messages, REPLY] if tokenize else messages, tokenize=tokenize, **options
    )
    with pytest.raises(ValueError, match=r"samples\[0\]: the chat template marks generated text in \d+ tokens"):
        encoded([CONVERSATION], tokenizer, limit=None)


TOOLS = "{% if tools is defined and tools %}{{ tools | tojson }}\n{% endif %}{% if loud %}LOUD {% endif %}"


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_variables_reach_the_template(as_text, encoded, tokenizer, with_template):
    tokenizer = with_template(TOOLS + tokenizer.chat_template)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    given = json.dumps(tools) if as_text else tools
    plain = {"prompt": TURNS, "completion": [REPLY]}
    rows = encoded(
        [plain, plain | {"tools": given, "images": []}, plain | {"tools": [], "chat_template_kwargs": {"loud": True}}],
        tokenizer, limit=None,
    )  # fmt: skip
    assert tokenizer.decode(rows[1].ids) == tokenizer.apply_chat_template([*TURNS, REPLY], tools=tools, tokenize=False)
    assert tokenizer.decode(rows[2].ids) == "LOUD " + tokenizer.decode(rows[0].ids)
    assert [tokenizer.decode(row.scored.tolist()) for row in rows] == ["Rome<|im_end|>\n"] * 3


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (
            {"prompt": "a", "completion": "b", "tools": [{}]},
            ValueError,
            "tools: only conversations have a chat template",
        ),
        ({"text": "a fox", "chat_template_kwargs": {"x": 1}}, ValueError, "chat_template_kwargs: only conversations"),
        (CONVERSATION | {"images": ["a.png"]}, ValueError, "images: expected text, as only text is scored"),
        ({"question": "a", "answer": "b", "image": b"x"}, ValueError, "image: expected text, as only text is"),
        (CONVERSATION | {"tools": "nonsense"}, TypeError, "tools: expected a list of tools or its JSON"),
        (CONVERSATION | {"tools": {"a": 1}}, TypeError, "tools: expected a list of tools, got dict"),
        (CONVERSATION | {"chat_template_kwargs": [1]}, TypeError, "expected a mapping of template var"),
        (
            CONVERSATION | {"chat_template_kwargs": {"add_generation_prompt": True}},
            ValueError,
            "chat_template_kwargs: 'add_generation_prompt' is set by acqcore",
        ),
    ],
)
def test_what_would_change_the_text_is_never_dropped(sample, error, message, encoded):
    with pytest.raises(error, match=re.escape(message)):
        encoded([sample], limit=None)
