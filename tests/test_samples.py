"""Samples of every kind are encoded as the ids the model would see and the positions to score."""

from __future__ import annotations

import copy
import json
import re
from decimal import Decimal
from typing import Any, ClassVar

import numpy
import pytest
import torch
from tokenizers import normalizers

from acqcore.students.samples import Row


def assert_same(rows: list[Row], expected: list[Row]) -> None:
    for row, other in zip(rows, expected, strict=True):
        assert row.ids.tolist() == other.ids.tolist()
        assert row.targets.tolist() == other.targets.tolist()


class Slow:
    """Wraps ``fast`` to look like a tokenizer written in Python, which gives no offsets."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.fast = fast
        self.chat_template = fast.chat_template
        self.apply_chat_template = fast.apply_chat_template

    def __call__(self, texts: list[str], **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self.fast(texts, **options)


@pytest.fixture(params=["offsets", "prefix"])
def any_tokenizer(request, tokenizer):
    return tokenizer if request.param == "offsets" else Slow(tokenizer)


class TestText:
    @pytest.mark.parametrize("wrap", [lambda text: text, lambda text: {"text": text}])
    def test_every_token_with_a_predecessor(self, wrap, encoded, any_tokenizer):
        text = "The quick brown fox, naïve 🙂 日本"
        (row,) = encoded([wrap(text)], any_tokenizer)
        ids = any_tokenizer([text])["input_ids"][0]
        assert row.ids.tolist() == ids
        assert row.targets.tolist() == [-100, *ids[1:]]


class TestPromptAndCompletion:
    def test_only_the_completion_is_scored(self, encoded, any_tokenizer):
        prompt, completion = "What is 2 + 3?", " The answer is 5."
        (row,) = encoded([{"prompt": prompt, "completion": completion}], any_tokenizer)
        assert row.ids.tolist() == any_tokenizer([prompt + completion])["input_ids"][0]
        assert row.scored.tolist() == any_tokenizer([completion])["input_ids"][0]

    def test_a_token_across_the_boundary_is_scored(self, encoded, any_tokenizer, tokenizer):
        whole = tokenizer("What is").input_ids
        assert tokenizer.decode(whole[-1:]) == " is"
        (row,) = encoded([{"prompt": "What i", "completion": "s"}], any_tokenizer)
        assert row.ids.tolist() == whole
        assert row.scored.tolist() == whole[-1:]

    def test_bytes_of_one_character_stay_together(self, encoded, any_tokenizer):
        (row,) = encoded([{"prompt": "a 語", "completion": "界!"}], any_tokenizer)
        assert row.scored.tolist() == any_tokenizer(["界!"])["input_ids"][0]

    def test_without_a_prompt_the_first_token_is_context(self, encoded, any_tokenizer):
        (row,) = encoded([{"prompt": "", "completion": "a lazy fox"}], any_tokenizer)
        assert row.scored.tolist() == row.ids[1:].tolist()

    def test_conversations(self, encoded, any_tokenizer, tokenizer):
        prompt = [{"role": "user", "content": "a fox?"}]
        completion = [{"role": "assistant", "content": "a dog."}]
        (row,) = encoded([{"prompt": prompt, "completion": completion}], any_tokenizer)
        assert tokenizer.decode(row.scored.tolist()) == "a dog.<|im_end|>\n"
        assert_same([row], encoded([{"messages": prompt + completion}], any_tokenizer))


def test_the_last_turn_of_a_conversation_is_scored(encoded, any_tokenizer, tokenizer):
    messages = [
        {"role": "system", "content": "help"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "so?"},
        {"role": "assistant", "content": "so."},
    ]
    (row,) = encoded([{"messages": messages}], any_tokenizer, limit=None)
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(row.scored.tolist()) == "so.<|im_end|>\n"


class TestTensors:
    IDS = ((5, 6, 7, 8), (9, 10, 11))

    def padded(self, side: str) -> dict[str, torch.Tensor]:
        short = [9, 10, 11]
        ids = torch.tensor([self.IDS[0], [*short, 0] if side == "right" else [0, *short]])
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0] if side == "right" else [0, 1, 1, 1]])
        return {"input_ids": ids, "attention_mask": mask}

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize(
        "positions",
        [
            lambda mask: (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 1),
            lambda mask: torch.arange(mask.shape[1]),
            lambda mask: torch.arange(mask.shape[1])[None] + 2,
            lambda mask: torch.arange(mask.shape[1]).expand(3, *mask.shape),
        ],
    )
    def test_padding_on_any_side(self, side, positions, encoded):
        samples = self.padded(side)
        samples["position_ids"] = positions(samples["attention_mask"])
        others = {"token_type_ids": samples["attention_mask"], "pixel_values": None, "advantages": torch.ones(2, 4)}
        rows = encoded({**samples, **others}, None)
        assert [tuple(row.ids.tolist()) for row in rows] == list(self.IDS)
        assert [row.targets.tolist() for row in rows] == [[-100, 6, 7, 8], [-100, 10, 11]]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_labels_are_aligned_with_ids(self, side, encoded):
        samples = self.padded(side)
        labels = samples["input_ids"].masked_fill(samples["attention_mask"] == 0, -100)
        labels[0, 2] = -100
        rows = encoded({**samples, "labels": labels}, None)
        assert [row.targets.tolist() for row in rows] == [[-100, 6, -100, 8], [-100, 10, 11]]

    @pytest.mark.parametrize("key", ["completion_mask", "assistant_masks"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_masks_confine_what_is_scored(self, side, key, encoded):
        samples = self.padded(side)
        rows = encoded({**samples, key: (samples["input_ids"] % 4 < 3).long()}, None)
        assert [row.targets.tolist() for row in rows] == [[-100, 6, -100, 8], [-100, 10, -100]]

    def test_without_a_mask_all_is_real(self, encoded):
        (row,) = encoded({"input_ids": torch.tensor([[4, 0, 0]], dtype=torch.int32)}, None)
        assert row.targets.tolist() == [-100, 0, 0]
        assert row.ids.dtype == torch.int64

    @pytest.mark.parametrize(
        ("samples", "error", "message"),
        [
            ({"ids": torch.ones(1, 2)}, TypeError, 'with "input_ids", or of columns such as "text", got keys \'ids\''),
            ({"input_ids": [[1, 2]]}, TypeError, 'samples["input_ids"]: expected an integer tensor [B, T], got list'),
            ({"input_ids": torch.ones(2, 3)}, TypeError, "expected an integer tensor [B, T], got float32 tensor"),
            ({"input_ids": torch.ones(3, dtype=torch.int64)}, ValueError, "expected shape [B, T], got int64 tensor"),
            (
                {"input_ids": torch.ones(1, 3, dtype=torch.int64), "labels": torch.ones(1, 2, dtype=torch.int64)},
                ValueError,
                'samples["labels"]: expected [1, 3] as input_ids, got int64 tensor of shape [1, 2]',
            ),
            (
                {"input_ids": torch.tensor([[1, 2], [3, 320]])},
                ValueError,
                "samples[1]: token id 320 is outside the student's vocabulary of 320",
            ),
            *(
                (
                    {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.tensor([mask])},
                    ValueError,
                    'samples["attention_mask"]: expected 1 for real tokens and 0 for padding, got an additive mask or',
                )
                for mask in ([0.0, -1e9], [0, -10000], [1, 2])
            ),
            (
                {"input_ids": torch.ones(1, 4).long(), "position_ids": torch.tensor([[0, 1, 0, 1]])},
                ValueError,
                'samples["position_ids"]: expected consecutive positions in each row, got others; put each packed',
            ),
            *(
                ({"input_ids": torch.ones(1, 4).long(), key: value}, ValueError, f'samples["{key}"]: {message}')
                for key, value, message in (
                    ("pixel_values", torch.ones(1, 3, 8, 8), "expected token ids alone"),
                    ("token_weights", torch.ones(1, 4), "expected labels, -100 at tokens that are not scored"),
                    ("loss_mask", torch.ones(1, 4), "expected labels, -100 at tokens that are not scored"),
                    ("completion_mask", torch.ones(1, 3).long(), "expected [1, 4] as input_ids, got int64"),
                    ("cu_seq_lens_q", torch.tensor([0, 2, 4]), "expected token ids alone"),
                    ("position_ids", torch.arange(3), "expected [1, 4] as input_ids, got int64 tensor of shape [3]"),
                )
            ),
            *(
                (
                    {"input_ids": torch.ones(2, 3).long(), "labels": torch.tensor([[1, 1, 1], [1, label, 1]])},
                    ValueError,
                    f"samples[1]: label {label} is outside the student's vocabulary of 320; expected -100 where not",
                )
                for label in (-1, 320)
            ),
            (
                {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, -100]])},
                ValueError,
                "samples[0]: nothing to score",
            ),
        ],
    )
    def test_bad_tensors(self, samples, error, message, encoded):
        with pytest.raises(error, match=re.escape(message)):
            encoded(samples, None)


class TestLength:
    TEXT = "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog."

    def test_over_the_limit(self, encoded, tokenizer):
        n = len(tokenizer(self.TEXT).input_ids)
        with pytest.raises(ValueError, match=rf"samples\[1\]: {n} tokens, the student takes at most 6; max_length"):
            encoded(["a fox", self.TEXT], limit=6)
        assert len(encoded([self.TEXT], limit=n)) == 1

    def test_plain_text_keeps_its_beginning(self, encoded):
        (whole,) = encoded([self.TEXT])
        (cut,) = encoded([self.TEXT], max_length=5)
        assert cut.ids.tolist() == whole.ids[:5].tolist()
        assert cut.targets.tolist() == whole.targets[:5].tolist()

    def test_the_prompt_goes_first_from_its_beginning(self, encoded, tokenizer):
        sample = {"prompt": self.TEXT, "completion": " What is 2 + 3?"}
        n = len(tokenizer(sample["completion"]).input_ids)
        (whole,) = encoded([sample])
        (cut,) = encoded([sample], max_length=n + 3)
        assert cut.ids.tolist() == whole.ids[-n - 3 :].tolist()
        assert cut.scored.tolist() == whole.scored.tolist()
        (cut,) = encoded([sample], max_length=n - 1)
        assert cut.ids.tolist() == whole.ids[-n - 1 : -2].tolist()  # one prompt token is kept to predict from
        assert cut.scored.tolist() == whole.scored.tolist()[: n - 2]

    def test_bad_max_length(self, encoded):
        with pytest.raises(ValueError, match="max_length: expected at least 2"):
            encoded(["a fox"], max_length=1)
        with pytest.raises(ValueError, match="max_length: the student takes at most 64 tokens, got 65"):
            encoded(["a fox"], max_length=65)
        with pytest.raises(TypeError, match="max_length: expected an int, got float"):
            encoded(["a fox"], max_length=8.0)


USER = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
BAD_SAMPLES = [
    (["ok then", ""], ValueError, "samples[1]: nothing to score, expected at least one scored token"),
    (["a"], ValueError, "samples[0]: nothing to score"),
    ([{"prompt": "a", "completion": ""}], ValueError, "samples[0]: the completion is empty"),
    ([{"prompt": [USER], "completion": []}], ValueError, "samples[0]: the completion is empty"),
    *(
        ([{"messages": [USER, {"role": "assistant", **reply}]}], ValueError, "samples[0]: the completion is empty")
        for reply in (
            {"content": [{"type": "text", "text": ""}]},
            {"tool_calls": "f()"},
            {"tool_calls": [None]},
            {"tool_calls": {"function": {"name": "f"}}},
            {"tool_calls": [{"function": {}}], "content": None},
        )
    ),
    ([{"messages": [USER]}], ValueError, "expected the assistant's turn last (it is scored), got 'user'"),
    ([{"messages": []}], ValueError, "expected the assistant's turn last (it is scored), got no message"),
    ([{"messages": [{"role": "assistant", "content": "a"}]}], ValueError, "samples[0]: expected a message before"),
    (
        [{"messages": [{"role": "tool", "content": "1"}, {"role": "assistant", "content": "a"}]}],
        ValueError,
        "samples[0]: the chat template rejects it: no tools here",
    ),
    ([{"messages": "hi"}], TypeError, "samples[0]: messages: expected a list of messages, got str"),
    ([{"messages": [{"role": "user"}]}], TypeError, '"role" and "content" (or "tool_calls"), got dict'),
    ([{"prompt": "a", "completion": [USER]}], TypeError, "samples[0]: completion: expected a string, got list"),
    ([{"prompt": [USER], "completion": "a"}], TypeError, "completion: expected a list of messages, got str"),
    (
        [{"prompt": {"role": "user"}, "completion": "a"}],
        TypeError,
        "prompt: expected a string or a list of messages, got dict",
    ),
    ([{"text": True}], TypeError, "samples[0]: text: expected a string, got bool"),
    ([{"text": None}], TypeError, "samples[0]: text: expected a string, got no value"),
    ([{"text": float("nan")}], TypeError, "samples[0]: text: expected a string, got no value"),
    ([{"text": 10**5000}], ValueError, "samples[0]: text: Exceeds the limit"),
    ([{"messages": [{"role": "user", "content": -(10**5000)}]}], ValueError, "samples[0]: messages: Exceeds the limit"),
    ([{"text": Decimal("sNaN")}], TypeError, "samples[0]: text: expected a string, got Decimal"),
    ([{"question": "a"}], TypeError, "got a mapping with keys 'question'"),
    ({"text": "a fox"}, TypeError, "a list of values in column 'text', got str; wrap a single sample in a list"),
    ({"question": ["a"], "answer": ["b", "c"]}, ValueError, "samples: expected columns of one length"),
    ([3], TypeError, "samples[0]: expected strings, mappings with"),
    (["a fox", {"text": "a fox"}], TypeError, "samples[1]: expected a string as in the samples before it, got text"),
    ("a fox", TypeError, "samples: expected a list of strings"),
    (iter(["a fox"]), TypeError, "samples: expected a list of strings"),
]


@pytest.mark.parametrize(("samples", "error", "message"), BAD_SAMPLES)
def test_bad_samples(samples, error, message, encoded):
    with pytest.raises(error, match=re.escape(message)):
        encoded(samples)


def test_a_text_without_tokens_has_nothing_to_score(encoded, tokenizer):
    stripping = copy.deepcopy(tokenizer)
    stripping.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(ValueError, match=r"samples\[1\]: nothing to score"):
        encoded(["a fox", " "], stripping)


def test_bad_tokenizers(encoded, tokenizer, with_template):
    with pytest.raises(TypeError, match="tokenizer: text samples require one, got none"):
        encoded(["a fox"], None)
    with pytest.raises(TypeError, match="tokenizer: expected a transformers tokenizer, got Tokenizer"):
        encoded(["a fox"], tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="tokenizer: messages require a chat template, this tokenizer has none"):
        encoded([{"messages": [USER, YES]}], with_template(None))


def test_errors_are_collected_where_asked(encoded):
    errors: dict[int, str] = {}
    samples = ["a fox", "", 3, "The dog", {"text": "a fox"}, "fox " * 80]
    rows = encoded(samples, errors=errors)
    assert [row.n_scored > 0 for row in rows] == [True, False, False, True, False, False]
    assert sorted(errors) == [1, 2, 4, 5]
    assert errors[1].startswith("nothing to score")
    assert errors[5].endswith("the student takes at most 64; max_length= truncates")


def test_a_label_outside_the_vocabulary_costs_its_sample_only(encoded):
    errors: dict[int, str] = {}
    labels = torch.tensor([[5000, 1, 319], [-100, -100, 5000], [0, -100, 2]])  # nothing predicts the first token
    rows = encoded({"input_ids": torch.ones(3, 3).long(), "labels": labels}, None, errors=errors)
    assert [row.n_scored for row in rows] == [2, 0, 1]
    assert list(errors) == [1]


class TestRowsOfAnySource:
    """A list, a table and a mapping of columns give the same rows."""

    ROWS = ({"question": "What is 2 + 3?", "answer": 5, "id": 1}, {"question": "a fox", "answer": 12, "id": 2})

    SOURCES: ClassVar = {
        "columns": lambda columns: columns,
        "numpy": lambda columns: {key: numpy.array(values) for key, values in columns.items()},
        "arrow": lambda columns: pytest.importorskip("pyarrow").table(columns),
        "pandas": lambda columns: pytest.importorskip("pandas").DataFrame(columns),
        "polars": lambda columns: pytest.importorskip("polars").DataFrame(columns),
        "datasets": lambda columns: pytest.importorskip("datasets").Dataset.from_dict(columns),
        "tensors": lambda columns: pytest.importorskip("datasets").Dataset.from_dict(columns).with_format("torch"),
        "list": lambda columns: [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
    }

    @pytest.mark.parametrize("source", SOURCES)
    def test_question_and_answer(self, source, encoded):
        """Numbers are read as text; other columns are ignored."""
        columns = {key: [row[key] for row in self.ROWS] for key in self.ROWS[0]}
        expected = encoded([{"prompt": row["question"], "completion": str(row["answer"])} for row in self.ROWS])
        assert_same(encoded(self.SOURCES[source](columns)), expected)
        if source == "datasets":
            data = self.SOURCES[source](columns)
            data.map(lambda batch: assert_same(encoded(batch), expected), batched=True)
            with pytest.raises(TypeError, match=r"expected columns prompt and completion, or messages, .* got id"):
                encoded(data.select_columns(["id"]))

    @pytest.mark.parametrize("source", ["arrow", "pandas", "datasets"])
    def test_messages_of_a_table(self, source, encoded, tmp_path):
        """Covers nulls in a table's structs and the arrays that pandas returns."""
        turn = [{"role": "user", "content": "hi", "name": "x"}, {"role": "assistant", "content": "yes"}]
        other = [{"role": "user", "content": "a fox?"}, {"role": "assistant", "content": "no"}]
        parquet = pytest.importorskip("pyarrow.parquet")
        arrow = pytest.importorskip("pyarrow")
        table = arrow.table({"messages": [turn, other]})
        parquet.write_table(table, tmp_path / "rows.parquet")
        if source == "pandas":
            table = pytest.importorskip("pandas").read_parquet(tmp_path / "rows.parquet")
        elif source == "datasets":
            table = pytest.importorskip("datasets").Dataset(table)
        assert_same(encoded(table), encoded([{"messages": turn}, {"messages": other}]))

    @pytest.mark.parametrize("source", ["arrow", "pandas", "polars", "datasets"])
    def test_keys_that_only_some_rows_have(self, source, encoded, tokenizer, with_template):
        """A table fills them with nulls, at any depth, which must not reach the chat template."""
        beside = "{% for x in [tools, loud, messages[1].tool_calls] %}{% if x %}{{ x | tojson }}{% endif %}{% endfor %}"
        tokenizer = with_template(beside + tokenizer.chat_template)

        def call(**arguments):
            calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
            return [USER, YES | {"tool_calls": calls}, USER, YES]

        def tool(*names, **more):
            properties = {name: {"type": "string"} for name in names}
            return [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}, **more}}]

        columns: dict[str, list[Any]] = {
            "messages": [call(x="a"), call(city="Rome"), [USER, YES, USER, YES]],
            "tools": [tool("x"), tool("city", strict=True), None],
            "chat_template_kwargs": [{"loud": {"very": "a"}}, None, {"quiet": "b"}],
        }
        rows = [{key: values[i] for key, values in columns.items() if values[i]} for i in range(3)]
        expected = encoded(rows, tokenizer, limit=None)
        text = tokenizer.decode(expected[1].ids)
        assert "strict" in text
        assert "null" not in text
        table = pytest.importorskip("pyarrow").table(columns)
        if source == "pandas":
            table = table.to_pandas()
        elif source != "arrow":
            module = pytest.importorskip(source)
            table = module.from_arrow(table) if source == "polars" else module.Dataset(table)
        assert_same(encoded(table, tokenizer, limit=None), expected)
        as_text = [row | {"tools": json.dumps(row["tools"][:1])} if "tools" in row else row for row in rows]
        assert_same(encoded(as_text, tokenizer, limit=None), expected)

    def test_a_frame_has_nan_where_a_value_is_missing(self, encoded):
        pandas = pytest.importorskip("pandas")
        rows = [
            {"messages": [USER, YES], "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}},
            {"messages": [USER, YES]},
        ]
        frame = pandas.DataFrame(rows)
        assert_same(encoded(frame), encoded(rows))
        assert_same(encoded(frame.to_dict("records")), encoded(rows))
        texts = pandas.DataFrame([{"text": "a fox", "tools": float("nan")}])
        assert_same(encoded(texts), encoded(["a fox"]))
        for missing in (pandas.NA, pandas.NaT):
            texts = pandas.DataFrame({"text": ["a fox"], "image": [missing], "chat_template_kwargs": [missing]})
            assert_same(encoded(texts), encoded(["a fox"]))

    @pytest.mark.parametrize("kind", ["numpy", "tuple", "pandas", "polars", "pyarrow"])
    def test_a_column_of_strings(self, kind, encoded):
        values: Any = ("a fox", "the dog")
        if kind in ("pandas", "polars"):
            values = pytest.importorskip(kind).Series(values)
        elif kind == "pyarrow":
            values = pytest.importorskip(kind).chunked_array([[text] for text in values])
        elif kind == "numpy":
            values = numpy.array(values)
        assert_same(encoded(values), encoded(["a fox", "the dog"]))


class TestOneBadRow:
    """A bad row is reported and does not affect other rows."""

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ("c \ud83d d", "text: character 2 is the lone surrogate U+D83D, half a surrogate pair or"),
            ("\udcff", "text: character 0 is the lone surrogate U+DCFF"),
            (["a"], "text: expected a string, got list"),
            ([USER | {"content": "hi \udc00"}, YES], "messages: character"),
            ([USER | {"content": [{"type": "image", "url": "x"}]}, YES], "got parts ['image']"),
            ([USER, {"role": "assistant"}], 'expected messages with "role" and "content"'),
            ([{"role": 3, "content": "hi"}, YES], 'expected messages with "role" and "content"'),
            ([{"content": "hi"}, YES], 'expected messages with "role" and "content"'),
        ],
    )
    def test_texts_and_conversations(self, bad, message, encoded):
        turns = isinstance(bad, list) and isinstance(bad[0], dict)
        good, key = ([USER, YES], "messages") if turns else ("a fox", "text")
        samples = [{key: good}, {key: bad}, {key: good}]
        errors: dict[int, str] = {}
        rows = encoded(samples, errors=errors)
        assert list(errors) == [1]
        assert message in errors[1]
        assert [row.n_scored > 0 for row in rows] == [True, False, True]
        with pytest.raises((ValueError, TypeError), match=re.escape("samples[1]: ")):
            encoded(samples)

    def test_a_tokenizer_that_refuses_one_text(self, encoded, tokenizer):
        class Picky(Slow):
            def __call__(self, texts, **options):
                if any("dog" in text for text in texts):
                    raise RuntimeError("no dogs")
                return self.fast(texts, **options)

        errors: dict[int, str] = {}
        rows = encoded(["a fox", "the dog", "2 + 3"], Picky(tokenizer), errors=errors)
        assert errors == {1: "the tokenizer rejects it: RuntimeError: no dogs"}
        assert [row.n_scored > 0 for row in rows] == [True, False, True]
        with pytest.raises(ValueError, match=r"samples\[1\]: the tokenizer rejects it: RuntimeError: no dogs"):
            encoded(["a fox", "the dog"], Picky(tokenizer))


def test_no_samples(encoded):
    assert encoded([]) == []


def test_rows_are_samples(encoded):
    rows = encoded(["a quick fox", "2 + 3 = 5"])
    assert encoded(rows, None) == rows
    (cut,) = encoded(rows[:1], None, max_length=3)
    assert cut.ids.tolist() == rows[0].ids[:3].tolist()
    with pytest.raises(ValueError, match=r"samples\[0\]: \d+ tokens, the student takes at most 2"):
        encoded(rows, None, limit=2)
    with pytest.raises(TypeError, match=r"samples\[0\]: expected strings, .*, got Row"):
        encoded([rows[0], "a quick fox"])


@pytest.mark.parametrize(
    ("ids", "targets", "error", "message"),
    [
        ([5, 6], [5, 6], ValueError, "targets: expected -100 at the first token, which none predicts"),
        ([5, 6], [-100, 6, 7], ValueError, r"ids, targets: expected \[T\] each, got \[2\] and \[3\]"),
        ([[5, 6]], [[-100, 6]], ValueError, r"ids, targets: expected \[T\] each, got \[1, 2\] and \[1, 2\]"),
        ([5.0, 6.0], [-100, 6], TypeError, r"ids: expected an int64 tensor \[T\], got float32"),
    ],
)
def test_a_row_is_checked_when_made(ids, targets, error, message):
    """A target at the first token would be scored by the last token of the sample before it in the batch."""
    with pytest.raises(error, match=message):
        Row(torch.tensor(ids), torch.tensor(targets))


class TestSpecialTokensOnce:
    """Special tokens before and after a text are added only where the text does not contain them already."""

    @pytest.mark.parametrize("written", ["a fox", "<|bos|>a fox", "a fox<|eos|>", "<|bos|>a fox<|eos|>"])
    def test_of_a_text(self, written, encoded, with_template, tokenizer):
        bare = tokenizer("a fox").input_ids
        (row,) = encoded([written], with_template(adds=True))
        assert row.ids.tolist() == [1, *bare, 2]
        assert row.targets.tolist() == [-100, *bare, 2]

    @pytest.mark.parametrize("prompt", ["a", "<|bos|>a"])
    def test_of_a_prompt(self, prompt, encoded, with_template, tokenizer):
        (row,) = encoded([{"prompt": prompt, "completion": " fox"}], with_template(adds=True))
        assert row.ids.tolist() == [1, *tokenizer("a fox").input_ids, 2]
        assert row.scored.tolist() == [*tokenizer(" fox").input_ids, 2]

    def test_conversations_have_those_of_the_template(self, encoded, with_template):
        (row,) = encoded([{"messages": [USER, YES]}], with_template(adds=True))
        assert 1 not in row.ids

    def test_those_that_are_meant_stay(self, encoded, tokenizer):
        (row,) = encoded(["<|bos|><|bos|>a fox"])
        assert row.ids.tolist()[:2] == [1, 1]  # no token was added
