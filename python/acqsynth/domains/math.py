"""Mathematics: GSM8K, NuminaMath-CoT, and word problems with one final answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import ClassVar

from acqsynth.domains.base import Domain, Messages, Sample
from acqsynth.domains.data import Layout, Row, samples, text
from acqsynth.domains.math_check import MathChecker
from acqsynth.domains.prompts import ask_for_sample

_HASHES = re.compile(r"^####[ \t]*(\S.*)$", re.MULTILINE)
_STATED = re.compile(r"(?<![/\w])answer(?:\s+is\b\s*:?|\s*:)\s*(\S[^\n]*)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|[,;]?\s+(?:because|since|so|which|as)\b")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?(?![\w])")
_CALCULATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K's notes for a calculator

_INTEGER = re.compile(r"-?\d+")
_DECIMAL = re.compile(r"([-+]?)(?=\.?\d)(\d{1,3}(?:,\d{3})+|\d*)(\.\d*)?")
_FRACTION = re.compile(r"([-+]?)(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)")
_FRAC = re.compile(r"\\[dt]frac(?![A-Za-z])")
_LATEX_FRACTION = re.compile(r"([-+]?)\s*(\d*)\s*\\frac\s*(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))")
_LAYOUT = re.compile(r"\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\[!,;:]|~|\^\{?\\circ\}?|°")
_UNIT = re.compile(
    r"(?<=[\d}])(?:\s*\\(?:text|mathrm)\{[A-Za-z .]+\}|\s+(?!(?:and|or|sqrt|sin|cos|tan|log|mod)\b)"
    r"(?:[A-Za-z]{3,}|cm|mm|km|kg|mg|ml|ft|in|hr|lb|oz)(?: [A-Za-z]+)*)(?:\^\{?[23]\}?)?$"
)
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ -][A-Za-z]+)*")

_TASKS = re.compile(
    r"\b(find|compute|calculate|determine|evaluate|solve|simplify|what|how|which|when|who|express|factor|give|write)\b",
    re.IGNORECASE,
)


class Math(Domain):
    """Questions with one final answer, a number or an expression.

    Args:
        checker: compares what differs after :meth:`canonical`; by default two workers, five seconds a check. Its
            ``lost`` counts the answers that could not be compared, which count as wrong.
    """

    name: ClassVar[str] = "math"

    def __init__(self, checker: MathChecker | None = None) -> None:
        self.checker = checker or MathChecker()

    def generator_prompt(self, shown: Sequence[Sample]) -> Messages:
        return ask_for_sample(
            "one new mathematical problem that has exactly one final answer",
            "the final answer alone: a number or an expression",
            shown,
        )

    def student_prompt(self, question: str) -> Messages:
        return [{"role": "user", "content": f"{question}\n\nReason step by step and end with \\boxed{{the answer}}."}]

    def answer_of(self, completion: str) -> str | None:
        r"""The final answer, by the first of these that the completion has, and of these the last one:

        ``\boxed{...}``; a line ``#### ...``; "answer is ..." or "answer: ..." up to the end of its sentence; a number.
        One place gives the answer, all of it: several values in that place are one answer of several values, and what
        stands elsewhere counts for nothing, so naming candidates gains nothing.
        """
        stated = _stated(completion)
        if stated is not None:
            return stated
        numbers = _NUMBER.findall(completion)
        return numbers[-1] if numbers else None

    def solution(self, sample: Sample) -> str:
        final = _final(sample.answer)
        if _boxed(sample.reasoning) == final:
            return sample.reasoning
        boxed = f"\\boxed{{{final}}}"
        return "\n".join(part for part in (sample.reasoning, boxed) if part)

    def canonical(self, answer: str) -> str:
        """A rational number in lowest terms (``0.50``, ``1/2`` and ``$0.5`` are ``1/2``; units are dropped, a percent
        sign is kept); words in lower case; else the expression without spaces and layout."""
        plain = _plain(answer)
        percent = plain.endswith("%")
        number = _rational(plain.rstrip("%").rstrip())
        if number is not None:
            return f"{number}%" if percent else str(number)
        return plain.casefold() if _WORDS.fullmatch(plain) else _without_spaces(plain)

    def equivalent(self, gold: Sequence[Sample], answers: Sequence[str | None]) -> list[bool]:
        """Equal canonical forms, or equal for math-verify (numbers to six decimals).

        Words are right in the same words only: math-verify reads them as products of letters, equal in any order.

        Raises:
            RuntimeError: see ``MathChecker.equal``.
        """
        equal = [False] * len(answers)
        unlike: dict[int, tuple[str, str]] = {}
        for i, (sample, answer) in enumerate(zip(gold, answers, strict=True)):
            if answer is None:
                continue
            final = _final(sample.answer)
            truth, given = self.canonical(final), self.canonical(answer)
            equal[i] = truth == given
            if not equal[i] and _worth_checking(truth, given):
                unlike[i] = (_plain(final), _plain(answer))
        for i, result in zip(unlike, self.checker.equal(list(unlike.values())), strict=True):
            equal[i] = result
        return equal

    def verify(self, samples: Sequence[Sample]) -> list[bool | None]:
        """False where the reasoning states a final answer that is another than the answer given; else None, as nothing
        here proves an answer right."""
        agree = self.equivalent(samples, [_stated(sample.reasoning) or _final(sample.answer) for sample in samples])
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

    def load(
        self,
        source: str,
        split: str = "train",
        columns: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> list[Sample]:
        return samples(source, split, columns, limit, LAYOUTS)


def _boxed(completion: str) -> str | None:
    r"""The contents of the last whole ``\boxed{...}``."""
    found = None
    for match in re.finditer(r"\\f?boxed\s*\{", completion):
        depth = 1
        for i in range(match.end(), len(completion)):
            depth += {"{": 1, "}": -1}.get(completion[i], 0)
            if depth == 0:
                found = completion[match.end() : i].strip() or found
                break
    return found


def _stated(completion: str) -> str | None:
    """The answer that a completion marks as final, or None."""
    boxed = _boxed(completion)
    if boxed is not None:
        return boxed
    if lines := _HASHES.findall(completion):
        return str(lines[-1]).strip()
    statements = (_SENTENCE_END.split(rest, maxsplit=1)[0].strip(" *") for rest in _STATED.findall(completion))
    return next((s for s in reversed(list(statements)) if re.search(r"[\d\\$]|^[A-Za-z]$", s)), None)  # not "is right"


def _final(answer: str) -> str:
    """What an answer field gives: what it marks as final, else all of it."""
    return _stated(answer) or answer.strip()


def _plain(answer: str) -> str:
    """An answer without delimiters, currency, units and layout."""
    plain = answer.strip().strip("*").rstrip(".").strip()
    for opens, closes in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if plain.startswith(opens) and plain.endswith(closes) and len(plain) > len(opens) + len(closes):
            plain = plain[len(opens) : -len(closes)].strip()
    plain = _LAYOUT.sub("", plain.replace(r"\%", "%").replace("{,}", ",").replace("\\ ", " "))
    plain = re.sub(r"^([-+]?)\s*(?:\\?\$|€|£)\s*", r"\1", plain)
    plain = re.sub(r"\s*(?:\\text\{\s*percent\}|\bpercent)$", "%", plain)
    plain = _FRAC.sub(r"\\frac", _UNIT.sub("", plain))
    if whole := re.fullmatch(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", plain):
        plain = whole[1].strip()
    plain = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi", plain)
    return re.sub(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", plain).strip()


def _rational(plain: str) -> Fraction | None:
    """The number that is written, also as a fraction or mixed number; None where it is something else."""
    if len(plain) > 200:
        return None
    if match := _DECIMAL.fullmatch(plain):
        sign, whole, rest = match.groups()
        return Fraction(f"{sign}{whole.replace(',', '') or 0}{(rest or '').rstrip('.')}")
    if match := _FRACTION.fullmatch(plain) or _LATEX_FRACTION.fullmatch(plain):
        sign, whole, *pairs = match.groups()
        above, below = (int(part) for part in pairs if part is not None)
        if below:
            return (-1 if sign == "-" else 1) * (int(whole or 0) + Fraction(above, below))
    return None


def _worth_checking(truth: str, given: str) -> bool:
    """Whether canonical forms that differ may still be equal."""
    if _WORDS.fullmatch(truth) or (_INTEGER.fullmatch(truth) and _INTEGER.fullmatch(given)):
        return False
    # math-verify adds up "5 5", and of an answer with a box it reads the box alone.
    return not re.search(r"\d \d|\\boxed", given)


def _without_spaces(plain: str) -> str:
    """Spaces dropped, but for one that ends a command (``\\pi r``) or parts two numbers."""
    return re.sub(r"(\\[A-Za-z]+|\d)?\s+(?=([A-Za-z])?(\d)?)", _kept_space, plain)


def _kept_space(match: re.Match[str]) -> str:
    before, letter, digit = match.groups()
    if before is None:
        return ""
    return f"{before} " if (digit if before.isdigit() else letter) else str(before)


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


LAYOUTS = (Layout(("problem", "solution"), _numina), Layout(("question", "answer"), _worked, ("reasoning",)))
