"""Medicine: MedMCQA (four options), PubMedQA (yes, no or maybe), and questions of either form.

The options of a choice are listed in the question, one per line, and in ``extra["options"]``: letter -> text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

from acqsynth.domains.base import STATED, Domain, Layout, Messages, Row, Sample, ask_for_sample, optional, text

LETTERS = "ABCD"
DECISIONS = ("yes", "no", "maybe")

# Marks at line starts, otherwise marks of one kind within lines: texts such as "C. difficile" contain marks too.
_OPTIONS = [
    re.compile(rf"{before}\(?([A-D]){after}\s+", re.MULTILINE)
    for before, after in ((r"^[ \t]*", "[).:]"), (r"(?<!\S)", r"\)"), (r"(?<!\S)", r"\."), (r"(?<!\S)", ":"))
]
_BOXED = re.compile(r"\\boxed\{(?:\\text(?:bf)?\{)?([^{}]*)\}?\}")
# A letter alone, with its mark or instead of another ("B", "(b)", "B) aspirin", "B, not C"), not the article in "A
# fever"; or a decision with a mark.
_LETTER = re.compile(
    r"(?i:(?:the\s+)?(?:option|choice)\s+)?"
    r"\(?([A-Da-d])(?:[).:]|(?:,?\s+(?:(?:and\s+)?not|rather than)\s+\(?[A-D]\)?\.?)?$)"
)
_QUOTED = re.compile(r"['\"`“‘]([^'\"`“”‘’]+)['\"`”’]\.?")
_DECISION = re.compile(r"(yes|no|maybe)\b(?!\s+\w)", re.IGNORECASE)
# Two different choices, not the article "a" or a "no" before a noun.
_SEVERAL = re.compile(
    r"\(?([A-D]|yes|no|maybe)\)?\s*(?:,(?!\s*no\s+(?!(?:yes|no|maybe|or|and)\b)\w)|,\s*no(?=\s+(?:yes|maybe)\b)|/|&|\bor\b|\band\b)"
    r"\s*\(?(?!\1\b)"
    r"(?:[b-d]|(?-i:A)|a(?=\))|yes|no|maybe)\b",
    re.IGNORECASE,
)
# A marked letter whose option's text begins with letters: "B) A", "D) A, B and C", "A) B and T cells".
_OF_LETTERS = re.compile(r"\(?[A-Da-d][).:]\s+[A-D](?:(?:,|,? and| &)\s+[A-D])*(?:\s+\w[\w ]*)?$")
_REASON = re.compile(
    r"(?<!\s)[,;]?\s++(?:because|since)\b|(?:(?<=\b[A-D])|(?<=\byes)|(?<=\bno)|(?<=\bmaybe)),?\s+as\b(?!\s+well\b)",
    re.IGNORECASE,
)
# The parts of a list of choices: what stands between them, what may follow one without its text, and each of them. A
# mark before a small letter may abbreviate a genus ("B. anthracis"), a capital before a word may be the article.
_JOINT = re.compile(r"(?:[\s.,;:/&+()\u2013\u2014-]|(?i:or|and)\b)*")
_JOINED = re.compile(r"[/&+]|\b(?:or|and)\b", re.IGNORECASE)
_VERB = r"\s+(?:is|are|was|were|would|does|do|has|have|can|cannot|could|wrong|incorrect)\b"
_LISTED = r"(?=\s*(?:$|[,;/&+()]|[\u2013\u2014-]+\s|(?i:or|and)\b))"
_ENDS = rf"(?=[.:]|{_LISTED})"
_MARKED = re.compile(
    r"(?:(?i:option|choice)\s+)?\(?"
    rf"(?:([A-D])(?:\)|[.:]?(?={_VERB})|[.:](?!\s+(?!(?:or|and)\b)[a-z])|{_LISTED})|([a-d])\))"
)
_DECIDED = re.compile(rf"\(?(yes|no|maybe)\b{_ENDS}", re.IGNORECASE)
_CLAUSE = re.compile(_VERB + r"|\s+(?!(?:or|and)\b)[a-z]|\s*[:\u2013\u2014-]\s+\S")
_COMBINED = re.compile(r"\b(?i:all|both|none)\b|\b[A-D](?:,| and\b| &)")  # an option that names others
_WRONG = r"(?:wrong|incorrect|false|unlikely|excluded)\b"
_DENIED = re.compile(  # once: "not wrong" denies nothing
    rf"(?![^.;\n]*(?:not|n['’]t)\s+(?:be\s+)?(?:\w+\s+)?{_WRONG})[^.;\n]*?\b(?:not\b|{_WRONG})", re.IGNORECASE
)
_CONTRAST = re.compile(
    r"\.\s|\b(?:as|not|than|over|to|excluding|eliminating|ruling|rejecting|unlike|instead|while|whereas|but|nor)\b",
    re.IGNORECASE,
)
# A further marked letter in the same sentence, behind a text that is unknown.
_ALSO = re.compile(rf"(?:[,;/&]|\b(?:or|and)\b)\s*(?:(?:or|and)\s+)?\(?([A-D])\)(?!{_VERB})")


def _medmcqa(row: Row) -> Sample:
    """``cop`` counts from 0, as on the hub; in a csv it is text."""
    options = {letter: text(row, f"op{letter.lower()}") for letter in LETTERS}
    letter = dict(zip("0123", LETTERS, strict=True)).get(str(row["cop"]).strip())
    if letter is None:
        raise ValueError(f"cop: expected 0 to 3, got {row['cop']!r}")
    question = "\n".join([text(row, "question"), *(f"{letter}) {option}" for letter, option in options.items())])
    return Sample(question, f"{letter}) {options[letter]}", optional(row, "exp"), {"options": options})


def _pubmedqa(row: Row) -> Sample:
    contexts: Any = row["contexts"] if "contexts" in row else row["context"]
    if isinstance(contexts, Mapping):  # on the hub, sections come with labels
        contexts = contexts.get("contexts")
    if not isinstance(contexts, Sequence) or isinstance(contexts, str) or not all(isinstance(c, str) for c in contexts):
        raise ValueError(f"contexts: expected a list of texts, got {contexts!r:.60}")
    decision = text(row, "final_decision").lower()
    if decision not in DECISIONS:
        raise ValueError(f"final_decision: expected {', '.join(DECISIONS)}, got {decision!r}")
    question = "\n\n".join([*contexts, text(row, "question")])
    return Sample(question, decision, text(row, "long_answer"))


def _plain(row: Row) -> Sample:
    """``question`` (including its options, if any), ``answer`` and, if present, ``reasoning``."""
    question = text(row, "question")
    options = _options(question)
    extra = {"options": options} if options else {}
    return Sample(question, text(row, "answer"), optional(row, "reasoning"), extra)


LAYOUTS = (
    Layout(("question", "opa", "opb", "opc", "opd", "cop"), _medmcqa, ("exp",)),
    Layout(("question", "contexts", "long_answer", "final_decision"), _pubmedqa),
    Layout(("question", "context", "long_answer", "final_decision"), _pubmedqa),
    Layout(("question", "answer"), _plain, ("reasoning",)),
)


class Medical(Domain):
    """Questions answered by the letter of an option, or by yes, no or maybe."""

    name: ClassVar[str] = "medical"
    layouts = LAYOUTS

    def generator_prompt(self, shown: Sequence[Sample]) -> Messages:
        return ask_for_sample(
            "one new medical question, either with four options A) to D), one a line, of which exactly one is right, "
            "or to be answered by yes, no or maybe",
            "the letter and text of the right option, as in B) text; or yes, no or maybe",
            shown,
        )

    def student_prompt(self, question: str) -> Messages:
        form = "the letter of the right option" if _options(question) else "yes, no or maybe"
        return [{"role": "user", "content": f'{question}\n\nReason briefly and end with "The answer is", then {form}.'}]

    def answer_of(self, completion: str) -> str | None:
        r"""The last ``\boxed{...}``; else the last "answer is ..." or "answer: ..."; else the last line, if it is a
        choice by itself. If that place names several choices, none of them counts."""
        for pattern in (_BOXED, STATED):
            if found := pattern.findall(completion):
                return _without_bold(found[-1]) or None
        lines = completion.strip().splitlines()
        last = _without_bold(lines[-1]) if lines else ""
        return last if _choice(last) or _OF_LETTERS.match(last) else None

    def solution(self, sample: Sample) -> str:
        if self.answer_of(sample.reasoning) == sample.answer:
            return sample.reasoning
        stated = f"The answer is {sample.answer}"
        return "\n".join(part for part in (sample.reasoning, stated) if part)

    def canonical(self, answer: str) -> str:
        """An option's letter in upper case, a decision in lower case, or the text in lower case without punctuation."""
        plain = _without_bold(answer)
        return _choice(plain) or _words(plain)

    def equivalent(self, gold: Sequence[Sample], answers: Sequence[str | None]) -> list[bool]:
        """Whether letters or decisions agree; an option's full text counts as its letter."""
        return [
            answer is not None and self._choice_of(sample, sample.answer) == self._choice_of(sample, answer)
            for sample, answer in zip(gold, answers, strict=True)
        ]

    def verify(self, samples: Sequence[Sample]) -> list[bool | None]:
        """False if the reasoning states a different final answer than the sample's; otherwise None."""
        stated = [self.answer_of(sample.reasoning) for sample in samples]
        agree = self.equivalent(samples, [a or s.answer for a, s in zip(stated, samples, strict=True)])
        return [None if agrees else False for agrees in agree]

    def parse(self, text: str) -> Sample | None:
        """As :meth:`Domain.parse`; the options of the question become ``extra["options"]``."""
        sample = super().parse(text)
        options = {} if sample is None else _options(sample.question)
        return replace(sample, extra={"options": options}) if sample and options else sample

    def fault(self, sample: Sample) -> str | None:
        if len(sample.question) < 20:
            return "the question is too short"
        options = sample.extra.get("options")
        choice = self._choice_of(sample, sample.answer)
        if not options:
            if choice not in DECISIONS:
                return "neither options A) to D) nor an answer of yes, no or maybe"
            return None if "?" in sample.question else "nothing is asked"
        if choice not in options:
            return "the answer is none of the options"
        if len({_words(option) for option in options.values()}) < len(options):
            return "two options are the same"
        return None

    def _choice_of(self, sample: Sample, answer: str) -> str:
        """The canonical answer, with an option's text replaced by its letter. Texts come before letters, so that
        ``C. difficile`` is an option's text; a letter by itself is a letter, even if it is also a text."""
        options = sample.extra.get("options", {})
        plain = _without_bold(answer)
        for words in map(_words, (plain, _without_reason(plain))):
            if words not in ("", *LETTERS.lower()) and (letter := _by_text(words, plain, options)):
                return letter
        return _choice(plain, options) or _words(plain)


def _without_bold(answer: str) -> str:
    """Without bold and without quotes around the whole."""
    return _QUOTED.sub(r"\1", plain) if _QUOTED.fullmatch(plain := answer.replace("**", "").strip(" \t\n*")) else plain


def _words(text: str) -> str:
    """A text in lower case without punctuation."""
    return re.sub(r"\W+", " ", text).strip().casefold()


def _without_reason(plain: str) -> str:
    return _REASON.split(plain, maxsplit=1)[0]


def _by_text(words: str, plain: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option whose text, behind its letter or alone, a statement is or begins with."""
    for letter, option in options.items():
        if words == _words(f"{letter} {option}"):
            return letter
    for letter, option in options.items():
        text = _words(option)
        begins = len(text) > 1 and _LETTER.match(option) and words.startswith(f"{text} ")
        if words == text or (begins and not _names_several(plain, options)):
            return letter
    return None


def _choice(plain: str, options: Mapping[str, str] | None = None) -> str | None:
    """The single letter or decision that a text begins with, or None."""
    if _SEVERAL.match(plain) or _names_several(plain, options or {}):
        return None
    choice = _without_reason(plain)
    if letter := _LETTER.match(choice):
        return letter[1].upper()
    decision = _DECISION.match(choice)
    return decision[1].lower() if decision else None


def _names_several(plain: str, options: Mapping[str, str]) -> bool:
    """Whether a text begins with a list of different choices: ``A) aspirin or C``, ``yes; no``. The subject of a
    further clause is not in the list: ``C. A and B are wrong``, ``A) aspirin, and B) is not``."""
    texts = _texts(tuple(options.items()))
    groups: list[set[str]] = []
    joint, end, begin = "", 0, 0
    while item := _item(plain, begin, joint, texts, groups):
        choice, end = item
        apart = "," in joint and _CLAUSE.match(plain, end) and _DENIED.match(plain, end)
        if groups and not apart and (_JOINED.search(joint) or (len(groups) > 1 and "," in joint)):
            groups[-1].add(choice)
        else:
            groups.append({choice})
        between = _JOINT.match(plain, end)
        joint, begin = (between[0], between.end()) if between else ("", end)
    if len(groups) > 1 and _CLAUSE.match(plain, end):
        return len(set().union(*groups[: 1 if _DENIED.match(plain, end) else -1])) > 1
    if groups and len(groups[0]) == 1 and _COMBINED.search(options.get(next(iter(groups[0])), "")):
        return False
    named = set().union(*groups)
    sentence = _CONTRAST.split(_without_reason(plain[end:]), maxsplit=1)[0]
    return len(named | set(_ALSO.findall(sentence) if named else ())) > 1


@lru_cache(maxsize=1024)
def _texts(options: tuple[tuple[str, str], ...]) -> list[tuple[str, re.Pattern[str], re.Pattern[str]]]:
    """The letters of options, longest text first, with patterns of the text behind the letter and of the text alone; a
    text of one letter never stands alone."""
    spelled = {letter: r"\W+".join(map(re.escape, _words(option).split())) for letter, option in options}
    return [
        (
            letter,
            re.compile(rf"\(?{letter}[).:]+\W*{option}(?!\w)", re.IGNORECASE),
            re.compile(option + _ENDS if option not in LETTERS.lower() else r"(?!)", re.IGNORECASE),
        )
        for letter, option in sorted(spelled.items(), key=lambda item: -len(item[1]))
        if option
    ]


def _item(
    plain: str,
    begin: int,
    joint: str,
    texts: Sequence[tuple[str, re.Pattern[str], re.Pattern[str]]],
    before: Sequence[set[str]],
) -> tuple[str, int] | None:
    """The choice at a place of a list, behind ``joint`` and the choices before, and where it ends."""
    for letter, marked, _ in texts:
        if found := marked.match(plain, begin):
            return letter, found.end()
    if not before or re.search(r"[^\s.]", joint):
        for letter, _, alone in texts:
            if found := alone.match(plain, begin):
                return letter, found.end()
    if found := _MARKED.match(plain, begin):
        return (found[1] or found[2]).upper(), found.end()
    decided = _DECIDED.match(plain, begin) if not before or before[0] <= set(DECISIONS) else None
    return (decided[1].lower(), decided.end()) if decided else None


def _options(question: str) -> dict[str, str]:
    """The last options A to D of a question, or none."""
    for pattern in _OPTIONS:
        if options := _run(question, list(pattern.finditer(question))):
            return options
    return {}


def _run(question: str, marks: list[re.Match[str]]) -> dict[str, str]:
    """The options behind the last marks A to D in this order. Marks between those belong to the texts."""
    letters = "".join(mark[1] for mark in marks)
    begin = len(letters)
    for letter in reversed(LETTERS):
        begin = letters.rfind(letter, 0, begin)
        if begin < 0:
            return {}
    found = [marks[begin]]
    for letter in LETTERS[1:]:
        texts = (m for m in marks if m[1] == letter and question[found[-1].end() : m.start()].strip())
        if (mark := next(texts, None)) is None:
            return {}
        found.append(mark)
    ends = [*(mark.start() for mark in found[1:]), len(question)]
    options = {mark[1]: question[mark.end() : end].strip() for mark, end in zip(found, ends, strict=True)}
    return options if all(options.values()) else {}
