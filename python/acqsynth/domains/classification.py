"""Text classification: the student writes the label name of a short text.

The labels are a closed set: the answers of the seed rows (:meth:`Classification.with_seeds`). Comparison reads
underscores as spaces, so ``card_arrival`` is learnt and written as ``card arrival``, and ignores case and what stands
around a label: ``category:`` or ``the answer is``, a bullet, quotes, bold, a full stop. A generator prompt shows seeds
of one label and asks for another text with that label; without seeds, the generator chooses the label.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from acqsynth.domains.base import Domain, Layout, Messages, Row, Sample, text, written

#: The source ``intents:<name>`` is the file ``intents/<name>.jsonl`` in the folder that ACQCORE_DATA names.
INTENTS = "intents:"

_MARKER = r"(?:intent|label|category|class|topic)"
_BEFORE = re.compile(rf"^(?:[-*•] )?(?:(?:the )?(?:(?:final |correct )?answer|{_MARKER})(?: is\b ?[:：]?| ?[:：]))?")


def spoken(label: str) -> str:
    """The label with spaces for underscores: ``card arrival`` for ``card_arrival``."""
    return " ".join(label.replace("_", " ").split())


def _key(label: str) -> str:
    """The label as it is compared: accents composed, in lower case."""
    return unicodedata.normalize("NFC", spoken(label)).casefold()


def _bare(name: str) -> str:
    """The name without what a student may write around a label: a bullet, its marker, bold, quotes, a full stop."""
    plain = _BEFORE.sub("", name.replace("**", ""))
    return plain.lstrip(" \"'`*“‘").rstrip(" \"'`*”’.") or name


def _labelled(question: str, label: str) -> Sample:
    return Sample(question, label, extra={"skill": label})


def _label(row: Row, column: str) -> str:
    """The name of a label; ValueError if it is missing, empty or has several lines."""
    name = text(row, column)
    if "\n" in name:
        raise ValueError(f"{column}: expected a name of one line, got {name!r:.60}")
    return name


def _layout(question: str, label: str) -> Layout:
    def read(row: Row) -> Sample | None:
        return None if row[label] is None else _labelled(text(row, question), _label(row, label))

    return Layout((question, label), read)


class Classification(Domain):
    """Texts with a closed set of labels.

    Args:
        labels: label names; by default any name is a label.

    Raises:
        ValueError: a label is empty or has several lines, or two have the same name.
    """

    name: ClassVar[str] = "classification"
    answer_tokens: ClassVar[int] = 32
    layouts = (_layout("text", "label"), _layout("text", "intent"), _layout("question", "answer"))
    class_names: ClassVar[bool] = True

    def __init__(self, labels: Sequence[str] | None = None) -> None:
        self._labels: dict[str, str] = {}  # canonical form -> label
        for label in labels or ():
            if not label.strip() or "\n" in label.strip():
                raise ValueError(f"labels: expected names of one line, got {label!r:.60}")
            other = self._labels.setdefault(_key(label), label)
            if other != label:
                raise ValueError(f"labels: {other!r} and {label!r} are the same name")
        self._by_bare: dict[str, str] = {}  # bare name -> canonical label, "" if several labels have this bare name
        for name in self._labels:
            self._by_bare[_bare(name)] = "" if _bare(name) in self._by_bare else name

    @property
    def labels(self) -> list[str]:
        """The labels in the order given."""
        return list(self._labels.values())

    def with_seeds(self, seeds: Sequence[Sample]) -> Classification:
        return Classification(list(dict.fromkeys(seed.answer for seed in seeds)))

    def hands(self, seeds: Sequence[Sample]) -> list[list[Sample]]:
        """The seeds of each label."""
        by_label: dict[str, list[Sample]] = {}
        for seed in seeds:
            by_label.setdefault(self.canonical(seed.answer), []).append(seed)
        return list(by_label.values())

    def generator_prompt(self, shown: Sequence[Sample]) -> Messages:
        """Asks for a text with the last example's label; without examples, the generator chooses the label."""
        if not shown:
            return _asked("Write one new message, and the name of its category.", "the name of the category")
        label = spoken(shown[-1].answer)
        task = f'Write one new message of the category "{label}", unlike the examples, that does not name the category.'
        return _asked("\n\n".join([task, *map(self.tagged, shown)]), label)

    def request(self, shown: Sequence[Sample]) -> Messages:
        label = spoken(shown[-1].answer)
        return _asked(f'Write one new message of the category "{label}" that does not name the category.', label)

    def tagged(self, sample: Sample) -> str:
        return written(Sample(sample.question, spoken(sample.answer)))

    def student_prompt(self, question: str) -> Messages:
        return [{"role": "user", "content": f"{question}\n\nWhich category is this message? Write its name alone."}]

    def answer_of(self, completion: str) -> str | None:
        """The first line."""
        lines = completion.strip().splitlines()
        return lines[0].strip() if lines else None

    def canonical(self, answer: str) -> str:
        """The answer in lower case, without ``category:`` or ``the answer is`` before it or a bullet, bold, quotes and
        a full stop around it. They are kept if they belong to a label or are the only difference between labels."""
        plain = _key(answer)
        if plain in self._labels:
            return plain
        bare = _bare(plain)
        return self._by_bare.get(bare, bare) or plain

    def solution(self, sample: Sample) -> str:
        """The label alone, with spaces for underscores."""
        return spoken(sample.answer)

    def parse(self, text: str) -> Sample | None:
        """As :meth:`Domain.parse`; the answer is the label as written in the seeds, and the reasoning is dropped."""
        sample = super().parse(text)
        return sample and _labelled(sample.question, self._spelt(sample.answer))

    def labelled(self, sample: Sample, answer: str, reasoning: str) -> Sample:
        """As :meth:`Domain.labelled`; answer and skill are the label as written in the seeds, without reasoning."""
        label = self._spelt(answer)
        return replace(sample, answer=label, reasoning="", extra={**sample.extra, "skill": label})

    def fault(self, sample: Sample) -> str | None:
        if self._labels and self.canonical(sample.answer) not in self._labels:
            return "unknown label"
        return "the text names its label" if _names(sample.question, sample.answer) else None

    def _spelt(self, answer: str) -> str:
        """The label as written in the seeds; an unknown one as it is."""
        return self._labels.get(self.canonical(answer), answer)

    def load(
        self, source: str, split: str = "train", columns: Mapping[str, str] | None = None, limit: int | None = None
    ) -> list[Sample]:
        """As :meth:`Domain.load`, with columns ``text`` and ``label`` (or ``intent``), or ``question`` and ``answer``.
        Class numbers of a hub data set become names; rows without a label are left out. ``intents:banking77_train`` is
        ``intents/banking77_train.jsonl`` in the folder ``ACQCORE_DATA``, by default ``../shared/data``."""
        if source.startswith(INTENTS):
            path = intents_path(source)
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} does not exist: set ACQCORE_DATA to a folder with intents/{path.name}, or name a file or "
                    "hub data set with a text and a label, as in source=mteb/banking77 columns={text: text, label: "
                    "label_text}"
                )
            source = str(path)
        return super().load(source, split, columns, limit)


def _asked(task: str, answer: str) -> Messages:
    form = f"<question>\nthe message\n</question>\n<answer>\n{answer}\n</answer>"
    return [{"role": "user", "content": f"{task}\n\nWrite exactly these two parts and nothing else:\n{form}"}]


def _names(question: str, label: str) -> bool:
    """Whether a text gives its label away: it equals the label, contains its name with underscores, or states it.

    The label's words alone prove nothing: they occur in 2 % of BANKING77's messages and 21 % of CLINC150's. This check
    rejects 0.02 % and 0.1 % of them.
    """
    said, name = " ".join(question.casefold().split()), spoken(label).casefold()
    if re.sub(r"\W+", " ", spoken(said)).strip() == re.sub(r"\W+", " ", name).strip():
        return True
    if "_" in label and label.casefold() in said:
        return True
    quoted = rf"[\"'(]?{re.escape(name)}(?!\w)[\"')]?"
    return bool(re.search(rf"\b{_MARKER}\b(?:\s+(?:is|of|name)\b)?\s*[:=]?\s*{quoted}|{quoted}\s+{_MARKER}\b", said))


def intents_path(source: str) -> Path:
    """The file of a source ``intents:<name>``."""
    folder = Path(os.environ.get("ACQCORE_DATA", "../shared/data")).expanduser()
    return folder / "intents" / f"{source.removeprefix(INTENTS)}.jsonl"
