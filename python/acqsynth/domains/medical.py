"""Medicine: MedMCQA (four options), PubMedQA (yes, no or maybe), and questions of either form.

The options of a choice are listed in the question, one per line, and in ``extra["options"]``: letter -> text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby, takewhile
from typing import Any, ClassVar, NamedTuple

from acqsynth.domains.base import STATED, Domain, Layout, Messages, Row, Sample, ask_for_sample, optional, pair, text

LETTERS = "ABCD"
DECISIONS = ("yes", "no", "maybe")

# Marks at line starts, otherwise marks of one kind within lines: texts such as "C. difficile" contain marks too.
_OPTIONS = [
    re.compile(rf"{before}\(?([A-D]){after}\s+", re.MULTILINE)
    for before, after in ((r"^[ \t]*", "[).:]"), (r"(?<!\S)", r"\)"), (r"(?<!\S)", r"\."), (r"(?<!\S)", ":"))
]
_BOXED = re.compile(r"\\boxed\{(?:\\text(?:bf)?\{)?([^{}]*)\}?\}")
_QUOTED = re.compile(r"['\"`“‘]([^'\"`“”‘’]+)['\"`”’]\.?")
_LATEX = re.compile(r"\\(?:[()]|[a-z]+(?=\{))")
_ROUND = str.maketrans("[]", "()")
_SIGNS = ",;:/&+()!?.\u2013\u2014-"
_WORD = r"\d+(?:[.,]\d+)+\w*|\w+|[<>≤≥](?=\s*\d)"  # 1.2 is not 1,2, nor <5 >5
_PIECE = re.compile(rf"\(?\b[A-Da-d]\)|\b[A-Da-d]:|{_WORD}|[,;:/&+()!?\u2013\u2014]|(?<=\s)-|\.(?!\w)")
_KINDS = {
    word: kind
    for kind, words in {
        "join": "or and / & + plus",
        "pause": ", : - \u2013 \u2014 but",
        "stop": ". ; ( ) !",
        "end": "because since as than over unlike instead while whereas which nor preferred excluding eliminating "
        "rejecting",
        "denial": "not cannot wrong incorrect false unlikely excluded",
        "praise": "also too right correct true possible likely acceptable reasonable",
        "verb": "is are was were would does do has have can could",
        "filler": "the option choice letter rather possibly perhaps probably definitely certainly clearly obviously "
        "therefore thus hence indeed simply most only just",
    }.items()
    for word in words.split()
}


def _medmcqa(row: Row) -> Sample:
    """``cop`` counts from 0, as on the hub; in a csv it is text, in a table with gaps a float."""
    options = {letter: text(row, f"op{letter.lower()}") for letter in LETTERS}
    letter = dict(zip("0123", LETTERS, strict=True)).get(str(row["cop"]).strip().removesuffix(".0"))
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


def _with_options(sample: Sample) -> Sample:
    """The sample with the options of its question, if any, as ``extra["options"]``."""
    options = _options(sample.question)
    return replace(sample, extra={"options": options}) if options else sample


class Medical(Domain):
    """Questions answered by the letter of an option, or by yes, no or maybe."""

    name: ClassVar[str] = "medical"
    layouts = (
        Layout(("question", "opa", "opb", "opc", "opd", "cop"), _medmcqa, ("exp",)),
        Layout(("question", "contexts", "long_answer", "final_decision"), _pubmedqa),
        Layout(("question", "context", "long_answer", "final_decision"), _pubmedqa),
        Layout(("question", "answer"), lambda row: _with_options(pair(row)), ("reasoning",)),
    )
    proves: ClassVar[bool] = False  # verify only refutes

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
        return last if _choice(last, {}) else None

    def stated(self, answer: str) -> str:
        return f"The answer is {answer}"

    def canonical(self, answer: str) -> str:
        """An option's letter in upper case, a decision in lower case, or the text in lower case without punctuation."""
        return _read(answer, {})

    def equivalent(self, gold: Sequence[Sample], answers: Sequence[str | None]) -> list[bool]:
        """Whether letters or decisions agree; an option's full text counts as its letter."""
        return [
            answer is not None and _read(sample.answer, options) == _read(answer, options)
            for sample, answer in zip(gold, answers, strict=True)
            for options in [sample.extra.get("options", {})]
        ]

    def verify(self, samples: Sequence[Sample]) -> list[bool | None]:
        """False if the reasoning states a different final answer than the sample's; otherwise None."""
        stated = [self.answer_of(sample.reasoning) for sample in samples]
        agree = self.equivalent(samples, [a or s.answer for a, s in zip(stated, samples, strict=True)])
        return [None if agrees else False for agrees in agree]

    def parse(self, text: str) -> Sample | None:
        """As :meth:`Domain.parse`; the options of the question become ``extra["options"]``."""
        sample = super().parse(text)
        return sample and _with_options(sample)

    def fault(self, sample: Sample) -> str | None:
        if len(sample.question) < 20:
            return "the question is too short"
        options = sample.extra.get("options", {})
        choice = _read(sample.answer, options)
        if not options:
            if choice not in DECISIONS:
                return "neither options A) to D) nor an answer of yes, no or maybe"
            return None if "?" in sample.question else "nothing is asked"
        if choice not in options:
            return "the answer is none of the options"
        if len({tuple(_words(option)) for option in options.values()}) < len(options):
            return "two options are the same"
        return None


def _read(answer: str, options: Mapping[str, str]) -> str:
    """The canonical answer, with an option's text replaced by its letter."""
    plain = _without_bold(answer)
    return _choice(plain, options) or " ".join(_words(plain))


def _without_bold(answer: str) -> str:
    """Without bold and without quotes around the whole."""
    return _QUOTED.sub(r"\1", plain) if _QUOTED.fullmatch(plain := answer.replace("**", "").strip(" \t\n*_")) else plain


def _expanded(text: str) -> str:
    plain = unicodedata.normalize("NFKC", _LATEX.sub(" ", text)).translate(_ROUND)
    return plain.replace("\u2019", "'").replace("n't", " not").replace("as well as", "and")


def _words(text: str) -> list[str]:
    return re.findall(_WORD, _expanded(text).casefold())


class _Token(NamedTuple):
    kind: str  #: "choice", "word" or a kind of ``_KINDS``
    choice: str = ""  #: letter or decision
    sure: bool = False  #: a choice whatever follows: "B) ...", "yes, ..."


_Texts = list[tuple[str, list[str]]]  # letters and the words of their options


def _choice(plain: str, options: Mapping[str, str]) -> str | None:
    """The single letter or decision that an answer begins with, or None."""
    tokens = _tokens(plain, options)
    if not tokens or not tokens[0].choice:
        return None
    if _text_names_others(tokens, options) or (not options and _text_is_letters(tokens)):
        return tokens[0].choice
    first, *later = _split(tokens, "stop")
    stated = _claims(first)
    if not tokens[0].sure and _has_words(stated):  # "A fever", "aspirin and ibuprofen", "no difference"
        return None
    stated += [token for sentence in later for token in _claims(sentence, later=True)]
    return tokens[0].choice if len({token.choice for token in stated if token.choice}) == 1 else None


def _text_names_others(tokens: list[_Token], options: Mapping[str, str]) -> bool:
    """Whether the answer is an option that refers to others and may list them: "D) All of the above (A, B and C)", but
    not "D) All of the above or A"."""
    words = _words(options.get(tokens[0].choice, ""))
    several = not {"all", "both", "none"}.isdisjoint(words) or sum(word.upper() in LETTERS for word in words) > 1
    between = takewhile(lambda token: not token.choice, tokens[1:])
    return several and tokens[0].sure and all(token.kind != "join" for token in between)


def _text_is_letters(tokens: list[_Token]) -> bool:
    """Whether unmarked letters follow a marked one and are its text, which is not known here: "D) A, B and C"."""
    text = tokens[2:] if tokens[1:2] == [_Token("stop")] else tokens[1:]
    unmarked = not any(token.sure or token.kind == "stop" for token in text)
    return tokens[0].choice in LETTERS and tokens[0].sure and unmarked and bool(text and text[0].choice)


def _claims(sentence: list[_Token], later: bool = False) -> list[_Token]:
    """A sentence without clauses that deny choices ("C, [A, B and D are wrong]") or, in later sentences, explain."""
    clauses = _split(sentence, "pause")
    claims: list[_Token] = [] if later else clauses.pop(0)
    subject: list[_Token] = []
    for clause in clauses:
        subject += clause
        if _has_words(clause):
            if not _is_denied(subject) and not (later and _is_explanation(subject)):
                claims += subject
            subject = []
    return claims + subject


def _is_denied(clause: list[_Token]) -> bool:
    """ "is wrong", but "is not wrong" denies nothing, and "maybe not" is a hedge."""
    return sum(token.kind == "denial" for token in clause) % 2 == 1 and all(t.choice != "maybe" for t in clause)


def _is_explanation(clause: list[_Token]) -> bool:
    """ "A. [B treats infections]", but not "A. [C is also right]", "A. [or C in time]" or "no; [maybe in children]"."""
    return clause[0].kind != "join" and not any(t.kind in ("praise", "denial") or t.choice == "maybe" for t in clause)


def _has_words(clause: list[_Token]) -> bool:
    return any(token.kind not in ("choice", "join") for token in clause)


def _split(tokens: list[_Token], kind: str) -> list[list[_Token]]:
    return [list(part) for split, part in groupby(tokens, lambda token: token.kind == kind) if not split]


def _tokens(answer: str, options: Mapping[str, str]) -> list[_Token]:
    """An answer up to its reason or comparison: "B) Rest, or C because ..." is choice B, pause, join, choice C."""
    pieces = [*_PIECE.findall(_expanded(answer)), ".", "."]
    texts = [(letter, words) for letter, text in options.items() if (words := _words(text))]
    texts.sort(key=lambda item: -len(item[1]))
    tokens: list[_Token] = []
    at, listed = 0, True  # listed: no word or verb since the last choice or stop
    while at < len(pieces) - 2:
        token, at = _option(pieces, at, texts, listed) or (
            _letter(pieces, at, tokens, listed) or _decision(pieces, at, tokens) or _Token(_kind(pieces[at])),
            at + 1,
        )
        if token.kind == "end":
            break
        if token.choice and tokens and tokens[-1].kind == "denial":  # "A, not B"
            return tokens[:-1]
        opening = not tokens and token.kind in ("praise", "verb", "pause")  # "likely B", "the correct option is B"
        if token.kind != "filler" and (not opening or pieces[at - 1].lower() in ("also", "too")):
            tokens.append(token)
            listed = token.kind in ("choice", "stop") or (listed and token.kind not in ("word", "verb"))
    return tokens


def _option(pieces: list[str], at: int, texts: _Texts, listed: bool) -> tuple[_Token, int] | None:
    """Choice and next index: "B) aspirin", "B aspirin"; in a list, "aspirin", but not "aspirin poisoning" or a text
    that is a letter."""
    letter, marked = _mark(pieces, at)
    for owner, words in texts:
        if owner == letter and (marked or len(words[0]) > 1) and (end := _end_of(words, pieces, at + 1)):
            return _Token("choice", letter, marked), end
    for owner, words in texts:
        alone = listed and words[0] == _bare(pieces[at]) and "".join(words).upper() not in {*LETTERS}
        end = _end_of(words, pieces, at) if alone else None
        if end and (marked or _kind(pieces[end]) != "word" or pieces[end].upper() == f"({owner})"):
            return _Token("choice", owner, sure=marked), end  # marked: "C. difficile"
    return None


def _letter(pieces: list[str], at: int, before: list[_Token], listed: bool) -> _Token | None:
    """ "B", "(b)", "A is wrong", but not "hepatitis B", "a fever" or, after the first choice, "B. anthracis"."""
    letter, marked = _mark(pieces, at)
    if not letter or not (listed or marked) or (before and before[-1].kind == "word"):
        return None
    follower, second = pieces[at + 1 : at + 3]
    article = letter == "A" and not marked and _kind(follower) == "word" and len(_bare(follower)) > 1
    genus = before and follower == "." and second.islower() and _kind(second) == "word" and len(second) > 1
    return None if article or genus else _Token("choice", letter, marked)


def _decision(pieces: list[str], at: int, before: list[_Token]) -> _Token | None:
    """ "yes", "no, ...", "no maybe", but not "no fever" or, after a letter, "maybe"."""
    word, follower = pieces[at].lower(), pieces[at + 1].lower()
    if word not in DECISIONS:
        return None
    if before and before[0].choice in LETTERS:
        return _Token("praise")
    if word == "no" and _kind(follower) == "word" and follower not in DECISIONS:
        return None
    return _Token("choice", word, sure=_kind(follower) in ("pause", "stop", "end"))


def _kind(piece: str) -> str:
    return _KINDS.get(piece.lower(), "word")


def _bare(piece: str) -> str:
    return piece.strip(_SIGNS).casefold()


def _mark(pieces: list[str], at: int) -> tuple[str, bool]:
    """The letter at a place, or "", and whether it is marked: "B)", "B:", "B."."""
    letter = _bare(pieces[at]).upper()
    return letter if letter in {*LETTERS} else "", pieces[at][-1] in "):" or (pieces[at + 1] == "." != pieces[at + 2])


def _end_of(words: list[str], pieces: list[str], at: int) -> int | None:
    """The index after the words if they come next, signs aside; else None."""
    for word in words:
        while at < len(pieces) and not _bare(pieces[at]):
            at += 1
        if at == len(pieces) or _bare(pieces[at]) != word:
            return None
        at += 1
    return at


def _options(question: str) -> dict[str, str]:
    """The last options A to D of a question; empty if it has none."""
    for pattern in _OPTIONS:
        if options := _run(question, list(pattern.finditer(question))):
            return options
    return {}


def _run(question: str, marks: list[re.Match[str]]) -> dict[str, str]:
    """The options after the last marks A to D in this order. Marks between those belong to the texts."""
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
