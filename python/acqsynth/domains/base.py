"""The interface of a domain: how its questions are requested, parsed, checked, answered and compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from acqsynth.parsing import fields

Messages = list[dict[str, str]]  #: turns of a chat, each ``{"role", "content"}``


@dataclass(frozen=True)
class Sample:
    """A question with its answer: a seed row, or what a generator wrote."""

    question: str
    answer: str
    reasoning: str = ""
    #: read by its domain alone: options of a choice, tests and entry point of a program, the skill
    extra: Mapping[str, Any] = field(default_factory=dict)


def written(sample: Sample) -> str:
    """A sample in the format of ``acqsynth.parsing``."""
    parts = {"question": sample.question, "reasoning": sample.reasoning, "answer": sample.answer}
    return "\n".join(f"<{tag}>\n{part}\n</{tag}>" for tag, part in parts.items() if part)


def ask_for_sample(task: str, answer: str, shown: Sequence[Sample]) -> Messages:
    """One user's turn that asks for one new sample.

    Args:
        task: what is to be written, as a noun phrase with its article.
        answer: what stands between the answer tags.
        shown: examples, for the difficulty; may be empty.
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
    """One field of questions: one file, one class, no model."""

    name: ClassVar[str]
    #: most tokens of a student's answer
    answer_tokens: ClassVar[int] = 512
    #: whether :meth:`verify` can find an answer right; by default, whether the domain has a verify of its own
    proves: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "verify" in cls.__dict__ and "proves" not in cls.__dict__:
            cls.proves = True

    @abstractmethod
    def generator_prompt(self, shown: Sequence[Sample]) -> Messages:
        """Asks a generator for one new sample in the format of ``acqsynth.parsing``, ``shown`` as examples."""

    def with_seeds(self, seeds: Sequence[Sample]) -> Domain:
        """The domain completed by its seed rows: a classification takes its labels from them."""
        return self

    def hands(self, seeds: Sequence[Sample]) -> list[list[Sample]]:
        """The seeds in groups; a prompt shows seeds of one group."""
        return [list(seeds)]

    def request(self, shown: Sequence[Sample]) -> Messages:
        """Asks a generator for one new sample, given those shown as earlier turns of the chat."""
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
        """The form in which equal answers are equal strings, as far as cheap rules reach."""

    @abstractmethod
    def equivalent(self, gold: Sequence[Sample], answers: Sequence[str | None]) -> list[bool]:
        """Whether each of n answers is right for its sample; None is wrong. One call takes many, to run in parallel."""

    @abstractmethod
    def load(
        self,
        source: str,
        split: str = "train",
        columns: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> list[Sample]:
        """Rows of a hub data set or a local jsonl, csv or parquet file, in file order.

        Args:
            source: a hub id (``openai/gsm8k:main`` names a configuration after the colon), or a path.
            split: of a hub data set; a local file has none.
            columns: field of the sample -> column of the data; by default those of the data sets the domain knows.
            limit: most rows, from the first.

        Raises:
            FileNotFoundError: no such local file. ValueError: a column is missing (names it and those there are), a
                row cannot be read (names its number), or there are no rows.
        """

    def parse(self, text: str) -> Sample | None:
        """The sample a generator wrote, or None if the format is broken."""
        found = fields(text)
        if found is None:
            return None
        return Sample(found["question"], found["answer"], found.get("reasoning", ""))

    def solution(self, sample: Sample) -> str:
        """The completion a student learns for the sample: reasoning and answer, read back by :meth:`answer_of`."""
        return "\n".join(part for part in (sample.reasoning, sample.answer) if part)

    def fault(self, sample: Sample) -> str | None:
        """Why a parsed sample is no question of this domain, in a few words, or None if nothing is wrong."""
        return None

    def verify(self, samples: Sequence[Sample]) -> list[bool | None]:
        """Whether each sample's own answer is right; None if the domain cannot tell."""
        return [None] * len(samples)

    def computed(self, samples: Sequence[Sample], seed: int) -> list[Sample | None]:
        """The samples with answers computed by the domain instead of their own; None if it cannot.

        Args:
            seed: of answers that are random.
        """
        return [None] * len(samples)
