"""Reads answers as numbers or expressions with units, and reduces their equality to pairs for math-verify."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from itertools import pairwise
from math import gcd
from typing import NamedTuple

from acqsynth.domains.math_check import LONGEST

_INTEGER = re.compile(r"-?\d+")
_DECIMAL = re.compile(r"([-+]?)(?=\.?\d)(\d{1,3}(?:,\d{3})+|\d*)(\.\d*)?")
_FRACTION = re.compile(r"([-+]?)(?:(\d+)\s+(?!0\d))?(\d+)\s*/\s*(\d+)")
_FRAC = re.compile(r"\\[dt]frac(?![A-Za-z])")
_LATEX_FRACTION = re.compile(r"([-+]?)\s*(\d*)\s*\\frac\{(\d+)\}\{(\d+)\}")
_LITERAL = re.compile(r"0(?:[xX][0-9A-Fa-f]+|[oO][0-7]+|[bB][01]+)")
# Arguments of one character need no braces in LaTeX.
_FIRST_ARGUMENT = re.compile(r"\\(frac|sqrt)(?:\s*(\d)|\s+([A-Za-z]))")
_SECOND_ARGUMENT = re.compile(r"\\frac(\{(?:[^{}]|\{[^{}]*\})*+\})\s*([0-9A-Za-z])")
_LAYOUT = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])|\\[!,;:]|~")
_GAP = re.compile(r"(?<!\\)\\ |\\q?quad(?![A-Za-z])|(?<=\d)(?:\\[,;:]|~)(?=\s*\d)")  # "\\\\ " ends a row
_DOLLARS = re.compile(r"(?<!\\)\$((?:[^$\\]|\\.)++)\$(?![\d.])")
_ROOT = re.compile(r"√\s*([\d.]*\d|[A-Za-z]|\([^()]*\))")
_DEGREE = re.compile(r"\^\{?\\circ\}?|\\degree(?![A-Za-z])|°")
_ANGLE = re.compile(rf"([\d.]*\d|\\?[A-Za-z]+|\([^()]*\)|\{{[^{{}}]*\}})\s*(?:{_DEGREE.pattern})")
_OF_ANGLES = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_CURRENCY = re.compile(r"^([-+]?)\s*(?:US)?(\\?\$|[€£¥₹])\s*([-+]?)(?=[\d.])")
_CURRENCY_LAST = re.compile(r"(?<=\d)\s*(\\?\$|[€£¥₹¢])$")
_SCIENTIFIC = re.compile(
    r"([-+]?\d+(?:\.\d+)?)(?:[eE]|\s*(?:x|\*|\\times|\\cdot)\s*10\s*\^\s*(\{)?)([-+]?\d{1,3})(?(2)\})"
)
_RECURRING = re.compile(r"([-+]?)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\{(\d+)\}|\((\d+)\))")
_MODULO = re.compile(r"\(?\\?[pb]?mod(?:ulo)?(?![A-Za-z])\s*\{?(\d+|[A-Za-z])\}?\)?")
_COMPARED = re.compile(r"\\([lg]e)q?(?:slant)?(?![A-Za-z])")
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(pi(?![A-Za-z])|(?:(?:arc)?(?:sin|cos|tan)|cot|csc|exp|ln|log)(?=\s*(?:[(\\{^_\d]|[A-Za-z](?![A-Za-z]))))"
)
_EXPONENT = re.compile(r"\^(?:\(([^()]*)\)|\s*(-\s*(?:[\d.]*\d|[A-Za-z]))(?!\s*\^))")
_BUILDER = re.compile(r"\\\{\s*([A-Za-z])\s*(?:\\mid|[:|])\s*(.*(?<![A-Za-z])\1(?![A-Za-z]).*)\\\}")
_REALS = re.compile(r"(?:[A-Za-z]\s*\\in\s*)?\\mathbb(?:\s*R|\{R\})")
_DATE = re.compile(r"\d+([-/])\d+\1\d+")
_RANGE = re.compile(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)")
_TIME = re.compile(r"(\d?\d):([0-5]\d)")
_RATIO = re.compile(r"(?!\d?\d(?::[0-5]\d){2}$)[1-9]\d*(?:\s*:\s*[1-9]\d*){2,}")  # 1:10:20 may be a time
_SMALL = [  # superscripts and subscripts
    (sign, re.compile(f"[{''.join(c for c in map(chr, range(0x3000)) if unicodedata.decomposition(c)[:5] == kind)}]+"))
    for sign, kind in (("^", "<supe"), ("_", "<sub>"))
]
_AFTER_DIGIT = re.compile("(?<=\\d)(?=[¼-¾⅐-⅞↉])")  # in a mixed number
# Possessive quantifiers, so that no answer causes backtracking.
_UNIT = re.compile(
    r"(?<=[\d})])(\s*+)((?=[A-Za-z\\])(?:\\(?:text|textrm|mathrm|mbox)\{[A-Za-z .,/-]++\}|[A-Za-z ./-])++)"
    r"(?:(?:\^|(?<=[A-Za-z]))\{?([23])\}?)?$"
)
_SEPARATOR = re.compile(r"\s*+,?\s*+\\(?:text|textrm|mathrm|mbox)\{,?\s*+(and|or)\s*+\}\s*+")
_ALTERNATIVE = re.compile(r"(?<!\s),?\s+(?:or|and)\s+|[,;]\s*(?=[A-Za-z](?:_\{\w+\}|\w)*\s*=)")
_COMPOUND = re.compile(r"(?:(?<=\})\s*|(?<=[A-Za-z.}]),?\s+)(?:and\s+)?(?=\d)")
_PLUS_MINUS = re.compile(r"(?<!\\)[{(][^{}]*\\pm(?![A-Za-z])(?!.*\\mp)")  # within a formula
_MIXED = re.compile(r"[-+]?\d+\s+and\s+(?:\d+\s*/|\\frac)")  # "1 and 1/2" may be a sum
_TEXT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\{([^{}]*)\}")
#: Number words that multiply the number before them.
SCALES = {
    "dozen": 12, "score": 20, "gross": 144,
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15,
    "lakh": 10**5, "crore": 10**7,
}  # fmt: skip

_MAGNITUDES = {"k": "thousand", "K": "thousand", "M": "million", "B": "billion"}  # after an amount of money

CURRENCIES = {"€": "euro", "£": "gbp", "¥": "yen", "₹": "rupee", "¢": "cent"}  # anything else is the dollar

#: Unicode signs -> LaTeX.
SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2044": "/", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
                       "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≈": r"\approx ", "≡": r"\equiv ",
                       "≤": r"\le ", "≥": r"\ge ", "∅": r"\emptyset ",
                       "±": r"\pm ", "≠": r"\ne ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap "})  # fmt: skip

#: Aliases of units; any other word of three letters or more is also a unit, in the singular.
UNITS = {
    name: unit
    for unit, names in {
        "dollar": "usd", "euro": "eur", "gbp": "", "pound": "", "lb": "", "cent": "", "yen": "", "am": "", "pm": "",
        "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
        "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "mi per h": "mph", "km per h": "kph kmph",
        "mg": "milligram", "g": "gram", "kg": "kilogram", "oz": "ounce", "ml": "milliliter millilitre",
        "l": "liter litre", "s": "sec second", "min": "minute", "h": "hr hour", "day": "", "week": "wk",
        "kb": "kilobyte", "mb": "megabyte", "gb": "gigabyte", "tb": "terabyte",
        "year": "yr", "hz": "hertz", "degree": "deg", "celsius": "", "fahrenheit": "", "person": "people",
        "child": "children", "man": "men", "woman": "women",
    }.items()
    for name in (unit, *names.split())
}  # fmt: skip

#: Units that differ from others only in the case of a letter.
CASED = frozenset({"Mg", "Ms", "Mm", "MW", "MV", "MJ", "MN", "MA", "ML", "Gb", "Mb", "kb", "Kb", "Tb"})

#: Words after a number that are not units: they change the value, or belong to a formula.
NO_UNITS = frozenset(
    {
        *("and", "or", "minus", "plus", "divided", "squared", "cubed", "factorial", "choose", "base", "mod", "modulo"),
        *("remainder", "negative", "not", "than", "over", "multiplied", "percent", "percentage", "half", "halve"),
        *("quarter", "sqrt", "sin", "cos", "tan", "cot", "csc", "log", "exp", "lim", "max"),
        *("gcd", "lcm", "det", "inf", "infty", "infinity", "alpha", "beta", "gamma", "delta", "epsilon", "theta"),
        *("lambda", "rho", "sigma", "tau", "phi", "psi", "omega"),
    }
)

#: Cardinals and ordinals; ``SCALES`` come first.
_NUMBER_WORD = re.compile(
    r"zero|one|two|(?:twen|thir|four|for|fif|six|seven|eigh|nine)(?:ty|teen|tieth|teenth)|\w*illion(?:th)?|"
    r"three|four(?:th)?|five|fifth|third|six(?:th)?|seven(?:th)?|eighth?|nine|ninth|ten(?:th)?|eleven(?:th)?|twel(?:ve|fth)|"
    r"(?:hundred|thousand|lakh|crore)(?:th)?"
)

_ORDINAL = re.compile(r"(?:st|nd|rd|th)s?")

#: Units that are understood if none is written, and omitted from the canonical form.
UNDERSTOOD = frozenset({("dollar",), ("degree",)})

_LABEL = re.compile(
    r"\\(?:text|mathrm)\{[^{}]*\}|[A-Za-z](?:_\{?\w+\}?)?(?:\([A-Za-z0-9, ]*\))?|"
    r"[A-Za-z]{3,}(?: [A-Za-z]+)*|[A-Z]{2}|\\overline\{[A-Z]{2}\}|m? ?\\angle ?[A-Z]+|"
    r"\([A-Za-z](?:_\{?\w+\}?)?(?:,\s*[A-Za-z](?:_\{?\w+\}?)?)+\)"
)
_ZEROS = re.compile(r"(?<=\d)(?<!,\d{3}),(?=0\d\d(?!\d|,\d{3}(?!\d)))")  # never before a part of its own
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SPACED = re.compile(r"(?<![\w.,^])(?<!\d )\d{1,3}(?: \d{3})+(?!\d|,\d| ?[\d/])")  # thousands, not a mixed number
_SEVERAL = re.compile(r"\\(?:pm|mp|[lg]eq?|[lg]t|in|cup)(?![A-Za-z])|[<>±]")  # one part here may be several there
_INEQUALITY = re.compile(r"[<>]|\\[lg](?:eq?|t)(?![A-Za-z])")
_EQUALS = re.compile(r"(?<![<>!:=\\])=(?!=)")
_TIMES = re.compile(r"(?<=\d)(?<!\b0)\s*x\s*(?=\d)")  # not in 0x10
_APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])")
# Numbers and operations; commas only in thousands.
_CLOSED = re.compile(
    r"(?=.*(?:\d|\\pi))(?:(?<=\d),(?=\d{3}(?!\d))|[\d\s.+\-*/^!(){}\[\]]|\\(?:times|cdot|div|frac|sqrt|pi)(?![A-Za-z]))+"
)
_DECIMALS = re.compile(r"[-+]?[\d,]*(?:\.(\d+))?")
# Words -> signs, or the words that are read.
_SPELT = [
    (re.compile(pattern), sign)
    for pattern, sign in (
        (r"\b(?:[Pp]ositive )?[Ii]nfinity\b", r"\\infty"),
        (r"^(?:[Nn]egative|[Mm]inus) (?=[\d.\\])", "-"),
        (r"\bper cent\b", "percent"),
        (r"\bUS dollar", "dollar"),
        (r"\bsq\.? (?=[A-Za-z])", "square "),
        (r"\bcu\.? (?=[A-Za-z])", "cubic "),
        (r"(?<=[A-Za-z]) squared$", "^2"),
        (r"(?<=[A-Za-z]) cubed$", "^3"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
    )
]
_INNER_CURRENCY = re.compile(r"\\?\$(?=[\d.])")
_MOST_SIDES = 6  # each may take a check by math-verify
# Two letters alone are a product, except "no".
_WORDS = re.compile(r"(?:[Nn][Oo]|[A-Za-z]{3,}|[A-Za-z]{2}(?=[ -].*[A-Za-z]{3}))(?:[ -][A-Za-z]+)*")


class Quantity(NamedTuple):
    """A parsed answer."""

    form: str  #: canonical form without the unit
    plain: str  #: as LaTeX without the unit
    unit: tuple[str, ...]  #: words of the unit; ``("%",)`` for a percentage


def quantity(answer: str) -> Quantity:
    """Reads an answer; one longer than ``LONGEST`` characters is compared only as text."""
    if len(answer) > LONGEST:
        return Quantity(" ".join(answer.split()), answer, ())
    plain, unit = _alternatives(_plain(answer))
    number = _rational(plain)
    if number is not None:
        while unit and unit[0] in SCALES:
            number, unit = number * SCALES[unit[0]], unit[1:]
        kept = _DECIMAL.fullmatch(plain) and number == _rational(plain)
        return Quantity(str(number), plain if kept else str(number), unit)  # math-verify misreads 1e3, 0x10, 1 3/4
    if _RATIO.fullmatch(plain):
        terms = [int(term) for term in plain.split(":")]
        return Quantity(":".join(str(term // gcd(*terms)) for term in terms), plain, unit)
    if not any(word in SCALES for word in unit):
        form = plain.casefold() if _WORDS.fullmatch(plain) else _without_spaces(plain)
        return Quantity(form, plain, unit)
    plain = _plain(answer)
    return Quantity(_without_spaces(plain), plain, ())


def _alternatives(plain: str) -> tuple[str, tuple[str, ...]]:
    """As :func:`_with_unit`, with alternatives as a set in one order: ``x = 3 or x = -2`` and ``x = 3 and -2`` become
    ``x = {-2, 3}``; ``y = 2, x = 1`` becomes ``(x, y) = (1, 2)``, and ``5 feet 3 inches`` ``5 ft 3 in``."""
    measures = [_with_unit(part) for part in _COMPOUND.split(plain)]
    compound = all(unit and _known(unit[0]) and _rational(number) is not None for number, unit in measures)
    if len(measures) > 1 and compound:
        return " ".join(f"{number} {' '.join(unit)}" for number, unit in measures).replace("pound", "lb"), ()
    if plain.count(r"\pm") == 1 and _PLUS_MINUS.search(plain):
        value, unit = _with_unit(plain)
        name, equals, value = value.rpartition("=")
        plus, minus = (value.replace(r"\pm", sign) for sign in "+-")
        return rf"{name}{equals}\{{{plus}, {minus}\}}", unit
    parts = [_with_unit(part) for part in ([plain] if _MIXED.match(plain) else _ALTERNATIVE.split(plain))]
    values = [_EQUALS.split(part) for part, _ in parts]
    units = {unit for _, unit in parts if unit}
    names = {name.strip() for name, *rest in values if rest}
    unit = next(iter(units), ())
    listed = not (_SEVERAL.search(plain) or any(len(value) > 2 or _WORDS.fullmatch(value[-1]) for value in values))
    if listed and " or " not in plain and len(names) == len(parts) > 1 and len(units) < 2:
        solved = sorted((name.strip(), value.strip()) for name, value in values)
        left, right = (", ".join(side) for side in zip(*solved, strict=True))
        return f"({left}) = ({right})", unit
    if len(parts) > 1 and listed and len(units) < 2 and len(names) < 2 and not SCALES.keys() & unit:
        name = "".join(f"{name} = " for name in names)
        return rf"{name}\{{{', '.join(sorted(value[-1].strip() for value in values))}\}}", unit
    return (" or ".join(sorted(plain.split(" or "))), ()) if " or " in plain else _with_unit(plain)


def _with_unit(plain: str) -> tuple[str, tuple[str, ...]]:
    """An answer without its unit, and the unit."""
    before: tuple[str, ...] = ()
    if currency := _CURRENCY.match(plain):
        before = (CURRENCIES.get(currency[2], "dollar"),)
        plain = (currency[1] or currency[3]) + re.sub(r"/(?=[A-Za-z]{2})", " per ", plain[currency.end() :])
        plain = re.sub(r"(?<=\d)\s?([kKMB])$", lambda letter: f" {_MAGNITUDES[letter[1]]}", plain)
    if percent := re.search(r"(?<!\s)\s*+(?:%|\\text\{\s*percent\}|\bpercent)$", plain):
        return plain[: percent.start()].strip(), ("%",)
    if currency := _CURRENCY_LAST.search(plain):
        return plain[: currency.start()], (CURRENCIES.get(currency[1], "dollar"),)
    if _OF_ANGLES.search(plain):
        plain = _ANGLE.sub(r"(\\frac{\1\\pi}{180})", plain)
    elif degree := _DEGREE.search(plain):
        if degree.end() == len(plain) and _rational(plain[: degree.start()].strip()) is not None:
            return plain[: degree.start()].strip(), ("degree",)
        plain = re.sub(r"(?<=[\d})])\s*([CF])$", r" \1", _DEGREE.sub("", plain))
    found = _UNIT.search(plain)
    if found is None:
        return plain, before
    spaced = bool(found[1]) or "\\" in found[2]
    written = _TEXT.sub(r" \1 ", found[2]).replace(".", "").replace("/", " per ").split()
    if not written or not _are_units([*before, *written], spaced):
        return plain, before
    words = " ".join(map(_unit_word, written)).split()
    if found[3]:
        words[-1] += f"^{found[3]}"
    for name, power in (("square", "^2"), ("cubic", "^3")):
        if words[0] == name and len(words) > 1:
            words = [words[1] + power, *words[2:]]
    if words[0] in ("degree", "C", "F") and len(words) <= 2:
        words = [{"C": "celsius", "F": "fahrenheit"}.get(words[-1], words[-1])]
    scales = tuple(word for word in words if word in SCALES)
    rest = tuple(word for word in words if word not in SCALES)
    return plain[: found.start()].strip(), scales + (rest if rest[:1] == before else before + rest)


def _unit_word(word: str) -> str:
    """A unit's word in the singular, abbreviated if it has an abbreviation."""
    if (len(word) == 1 and word != "L") or word in CASED:
        return word
    word = word.casefold()
    if word in NO_UNITS:
        return word
    plural = re.fullmatch(r"(\w+[^s])s", word)
    single = plural[1] if plural and (len(word) > 3 or plural[1] in UNITS) else word
    return UNITS.get(word) or UNITS.get(single) or single


def _are_units(written: list[str], spaced: bool) -> bool:
    """Whether words are units or a plain noun phrase: ``brown eggs``, but not ``times x``."""
    before = ""
    for i, (letters, word) in enumerate(zip(written, map(_unit_word, written), strict=True)):
        if word in SCALES:
            fits = True
        elif word in NO_UNITS or word.removesuffix("^2") in NO_UNITS or _NUMBER_WORD.fullmatch(word):
            fits = False
        elif not spaced:
            fits = len(word) > 1 and _known(word)
        elif len(letters) == 1:  # a unit or the article, not a variable
            measured = not before or before in SCALES or before in ("per", "an", "square", "cubic") or _known(before)
            fits = (measured and _known(word)) or (word == "a" and 0 < i < len(written) - 1)
        else:
            fits = (i > 0 or len(letters) > 2 or _known(word)) and (before, word) != ("time", "the")
        if not fits:
            return False
        before = word
    return True


# Functions and products of variables after a coefficient: 2sinx, 3abc.
_FACTORS = re.compile(r"(?:arc)?(?:sin|cos|tan|csc|cot|log|exp)[a-rt-z]?|[abc]{2,3}|[xyz]{2,3}")


def is_glued_unit(number: str, glued: str) -> bool:
    """Whether what directly follows a number is its unit: not a variable, a clock time, a scale or an ordinal, except
    that of a fraction (``2/3rds``)."""
    letters = glued.rstrip("²³")
    word = _unit_word(letters)
    if not letters.isalpha() or word in NO_UNITS or word in SCALES or word in ("am", "pm"):
        return False
    if _FACTORS.fullmatch(word):
        return False
    if _ORDINAL.fullmatch(letters):
        return "/" in number
    if len(letters) == 1:
        return letters in "gmhlL" or (letters == "s" and "." in number)  # 90s are a decade
    return _known(word) or (len(letters) > 2 and not _NUMBER_WORD.fullmatch(word))


def _known(word: str) -> bool:
    """Whether a word is a unit of measure."""
    return word.partition("^")[0] in {*UNITS.values(), *CASED, "C", "F"}


def _agree(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether one unit is missing, or is only more specific than the other: ``egg`` and ``brown egg``, not ``mile`` and
    ``nautical mile``, ``mile per hour`` or another product, nor ``m per s`` and ``s per m``."""
    if "pound" in (*a, *b):  # money or weight
        a, b = (tuple("pound" if word in ("lb", "gbp") else word for word in unit) for unit in (a, b))
    fewer, more = sorted((a, b), key=lambda unit: len(set(unit)))
    rest = set(more) - set(fewer)
    products = (
        {word, after} & rest
        for word, after in pairwise(more)
        if _known(after) and after != "in" and word not in ("in", "man")
        if _known(word) or word in ("nautical", "light")
    )
    return not fewer or (_placed(fewer) <= _placed(more) and "per" not in rest and not any(products))


def _placed(unit: tuple[str, ...]) -> set[tuple[str, bool]]:
    """The words of a unit, and whether each comes after "per"."""
    return {(word, "per" in unit[:i]) for i, word in enumerate(unit)}


def compare(truth: Quantity, given: Quantity) -> bool | list[tuple[str, str]]:
    """Whether two answers are equal, or the pairs of which math-verify must find one equal."""
    if (truth.form, truth.unit) == (given.form, given.unit):
        return True
    if not _agree(truth.unit, given.unit):
        return False
    if truth.form == given.form or any(a == b for a, b in _sides(truth.plain, given.plain)):
        return True
    if {truth.unit, given.unit} & {("am",), ("pm",)}:
        return truth.form.removesuffix(":00") == given.form.removesuffix(":00")  # 10:30 is not a ratio
    pairs = [(truth, given)]
    if (truth.unit == ("%",)) != (given.unit == ("%",)) and not _differ_in_reading(truth.plain, given.plain):
        pairs.append((_hundredth(truth), _hundredth(given)))
        if pairs[-1][0].form == pairs[-1][1].form:
            return True
    unlike = [(a.plain, b.plain) for a, b in pairs if _worth_checking(a.form, b.form)]
    sides = [pair for a, b in unlike for pair in _sides(a, b)]
    return [pair for pair in sides if _of_a_kind(*pair) and not _differ_in_reading(*pair)]


def _differ_in_reading(truth: str, given: str) -> bool:
    """Whether one answer may be a time or a range and the other not; for ``2:3``, ``10:15`` can only be a ratio."""
    ratio = ":" in truth and not _TIME.fullmatch(truth)
    return _is_time_or_range(truth) or (_is_time_or_range(given) and not ratio)


def _is_time_or_range(plain: str) -> bool:
    """Whether an answer reads as a time or a range: ``10:30`` and ``5-6``, but not the ratio ``3:10``, in lowest terms,
    nor the difference ``6-5``."""
    if ends := _RANGE.fullmatch(plain):
        return Fraction(ends[1]) < Fraction(ends[2])
    time = _TIME.fullmatch(plain)
    return time is not None and gcd(int(time[1]), int(time[2])) > 1


def _of_a_kind(truth: str, given: str) -> bool:
    """Whether two answers may have as many parts, in brackets that may mean the same. math-verify takes ``5,5`` for 5,
    and a set for a pair."""
    (opens, parts), (opened, more) = _parts(truth), _parts(given)
    brackets = {opens, opened}
    if brackets == {"{"}:
        return True  # {1,1} is {1}
    others = [answer for answer in (truth, given) if not _INEQUALITY.search(answer)]
    if len(others) == 1 and not re.search(r"[(\[]", others[0]):
        return False  # 3 < x < 4 may be (3, 4), but not 3, 4
    if "[" in brackets and len(brackets) > 1 and (parts, more) == ({1}, {1}):
        return False  # a list of one number is not a number
    mixed = "{" in brackets and not brackets.isdisjoint("([")
    return not (mixed and max(parts) > 1) and bool(parts & more or _SEVERAL.search(truth + given))


def _parts(plain: str) -> tuple[str, set[int]]:
    """The opening bracket around an answer, if any, and the possible numbers of parts: ``2,100`` is one or two."""
    plain = re.sub(r"\\([{}])", r"\1", re.sub(r"^[A-Za-z]\s*\\in(?![A-Za-z])", "", plain)).strip()
    depth, commas, certain = 0, [1, 1], [1, 1]  # parts by depth
    whole = plain.startswith(("(", "[", "{"))
    for i, char in enumerate(plain):
        depth += (char in "([{") - (char in ")]}")
        whole = whole and (depth > 0 or i == len(plain) - 1)
        if char == "," and depth in (0, 1):
            commas[depth] += 1
            certain[depth] += not _THOUSANDS.match(plain, i)
    return plain[0] if whole else "", {commas[whole], certain[whole]}


def _hundredth(quantity: Quantity) -> Quantity:
    """The value of a percentage; any other answer unchanged."""
    if quantity.unit != ("%",):
        return quantity
    number = _rational(quantity.plain)
    if number is None:
        return Quantity(f"({quantity.form})/100", rf"\frac{{{quantity.plain}}}{{100}}", ())
    return Quantity(str(number / 100), str(number / 100), ())


def _sides(truth: str, given: str) -> list[tuple[str, str]]:
    """The pairs that math-verify must find equal. Given equations, it would solve them, treat all without a solution as
    equal, and read the last side where a number is expected."""
    sides = [[side.strip() for side in _EQUALS.split(plain)] for plain in (truth, given)]
    left, right = sides
    if len(left) == len(right) == 1:
        return [(truth, given)]
    if len(left) == len(right) == 2:
        if _without_spaces(left[0]) == _without_spaces(right[0]):
            return [(left[1], right[1])]
        return [] if re.search(r"[A-Za-z]\(", truth + given) else [(truth, given)]
    if len(left) + len(right) == 3:
        long, short = (left, right[0]) if len(left) == 2 else (right, left[0])
        if _rational(long[0]) is not None:
            long.reverse()  # 3 = x
        if _LABEL.fullmatch(long[0]):
            return [(long[1], short) if long is left else (short, long[1])]
    return []


def closed_sides(answer: str) -> list[str]:
    """The sides of an equation without variables, such as ``3 + 4 = 7``, without a label before them; else empty."""
    if len(answer) > LONGEST:
        return []
    plain = _APPROXIMATELY.sub("=", _TIMES.sub(r" \\times ", _plain(answer)))
    sides = [side.strip() for side in _EQUALS.split(plain)]
    if len(sides) > 2 and _LABEL.fullmatch(sides[0]):
        del sides[0]
    sides = [_INNER_CURRENCY.sub("", side) for side in sides[:-1]] + sides[-1:]
    closed = all(_CLOSED.fullmatch(quantity(side).plain) for side in sides)
    return sides if closed and 2 <= len(sides) <= _MOST_SIDES else []


def is_approximate(answer: str) -> bool:
    return bool(_APPROXIMATELY.search(_in_ascii(answer)))


def exact(sides: list[str]) -> str:
    """The first side of an equation with the unit of the last: ``200/3 cm`` of ``200/3 ≈ 66.67 cm``."""
    unit = () if quantity(sides[0]).unit else quantity(sides[-1]).unit
    return " ".join([sides[0], *unit])


def rounded(side: str, last: str, whole: bool) -> str:
    """A side of an equation in LaTeX, rounded like the last side if that has decimals (``200/3 = 66.67`` is true), or,
    if ``whole``, is an integer."""
    value, result = quantity(side), quantity(last)
    decimals = _DECIMALS.fullmatch(result.plain)
    if value.unit or result.unit == ("%",) or not decimals or not (decimals[1] or whole):
        return side
    shift = f"10^{{{len(decimals[1] or '')}}}"
    return rf"\frac{{\lfloor ({value.plain}) \cdot {shift} + \frac{{1}}{{2}} \rfloor}}{{{shift}}}"


def _plain(answer: str) -> str:
    """An answer without delimiters and layout."""
    plain = re.sub(r"(?<!\.)\.$", "", _in_ascii(answer).strip().strip("*")).strip()
    for opens, closes in (("$$", "$$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if plain.startswith(opens) and plain.endswith(closes) and len(plain) > len(opens) + len(closes):
            plain = plain[len(opens) : -len(closes)].strip()
    plain = _DOLLARS.sub(r"\1 ", plain).strip()  # "$18$ eggs", not "$5 or $7"
    plain = re.sub(r"^(?:\\approx(?![A-Za-z])|=)\s*", "", plain)
    plain = re.sub(r"^0(?=\d:[0-5]\d)", "", plain)  # of a time
    plain = _LAYOUT.sub("", _GAP.sub(" ", plain).replace(r"\%", "%").replace("{,}", ",")).replace("**", "^")
    plain = plain if re.search(r"\d,\d", plain) else plain.replace(";", ",")  # (1,5; 2) may be (1.5, 2)
    for spelt, sign in _SPELT:
        plain = spelt.sub(sign, plain)
    plain = _SPACED.sub(lambda number: number[0].replace(" ", ""), plain)
    comma = " and " if _INEQUALITY.search(plain) else ", "
    plain = _ZEROS.sub("", _SEPARATOR.sub(lambda found: " or " if found[1] == "or" else comma, plain))
    plain = _FIRST_ARGUMENT.sub(r"\\\1{\2\3}", _FRAC.sub(r"\\frac", plain))
    plain = _SECOND_ARGUMENT.sub(r"\\frac\1{\2}", plain)
    plain = _MODULO.sub(r" \\pmod{\1}", plain).replace(r"\varnothing", r"\emptyset")
    if whole := re.fullmatch(r"\\(?:text|mathrm|textbf|mathbf|boldsymbol|underline)\{([^{}]*)\}", plain):
        plain = whole[1].strip()
    plain = _COMPARED.sub(r"\\\1", _EXPONENT.sub(r"^{\1\2}", _FUNCTION.sub(r"\\\1", plain)))
    plain = r"(-\infty,\infty)" if _REALS.fullmatch(plain) else _BUILDER.sub(r"\2", plain)
    return re.sub(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", plain).strip()


def _in_ascii(answer: str) -> str:
    """The answer without invisible characters, and with Unicode signs in LaTeX: ``2½`` is ``2 1/2``."""
    if answer.isascii():
        return answer
    plain = "".join(char for char in answer if unicodedata.category(char) != "Cf")
    for sign, small in _SMALL:
        plain = small.sub(rf"{sign}{{\g<0>}}", plain)
    plain = unicodedata.normalize("NFKC", _AFTER_DIGIT.sub(" ", plain)).translate(SIGNS)
    return _ROOT.sub(r"\\sqrt{\1}", plain)


def _rational(plain: str) -> Fraction | None:
    """The value of a number, fraction or mixed number; None for anything else."""
    if len(plain) > 200:
        return None
    if match := _DECIMAL.fullmatch(plain):
        sign, whole, rest = match.groups()
        return Fraction(f"{sign}{whole.replace(',', '') or 0}{(rest or '').rstrip('.')}")
    if _LITERAL.fullmatch(plain):
        return Fraction(int(plain, 0))
    if match := _SCIENTIFIC.fullmatch(plain):
        return Fraction(match[1]) * Fraction(10) ** int(match[3])
    if match := _RECURRING.fullmatch(plain):
        sign, whole, once, *again = match.groups()
        digits = again[0] or again[1]
        tail = Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(once))
        return (-1 if sign == "-" else 1) * (Fraction(f"{whole or 0}.{once or 0}") + tail)
    if match := _FRACTION.fullmatch(plain) or _LATEX_FRACTION.fullmatch(plain):
        sign, whole, *pairs = match.groups()
        above, below = (int(part) for part in pairs if part is not None)
        if below:
            return (-1 if sign == "-" else 1) * (int(whole or 0) + Fraction(above, below))
    return None


def _worth_checking(truth: str, given: str) -> bool:
    """Whether different canonical forms may still be equal."""
    if _WORDS.fullmatch(truth) or given == "no" or all(map(_INTEGER.fullmatch, (truth, given))):
        return False
    if _DATE.fullmatch(truth) or _DATE.fullmatch(given):
        return False
    # math-verify adds up "5 5", reads only the box of an answer with a box, 0x1 as 0 times x times 1, 2:3:1 as 2/3, and
    # the inverse of a function as its reciprocal.
    glued = (re.search(r"[A-Za-z]\d", re.sub(r"\\[A-Za-z]+", " ", form)) for form in (truth, given))
    return not any(glued) and not re.search(r"(?<!_)\d \d|\\boxed|:[^;]*:|[fgh]\^\{?-1\}?\(", f"{truth};{given}")


def _without_spaces(plain: str) -> str:
    """Drops spaces, except one that ends a command (``\\pi r``) or separates two numbers; ``x^{2}`` is ``x^2``."""
    plain = re.sub(r"([_^])\{(\w)\}", r"\1\2", plain)
    return re.sub(r"(\\[A-Za-z]+|\d)?\s+(?=([A-Za-z])?(\d)?)", _kept_space, plain)


def _kept_space(match: re.Match[str]) -> str:
    before, letter, digit = match.groups()
    if before is None:
        return ""
    return f"{before} " if (digit if before.isdigit() else letter) else str(before)
