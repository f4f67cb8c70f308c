"""The interface of a domain: how its questions are loaded, requested, parsed, checked, answered and compared."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from acqsynth import checks
from acqsynth.parsing import SURROGATE, fields

Messages = list[dict[str, str]]  #: chat turns, each ``{"role", "content"}``
Row = Mapping[str, Any]  #: row of a data set

SUFFIXES = (".jsonl", ".csv", ".parquet")  #: suffixes of local files
_ANSWER = r"(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is\b|\s*:)"
# A later sentence that states an answer again, "Wait, no, the answer is 6.", but not "The answer is clear." or "If the
# answer is 6": what follows must not begin with a word in lower case.
_AGAIN = (
    rf"[.?!;]\s+(?:\w+[,:]\s+)*(?:so\s+|thus\s+|hence\s+|therefore\s+)?{_ANSWER}\s*+:?+\s*+"
    r"(?:(?:yes|no|maybe)\b|(?-i:(?![a-z]{2}|a\s)))"
)
#: A final answer stated in words, up to the end of its line or to the next such sentence.
STATED = re.compile(
    rf"(?<![/\w])answer(?:\s+is\b\s*+:?+|\s*+:)[\s*]*+(?!{_ANSWER})"
    rf"(?=[^\n]*[0-9A-Za-z\xa1-\u1fff\u2070-\U0010ffff])((?:(?!{_AGAIN})[^\n])++)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Sample:
    """A question with its answer: a seed row or a generated sample.

    Raises:
        TypeError: question, answer or reasoning is not a string.
    """

    question: str
    answer: str
    reasoning: str = ""
    #: read only by its domain: options of a choice, tests and entry point of a program, the skill
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("question", "answer", "reasoning"):
            if not isinstance(value := getattr(self, name), str):
                raise TypeError(f"{name}: expected a string, got {value!r:.60}")


@dataclass(frozen=True)
class Layout:
    """The columns of a data set, and the function that reads a row as a sample.

    ``read`` returns None for an intact row without a final answer (a proof); such rows are skipped. It raises
    ValueError, naming the column, for a broken row.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], Sample | None]
    optional: tuple[str, ...] = ()  #: columns that are read if present


def pair(row: Row) -> Sample:
    """The sample of the columns ``question``, ``answer`` and, if present, ``reasoning``."""
    return Sample(text(row, "question"), text(row, "answer"), optional(row, "reasoning"))


def written(sample: Sample, end: str = "\n") -> str:
    """A sample in the format of ``acqsynth.parsing``; ``end`` separates tags and fields."""
    parts = {"question": sample.question, "reasoning": sample.reasoning, "answer": sample.answer}
    return end.join(f"<{tag}>{end}{part}{end}</{tag}>" for tag, part in parts.items() if part)


def ask_for_sample(task: str, answer: str, shown: Sequence[Sample]) -> Messages:
    """A single user turn that asks for one new sample.

    Args:
        task: the text to write, as a noun phrase with its article.
        answer: the placeholder between the answer tags.
        shown: examples of format and difficulty; may be empty.
    """
    lines = [f"Write {task}, with its solution."]
    if shown:
        count = "This is an example" if len(shown) == 1 else f"These are {len(shown)} examples"
        lines.append(f"{count}, for the format and the difficulty:")
        lines += [written(sample) for sample in shown]
        lines.append("Yours is about as hard, asks for something else, and can be answered without them.")
    lines.append(
        "Write exactly these three parts and nothing else:\n"
        "<question>\nthe whole question, which does not give its answer away\n</question>\n"
        "<reasoning>\nthe steps from the question to the answer\n</reasoning>\n"
        f"<answer>\n{answer}\n</answer>"
    )
    return [{"role": "user", "content": "\n\n".join(lines)}]


class Domain(ABC):
    """A field of questions: one file, one class, no model."""

    name: ClassVar[str]
    #: maximum tokens of a student's answer
    answer_tokens: ClassVar[int] = 512
    #: whether :meth:`verify` can confirm an answer; by default, whether the domain overrides it
    proves: ClassVar[bool] = False
    #: for :meth:`load`, which uses the first with all columns present
    layouts: ClassVar[Sequence[Layout]] = (Layout(("question", "answer"), pair, ("reasoning",)),)
    class_names: ClassVar[bool] = False  #: read the classes of a hub data set by name, not by number

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "verify" in cls.__dict__ and "proves" not in cls.__dict__:
            cls.proves = True

    @abstractmethod
    def generator_prompt(self, shown: Sequence[Sample]) -> Messages:
        """Asks a generator for one new sample in the format of ``acqsynth.parsing``, with ``shown`` as examples."""

    def with_seeds(self, seeds: Sequence[Sample]) -> Domain:
        """The domain completed by its seed rows: a classification takes its labels from them."""
        return self

    def hands(self, seeds: Sequence[Sample]) -> list[list[Sample]]:
        """The seeds in groups; each prompt shows seeds from one group."""
        return [list(seeds)]

    def request(self, shown: Sequence[Sample]) -> Messages:
        """Asks a generator for one new sample, with ``shown`` as earlier turns of the chat."""
        return self.generator_prompt([])

    def tagged(self, sample: Sample) -> str:
        """The sample as a generator writes it, read back by :meth:`parse`."""
        return written(sample)

    @abstractmethod
    def student_prompt(self, question: str) -> Messages:
        """Asks a student the question, in training and evaluation alike."""

    @abstractmethod
    def answer_of(self, completion: str) -> str | None:
        """The final answer in a student's completion, verbatim; None without one."""

    @abstractmethod
    def canonical(self, answer: str) -> str:
        """A form in which equal answers are equal strings, as far as cheap rules can tell."""

    def equivalent(self, gold: Sequence[Sample], answers: Sequence[str | None]) -> list[bool]:
        """Whether each of n answers is right for its sample; None is wrong. A call takes many answers so that they can
        be checked in parallel. By default, compares canonical forms."""
        return [
            answer is not None and self.canonical(answer) == self.canonical(sample.answer)
            for sample, answer in zip(gold, answers, strict=True)
        ]

    def load(
        self, source: str, split: str = "train", columns: Mapping[str, str] | None = None, limit: int | None = None
    ) -> list[Sample]:
        """Rows of a hub data set or a local jsonl, csv or parquet file, in file order.

        Args:
            source: a hub id (``openai/gsm8k:main`` names a configuration after the colon), or a path.
            split: split of a hub data set; ignored for local files.
            columns: sample field -> data column; by default the columns of the data sets that the domain knows.
            limit: maximum number of rows, from the first.

        Raises:
            FileNotFoundError: no such local file. ValueError: a column is missing (the message lists those present), a
                row cannot be read (the message gives its number), or there are no rows.
        """
        if limit is not None:
            checks.positive_int("limit", limit)
        columns = columns or {}
        layout: Layout | None = None
        found: list[Sample] = []
        number = 0
        for number, row in rows(source, split, self.class_names):
            renamed = _renamed(row, columns)
            if layout is None:
                if unknown := [column for column in columns.values() if column not in row]:
                    raise ValueError(f"columns: no {_listed(unknown)} in {source}, which has {_listed(row)}")
                layout = _layout(source, renamed, self.layouts)
                known = (*layout.columns, *layout.optional)
                if unknown := [name for name in columns if name not in known]:
                    raise ValueError(f"columns: unknown field {_listed(unknown)}, expected some of {_listed(known)}")
            if missing := [column for column in layout.columns if column not in renamed]:
                raise ValueError(f"{source}: row {number}: no {_listed(missing)}, only {_listed(row)}")
            try:
                sample = layout.read(renamed)
            except ValueError as error:
                raise ValueError(f"{source}: row {number}: {error}") from None
            if sample is not None:
                found.append(sample)
            if len(found) == limit:
                break
        if not found:
            raise ValueError(f"{source}: {f'none of {number} rows has a final answer' if number else 'no rows'}")
        return found

    def parse(self, text: str) -> Sample | None:
        """The sample a generator wrote, or None if the format is broken."""
        found = fields(text)
        if found is None:
            return None
        return Sample(found["question"], found["answer"], found.get("reasoning", ""))

    def solution(self, sample: Sample) -> str:
        """The completion a student learns for the sample, read back by :meth:`answer_of`: the reasoning, and the answer
        unless the reasoning ends with it."""
        if self.answer_of(sample.reasoning) == sample.answer:
            return sample.reasoning
        return "\n".join(part for part in (sample.reasoning, self.stated(sample.answer)) if part)

    def stated(self, answer: str) -> str:
        """An answer as a solution states it."""
        return answer

    def labelled(self, sample: Sample, answer: str, reasoning: str) -> Sample:
        """The sample with a student's answer and reasoning instead of its own."""
        return replace(sample, answer=answer, reasoning=reasoning)

    def fault(self, sample: Sample) -> str | None:
        """A short reason why a parsed sample is not a question of this domain, or None if nothing is wrong."""
        return None

    def require(self) -> None:  # noqa: B027  (most domains need nothing)
        """Raises RuntimeError if a program or package that checks answers is missing on this machine."""

    def verify(self, samples: Sequence[Sample]) -> list[bool | None]:
        """Whether each sample's own answer is right; None if the domain cannot tell."""
        return [None] * len(samples)

    def computed(self, samples: Sequence[Sample], seed: int) -> list[Sample | None]:
        """The samples with answers computed by the domain instead of their own, or drawn at random with ``seed``; None
        where it cannot."""
        return [None] * len(samples)


# --- rows of a data set ---------------------------------------------------------------------------------------------


def rows(source: str, split: str = "train", class_names: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its number, from 1. Local files are read lazily, so lines beyond a ``limit`` are not read.

    Args:
        source, split: as in ``Domain.load``.
        class_names: return the names of a hub data set's classes instead of their numbers, None for unlabelled rows.

    Raises:
        FileNotFoundError: no such local file, or (from ``datasets``) no such data set.
        ValueError: an unreadable row, an invalid parquet file, or an unknown suffix.
    """
    if not is_local(source):
        return _hub(source, split, class_names)
    path = Path(source).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{source}: expected a file that ends in {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    return _file(source, path)


def is_local(source: str) -> bool:
    """Whether a source is a path rather than a hub id."""
    path = Path(source).expanduser()
    return path.suffix in SUFFIXES or source.startswith(("/", ".", "~")) or path.is_file()


def text(row: Row, column: str) -> str:
    """The stripped text of a column, with plain line ends; ValueError if it is missing, empty or not text."""
    value = row.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf:
        value = str(value)  # a csv file does not distinguish 5 from "5"
    if not isinstance(value, str) or not value.strip() or SURROGATE.search(value):
        encoded = " in UTF-8" if isinstance(value, str) and value.strip() else ""
        raise ValueError(f"{column}: expected text{encoded}, got {value!r:.60}")
    return value.replace("\r\n", "\n").strip()


def optional(row: Row, column: str) -> str:
    """The text of a column, empty if the row has none."""
    return text(row, column) if row.get(column) else ""


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with the names that layouts know; an unmapped column keeps its name unless a mapped one takes it."""
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return {**kept, **{field: row[column] for field, column in columns.items() if column in row}}


def _layout(source: str, row: Row, layouts: Sequence[Layout]) -> Layout:
    for layout in layouts:
        if row.keys() >= set(layout.columns):
            return layout
    known = " or ".join(f"({', '.join(layout.columns)})" for layout in layouts)
    raise ValueError(f"{source}: expected the columns {known}, found {_listed(sorted(row))}")


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))


def _file(source: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import acqcore

    try:
        for record in acqcore.records(path):
            if record.error is not None:
                raise ValueError(f"row {record.line}: {record.error}")
            yield record.line, record.values
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        raise ValueError(message if str(path) in message else f"{source}: {message}") from None


def _hub(source: str, split: str, class_names: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    name, _, configuration = source.partition(":")
    found = datasets.load_dataset(name, configuration or None, split=split)
    features = found.features if class_names else {}
    kinds = {column: kind for column, kind in features.items() if hasattr(kind, "int2str")}
    for number, row in enumerate(found, 1):
        # -1 marks unlabelled rows.
        names = {
            column: None if row[column] in (None, -1) else kind.int2str(row[column]) for column, kind in kinds.items()
        }
        yield number, {**row, **names}
