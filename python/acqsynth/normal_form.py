"""Normalises texts for gates that compare them, so that texts a reader cannot tell apart are equal.

A generator rewarded for new questions finds every way to disguise an old one: zero-width characters, soft hyphens,
full-width or bold letters, look-alikes from another script, decomposed accents, Markdown, HTML and LaTeX marks, other
digits, ``5.0`` for ``5``, a number before or after the question; spaces within words, other signs between them.
"""

from __future__ import annotations

import html
import operator
import re
import unicodedata
from collections import Counter
from fractions import Fraction
from functools import lru_cache

# Look-alikes that Unicode's compatibility forms do not map, in the style of UTS 39 ("confusables"): pairs of strings of
# equal length, those shaped like capital letters first.
_CAPITALS = (
    "АВЕЅІЈКМНОРСТУХԚԜΑΒΕΖΗΙΚΜΝΟΡΤΥΧᎪᏴᏟᎠᎬᎻᎫᏦᏞᎷᏢᏒᏚᎢᏙᎳᏃꓮꓐꓚꓓꓰꓝꓖꓧꓲꓙꓗꓡꓟꓠꓳꓑꓣꓢꓔꓴꓦꓪꓫꓬꓜ",
    "ABESIJKMHOPCTYXQWABEZHIKMNOPTYXABCDEHJKLMPRSTVWZABCDEFGHIJKLMNOPRSTUVWXYZ",
)
_SMALL = (
    "асԁеһіјкӏмоԛрѕтԝхуνοραικυτχγεηƄɑɡɩıłøđðþօհոսցզɛⱥⱦŧɇƀɏɉɍꝁħƶȼǥɨʉɵɓɗƒɠɦƙɱɲƥʠɽʂƭʋⱳƴʐⲁⲥⲓⲕⲙⲛⲟⲣⲧⲩⲭ𐐬ɐǝəŋɔɯɹɾʇʌʍʎ",
    "acdehijklmoqpstwxyvopaikutxyenbagiiloddpohnugqeattebyjrkhzcgiuobdfghkmnpqrstvwyzacikmnoptyxoaeenomrrtvwy",
)
_SMALL_CAPITALS = ("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ", "abcdefghijklmnoprstuvwyz")
_SIGNS = ("‐‑‒–—―−﹣－‘’‚‛′ʹʼ“”„‟″⁄∕÷×∙·•。、", "---------'''''''\"\"\"\"\"///x***.,")
_ALIKE = {
    **{ord(a): b for pair in (_CAPITALS, _SMALL, _SMALL_CAPITALS, _SIGNS) for a, b in zip(*pair, strict=True)},
    **{0x2776 + i: str(i % 10 + 1) for i in range(30)},  # circled numbers
    **dict(zip(map(ord, "➕➖➗✖"), "+-/x", strict=True)),
    # Letters in black circles and squares, and regional indicators.
    **{k + i: chr(97 + i) for k in (0x1F150, 0x1F170, 0x1F1E6) for i in range(26)},
    0x20E3: ".",  # of a number on a keycap
}
_BRACKETED = {k + i: chr(97 + i) for k in (0x249C, 0x1F110) for i in range(26)}  # "(a)" to Unicode
_CAPITAL_I = re.compile(r"(?<![^\W_])[a-z]++(?:I++[a-z]*+)++(?![^\W_])")  # for l in a word of lower case
_INVISIBLE = frozenset({"Cf", "Cs", "Co", "Cn", "Cc"})
# Invisible characters of other categories: joiners, fillers, blanks, variation selectors.
_BLANK = frozenset(
    "\u034f\u115f\u1160\u180b\u180c\u180d\u2800\u3164\uffa0\U0001d159" + "".join(map(chr, range(0xE0100, 0xE01F0)))
)
_ORNAMENTS = re.compile(  # accents and emoji, without chess pieces and card suits
    "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f"
    "\u2600-\u2653\u2668-\u27bf"
    "\U0001f300-\U0001faff]"
)

_COMMENT = re.compile(r"<!--(?:[^-<]++|-(?!->)|<(?!!--))*+-->")
_TAG = re.compile(r"<([a-z][\w-]*+)>[^\w<>]*+</\1>|</?([a-z][\w-]*+)(?:\s[^<>]*)?/?>")  # a pair around nothing first
_CLOSING = re.compile(r"</([a-z][\w-]*+)\s*+>|<([a-z][\w-]*+)/>")
_KNOWN_TAG = re.compile("[biuspa]|em|strong|sub|sup|span|br|hr|wbr|img|div|font|mark|code|small|big|tt|del|ins")
_LINK = re.compile(  # with an address; "[x+1](x-2)" is a product
    r"!?\[([^\[\]]*+)\]\((?:https?:|mailto:|\.{0,2}/|#|(?:[\w-]++\.)++[a-z]{2})[^()\s]*+\)"
)
# "f.a.r.m.e.r. h.a.s.", longer than "e.g." and a list of options
_DOTTED = re.compile(r"(?<!\w)(?:[^\W\d_]\.\s?){3}(?:\w\.\s?){5,}")
_COMMAND = re.compile(
    r"\\(?:text)?color\{\w*\}|\\(?:q?quad|text\w*|math\w+|emph|underline|f?boxed|mbox|displaystyle)(?![a-z])"
    r"|\\[,;:! ()\[\]]|\\(?=[^\w\s])|[{}$]"
)
_MARK = re.compile(r"(\d ?\*+ ?(?=\d))|[*_~`]+")  # a star between two numbers is a multiplication sign
_LINE = re.compile(r"^[ \t]*(?:#{1,6}|>+|[-+])[ \t]+", re.MULTILINE)
_NUMBER = re.compile(r"\d{1,3}(?:[, ]\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+")
_SCALES = {"k": 10**3, "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6}
_SCALED = re.compile(rf"(?<![\d.])(\d++(?:\.\d++)?) ?({'|'.join(_SCALES)})(?![a-z])")
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "x": operator.mul, "/": operator.truediv}
_POWER = re.compile(r"(?<![\d.])(?:(\d++(?:\.\d++)?)(?: ?[x*] ?10 ?(?:\^|\*\*) ?|e)|10 ?(?:\^|\*\*) ?)(\d\d?)(?!\d)")
_LITERAL = re.compile(r"(?<![\w.])0(?:x[0-9a-f]{1,99}|o[0-7]{1,99}|b[01]{1,99})(?!\w)")
_CALCULATION = re.compile(r"(?<![\w.])(\d++(?:\.\d++)?) ?([-+*/x]) ?(\d++(?:\.\d++)?)")
_RAISED = re.compile(r"(?<=[^\s⁰¹²³⁴-⁹])[⁰¹²³⁴-⁹]+")  # alone they are a disguise

_LABEL = r"(?:(?:question|problem|exercise|task|step|example|variant|version|part|number|no|nr|id|q|v)(?![a-z])\.?\s*)"
_BEFORE = re.compile(rf"^\W*(?:{_LABEL}[#(\[]?\d+[.):\]]*|[#(\[]?\d+(?:[.)\]:]+(?=\s)|\.(?=[a-z]))|#\d+(?=\s))\s*")
_AFTER = re.compile(rf"(?<=[.?!])(?:\s*[#(\[]\s*{_LABEL}?\d+\s*[)\]]?|\s+{_LABEL}?\d+)[\s.]*$")
_DECIMALS = 30  # of the value of a number; further ones are cut
_END = 64  # characters searched for a numbering at either end

# Signs without a meaning in formulas; "!" has one after a number, "'" in f'(x), a full stop within a number.
_MUTE = re.compile(r"[^\w\s+*/^=<>%|()\[\]!'.\\€£¥\xb0\xb1\u2200-\u22ff-]|(?<!\d)[!.]|\.(?!\d)|'(?!'?\()")
# Signs between two words or numbers, with spaces on both sides or on none.
_JOINT = re.compile(r"(?<!\w)(\\?\w++)( ?)[-/|()\[\]]++(?: [-/|()\[\]]++)*+\2(?=(\\?\w++))")
# A word that is not a function.
_WORD = re.compile(r"(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|frac|lim|max|min|gcd|lcm|det|mod|abs)$)[^\W\d_]{3,}")


def visible(text: str) -> str:
    """The text in compatibility form, without invisible characters."""
    plain = unicodedata.normalize("NFKD", text)
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(
        char
        for char in plain
        if char.isspace() or (unicodedata.category(char) not in _INVISIBLE and char not in _BLANK)
    )


@lru_cache(maxsize=1024)  # every gate reads the same fields of a batch
def normal_form(text: str) -> str:
    """The text as gates compare it: lower case, single spaces, numbers by value, no markup, no numbering."""
    plain = visible(_RAISED.sub(r"^\g<0>", html.unescape(text)).translate(_BRACKETED))
    if not plain.isascii():
        plain = _ORNAMENTS.sub("", plain.translate(_ALIKE))
        digits = (str(unicodedata.digit(x)) if x.isdigit() and not x.isascii() else x for x in plain)
        plain = unicodedata.normalize("NFC", "".join(digits))
    plain = _CAPITAL_I.sub(lambda word: word[0].replace("I", "l"), plain).casefold().translate(_ALIKE).lower()
    if "<" in plain:
        plain = _COMMENT.sub("", plain)
        closed = {name for names in _CLOSING.findall(plain) for name in names}  # "x <y and z> w" is not a tag
        plain = _TAG.sub(
            lambda found: "" if found[2] in closed or _KNOWN_TAG.fullmatch(found[1] or found[2]) else found[0], plain
        )
    plain = _LINK.sub(r"\1", _DOTTED.sub(lambda found: found[0].replace(".", ""), plain))
    plain = _COMMAND.sub("", plain)
    plain = _MARK.sub(r"\1", " ".join(_LINE.sub("", plain).split()))
    plain = _NUMBER.sub(lambda found: _written(value(found[0])), plain)
    for _ in range(4):  # "Question 3: 1. ... (5)"
        bare = _BEFORE.sub("", plain[:_END], count=1) + plain[_END:]
        bare = bare[:-_END] + _AFTER.sub("", bare[-_END:], count=1)
        if not bare.strip() or bare == plain:
            break
        plain = bare
    return " ".join(plain.split())


def spelled(plain: str) -> list[str]:
    """The words, numbers and operators of a normal form; joined, they do not depend on what separates words."""
    words = " ".join(_MUTE.sub("", plain).split())
    return _JOINT.sub(_parted, words).replace("\\", "").split()


def _parted(joint: re.Match[str]) -> str:
    """A space instead of the signs, unless they stand between operands: numbers, variables, functions, commands."""
    return f"{joint[1]} " if _WORD.fullmatch(joint[1]) or _WORD.fullmatch(joint[3]) else joint[0]


def numbers(plain: str) -> Counter[Fraction]:
    """The values of the numbers in a normal form."""
    return Counter(value(found) for found in _NUMBER.findall(plain))


def readings(plain: str) -> Counter[Fraction]:
    """The values of numbers that a normal form writes in another way: ``1 2`` for 12, ``2k``, ``3 dozen``, ``10^3``,
    ``0xc``, ``(10+2)``."""
    found = numbers(re.sub(r"(?<=\d) (?=\d)", "", plain)) - numbers(plain)
    found.update(value(number) * _SCALES[scale] for number, scale in _SCALED.findall(plain))
    found.update(value(number or "1") * 10 ** int(power) for number, power in _POWER.findall(plain))
    found.update(Fraction(int(literal, 0)) for literal in _LITERAL.findall(plain))
    for a, sign, b in _CALCULATION.findall(plain):
        if sign != "/" or value(b):
            found[_OPERATIONS[sign](value(a), value(b))] += 1
    return found


@lru_cache(maxsize=4096)
def value(number: str) -> Fraction:
    """The value of a number as :func:`normal_form` finds it."""
    whole, _, rest = number.replace(",", "").replace(" ", "").partition(".")
    # Truncated: Python refuses to parse integers of thousands of digits.
    rest = rest[:_DECIMALS]
    return int(whole[-300:] or "0") + Fraction(int(rest or "0"), 10 ** len(rest))


def _written(number: Fraction) -> str:
    if number.denominator == 1:
        return str(number.numerator)
    digits = str(number.numerator * 10**_DECIMALS // number.denominator).zfill(_DECIMALS + 1)
    return f"{digits[:-_DECIMALS]}.{digits[-_DECIMALS:].rstrip('0')}"
