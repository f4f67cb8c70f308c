"""Mathematics: GSM8K, NuminaMath-CoT, and word problems with one final answer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import ClassVar

from acqsynth.domains.base import STATED, Domain, Layout, Messages, Row, Sample, ask_for_sample, text
from acqsynth.domains.math_check import MathChecker
from acqsynth.domains.quantities import (
    UNDERSTOOD,
    closed_sides,
    compare,
    exact,
    is_approximate,
    is_glued_unit,
    quantity,
    rounded,
)

_HASHES = re.compile(r"^####[ \t]*(\S.*)$", re.MULTILINE)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|[,;]?\s+(?:because|since|so|which|as)\b")
# Statements that are answers wherever they stand; "the answer is in km/h" and "the answer is positive" may be comments.
_EXACT = re.compile(
    r"(?=.*[\d\\$]).*|[A-Za-z]|(?!in\b)(?=.*[-=+*/^<>(])(?:(?:[A-Za-z]{1,2}|sin|cos|tan|log|exp|sqrt)\b|[^A-Za-z])+"
)
_WORDED = re.compile(
    r"(?i:yes|no|true|false|none|undefined|indeterminate|im?possible|infinit[ey]|infinity|dne|"
    r"(?:it |the limit )?does not exist|not (?:defined|possible)|(?:that )?(?:there (?:is|are) )?"
    r"no (?:\w+ ){0,2}(?:solution|root|number|value|limit|answer)s?(?: exists?)?)|[A-Z][a-z]+"
)
# Words before a value that are not part of it.
_LEADING = re.compile(
    r"(?:,?\s*(?:therefore|thus|hence|then|indeed)\b,?\s+|"
    r"(?:(?:exactly|equal to|simply|just|about|approximately|roughly|around)\s+)+(?=[-+]?(?:[\d$€£¥]|\.\d|\\)))+",
    re.IGNORECASE,
)
_BOLD = re.compile(r"(?<!\w)\*\*|\*\*(?!\w)")
_QUOTED = re.compile(r"[\"'“‘]([^\"“”]*)[\"'”’]")
_WORDY = 4  # maximum words of an answer in words; longer ones are prose
# A number and what is glued to it; possessive, so that 2.5kg is never 2. A time, 5 000, 2 1/2, \frac{5}{2}, ½ and 10^-3
# are read whole.
_NUMBER = re.compile(
    r"(?<![\w.^])(?<!\^[-+{(])(?<!\^[{(][-+])([-+]?(?>"
    r"\d{1,2}:[0-5]\d(?![\d:])|\d{1,3}(?: \d{3})*+(?<= 000)|"
    r"\d++ \d++/\d++|\\[dt]?frac\{\d++\}\{\d++\}|(?:\d++ ?)?+[¼-¾⅐-⅞]|"
    r"(?>\d{1,3}(?:,\d{3}(?!\d))++|\d++)(?:\.\d++)?+(?:[eE][-+]?\d{1,3}(?!\d)|"
    r"(?: ?(?:[x*×]|\\times|\\cdot) ?10)?(?:\^(?:[-+]?\d++|\{[-+]?\d++\}|\([-+]?\d++\))|⁻?[⁰¹²³⁴-⁹]++))?+"
    r"(?:\s*+/\s*+\d++(?:\.\d++)?+)?+))(\w*+)"
)
_SIZE = re.compile(  # of what is counted: "2 cartons of 1L milk"
    r"(\d (?!(?:out|instead|total|because|ahead|short)\b)\w+ of) \d[\d.,]*[A-Za-z]+(?= [a-z])"
)
_RATIO = re.compile(r"\bratios?\b", re.IGNORECASE)
_COLON = re.compile(r"(?<!\b0\d):(?!0\d)")  # may be that of a ratio: not in 10:00 and 09:30
_CALCULATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K's calculator annotations

_TASKS = re.compile(
    r"\b(find|compute|calculate|determine|evaluate|solve|simplify|what|how|which|when|who|express|factor|give|write)\b",
    re.IGNORECASE,
)


def _worked(row: Row) -> Sample:
    """``question`` and ``answer``: a solution that marks its final answer, or the final answer alone."""
    question, answer = text(row, "question"), text(row, "answer")
    if row.get("reasoning"):
        return Sample(question, _final(answer), text(row, "reasoning"))
    final = _stated(answer)
    if final is None and "\n" in answer:
        raise ValueError("answer: no final answer, marked by #### or \\boxed{}")
    if final is None or final == answer:
        return Sample(question, answer)
    reasoning = _HASHES.sub("", _CALCULATION.sub("", answer)).strip()
    return Sample(question, final, reasoning)


def _numina(row: Row) -> Sample | None:
    """``problem`` and ``solution``, whose final answer is boxed; a proof has none."""
    solution = text(row, "solution")
    final = _boxed(solution)
    return None if final is None else Sample(text(row, "problem"), final, solution)


class Math(Domain):
    """Questions with one final answer, a number or an expression.

    Args:
        checker: compares answers with different :meth:`canonical` forms; by default two workers, five seconds per
            check. Its ``lost`` counts answers that could not be compared, which are treated as wrong.
    """

    name: ClassVar[str] = "math"
    layouts = (Layout(("problem", "solution"), _numina), Layout(("question", "answer"), _worked, ("reasoning",)))
    proves: ClassVar[bool] = False

    def __init__(self, checker: MathChecker | None = None) -> None:
        self.checker = checker or MathChecker()

    def require(self) -> None:
        self.checker.require()

    def generator_prompt(self, shown: Sequence[Sample]) -> Messages:
        return ask_for_sample(
            "one new mathematical problem that has exactly one final answer",
            "the final answer alone: a number or an expression",
            shown,
        )

    def student_prompt(self, question: str) -> Messages:
        return [{"role": "user", "content": f"{question}\n\nReason step by step and end with \\boxed{{the answer}}."}]

    def answer_of(self, completion: str) -> str | None:
        r"""The final answer: the last occurrence of the first of these forms that the completion contains.

        ``\boxed{...}``; a line ``#### ...``; "answer is ..." or "answer: ..." up to the end of its sentence; a number.
        That one place is the whole answer: several values there are one answer with several values, and text elsewhere
        is ignored, so listing candidates gains nothing. Words count if they are a value, such as "undefined", or if
        there is no number: "the answer is positive" may be a comment.
        """
        stated = _stated(completion)
        if stated is not None:
            return _final(stated)
        short = [words for words in _statements(completion) if 0 < len(words.split()) <= _WORDY]
        return next(reversed(_numbers(completion) or short), None)

    def solution(self, sample: Sample) -> str:
        final = _final(sample.answer)
        if _boxed(sample.reasoning) == final:
            return sample.reasoning
        boxed = f"\\boxed{{{final}}}"
        return "\n".join(part for part in (sample.reasoning, boxed) if part)

    def canonical(self, answer: str) -> str:
        """A rational number in lowest terms (``0.50``, ``1/2`` and ``$0.5`` are ``1/2``, ``5 million`` is
        ``5000000``) with its unit (``3 kilometers`` is ``3 km``; dollars and degrees are omitted), words in lower
        case, or the expression without spaces and layout."""
        found = quantity(answer)
        unit = "" if found.unit in UNDERSTOOD else " ".join(found.unit)
        return found.form + (unit if unit == "%" else f" {unit}" if unit else "")

    def equivalent(self, gold: Sequence[Sample], answers: Sequence[str | None]) -> list[bool]:
        r"""Whether canonical forms are equal, or math-verify finds equality (numbers to six decimals, and within a
        relative 5e-5) and units agree.

        Of a true equation without variables, such as ``3 + 4 = 7``, the last side counts, which may be rounded to its
        decimals; a false one equals nothing. Of ``200/3 \approx 67``, the first side counts as well.
        A missing unit agrees with any; different units do not agree. A percentage also equals its value: ``50%`` is
        ``0.5``. Ratios are equal if their lowest terms are; where the question asks for no ratio, ``2:40`` may be a
        time. Answers in words must be the same words: math-verify would read them as products of letters, equal in
        any order.
        """
        pairs = [(_final(sample.answer), str(answer)) for sample, answer in zip(gold, answers, strict=True)]
        for i, sample in enumerate(gold):
            if _RATIO.search(sample.question):  # with spaces, a ratio is not a time
                pairs[i] = (_COLON.sub(" : ", pairs[i][0]), _COLON.sub(" : ", pairs[i][1]))
        given = [i for i, answer in enumerate(answers) if answer is not None]
        readings = self._without_workings([pairs[i] for i in given])
        unread = [(i, pair) for i, read in zip(given, readings, strict=True) for pair in read]
        equal = self._equal([pair for _, pair in unread])
        right = {i for (i, _), true in zip(unread, equal, strict=True) if true}
        return [i in right for i in range(len(answers))]

    def _equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the second of each pair equals the first, the true answer."""
        equal = [False] * len(pairs)
        unlike: list[tuple[int, tuple[str, str]]] = []
        for i, (truth, given) in enumerate(pairs):
            found = compare(quantity(truth), quantity(given))
            if isinstance(found, bool):
                equal[i] = found
            else:
                unlike += [(i, pair) for pair in found]
        for (i, _), result in zip(unlike, self.checker.equal([pair for _, pair in unlike]), strict=True):
            equal[i] = equal[i] or result
        return equal

    def _without_workings(self, pairs: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
        """The readings of each pair, with ``3 + 4 = 7`` replaced by ``7`` where the other answer is no equation, and
        ``200/3 ≈ 67`` by ``67`` or ``200/3``."""
        sides = {
            (i, k): closed_sides(pair[k])
            for i, pair in enumerate(pairs)
            for k in (0, 1)
            if "=" not in pair[1 - k] and pair[0] != pair[1]
        }
        claims = [
            (place, (found[-1], rounded(side, found[-1], is_approximate(pairs[place[0]][place[1]]))))
            for place, found in sides.items()
            for side in found[:-1]
        ]
        holds = self._equal([claim for _, claim in claims])
        refuted = {place for (place, _), true in zip(claims, holds, strict=True) if not true}

        def read(i: int, k: int) -> list[str]:
            answer, found = pairs[i][k], sides.get((i, k))
            if not found:
                return [answer]
            if (i, k) in refuted:
                return []
            return [found[-1], exact(found)] if is_approximate(answer) else [found[-1]]

        return [list(itertools.product(read(i, 0), read(i, 1))) for i in range(len(pairs))]

    def verify(self, samples: Sequence[Sample]) -> list[bool | None]:
        """False if the reasoning states a different final answer than the sample's; otherwise None, as this domain
        cannot prove an answer right. Words in the reasoning contradict only an answer in words."""
        finals = [_final(sample.answer) for sample in samples]
        stated = [
            _stated(sample.reasoning, words=bool(_WORDED.fullmatch(final)))
            for sample, final in zip(samples, finals, strict=True)
        ]
        agree = self.equivalent(samples, [_final(one or final) for one, final in zip(stated, finals, strict=True)])
        return [None if agrees else False for agrees in agree]

    def fault(self, sample: Sample) -> str | None:
        if len(sample.question) < 15:
            return "the question is too short"
        if "?" not in sample.question and not _TASKS.search(sample.question):
            return "nothing is asked"
        answer = _final(sample.answer)
        if len(answer) > 200 or "\n" in answer:
            return "the answer is more than a final answer"
        return None


def _boxed(completion: str) -> str | None:
    r"""The contents of the last complete, non-empty ``\boxed{...}``, found in one pass."""
    found = None
    last = -1  # start of the contents found
    open_braces: list[tuple[int, bool]] = []  # start of the contents, whether they belong to a box
    for match in re.finditer(r"(\\f?boxed\s*)?\{|\}", completion):
        if match[0] != "}":
            open_braces.append((match.end(), match[1] is not None))
        elif open_braces:
            begin, box = open_braces.pop()
            if box and begin > last and (contents := completion[begin : match.start()].strip()):
                found, last = contents, begin
    return found


def _stated(completion: str, words: bool = True) -> str | None:
    """The answer that a completion marks as final, or None."""
    boxed = _boxed(completion)
    if boxed is not None:
        return boxed
    if lines := _HASHES.findall(completion):
        return str(lines[-1]).strip()
    statements = _statements(completion)
    exact = [statement for statement in statements if _EXACT.fullmatch(statement)]
    worded = [statement for statement in statements if words and _WORDED.fullmatch(statement)]
    return next(reversed(exact or worded), None)


def _statements(completion: str) -> list[str]:
    """What follows "answer is" and "answer:", up to the end of the sentence; nothing if it is an empty or open box."""
    rests = (_BOLD.sub("", rest) for rest in STATED.findall(completion) if not re.search(r"\\f?boxed", rest))
    values = (rest[found.end() :] if (found := _LEADING.match(rest)) else rest for rest in rests)
    stated = (_SENTENCE_END.split(value, maxsplit=1)[0].strip(" *`") for value in values)
    return [found[1] if (found := _QUOTED.fullmatch(value)) else value for value in stated]


def _numbers(completion: str) -> list[str]:
    """The numbers that stand alone or have a unit glued to them, without the unit; ``2x`` is not one."""
    return [
        number
        for number, glued in _NUMBER.findall(_SIZE.sub(r"\1", completion))
        if not glued or is_glued_unit(number, glued)
    ]


def _final(answer: str) -> str:
    """The final answer in an answer field: the part marked as final, otherwise all of it."""
    return _stated(answer) or answer.strip()
