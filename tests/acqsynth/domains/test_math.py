from __future__ import annotations

import json
import time

import pytest

from acqsynth.domains import Sample
from acqsynth.domains.math import Math
from acqsynth.domains.math_check import MathChecker


@pytest.fixture(scope="module")
def math():
    math = Math(MathChecker(workers=1, seconds=3.0))
    yield math
    math.checker.close()


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("So \\boxed{\\frac{1}{2}} it is.", "\\frac{1}{2}"),
        ("\\boxed{1}, no, \\boxed{2}", "2"),
        ("\\boxed{4} and the answer is 5\n#### 6", "4"),
        ("\\boxed{}\n#### 6", "6"),
        ("\\boxed{7", "7"),
        ("#### 5\nNo.\n#### 1,200", "1,200"),
        ("The answer is 42.", "42"),
        ("The answer is 42 because 6 * 7 = 42.", "42"),
        ("**Answer:** $3.50", "$3.50"),
        *((f"So 8. The answer is {words}.", "42") for words in ("`42`", '"42"', "'42'", "“42”", "indeed 42")),
        *((f"So 8. The answer is {word}equal to 42.", "42") for word in ("", "exactly ", "approximately ")),
        ('So 8. The answer is "yes".', "yes"),
        ("So 8. The answer is 5'11\".", "5'11\""),
        ("The final answer is: 3/4\nDone in 2 steps.", "3/4"),
        ("The answer is 3 or 4.", "3 or 4"),
        ("I hope my answer is right. It is 8.", "8"),
        ("So 8. My answer is clearly correct.", "8"),
        ("The answer is 8. Indeed the answer is positive.", "8"),
        ("The answer is yes.", "yes"),
        ("**Answer:** No", "No"),
        ("There are 7 of them, but more exist. The answer is undefined.", "undefined"),
        ("The coefficient of x is 2. The answer is x + y.", "x + y"),
        ("The coefficient is 2. The answer is cos x - sin x.", "cos x - sin x"),
        ("2 a, then b. The answer is (a, b).", "(a, b)"),
        ("There are 7. The answer is that there is no such number.", "that there is no such number"),
        ("There are 7. **The answer is no real solution** because -1 < 0.", "no real solution"),
        ("100 mod 7 is 2. The answer is Tuesday.", "Tuesday"),
        ("The answer is positive.", "positive"),
        ("6 * 3 = 18 dollars. The answer is consistent with the problem.", "18"),
        ("18. The answer is **consistent** with the problem.", "18"),
        ("So 18. This answer is verified.", "18"),
        ("The total is 18. The answer is positive, so it is valid.", "18"),
        ("First find what the answer is in hours. 3+4 = 7", "7"),
        ("First find what the answer is in km/h. 3+4 = 7", "7"),
        ("3+4 = 7 and so that's what the answer is.", "7"),
        ("2+2=4. Therefore the answer is four.", "4"),
        ("The answer is 2**3.", "2**3"),
        ("The answer is the sum of these two numbers. So 7.", "7"),
        ("2 points/answer = 6 points, so 7", "7"),
        ("First 3, then 10/4", "10/4"),
        ("x7 is -1,234.5.", "-1,234.5"),
        ("I do not know.", None),
        ("The answer is therefore 7.", "7"),
        ("The answer is, thus, about 7 because 3 + 4 = 7.", "7"),
        ("The answer is approximately $7.50.", "$7.50"),
        ("The answer is then **x + y**.", "x + y"),
        ("So 18. The answer is therefore positive.", "18"),
        ("So 18. The answer is about ducks.", "18"),
        ("So the answer is 3 + 4 = 7.", "3 + 4 = 7"),
        # units glued to numbers
        ("The bag weighs 2.5kg.", "2.5"),
        ("Therefore Brian needs 2 cartons of 1L milk.", "2"),
        ("Tom has 4 bags of 5kg each.", "4"),
        ("On day 3 instead of 5km run", "5"),
        ("So 3 out of 4kg remain.", "4"),
        ("Brian drinks a total of 1L milk.", "1"),
        ("It costs 1,234km", "1,234"),
        ("Tom has 3 bags, so in total 15kg.", "15"),
        ("Tom has 3 bags, so in total 1,015.25g.", "1,015.25"),
        ("It takes 3 runs, at 9.58s", "9.58"),
        ("So it is 1.5e3", "1.5e3"),
        ("It is 2 times 5e-2.", "5e-2"),
        ("He needs 3/4cup", "3/4"),
        ("He ate 2/3rds of 7 pies, so 2/3rds.", "2/3"),
        ("The tin weighs 0.75lb", "0.75"),
        ("The floor has 25cm².", "25"),
        ("It moves at 60km/h.", "60"),
        ("So 10/2.5", "10/2.5"),
        ("So 18apples.", "18"),
        ("He needs 2 1/2 cups of 3", "3"),
        ("He needs 2 1/2 cups", "2 1/2"),
        ("He needs 2½ cups", "2½"),
        ("So it is half a cup, ½", "½"),
        ("So x = 3 or so, and y = $\\frac{5}{2}$", "\\frac{5}{2}"),
        ("The mass is 10^-3 kg", "10^-3"),
        ("The mass is 10^6kg.", "10^6"),
        ("The mass is $1.5 \\times 10^{-3}$ kg", "1.5 \\times 10^{-3}"),
        ("The mass is 1.5×10⁻³ kg", "1.5×10⁻³"),
        ("So 2^10", "2^10"),
        ("The train leaves at 12:30", "12:30"),
        ("So he has 5 000 of them", "5 000"),
        ("On page 3 100 words", "100"),
        # no units
        ("So x2 and 2x + 3", "3"),
        ("There are 12 in 2.5x.", "12"),
        ("There are 12 in 1,234y.", "12"),
        ("There are 12, as in the 1980s.", "12"),
        ("There are 12 on the 3rd day.", "12"),
        ("There are 12 by 5pm.", "12"),
        ("The 12 of 2pi", "12"),
        *((f"So it is {value}.", None) for value in ("2pi", "2sinx", "3abc", "2.5x")),
        ("There are 12, not 5million", "12"),
        ("There are 12 in 3D.", "12"),
        ("It is 18.So it is.", "18"),
        ("In 1,2345", "2345"),
        ("", None),
        ("The answer is 5. Wait, the answer is 6.", "6"),
        ("The answer is 5. The answer is a multiple of 5.", "5"),
        ("The answer is 5. If the answer is 6, then x = 7.", "5"),
        ("The answer is 5. Confidence in this answer: 90%", "5"),
        # boxes in boxes
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{1 + \\boxed{2} }", "2"),
        ("\\boxed{x_{1}} } and {\\boxed {y}", "y"),
        ("\\boxed{4} \\boxed{5", "4"),
        ("\\boxed{4} \\boxed{ }", "4"),
        ("{\\boxed{4}", "4"),
    ],
)
def test_answer_of(math, completion, answer):
    assert math.answer_of(completion) == answer


@pytest.mark.parametrize(
    "forms",
    [
        ("18", "18.00", "$18", "+18", "\\$18", "18 dollars", "$18$", "18.", "018", "\\(18\\)"),
        ("1/2", "0.5", ".50", "\\frac{1}{2}", "\\dfrac12", "2/4", "$\\tfrac{1}{2}$"),
        ("1/2 mi per h", "0.5 miles per hour", ".5 mph", "\\frac12\\text{ mi/h}"),
        ("18 cm", "18\\text{ cm}", "18.0 centimeters", "18cm", "18\\,\\mathrm{cm}"),
        ("18 cm^2", "18 square centimeters", "18\\text{ cm}^2", "18 cm^{2}"),
        ("24", "2 dozen", "24.0"),
        ("5000000", "$5 million", "5\\text{ million dollars}", "5 thousand thousand", "50 hundred thousand"),
        ("10:30 am", "10:30 a.m.", "10:30 AM", "10:30am"),
        ("18 egg", "18 eggs", "18.0 Eggs"),
        ("20 celsius", "20°C", "20 degrees Celsius", "20^\\circ C"),
        ("x_1", "x_{1}", "$x_1$"),
        ("-3/2", "-1.5", "-1 1/2", "-1\\frac{1}{2}", "- \\frac{3}{2}"),
        ("1450000", "1,450,000", "1,450,000.0", "1{,}450{,}000"),
        ("50%", "50\\%", "50.0 %", "50 percent"),
        ("tuesday", "Tuesday", "\\text{Tuesday}", "TUESDAY."),
        ("(1,2)", "( 1, 2 )", "\\left(1,2\\right)"),
        ("2\\pi r", "2 \\pi r", "2\\pi\\, r"),
        ("60", "60^\\circ", "60^{\\circ}", "60°"),
    ],
)
def test_equal_answers_have_one_canonical_form(math, forms):
    assert {math.canonical(form) for form in forms} == {forms[0]}


def test_other_answers_have_other_canonical_forms(math):
    answers = ["5", "5 x", "5%", "-5", "5 5", "55", "5, 5", "5 or 6", "1/0", "0", "5:5", "12,34", "1234", "", "5 i"]
    answers += ["5 km", "5 m", "5 km^2", "5 km per h", "5 million km", "5 euros", "5 am", "5 minus one", "5 squared"]
    assert len({math.canonical(answer) for answer in answers}) == len(answers)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("72", "72.0 clips", True),
        ("72", "73", False),
        ("72", None, False),
        ("72", "", False),
        ("\\boxed{72}", "72", True),
        ("The answer is 72.", "72", True),
        ("5", "x = 5", True),
        ("\\frac{1}{x+1}", "1/(x+1)", True),
        ("\\pi/4", "pi/4", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.33", False),
        ("2^{10}", "1024", True),
        ("3", "3 or 4", False),
        ("3", "1, 2, 3", False),
        ("4", "3\\boxed{4}", False),
        ("10", "5 5", False),
        ("100", "1 00", False),
        ("5", "five", False),
        ("eat", "tea", False),
        ("No", "no", True),
        ("no solution", "\\text{No solution}", True),
        ("No Solution", "no solutions", False),
        ("At most", "at most", True),
        ("no", "on", False),
        ("on", "no", False),
        ("no solution", "on solution", False),
        ("ab", "ba", True),
        ("Tuesday", "on Tuesday", False),
    ],
)
def test_equivalent(math, gold, answer, right):
    assert math.equivalent([Sample("?", gold)], [answer]) == [right]


@pytest.mark.parametrize(
    ("gold", "answers"),
    [
        # A string that starts with a number does not equal that number.
        ("4", ["4\\sqrt(2)", "4\\mathrm{e}", "4_{8}", "4_8", "4**2", "4|7", "4+", "4-", "4/", "4^", "4\\cdot"]),
        ("4", ["4'", "4''", "4\\ldots", "4...", "4, ", "4;", "4:", "4!", "4?", "4i", "4e", "4 or", "4 x", "4\\pm1"]),
        ("4", ["4(", "4)", "4\\%\\%"]),
        ("4", ["4\\text{ or }5", "4 mod 7", "4 \\pmod 7", "4 squared", "4 minus one", "4 plus", "4 or more than five"]),
        ("101_2", ["101_3", "101", "101_{10}", "5_2"]),
        ("f(2)=3", ["f(2)=4", "f(3)=3", "g(2)=3", "f(2)=3=4"]),
        ("5", ["x+y=5", "2x=5", "x=5=6", "x<5", "x\\ne 5"]),
        ("x=1", ["x=2", "y=1", "2x=1"]),
        # Number words and units are part of the value.
        ("\\$5 million", ["\\$5", "5", "5 billion", "\\$5,000"]),
        ("$1.5M", ["1.5", "$1.5B", "$1.5k"]),
        ("(1,000, 5)", ["(1, 0, 5)", "(1,0,5)", "10005"]),
        ("2 dozen", ["2", "12", "2 hundred"]),
        ("3 km", ["3 m", "3 miles", "3 km^2", "3 km per hour", "4 km"]),
        ("20 minutes", ["20 hours", "20 seconds", "20 minutes per day"]),
        ("10:30 am", ["10:30 pm", "11:30 am", "1:3"]),
        ("3 pm", ["3:30 pm", "3:00 am", "30 pm", "3:01"]),
        ("1/3", ["10:30", "2:06", "x = 10:30"]),
        ("10:30", ["1/3", "2:06"]),
        ("1:20", ["2:40"]),
        ("1", ["1 000/3"]),
        ("2:3", ["2:3:1"]),
        ("1:2:3", ["1:6:1", "1/6"]),
        ("10:30:00", ["1:03:00"]),
        ("1:10:20", ["2:20:40"]),
        ("5 100", ["100 + 5", r"\sqrt{11025}"]),
        ("-1", ["5-6", "5–6", "x = 5-6", "5-6 cm"]),
        ("-0.01", ["5-6%", "x = 5-6%"]),
        ("5-6", ["-1", "11", "4-5", "5"]),
        ("$5", ["5 euros", "€5", "5 cents", "5%"]),
        ("20°C", ["20°F", "21°C"]),
        ("45°", ["45 radians", "54°"]),
        ("€5", ["5 $", "£5", "5 £", "€6"]),
        ("½", ["2", "⅓", "1½", "12"]),
        ("10³", ["103", "30", "10^2"]),
        ("1e3", ["1e4", "1e", "13", "1e-3", "10^2", "10^{4}"]),
        ("0x10", ["0x11", "10", "0", "0b10", "0x1g"]),
        ("0b11", ["0b10", "11", "0b12", "0"]),
        ("x2", ["2x", "x^3", "x3"]),
        ("2N", ["2n", "2M"]),
        ("\\Pi r", ["\\pi r", "\\Pi R"]),
        ("E+1", ["e+1"]),
        ("x=A", ["x=a"]),
        ("3 gross", ["3", "36", "3 score"]),
        ("3 mg", ["3 Mg", "3 kg"]),
        ("5 Mb", ["5 MB", "5 Gb"]),
        # Words that relate or divide are no units.
        ("5", ["5 more than x", "5 less than x", "5 times x", "5 times the number", "5 over x", "5 percent of x"]),
        ("5", ["5 twelfths", "5 thirteen", "5 millionths", "5 quadrillion", "5 lakh", "5 ninetieths", "5 eggs x"]),
        ("5 m", ["5 M", "5 m kg", "5 times m"]),
        ("5 miles", ["5 nautical miles", "5 miles per hour"]),
        ("£5", ["5 lb", "5 lbs"]),
        ("5 hours", ["5 light hours"]),
        ("5", ["5,5", "5,10/2", "\\{5,5\\}", "(5,5)"]),
        ("\\{1,2\\}", ["(1,2)", "[1,2]", "(2,1)"]),
        ("1,2", ["1,2,2"]),
        ("\\{1,200\\}", ["(1,200)", "[200,1]", "\\{1,201\\}"]),
        ("5", ["5\\text{ or }5", "5\\text{ and }10/2"]),
        ("\\$18 per day", ["$18", "$18 per hour", "£18 per day", "18 euros per day", "18 pounds per day"]),
        ("£18 per day", ["18 lb per day"]),
        ("20 minutes", ["20 more hours", "20 minutes more than x"]),
        ("x^2=-1", ["y^2=-9", "x^2=-4", "x^2=1", "y^2=-1"]),
        ("0=1", ["x=x+1", "2=3"]),
        ("x=x", ["y=y", "0=0"]),
        ("5", ["[5]", "\\left[5\\right]"]),
        ("3x10^8", ["3x10^9", "3x^8", "3x10^{8"]),
        ("x=1 or x=2", ["x=1 or x=3", "x=1", "x=1 or y=2", "y=1 or y=2"]),
        ("2 hours and 30 minutes", ["2 hours or 30 minutes", "2, 30"]),
        ("5 or 10 cm", ["5 or 10 kg", "5 cm or 10 kg", "5 or 11 cm"]),
        ("1 or 1/2", ["1 and 1/2", "1 1/2"]),
        ("(3,4)", ["3 or 4", "4 and 3", "x=3, x=4"]),
        ("3<x<4", ["3, 4", "3 or 4", "\\{3,4\\}"]),
        ("x \\in (3,4)", ["3 or 4"]),
        ("-2<x<2", ["\\pm 2"]),
        ("23", ["$2$$3$"]),
        ("50%", ["0.05", "5000%", "50 cm", "0.5 km", "50 percent of 10"]),
        ("2\\sqrt{3} cm", ["2\\sqrt{3} km", "2\\sqrt{2} cm"]),
        ("x<1 or x>2", ["x<1 and x>2", "x<1 \\text{ and } x>2", "x<1", "1<x<2", "(-\\infty,1)\\cap(2,\\infty)"]),
        ("x=1, y=2", ["x=2, y=1", "(2,1)", "\\{1,2\\}", "x=1, z=2", "1"]),
        ("5 ft 3 in", ["5 ft", "5 ft 4 in", "8 ft"]),
        ("2020-05-06", ["2020-06-05", "2009"]),
        ("5/6/2020", ["6/5/2020", "1/2424"]),
        ("15", ["10 5"]),
        ("5 m/s", ["5 s/m", "5 seconds per meter"]),
        ("x ≥ 2", ["x ≤ 2", "x > 2"]),
        ("\\{x : x>1\\}", ["\\{x : x>2\\}", "\\{x \\mid x<1\\}"]),
        ("\\mathbb{R}", ["\\mathbb{N}", "R", "(0,\\infty)"]),
        ("1/3", ["0.3", "0.0\\overline{3}"]),
        ("0.\\overline{12}", ["0.1\\overline{2}", "0.12", "12"]),
        ("17 \\pmod{20}", ["17 (mod 21)", "17"]),
        ("₹5", ["$5", "€5"]),
        ("101₂", ["1012", "101₃"]),
        ("2ⁿ", ["2n"]),
        ("x₁", ["x1", "x₂"]),
        ("\\sin 30^\\circ", ["\\sin 30", "\\sin(30)", "\\cos 30°"]),
        ("6.62\\times10^{-34}", ["6.63\\times10^{-34}", "0.0", "6.62\\times10^{-33}"]),
        ("0.0000001", ["0.0000002", "0.00000010001"]),
        ("f^{-1}(x)", ["\\frac{1}{f(x)}", "1/f(x)"]),
        ("45", ["4\\,5", "4~5", "4\\\\5"]),
        ("(1; 2)", ["(2; 1)", "(1.2)", "(1; 3)"]),
        ("(1,5; 2)", ["(1, 5, 2)"]),
        ("[0; 1)", ["[0; 1]", "(0; 1]"]),
        ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", ["\\begin{pmatrix} 1 & 3 \\\\ 2 & 4 \\end{pmatrix}"]),
        ("\\frac{1\\pm\\sqrt5}{2}", ["\\frac{1+\\sqrt5}{2}", "\\frac{1\\pm\\sqrt3}{2}", "\\frac{1\\mp\\sqrt5}{3}"]),
        ("10^-2", ["10^2", "10^-3", "10^{-}2", "8"]),
        ("2**10", ["2^1", "20"]),
        ("5 m2", ["5 m3", "5 m", "52"]),
        ("3 hours 30 minutes", ["3 hours 30 seconds", "30 hours 3 minutes"]),
    ],
)
def test_answers_that_differ_in_any_part(math, gold, answers):
    right = math.equivalent([Sample("?", gold)] * len(answers), answers)
    assert [answer for answer, equal in zip(answers, right, strict=True) if equal] == []
    right = math.equivalent([Sample("?", answer) for answer in answers], [gold] * len(answers))
    assert [answer for answer, equal in zip(answers, right, strict=True) if equal] == []


def test_times_where_a_question_asks_for_a_ratio(math):
    answers = ["6:20", "3:10", "6:21", None]
    for question, equal in (("Find the ratio a:b.", True), ("When does it leave?", False)):
        assert math.equivalent([Sample(question, "3:10")] * 4, answers) == [equal, True, False, False]
        times = [Sample(question, time) for time in ("5:00", "9:30 am", "1:05:00")]
        assert math.equivalent(times, ["10:00", "09:30 am", "2:10:00"]) == [False, True, False]


@pytest.mark.parametrize(
    ("gold", "answers"),
    [
        ("4", ["(4)", "\\sqrt{16}", "2+2", "4.0", "x = 4", "f(2)=4", "\\text{Area} = 4", "10/2.5", "2^2", "\\{4\\}"]),
        ("5000000", ["5 million", "\\$5 million", "5\\times 10^6", "5\\text{ million}", "5 million people"]),
        ("24", ["2 dozen", "2 dozen eggs", "24 eggs"]),
        ("3 km", ["3", "3.0 kilometers", "3 kilometres", "x = 3 km"]),
        ("3", ["3 km", "$3$people", "3 people", "3 times", "3 brown eggs", "\\frac{6}{2} hours"]),
        ("18 eggs", ["18 brown eggs", "18", "18 Eggs"]),
        ("5 hours", ["5 hrs", "5 hr", "5 h"]),
        ("16", ["0x10", "0b10000", "0o20"]),
        ("432", ["3 gross", "3 gross of pens", "36 dozen"]),
        ("1/2", ["\\frac1{2}", "\\frac{1}2", "\\frac 12", "\\dfrac 1 2"]),
        ("\\frac{\\sqrt{2}}{2}", ["\\frac{1}{\\sqrt2}", "\\sqrt 2/2", "\\frac1{\\sqrt 2}"]),
        ("\\frac{1}{x}", ["\\frac1x", "\\frac{1}x", "1/x"]),
        ("50%", ["0.5", "50", "1/2", "\\frac{1}{2}", "50 percent"]),
        ("0.5", ["50%", "50\\%"]),
        ("10:30 am", ["10:30", "10:30 A.M."]),
        ("9:30 am", ["09:30 am", "09:30"]),
        ("3 pm", ["3:00 PM", "3:00 p.m.", "3:00", "3"]),
        ("3:00 pm", ["3 PM", "3:00"]),
        ("3:10", ["3/10", "3 : 10"]),
        ("2:3", ["10:15", "2/3"]),
        ("2:3:4", ["4:6:8", "2 : 3 : 4"]),
        ("1000000", ["1 000 000", "1\u202f000\u202f000", "1 000 000.0", "x = 1 000 000", "999 999 + 1"]),
        ("(1234, 5678)", ["(1 234, 5 678)"]),
        ("5-6 hours", ["5-6", "5–6 hours"]),
        ("1", ["6-5", "6 - 5"]),
        ("60°", ["60", "60 degrees", "60^\\circ"]),
        ("2\\sqrt{3} cm", ["\\sqrt{12}", "\\sqrt{12}\\text{ cm}"]),
        ("f(2)=3", ["f(2) = 3.0", "3"]),
        ("y=2x+1", ["y = 1 + 2x", "2x+1"]),
        ("4\\frac12 hours", ["4.5 hours", "9/2"]),
        ("2.5 kg", ["2.5", "2 1/2", "2½"]),
        ("4", ["４", "4\u200b", "\u20664\u2069", "\ufeff4", "+4", "2²"]),
        ("1/2", ["½", "0.５", "1⁄2"]),
        ("-5/2", ["−2½", "–2.5", "-2 ½"]),
        ("1000", ["10³", "1×10³", "1 · 10³", "1e3", "1.0E+3", "1\\times10^{3}"]),
        ("10^{3}", ["1e3", "0x3e8", "1.0E+3"]),
        ("2-1/4", ["1 3/4", "1\\frac34"]),
        ("2/\\sqrt{36}", ["0.\\overline{3}", "0.(3)"]),
        ("300000000", ["3.0x10^8", "3 * 10^{8}", "3.0 \\cdot 10^8"]),
        ("x=1 or x=2", ["x=2 or x=1"]),
        ("5 or 10", ["5 or 10 dollars", "$10 or $5", "10 or 5 apples", "10 cm or 5 cm", "x = 10 or x = 5"]),
        ("5 or 10 cm", ["10 or 5", "5 cm or 10 cm"]),
        ("3 or -2", ["x=3 or -2", "x=-2 or x=3", "\\text{-2 or 3}", "-2, 3", "$x = 3$ or $x = -2$", "3 and -2"]),
        ("x = 3, x = -2", ["x = 3 \\text{ or } x = -2", "x = -2 and x = 3", "3, -2"]),
        ("1/2 or 3", ["3 or 0.5", "1/2 and 3"]),
        ("3<x<4", ["(3,4)", "x \\in (3,4)"]),
        ("2\\sqrt{3}", ["2√3", "√12", "2√(2+1)"]),
        ("2 million or 3 million", ["3 million or 2 million"]),
        ("0.0025", ["2.5x10^{-3}", "2.5e-3", "2.5×10⁻³"]),
        ("x^2", ["x²", "x^{2}", "x·x"]),
        ("2\\pi", ["2π", "2 π", "2·π"]),
        ("5 cm^2", ["5 cm²", "5 ㎝²"]),
        ("¥5000000", ["5 million yen", "¥5million", "$5000000\\text{ }$"]),
        ("5 euros", ["€5", "5 €", "5€", "5 EUR"]),
        ("5", ["5 $", "5\\$", "5 £"]),
        ("5", ["5 red apples", "5 months", "5 cups of flour", "5 hours a day", "5 km in total", "5 more eggs", "5 L"]),
        ("5", ["5 times per week", "5 miles per hour", "5 canteens", "5 kg m", "5 dollars an hour"]),
        ("500000", ["5 lakh", "5 lakh rupees"]),
        ("5 pounds", ["£5", "5 lb", "5 lbs", "5"]),
        ("5 hours", ["5 hours of work", "5 hours in total"]),
        ("1,2", ["2, 1", "\\{2,1\\}", "(1,2)"]),
        ("\\{1,2\\}", ["\\{2,1,1\\}", "2,1"]),
        ("(1/2,100)", ["(0.5, 100)", "(\\frac12,100)", "\\left(0.5,\\frac{200}{2}\\right)", "0.5,100", "1/2, 100"]),
        ("\\{2,100\\}", ["\\{100,2\\}", "{100, 2}", "100, 2"]),
        ("\\{100, 200\\}", ["\\{200,100\\}"]),
        ("(1,100)", ["(1.0, 100)", "(1, 10^2)"]),
        ("[1,100]", ["[1, 10^2]"]),
        ("3 \\text{ and } 5", ["3, 5", "5,3", "5 \\text{ or } 3", "3,\\text{ and }\\frac{10}{2}"]),
        ("3\\text{ and }-5", ["-5, 3"]),
        ("1 \\text{ or } 2", ["2, 1"]),
        ("18 dollars per day", ["$18 per day", "\\$18 per day", "$18/day", "18 per day", "18"]),
        ("5 dollars per pound", ["$5 per pound", "$5 per lb"]),
        ("18 pounds per day", ["£18 per day"]),
        ("18 dollars a day", ["$18 a day"]),
        ("18 euros per day", ["€18 per day"]),
        ("20 dollars in total", ["$20 in total", "$20"]),
        ("$20", ["20 more dollars", "$20 each"]),
        ("12 minutes", ["12 more minutes", "12 minutes each day"]),
        ("12 miles", ["12 additional miles", "12 total miles"]),
        ("3 people", ["3 more people"]),
        ("12 children", ["12 young children"]),
        ("7 weeks", ["7 full weeks"]),
        ("40 hours", ["40 work hours", "40 man hours", "40 hours a week"]),
        ("8 ounces", ["8 fluid ounces"]),
        ("3 bulbs", ["3 light bulbs"]),
        ("A=(1,2)", ["(1, 2)", "A = (1, 4/2)"]),
        ("2,-2", ["\\pm 2", "2 or -2"]),
        ("±2", ["2 or -2", "-2 or 2"]),
        ("2x+y=3", ["y=3-2x", "4x+2y-6=0", "3=y+2x"]),
        ("x^2+y^2=1", ["y^2=1-x^2"]),
        ("xy=1", ["y=1/x", "x=\\frac{1}{y}"]),
        ("1500000", ["$1.5M", "$1500k", "$1.5 million"]),
        ("(1000, 5)", ["(1,000, 5)", "(1,000,5)"]),
        ("1000500", ["1,000,500"]),
        ("45°", ["45", "45^{\\circ}", "45 degrees", "45\\degree"]),
        ("(-\\infty,1)\\cup(2,\\infty)", ["x<1 or x>2", "x>2 \\text{ or } x<1.0"]),
        ("(1,2)", ["1<x<2", "x>1 and x<2"]),
        ("x=1/2, y=2", ["y=2, x=0.5", "x=0.5 and y=2", "(x,y)=(1/2,2)", "(0.5, 2)"]),
        ("5 ft 3 in", ["5 feet 3 inches", "5 feet, 3 inches", "5 feet and 3 inches"]),
        ("5 ft 0 in", ["5 feet 0 inches"]),
        ("Tan", ["tan"]),
        ("Log", ["log"]),
        ("the tan dog", ["The tan dog"]),
        ("1/6", ["0.1\\overline{6}", "0.1\\bar{6}", "0.1(6)"]),
        ("x \\equiv 3 \\pmod 7", ["x ≡ 3 (mod 7)", "x \\equiv 3 \\pmod{7}"]),
        ("\\emptyset", ["\\varnothing", "∅"]),
        ("-5 dollars", ["-$5", "$-5", "-US$5"]),
        ("5 cents", ["5¢"]),
        ("x \\ge 2", ["x ≥ 2", "x \\geqslant 2", "[2,\\infty)", "\\{x \\mid x \\ge 2\\}"]),
        ("e^{2x}", ["e^(2x)", "exp(2x)"]),
        ("\\sin x+\\ln 2", ["sin(x) + ln 2", "ln(2) + sin x"]),
        ("(-\\infty,\\infty)", ["\\mathbb{R}", "x \\in \\mathbb R"]),
        ("a=2, b=3", ["b=3; a=2"]),
        ("x = 3", ["3 = x"]),
        ("\\log_2 8", ["3", "log_2(8)", "log₂8"]),
        ("\\sin 30^\\circ", ["0.5", "\\frac12", "sin(30°)", "\\sin(\\frac{\\pi}{6})"]),
        ("2\\sin(10^\\circ)", ["2\\sin 10^{\\circ}"]),
        ("\\tan x^\\circ", ["\\tan(x°)"]),
        ("3e-7", ["3 \\times 10^{-7}", "0.0000003"]),
        ("\\frac{\\sqrt{3}}2", ["\\frac{\\sqrt3}{2}"]),
        ("0.01", ["10^-2", "10**-2", "1/10^2"]),
        ("1024", ["2**10", "2^10"]),
        ("1/x", ["x^-1", "x^{-1}"]),
        ("(1, 2)", ["(1; 2)", "\\langle 1, 2 \\rangle", "\\bigl(1,\\quad 2\\bigr)"]),
        ("(0, 1]", ["(0; 1]", "x ∈ (0, 1]", "0 < x ≤ 1"]),
        ("1, 2", ["1; 2", "2; 1"]),
        ("x_1 = 2, x_2 = -2", ["x_{1}=2, x_{2}=-2", "x_{2} = -2; x_{1} = 2"]),
        ("\\frac{1\\pm\\sqrt5}{2}", ["\\frac{1-\\sqrt5}{2}, \\frac{1+\\sqrt5}{2}", "x = \\frac{1±\\sqrt{5}}{2}"]),
        (
            "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
            ["\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{bmatrix}1 & 2\\\\ 3 & \\frac82\\end{bmatrix}"],
        ),
        ("25 square feet", ["25 sq ft", "25 sq. ft.", "25 ft2", "25 feet squared"]),
        ("9.8 m/s^2", ["9.8 meters per second squared", "9.8 m/s²", "9.8 m/s2"]),
        ("-\\infty", ["-infinity", "negative infinity", "−∞"]),
        ("-5", ["negative 5", "minus 5", "= -5", "\\mathbf{-5}"]),
        ("10%", ["10 per cent"]),
        ("$5", ["5 US dollars"]),
        ("3 hours 30 minutes", ["3\\text{ hours }30\\text{ minutes}", "3 hr 30 min"]),
        ("2 lb 3 oz", ["2 pounds 3 ounces"]),
        ("5", ["AB = 5", "\\overline{AB} = 5"]),
        ("60°", ["m\\angle A = 60^\\circ"]),
    ],
)
def test_the_same_answer_in_other_words(math, gold, answers):
    right = math.equivalent([Sample("?", gold)] * len(answers), answers)
    assert [answer for answer, equal in zip(answers, right, strict=True) if not equal] == []


WORKINGS = [
    "So the answer is 3 + 4 = 7.",
    "\\boxed{3+4=7}",
    "#### 3 + 4 = 7",
    "\\boxed{3 + 4 = 14/2 = 7.0}",
    "\\boxed{x = 3 + 4 = 7}",
    "The answer is $3 + $4 = $7.",
    "The answer is $3 + 4 = 7$.",
    "The answer is 21 / 3 = 7 eggs.",
    "\\boxed{\\frac{21}{3} = 7}",
    "\\boxed{700\\% = 7}",
    "The answer is therefore 3 + 4 = 7.",
]


@pytest.mark.parametrize("completion", WORKINGS)
def test_a_true_equation_counts_as_its_last_side(math, completion):
    answer = math.answer_of(completion)
    golds = [Sample("?", gold) for gold in ("7", "8", "3", "7 km" if "eggs" in completion else "7.5")]
    assert math.equivalent(golds, [answer] * 4) == [True, False, False, False]
    assert math.equivalent([Sample("?", completion)] * 2, ["7", "8"]) == [True, False]
    assert math.verify([Sample("?", "7", completion), Sample("?", "8", completion)]) == [None, False]


@pytest.mark.parametrize(
    "answer",
    ["3 + 4 = 8", "8 = 7", "7 = 8", "3 + 4 = 8 = 7", "7 = 7 = 8", "x + 3 = 7", "7, 8 = 7, 8", "2x = 7 = 7", "= 7 = 8",
     "3 + 5 = 7", "3 + 4 = 7 or 8", "7 \\text{ or } 8 = 8", "7 km = 8 km", "7 = 7 = 7 = 7 = 7 = 7 = 7", "7 cm = 8"],
)  # fmt: skip
def test_any_other_equation_is_wrong(math, answer):
    assert math.equivalent([Sample("?", "7"), Sample("?", "8")], [answer] * 2) == [False, False]


@pytest.mark.parametrize(
    ("gold", "equation", "right"),
    [
        ("120", "5! = 120", True),
        ("121", "5! = 121", False),
        ("6", "18 \u00f7 3 = 6", True),
        ("14", "7 x 2 = 14", True),
        ("14", "7x2 = 14", True),
        ("15", "7 x 2 = 15", False),
        ("66.67", "200/3 = 66.67", True),
        ("66.67", "100*2/3 = 200/3 = $66.67", True),
        ("66.67", "200/3 \u2248 66.67", True),
        ("66.66", "200/3 = 66.66", False),
        ("-0.3", "-1/3 = -0.3", True),
        ("1", "2/3 = 1", False),
        ("12.5%", "1/8 = 12.5%", True),
        ("200/3", "200/3 \u2248 66.67", True),
        ("\\frac{200}{3}", "\\frac{200}{3} \\approx 66.67", True),
        ("3.14", "π ≈ 3.14", True),
        ("3.14", "≈ 3.14", True),
        ("3.15", "π ≈ 3.15", False),
        ("200/3 \u2248 66.67", "\\frac{200}{3}", True),
        ("200/3 \u2248 67", "200/3 \u2248 66.67", True),
        ("200/3 cm", "200/3 \u2248 66.67 cm", True),
        ("200/3 kg", "200/3 \u2248 66.67 cm", False),
        ("67", "200/3 \u2248 67", True),
        ("66", "200/3 \u2248 66", False),
        ("200/3", "200/3 \u2248 60", False),
        ("200/3 \u2248 60", "200/3", False),
        ("100/3", "200/3 \u2248 66.67", False),
        ("200/3", "200/3 = 66.67", False),
    ],
)
def test_signs_and_rounding_of_an_equation(math, gold, equation, right):
    assert math.equivalent([Sample("?", gold)], [math.answer_of(f"The answer is {equation}.")]) == [right]


def test_an_equation_is_compared_with_an_equation_as_a_whole(math):
    golds = [Sample("?", gold) for gold in ("y = 7", "3 + 4 = 7", "2 + 3 = 5")]
    assert math.equivalent(golds, ["0 = 0", "3+4=7", "3 + 2 = 6"]) == [False, True, False]


@pytest.mark.parametrize(
    "part",
    [
        *("1,111,", "1", "1.", "1/", "1 ", "1e5", ",111", "\\boxed{", "\\boxed", "{", "}", "\\boxed{}", "\\boxed{1"),
        *("\\boxed {{", "answer: ", "answer is *", "the ", "answer:\n"),
    ],
)
def test_long_completions_are_read_in_linear_time(math, part):
    begin = time.monotonic()
    for end in ("", "x", "\\boxed{7}"):
        math.answer_of(part * (400_000 // len(part)) + end)
    assert time.monotonic() - begin < 5


def test_naming_many_answers_gains_nothing(math):
    """Listing all candidates matches at most one of them, because one answer is read and compared as a whole."""
    golds = [Sample("?", str(i)) for i in range(10)]
    everything = " ".join(f"The answer may be {i}." for i in range(10)), ", ".join(map(str, range(10)))
    for text in (*everything, f"\\boxed{{{everything[1]}}}", f"The answer is {everything[1]}."):
        answer = math.answer_of(text)
        assert sum(math.equivalent(golds, [answer] * 10)) <= 1
    assert sum(math.equivalent(golds, [math.answer_of(f"\\boxed{{{everything[1]}}}")] * 10)) == 0


def test_what_can_not_be_compared_is_counted():
    math = Math(MathChecker(workers=1, seconds=0.5))
    assert math.equivalent([Sample("?", "9")], ["9^{9^{9^{9}}}"]) == [False]
    assert (math.checker.checked, math.checker.lost) == (1, 1)
    math.checker.close()


def test_a_solution_is_read_back(math):
    sample = Sample("?", "1/2", "Half of 1.\nOf 7 things.")
    assert math.solution(sample) == "Half of 1.\nOf 7 things.\n\\boxed{1/2}"
    assert math.answer_of(math.solution(sample)) == "1/2"
    assert math.solution(Sample("?", "The answer is 5.")) == "\\boxed{5}"
    boxed = Sample("?", "3", "It is \\boxed{3}.")
    assert math.solution(boxed) == boxed.reasoning


def test_verify_knows_a_contradiction_and_no_more(math):
    samples = [
        Sample("?", "12", "5 + 7 = 12. The answer is 12."),
        Sample("?", "12", "5 + 7 = 13. The answer is 13."),
        Sample("?", "0.5", "It is \\boxed{\\frac{1}{2}}."),
        Sample("?", "12", "5 + 7 = 13"),
        Sample("?", "12"),
        Sample("?", "yes", "1 < 2. The answer is no."),
        Sample("?", "Yes", "1 < 2. The answer is yes."),
    ]
    assert math.verify(samples) == [None, False, None, None, None, False, None]


@pytest.mark.parametrize(
    ("reasoning", "answer"),
    [
        ("Since x>0, the answer is positive. x = 10/2 = 5.", "5"),
        ("First find what the answer is in minutes. 60*2 = 120.", "120"),
        ("First find what the answer is in km/h. 60*2 = 120.", "120"),
        ("The answer is the sum of both. 3+4=7.", "7"),
        ("3+4=7. So the answer is seven.", "7"),
        ("The answer is twelve dollars", "$12"),
        ("3+4=7. The answer is consistent with this.", "7"),
        ("The answer is a prime. 7 is prime.", "7"),
        ("Is 7 odd? The answer is yes.", "7"),
        ("The answer is a day. Monday is over.", "Tuesday"),
    ],
)
def test_words_on_an_answer_do_not_contradict_it(math, reasoning, answer):
    assert math.verify([Sample("?", answer, reasoning)]) == [None]


@pytest.mark.parametrize(
    ("question", "answer", "fault"),
    [
        ("How many eggs are left?", "3", None),
        ("Solve 3x - 8 = 19.", "9", None),
        ("What?", "3", "the question is too short"),
        ("There are three red hens in the yard.", "3", "nothing is asked"),
        ("How many eggs are left?", "3 or so\nthat is", "the answer is more than a final answer"),
        ("How many eggs are left?", "a" * 201, "the answer is more than a final answer"),
    ],
)
def test_fault(math, question, answer, fault):
    assert math.fault(Sample(question, answer)) == fault


def test_numina_rows(math, tmp_path):
    rows = [
        {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "source": "x"},
        {"problem": "Prove it.", "solution": "Clear."},
        {"problem": "What is $2+2$?", "solution": "First $\\boxed{3}$, no: $\\boxed{\\frac{8}{2}}$."},
    ]
    path = tmp_path / "numina.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert math.load(str(path)) == [
        Sample("What is $1+1$?", "2", "It is $\\boxed{2}$."),
        Sample("What is $2+2$?", "\\frac{8}{2}", "First $\\boxed{3}$, no: $\\boxed{\\frac{8}{2}}$."),
    ]
    assert [s.answer for s in math.load(str(path), limit=2)] == ["2", "\\frac{8}{2}"]


def test_gsm8k_rows(math, shared_data):
    path = shared_data("math/gsm8k_test.jsonl")
    samples = math.load(path)
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(samples) == len(rows) == 1319
    assert samples[0].answer == "18"
    assert samples[0].reasoning.endswith("She makes 9 * 2 = $18 every day at the farmer’s market.")
    assert not any("<<" in sample.reasoning or "####" in sample.reasoning for sample in samples)
    for solutions in ([row["answer"] for row in rows], [math.solution(sample) for sample in samples]):
        assert all(math.equivalent(samples, [math.answer_of(solution) for solution in solutions]))
    others = [math.answer_of(row["answer"]) for row in rows[1:] + rows[:1]]
    assert sum(math.equivalent(samples, others)) < 60
    assert {math.fault(sample) for sample in samples} == {None}
    assert set(math.verify(samples)) == {None}
