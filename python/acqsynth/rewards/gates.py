"""Gates that a sample must pass before it is scored. A gate multiplies the reward, so no signal can outweigh it.

Difficulty and uncertainty are largest for text that is not a question: random tokens have a higher loss, repeated ones
more agreement and unsolvable questions more entropy than any honest sample. Gates keep such text away from the signals.

:func:`default_gates` orders them, cheap ones first; each sees only samples that passed the earlier ones. Gates that
compare or measure text use its normal form (:mod:`acqsynth.normal_form`).
"""

from __future__ import annotations

import functools
import itertools
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from acqsynth.domains import Domain, Sample
from acqsynth.domains.base import STATED
from acqsynth.normal_form import normal_form, visible
from acqsynth.rewards.answers import SampledAnswers
from acqsynth.rewards.batch import Batch, require_samples, sample_length
from acqsynth.rewards.scoring import Scorer
from acqsynth.rewards.texts import Contamination, NearCopies, words

Verdict = bool | Sample | None
Label = Callable[[Sequence[Sample]], Sequence[Sample | None]]


@runtime_checkable
class Gate(Protocol):
    """A named pass/fail check; may have the optional methods of a :class:`acqsynth.rewards.Signal`."""

    name: str

    def __call__(self, samples: Sequence[Sample]) -> Sequence[Verdict]:
        """The verdict on each of n samples: True or False; a replacement sample, which passes if it also passes the
        earlier gates; or None for undecidable, which masks the sample."""
        ...


class Sound:
    """Passes samples in which ``domain.fault`` finds no fault and no field spells a control token like ``<|im_end|>``.

    Tokenizers read such text as the token itself, so a question could end the user's turn and answer itself.

    Args:
        scorer: adds the special tokens of its student. Without it, ``<s>`` and ``</s>``, which are also HTML, count as
            such.
    """

    name = "sound"

    def __init__(self, domain: Domain, scorer: Scorer | None = None) -> None:
        self.domain = domain
        self.scorer = scorer

    def __call__(self, samples: Sequence[Sample]) -> list[bool | None]:
        control = _control(frozenset({"<s>", "</s>"}) if self.scorer is None else self.scorer.special_tokens())
        return [
            not any(map(control.search, (sample.question, sample.reasoning, sample.answer)))
            and self.domain.fault(sample) is None
            for sample in samples
        ]

    def refresh(self, student: Any) -> None:
        if self.scorer is not None:
            self.scorer.refresh(student)


class Length:
    """Inclusive bounds on the visible characters of the question, and of question, reasoning and answer together.

    Questions in GSM8K, MBPP, HumanEval and PubMedQA have 36 to 1,360 characters, whole samples up to 3,500; questions
    in the arithmetic world have as few as 8.
    """

    name = "length"

    def __init__(self, question: tuple[int, int] = (4, 2000), whole: tuple[int, int] = (6, 6000)) -> None:
        for name, (least, most) in (("question", question), ("whole", whole)):
            if not 0 <= least <= most:
                raise ValueError(f"{name}: expected (least, most) characters, got ({least}, {most})")
        self.question = question
        self.whole = whole

    def __call__(self, samples: Sequence[Sample]) -> list[bool | None]:
        return [
            self.question[0] <= len(visible(sample.question).strip()) <= self.question[1]
            and self.whole[0] <= sample_length(sample) <= self.whole[1]
            for sample in samples
        ]


class NoRepetition:
    """At most a share ``limit`` of a field's 8-character runs repeat an earlier one; fields below 16 characters pass.

    In GSM8K, MBPP, HumanEval and PubMedQA the largest share in a question, solution or program is 0.55; "the the the
    the the" has 0.67. Works for any script and ignores spacing.
    """

    name = "no_repetition"

    def __init__(self, limit: float = 0.6) -> None:
        if not 0 < limit <= 1:
            raise ValueError(f"limit: expected a share in (0, 1], got {limit}")
        self.limit = limit

    def __call__(self, samples: Sequence[Sample]) -> list[bool | None]:
        return [
            max(repetition(normal_form(text)) for text in (sample.question, sample.reasoning, sample.answer))
            <= self.limit
            for sample in samples
        ]


class NoLeak:
    """The question does not contain its answer, judged by wording.

    An answer of at least four words (counting signs), or reasoning of at least eight, leaks if the question contains
    all of it. Shorter answers occur in many honest questions, so they leak only if the question calls them the answer:
    "answer", "solution" or "result", at most three of "is", ":", "=" and the like, then the answer. The text of an
    option in a list of options ("B) ...") is not a leak, nor is "answer:" before the list or, where the question does
    not ask how many, a number of decimal places.

    Args:
        domain: its canonical form of the answer is searched for as well, and the final part if equivalent: the 5 of
            ``5 eggs``. So is any short answer, in whatever form, that the question states as "answer is" or "answer:",
            or marks by ``\\boxed{...}``, a line ``#### ...`` or a sentence "Answer - ...".
    """

    name = "no_leak"

    def __init__(self, domain: Domain) -> None:
        self.domain = domain

    def __call__(self, samples: Sequence[Sample]) -> list[bool | None]:
        return [not self._leaks(sample) for sample in samples]

    def _leaks(self, sample: Sample) -> bool:
        asked = visible(sample.question)
        if "how many" not in asked.casefold():
            asked = _PLACES.sub(" ", asked)
        options = list(_OPTION.finditer(asked))
        stem = words(normal_form(_OPTION.sub(" ", asked) if len(options) > 1 else asked))
        # "The answer is:" before a list states none of its options, but "The answer is B." before or after it does.
        for option, later in reversed(list(itertools.pairwise(options))):
            if ord(_mark(later)) == ord(_mark(option)) + 1:
                asked = f"{asked[: option.start()]}\n|\n{asked[option.start() :]}"
        question = words(normal_form(asked))
        reasoning = words(normal_form(sample.reasoning))
        if len(reasoning) >= _LONG_REASONING and _holds(stem, reasoning):
            return True

        def leaks(answer: str) -> bool:
            part = words(normal_form(answer))
            return bool(part) and (_holds(stem, part) if len(part) >= _LONG_ANSWER else _stated(question, part))

        answers = {sample.answer, self.domain.canonical(sample.answer)}
        if any(map(leaks, answers)):
            return True
        others = {final for answer in answers if (final := self.domain.answer_of(answer)) and leaks(final)}
        if len(words(sample.answer)) < _LONG_REASONING:
            others |= {final for marked in _marked(asked) if (final := self.domain.answer_of(marked))}
        return any(self.domain.equivalent([sample] * len(others), sorted(others)))


class New:
    """Rejects near copies (:class:`NearCopies`) of a seed question or of one that passed an earlier call.

    Copies within one call pass or fail together, since results must not depend on the order within a group; their
    novelty is lower instead.
    """

    name = "new"

    def __init__(self, seeds: Sequence[Sample] = (), **options: Any) -> None:
        """``options`` are passed to NearCopies; ``capacity`` applies to the archive only."""
        require_samples("seeds", seeds)
        self.seeds = NearCopies(**(options | {"capacity": max(1, len(seeds))}))
        self.seeds.add(sample.question for sample in seeds)
        self._options = options
        self.archive = NearCopies(**options)

    def __call__(self, samples: Sequence[Sample]) -> list[bool | None]:
        return [self.seeds.find(s.question) is None and self.archive.find(s.question) is None for s in samples]

    def accept(self, samples: Sequence[Sample]) -> None:
        self.archive.add(sample.question for sample in samples)

    def __len__(self) -> int:
        return len(self.archive)

    def state_dict(self) -> dict[str, Any]:
        return {"texts": self.archive.texts()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.archive = NearCopies(**self._options)
        self.archive.add(state["texts"])


class NotInEvaluation:
    """Rejects questions that share 13 words in a row with an evaluation question, or contain a whole shorter one (see
    :class:`Contamination`)."""

    name = "not_in_evaluation"

    def __init__(self, rows: Sequence[Sample], **options: Any) -> None:
        require_samples("rows", rows)
        self.contamination = Contamination((row.question for row in rows), **options)

    def __call__(self, samples: Sequence[Sample]) -> list[bool | None]:
        return [sample.question not in self.contamination for sample in samples]


class Fluent:
    """Passes samples whose loss per token on each field, read as plain text, is at most the seeds' mean plus
    ``deviations`` times their standard deviation (taken as at least a tenth of the mean).

    The fields are the question and, from 32 characters on, reasoning and answer, each compared with the same field of
    the seeds. Rejects random tokens and word salad, whose loss is far above any text's, even a hard question's.

    Args:
        student, options: as :class:`acqsynth.rewards.scoring.Scorer`; ``reduction`` is ignored.
        seeds: at least one; scored on the first call.
        deviations: standard deviations allowed above the mean.

    Raises:
        ValueError: no seeds; as Scorer.
    """

    name = "fluent"

    def __init__(self, student: Any, seeds: Sequence[Sample], *, deviations: float = 4.0, **options: Any) -> None:
        require_samples("seeds", seeds, some=True)
        self.scorer = Scorer(student, ("loss",), **(options | {"reduction": "mean"}))
        self.seeds = seeds
        self.deviations = deviations
        self._limits: dict[str, float] | None = None

    def __call__(self, samples: Sequence[Sample]) -> list[bool | None]:
        fields = [(i, field, text) for i, sample in enumerate(samples) for field, text in _prose(sample)]
        passes: list[bool | None] = [True] * len(samples)
        limits = self.limits()
        losses = self.scorer([text for _, _, text in fields]).values["loss"]
        for (i, field, _), loss in zip(fields, losses, strict=True):
            if loss is None:
                passes[i] = None
            elif passes[i] and loss > limits.get(field, limits["question"]):
                passes[i] = False
        return passes

    def refresh(self, student: Any) -> None:
        self.scorer.refresh(student)
        self._limits = None

    def limits(self) -> dict[str, float]:
        """Field -> largest passing loss in nats per token; fields that no seed has use the question's limit."""
        if self._limits is None:
            losses: dict[str, list[float]] = {}
            fields = [pair for sample in self.seeds for pair in _prose(sample)]
            found = self.scorer([text for _, text in fields]).values["loss"]
            for (field, _), loss in zip(fields, found, strict=True):
                if loss is not None:
                    losses.setdefault(field, []).append(loss)
            if "question" not in losses:
                raise RuntimeError("seeds: no question could be scored, so there is nothing to compare with")
            self._limits = {}
            for field, values in losses.items():
                mean = statistics.fmean(values)
                self._limits[field] = mean + self.deviations * max(statistics.pstdev(values), 0.1 * mean)
        return self._limits


class Labelled:
    """Passes samples with a label, which replaces the generator's answer, as students are trained on labels.

    Args:
        label: maps n samples to labelled samples, with None for those that have no label.
    """

    name = "labelled"

    def __init__(self, label: Label) -> None:
        self.label = label

    def __call__(self, samples: Sequence[Sample]) -> list[Verdict]:
        return [False if sample is None else sample for sample in self.label(samples)]


class Verified:
    """Rejects samples whose own answer ``domain.verify`` refutes; undecided samples pass."""

    name = "verified"

    def __init__(self, domain: Domain) -> None:
        self.domain = domain

    def __call__(self, samples: Sequence[Sample]) -> list[bool | None]:
        return [verdict is not False for verdict in Batch.of(samples).verified(self.domain)]


class Answerable:
    """Passes samples whose answer equals a share ``least`` or more of the student's k, or that the domain confirms.

    The student's answers to an unsolvable question scatter, and a wrong answer matches none of them. If the domain
    cannot confirm answers, questions that the student never solves are rejected too.

    Args:
        answers: sampled answers, shared with the signals.
        least: share in (0, 1]; by default two of the k answers, as one may match by chance (one if k is 1).
    """

    name = "answerable"

    def __init__(self, answers: SampledAnswers, least: float | None = None) -> None:
        if least is not None and not 0 < least <= 1:
            raise ValueError(f"least: expected a share in (0, 1], got {least}")
        self.answers = answers
        self.least = least or min(2, answers.k) / answers.k

    def __call__(self, samples: Sequence[Sample]) -> list[bool | None]:
        batch = Batch.of(samples)
        known = batch.verified(self.answers.domain)
        open_to_question = [sample for sample, verdict in zip(samples, known, strict=True) if verdict is not True]
        shares = iter(self.answers.shares(batch.part(open_to_question)))
        return [verdict is True or next(shares) >= self.least - 1e-9 for verdict in known]


class Check:
    """A gate built from a function of one sample, for custom conditions."""

    def __init__(self, name: str, function: Callable[[Sample], bool]) -> None:
        self.name = name
        self.function = function

    def __call__(self, samples: Sequence[Sample]) -> list[bool | None]:
        return [self.function(sample) for sample in samples]


def sample_gates(domain: Domain, scorer: Scorer | None = None) -> list[Gate]:
    """The default gates that need nothing but the sample; the scorer is that of :class:`Sound`."""
    return [Sound(domain, scorer), Length(), NoRepetition(), NoLeak(domain)]


def default_gates(
    domain: Domain,
    *,
    seeds: Sequence[Sample],
    shown: Sequence[Sample] = (),
    evaluation: Sequence[Sample] = (),
    label: Label | None = None,
    student: Any = None,
    answers: SampledAnswers | None = None,
    **options: Any,
) -> list[Gate]:
    """The default gates; ``not_in_evaluation``, ``labelled``, ``fluent`` and ``answerable`` only with ``evaluation``,
    ``label``, ``student`` and ``answers``. Arguments are as in :meth:`acqsynth.rewards.ComposedReward.default`;
    ``shown`` are rows besides the seeds that prompts show, so samples may not copy them, and ``options`` are passed to
    :class:`acqsynth.rewards.scoring.Scorer`."""
    fluent = None if student is None else Fluent(student, seeds, **options)
    gates: list[Gate | None] = [
        *sample_gates(domain, None if fluent is None else fluent.scorer),
        New([*seeds, *shown]),
        NotInEvaluation(evaluation) if evaluation else None,
        None if label is None else Labelled(label),
        fluent,
        Verified(domain),
        None if answers is None else Answerable(answers),
    ]
    return [gate for gate in gates if gate is not None]


def repetition(text: str) -> float:
    """Share of 8-character runs that occurred earlier in the text; 0 below 16 characters."""
    plain = " ".join(text.split())
    if len(plain) < 16:
        return 0.0
    runs = [plain[i : i + 8] for i in range(len(plain) - 7)]
    return 1 - len(set(runs)) / len(runs)


@functools.lru_cache
def _control(tokens: frozenset[str]) -> re.Pattern[str]:
    """Matches these tokens and those of the common chat templates."""
    return re.compile("|".join([_CONTROL, *map(re.escape, sorted(tokens))]))


# Control tokens of the common chat templates; DeepSeek's bars are full-width.
_CONTROL = (
    r"<\|[A-Za-z][\w/.-]{2,40}\|>|<\uff5c[^\n<>]{1,40}\uff5c>|<[be]os>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>"
    r"|<end_of_utterance>|\[/?(?:INST|SYSTEM_PROMPT)\]|<</?SYS>>|\[\|(?:system|user|assistant|endofturn)\|\]|<[BE]OS_TOKEN>"
    r"|<seed:[be]os>|<(?:SPECIAL|extra_id)_\d+>"
)
_LONG_ANSWER = 4  # words
_LONG_REASONING = 8
_PROSE = 32  # characters from which a solution's loss is comparable to that of prose
_MARKERS = frozenset({"answer", "answers", "solution", "result", "ans"})
_FILLERS = frozenset({"is", "are", "be", "was", "equals", "should", "must", "will", "the", "a", "an", ":", "=", "("})
_GOES_ON = frozenset({"or", "and", ",", "/", "+", "-", "*", "^", "%"})
# An option in a list: "B) ...", "(c) ...", "D. ..." or a line "a) ...", up to the end of the line or the next label.
_OPTION = re.compile(
    r"(?:(?:^|\s)(?:[A-H][).:]|\([A-Ha-h]\))|^[a-h]\))\s.*?(?=$|\n|\s(?:[B-H][).:]|\([B-Hb-h]\))\s)", re.MULTILINE
)


# A complete box that holds something, with braces of two levels in it; not a blank within a formula.
_BOX = re.compile(
    r"(?<![-+*/]\s)(?<![-+*/])\\f?boxed\s*+\{(?=\s*+[^\s}])(?!\s*+\\[hv]?phantom)"
    r"(?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+\}(?!\s*[-+*/=])"
)
# The form of an answer, unless the question asks how many.
_PLACES = re.compile(r"\b\d+ (?:decimals|decimal places?|significant (?:figures?|digits?))\b", re.IGNORECASE)
_HASHES = re.compile(r"(?<=\n)####[ \t]*\S.*$", re.MULTILINE)  # in the first line it is a heading
_DASHED = re.compile(
    r"(?:^|(?<=[.?!:;]))[ \t]*(?P<open>\()?(?:the )?(?:final |correct )?ans(?:wer)?\s+"
    r"(?:[-\u2013\u2014=]+>?|\u2192)[ \t]+"
    r"(?P<value>\S(?(open)[^\n()]*|[^\n]*))",
    re.IGNORECASE | re.MULTILINE,
)


def _marked(question: str) -> list[str]:
    """The parts of a question that mark a final answer."""
    found = [match[0] for pattern in (STATED, _BOX, _HASHES) for match in pattern.finditer(question)]
    return found + [f"Answer: {match['value']}" for match in _DASHED.finditer(question)]


def _mark(option: re.Match[str]) -> str:
    return option[0].strip("( \n")[0]


def _prose(sample: Sample) -> list[tuple[str, str]]:
    solution = [("reasoning", sample.reasoning), ("answer", sample.answer)]
    return [("question", sample.question), *((field, text) for field, text in solution if len(text) >= _PROSE)]


def _holds(text: Sequence[str], part: Sequence[str]) -> bool:
    """Whether ``text`` contains the words of ``part`` in sequence; a string search, which is linear."""
    return "\n".join(["", *part, ""]) in "\n".join(["", *text, ""])


def _stated(question: list[str], answer: list[str]) -> bool:
    """Whether the question contains a marker word, then at most three fillers, then the answer."""
    for begin in range(len(question) - len(answer) + 1):
        if question[begin : begin + len(answer)] != answer:
            continue
        i, fillers = begin - 1, 0
        while i >= 0 and question[i] in _FILLERS and fillers < 3:
            i, fillers = i - 1, fillers + 1
        # "Is the answer 7 or 8?" and "the result of 7 + 8" state nothing: such a continuation is not a leak.
        after = question[begin + len(answer)] if begin + len(answer) < len(question) else ""
        if i >= 0 and question[i] in _MARKERS and after not in _GOES_ON:
            return True
    return False
