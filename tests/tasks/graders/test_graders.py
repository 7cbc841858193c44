"""The graders against pairs made by hand, and against whatever text there is."""

import gc
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hrpo_patches.tasks.graders.expressions import expression
from hrpo_patches.tasks.graders.names import exact_match, normalized
from hrpo_patches.tasks.graders.numbers import number
from hrpo_patches.tasks.graders.options import choice

NUMBERS_RIGHT = [
    *[
        ("18", text)
        for text in ("18", "18.", "18.0", "18.00", "018", "+18", " 18 ", "**18**", "18!", "(18)", "18/1", "36/2")
    ],
    *[
        ("18", text)
        for text in ("$18", "$18.00 per day", "€18", "USD 18", "18USD", "18 dollars", "18 apples", "18 kg.")
    ],
    *[
        ("18", text)
        for text in ("18, because he buys more", "the answer is 18", "x = 18", "18 (eighteen)", "18th", "18\xa0km")
    ],
    *[
        ("18", text)
        for text in ("18%", "18 %", "18\\%", "$18$", "\\boxed{18}", "\\$18", "18 \\text{ cm}", "\\frac{36}{2}")
    ],
    *[("-18", text) for text in ("-18", "−18", "- 18", "-$18", "$-18", "-18.0", "–18 degrees", "it is -18")],
    *[("1000", text) for text in ("1,000", "1 000", "1000.00", "1\u202f000", "1,000 km", "$1,000.00")],
    *[("1,000", "1000"), ("1234567.5", "1,234,567.50"), ("1000000", "1 000 000"), ("1000000", "1,000,000")],
    *[
        ("0.5", "1/2"),
        ("1/2", "0.5"),
        ("0.5", ".5"),
        ("0.5", "1 / 2"),
        ("18%", "18%"),
        ("2.50", "2.5"),
    ],
    *[("18", "１８"), ("18", "x=18"), ("7", "seven (7)"), ("0", "-0"), ("0", "0.0")],
]
NUMBERS_RIGHT += [("18", text) for text in ("18 m^2", "18 m²", "18 cm^3", "$18/day", "18 %", "a total of 18")]
NUMBERS_WRONG = [
    *[
        ("5", text)
        for text in ("negative 5", "minus 5", "-(5)", "not 5", "5k", "5 thousand", "5 + x", "x + 5", "> 5", "≠5")
    ],
    *[("1", "1 million"), ("12", "12 hundred"), ("18", "x<18"), ("0.18", "18%"), ("0.33", "33%"), ("5", "1½")],
    *[
        ("18", text)
        for text in ("", " ", "no", "eighteen", "180", "81", "1.8", ".18", "-18", "−18", "17", "18.5", "18/2")
    ],
    *[
        ("18", text)
        for text in ("17 or 18", "18 19", "17, 18", "10-18", "1-18", "18:00", "18 + 0", "18 = 17 + 1", "1 8")
    ],
    *[
        ("18", text)
        for text in ("\\boxed{17}", "\\boxed{17}\\boxed{18}", "\\frac{18}{2}", "18/0", "1/0", "\\text{no}", "\\")
    ],
    *[("-18", text) for text in ("18", "x-18", "(-1)8", "$18")],
    *[("1000", text) for text in ("1.000", "1,00,0", "10000", "100", "1,000,000", "1 0 0 0")],
    *[("2.5", "2,5"), ("0.5", "5"), ("5", "5:00"), ("5", "5 h 30"), ("1.5", "1 1/2"), ("0.333", "1/3"), ("3", "３.5")],
]
NUMBERS_RIGHT += [
    *[
        ("18", text)
        for text in ("=> 18", "-> 18", "<answer>18</answer>", "(+18)", "$+18", "18 more than Tom", "18 m2")
    ],
    *[
        ("18", text)
        for text in ("18, not counting Tom", "18 (not including tax)", "18 tons of CO2", "\\text{18 dollars}")
    ],
    *[("18", text) for text in ("\\( 18 \\text{ eggs} \\)", "\\underline{18}", "18^\\circ", "$18 less than before")],
    *[("1234", text) for text in ("1{,}234", "$1{,}234$", "1\\,234", "\\boxed{1{,}234}")],
    *[
        ("500", "Rs.500"),
        ("5", "No.5"),
        ("0.5", "½"),
        ("-5", "-\\(5\\)"),
        ("-5", "-\\boxed{5}"),
        ("0.5", "\\frac{1}{2}."),
    ],
    *[("5", "\\dfrac{10}{2}."), ("20000", "$20,000"), ("17", "The answer is \\$17")],
]
NUMBERS_WRONG += [
    *[("7", text) for text in ("\\(1\\) \\(2\\) \\(7\\)", "1 2 3 \\boxed{7}", "It is \\(5\\). No, \\(7\\).")],
    *[("17", "\\boxed{17} or 18"), ("18", "The answer is \\$17 or \\(18\\)"), ("18", "10 \\\\ 18")],
    *[
        ("5", text)
        for text in ("-\\(5\\)", "minus \\boxed{5}", "not \\(5\\)", "\\$5 \\text{ million}", "\\(5\\) million dollars")
    ],
    *[
        ("5", text)
        for text in ("\\neq 5", "\\ge 5", "more than \\(5\\)", "\\text{at least } 5", "4 \\to 5", "isn't 5")
    ],
    *[
        ("5", text)
        for text in ("5 thousands", "5 dozens", "5M", "$5M", "5 bn", "5 trillion", "5 and a half hours", "5 or six")
    ],
    *[("5", text) for text in ("fewer than 5", "√5", "sqrt(5)", "5x", "x - 5", "5 - x", "It is not equal to 5")],
    *[
        ("52", "5²"),
        ("103", "10³"),
        ("0.18", "Rs.18"),
        ("0.5", "No.5"),
        ("1500", "1 500ml"),
        ("5100", "5 100-dollar bills"),
    ],
    ("5 thousand", "5"),
]
EXPRESSIONS_RIGHT = [
    *[("\\frac{1}{2}", text) for text in ("\\frac{1}{2}", "\\frac12", "\\dfrac{1}{2}", "\\tfrac{1}{2}", "0.5", "1/2")],
    *[
        ("\\frac{1}{2}", text)
        for text in ("$\\frac{1}{2}$", "\\boxed{\\frac{1}{2}}", "\\( \\frac{1}{2} \\)", "1 \\div 2")
    ],
    *[("\\frac{3}{4}", "The answer is $\\frac{3}{4}$."), ("\\frac{3}{4}", "0.75"), ("\\frac{3}{4}", "\\frac{6}{8}")],
    *[("x^2+1", "1+x^2"), ("x^2+1", "x^2 + 1"), ("a^3-b", "-b+a^3"), ("2x", "x \\cdot 2"), ("x(x+1)", "x^2+x")],
    *[("\\sqrt{2}", "\\sqrt2"), ("\\sqrt{2}", "2^{1/2}"), ("2\\sqrt{3}", "\\sqrt{12}")],
    *[("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"), ("10^{6}", "1000000"), ("5!", "120"), ("4+3", "7")],
    *[("(1,2)", "(1, 2)"), ("[0,1)", "[0, 1)"), ("(-\\infty,3)", "(-\\infty, 3)"), ("\\{1,2\\}", "\\{2,1\\}")],
    *[
        ("\\pi", "\\pi"),
        ("2\\pi", "\\pi \\cdot 2"),
        ("\\infty", "\\infty"),
        ("2i+1", "1+2i"),
        ("-7", "−7"),
        ("-7", "-7"),
    ],
    *[("10\\%", "10\\%"), ("10\\%", "0.1"), ("\\$10", "10"), ("10", "\\$10"), ("1,000", "1000"), ("90^\\circ", "90")],
    *[
        ("5\\text{ cm}", "5"),
        ("5", "5 \\text{ cm}"),
        ("6", "6 units"),
        ("x=5", "5"),
        ("5", "x=5"),
        ("5", "\\boxed{5}"),
    ],
    *[("-\\frac{1}{3}", "-1/3"), ("-\\frac{1}{3}", "\\frac{-1}{3}"), ("x>3", "3<x"), ("1\\le x\\le 2", "[1,2]")],
    *[
        ("\\text{even}", "even"),
        ("\\text{Monday}", "Monday"),
        ("\\text{(B)}", "B"),
        ("12_{8}", "12_8"),
        ("C", "\\text{C}"),
    ],
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    (r"1 - \frac{1}{\mathrm{e}}", r"\frac{e-1}{e}"),
    (r"\mathrm{e}^2", "e^2"),
    (r"5\,\mathrm{m}", "5"),
    (r"\frac{3}{8}", "0.375"),
    ("12", r"\boxed{12}!"),
    ("12", "It is 12!"),
    ("10", r"\frac{5!}{2!3!} = 10"),
    ("720", "720 = 6!"),
    ("120", "5!"),
    ("5", r"5\,\frac{\mathrm{m}}{\mathrm{s}}"),
]
EXPRESSIONS_RIGHT += [
    *[(r"(\frac{1}{2},2)", "(0.5,2)"), (r"\frac{x}{2}", "0.5x"), (r"y = \frac{x}{2}", "y = 0.5x")],
    *[("e^{0.5}", r"\sqrt{e}"), ("e^{0.5}", r"e^{\frac12}"), ("e^{1.5}", "e^{3/2}"), ("x e^{0.5}", r"x\sqrt{e}")],
    *[(r"[0.5,\infty)", r"[1/2,\infty)"), ("(-0.5, 2)", "(-1/2, 2)"), ("1,000.5", r"\frac{2001}{2}")],
    *[("[0.1,0.7)", "[1/10,7/10)"), (r"(\pi, 1)", "(3.14159265, 1)"), (r"\frac{\sqrt{2}}{2}", "0.70710678")],
    (r"\begin{pmatrix} -1/2 \\ 2 \end{pmatrix}", r"\begin{pmatrix} -0.5 \\ \frac{4}{2} \end{pmatrix}"),
    *[
        ("x^2+y^2", "y^2+x^2"),
        ("x^3+x^2", "x^2 + x^3"),
        ("e^{x^2}", "e^{x^2}"),
        ("\\frac{x^2}{y^2}", "\\frac{x^2}{y^2}"),
    ],
    *[("5", "2^2+1^2"), ("x^2", "**$x^2$**"), ("x^5-x^4+x^3", "x^3 - x^4 + x^5")],
]
EXPRESSIONS_WRONG = [
    *[("x^2+y^2", "x^2-y^2"), ("999", "9**9**9"), ("18", "\\prod_{k=1}^{9999}(x+k)")],
    *[
        ("\\frac{1}{2}", text)
        for text in ("", "2", "\\frac{2}{1}", "\\frac{1}{3}", "-\\frac{1}{2}", "half of it", "\\frac{1}")
    ],
    *[("(1,2)", "(2,1)"), ("[0,1)", "[0,1]"), ("\\{1,2\\}", "\\{1,3\\}"), ("x^2+1", "x^2-1"), ("2", "2 or 3")],
    *[
        ("\\pi", "3.14159"),
        ("\\sqrt{2}", "1.41"),
        ("5", "\\boxed{4}\\boxed{5}"),
        ("5", "$"),
        ("5", "\\boxed{"),
        ("5", "{{{"),
    ],
    *[
        ("1", "9^{9^{9^9}}"),
        ("1", "9**9**9**9"),
        ("1", "1000000!"),
        ("1", "2^{100000}"),
        ("1", "9!!!!"),
        ("1", "(9!)!"),
    ],
    # An answer whose beginning alone was read, decimals that math-verify rounds, a factorial.
    (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}"),
    (r"1 - \frac{1}{\mathrm{e}}", "1"),
    (r"2\mathrm{e}", "2"),
    (r"\frac{1}{\mathrm{x}}", r"\frac{1}{\mathrm{y}}"),
    (r"1 - \frac{1}{\operatorname{e}}", r"1 + \frac{1}{\operatorname{e}}"),
    (r"\frac{1}{3}", "0.333333333"),
    ("0.1", "0.10000001"),
    ("4.5", "4.49999999999"),
    (r"(\frac{1}{3},2)", "(0.333333333,2)"),
    (r"[1/3,\infty)", r"[0.333333333,\infty)"),
    (r"\left[\frac13,2\right)", "[0.333333333,2)"),
    (r"\left\{\frac13,2\right\}", r"\{0.333333333,2\}"),
    (r"\frac{x}{3}", "0.333333333x"),
    (r"y = \frac{x}{3}", "y = 0.333333333x"),
    (r"\begin{pmatrix} 1/3 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 0.333333333 \\ 2 \end{pmatrix}"),
    ("12", "12!"),
]
DOTTED = (
    "\\frac{1}{2}",
    "3\\sqrt{13}",
    "x^2+1",
    "\\pi",
    "(3,4)",
    "[-2,7]",
    "1,-2",
    "p - q",
    "6-5i",
    "y = 2x+3",
    "C",
    "Evelyn",
)
EXPRESSIONS_RIGHT += [
    *[(text, f"{text}.") for text in DOTTED],
    *[(text, f"${text}.$") for text in DOTTED],
    *[("\\text{Yes}", "yes."), ("25\\pi", "25\\pi \\text{ square units}"), ("12", "12 cm^2"), ("\\sqrt{2}", "√2")],
    *[
        ("\\emptyset", "\\varnothing"),
        ("1,2", "$1$ and $2$"),
        ("-5", "-$5$"),
        ("-5", "-\\boxed{5}"),
        ("x=5", "x = \\boxed{5}"),
    ],
    *[("x^2", "The answer is \\(x^2\\)."), ("5", "5 dollars"), ("4210_{5}", "4210_5"), ("(-1,2)", "$(-1, 2)$")],
]
EXPRESSIONS_WRONG += [
    *[("12_8", "12_9"), ("52_8", "52"), ("52", "52_8"), ("4210_{5}", "4210_{6}"), ("2x", "2"), ("2", "2x")],
    *[("7", text) for text in ("$5$ $6$ $7$", "maybe 5, maybe 7", "It is 5. No, it is 7.", "1 2 \\boxed{7}")],
    *[("3", "either 2 or 3"), ("6", "5 (or 6)"), ("3", "$2$ or $3$"), ("x", "x and y"), ("10", "\\$10 million")],
    *[
        ("5", text)
        for text in (
            "minus 5",
            "negative 5",
            "-$5$",
            "-\\boxed{5}",
            "at least 5",
            "more than 5",
            "5 million",
            "not $5$",
        )
    ],
]
CHOICES_RIGHT = [
    *[("B", text) for text in ("B", "b", "(B)", "(b)", "[B]", "B.", "b.", "B:", "B)", " B ", "**B**", "Ｂ", "$B$")],
    *[
        ("B", text)
        for text in ("B. because it is", "B) 42", "B: x", "(B) the second", "B because", "B is right", "it's B")
    ],
    *[
        ("B", text)
        for text in ("The answer is B", "the answer is (B).", "Answer: B", "answer B", "Option B", "option (B)")
    ],
    *[("B", text) for text in ("the correct option is B", "choice B", "Choice: B", "I choose B", "I think B", "so B")],
    *[
        ("B", text)
        for text in ("The answer is B, not C", "B. Vitamin C", "\\boxed{B}", "\\text{B}", "The answer is B.", "— B")
    ],
    *[
        ("A", text)
        for text in ("A", "a", "(A)", "A.", "a)", "Answer: A", "The answer is A", "A: a cat", "A) a cat", "So A.")
    ],
    *[("D", text) for text in ("D", "d", "It is D", "the answer is D!", "D. none of them", "D) all")],
    *[("H", "H"), ("C", "Option C is a fit"), ("C", "C, since a cat purrs"), ("C", "thus C"), ("E", "E."), ("b", "B")],
]
CHOICES_RIGHT += [
    *[("A", text) for text in ("A is correct", "A because it is", "I choose A because", "The answer is A for sure")],
    *[
        ("B", text)
        for text in ("the answer is b", "answer: b", "option b", "b) because", "\\boxed{b}", "'B'", "__B__")
    ],
    *[("C", "The answer is not B but C"), ("B", "B, because C is wrong"), ("(B)", "B"), ("A. x", "(A)")],
]
CHOICES_RIGHT += [
    *[("D", text) for text in ("D. Both A and B", "D - Both A & C", "D 181°C", "\\boxed{D} 181°C", "(D) A and B")],
    *[
        ("C", text)
        for text in ("The correct answer is (C) Either A or B", "C. C, C++", "\\boxed{\\text{C}}", "C) A or B")
    ],
    *[
        ("A", text)
        for text in ("\\boxed{A} the temperature is 25 °C", "**A** mass", "\\boxed{A} commensalism", "$A$ mass")
    ],
    *[
        ("B", text)
        for text in (
            "B (8.0 × 10^-19 C)",
            "B, A two-sample t-test",
            "\\boxed{B. a cat}",
            "an electric field (B)",
            "**B.** a cat",
        )
    ],
]
CHOICES_WRONG = [
    *[("C", text) for text in ("25 °C", "C(s) + CO2(g) → 2CO(g)", "vitamin C", "A 25 °C", "the C and the D")],
    *[
        ("B", text)
        for text in ("not B", "The answer is not B", "B is wrong", "anything but B", "The answer is B, or C")
    ],
    ("a", "The answer is a cat"),
    *[
        ("B", text)
        for text in ("", " ", "A", "a", "C.", "The answer is C", "BB", "Bob", "Because", "beta", "b2", "B2", "2")
    ],
    *[
        ("B", text)
        for text in ("A or B", "B or A", "A, B", "B and C", "B/C", "(B) or (C)", "the answer is B or C", "A B C D")
    ],
    *[("B", text) for text in ("option bee", "the second", "A. no, B", "I", "what's B'C", "AB", "none", "?", "Ω")],
    *[("A", text) for text in ("A cat", "An apple", "apple", "a cat", "B", "AA", "Aha")],
]
NAMES_RIGHT = [
    *[
        ("Marie Curie", text)
        for text in ("Marie Curie", "marie curie", "MARIE CURIE", " Marie  Curie ", "Marie Curie.")
    ],
    *[
        ("Marie Curie", text)
        for text in ("'Marie Curie'", '"Marie Curie"', "Marie, Curie", "Marie Curie!", "Marie\tCurie")
    ],
    *[
        ("The Beatles", text)
        for text in ("Beatles", "the beatles", "The Beatles", "a Beatles", "the the Beatles", "Beatles.")
    ],
    *[
        ("the United States", text)
        for text in ("United States", "The United States", "an United States", "united states")
    ],
    *[("U.S.", text) for text in ("US", "U.S.", "us", "the U.S.", "u.s", "U.S")],
    *[("1,000", "1000"), ("1000", "1,000"), ("3.5", "35"), ("$5", "5"), ("5%", "5"), ("May 5, 1990", "may 5 1990")],
    *[("Jean-Paul", "JeanPaul"), ("rock 'n' roll", "rock n roll"), ("AC/DC", "acdc"), ("yes", "Yes."), ("no", "No")],
    *[
        ("Zürich", "zürich"),
        ("Zürich", "Zu\u0308rich"),
        ("Åland", "A\u030aland"),
        ("東京", "東京"),
        ("Ωmega", "ωmega"),
    ],
    *[
        ("Straße", "straße"),
        ("École", "école"),
        ("Nguyễn", "nguyễn"),
        ("São Paulo", "são paulo"),
        ("José", "Jose\u0301"),
    ],
    *[
        ("theory", "theory"),
        ("anthem", "Anthem"),
        ("banana", "a banana"),
        ("A-level", "alevel"),
        ("the", "The The x"[:3]),
    ][:4],
    *[("Paris", "Paris?"), ("Paris", "(Paris)"), ("Paris", "[Paris]"), ("Paris", "Paris;"), ("Paris", "the paris")],
    *[
        ("Lake Como", "lake como"),
        ("Mount Everest", "mount everest!"),
        ("Rome", "rome "),
        ("NaCl", "nacl"),
        ("B12", "b12"),
    ],
]
NAMES_RIGHT += [("A", "A"), ("The The", "The The"), ("!!!", "!!!")]
NAMES_WRONG = [
    *[
        ("Marie Curie", text)
        for text in ("", " ", ".", "Curie", "Marie", "Pierre Curie", "Marie Curie and Pierre", "MarieCurie")
    ],
    *[
        ("Paris", text)
        for text in ("Paris, France", "London", "in Paris", "Pari", "paris is it", "parís", "Bari", "it is Paris")
    ],
    *[
        ("the", "a"),
        ("a", "the"),
        ("", ""),
        ("an", ""),
        ("Zürich", "Zurich"),
        ("10", "1 0"),
        ("theory", "ory"),
    ],
]
FAMILIES = {
    number: (NUMBERS_RIGHT, NUMBERS_WRONG),
    expression: (EXPRESSIONS_RIGHT, EXPRESSIONS_WRONG),
    choice: (CHOICES_RIGHT, CHOICES_WRONG),
    exact_match: (NAMES_RIGHT, NAMES_WRONG),
}


def cases(kind):
    return [(grader, *pair) for grader, pairs in FAMILIES.items() for pair in pairs[kind]]


@pytest.mark.parametrize("grader", FAMILIES)
def test_each_family_has_its_sixty_pairs(grader):
    right, wrong = FAMILIES[grader]
    assert len(set(right) | set(wrong)) >= 60 and not set(right) & set(wrong)


@pytest.mark.parametrize(("grader", "gold", "answer"), cases(0))
def test_a_right_answer_is_right(grader, gold, answer):
    assert grader(gold, answer)


@pytest.mark.parametrize(("grader", "gold", "answer"), cases(1))
def test_a_wrong_answer_is_wrong(grader, gold, answer):
    assert not grader(gold, answer)


GOLDS = {number: "18", expression: "\\frac{1}{2}", choice: "B", exact_match: "Marie Curie"}
MATHEMATICAL = st.text(st.sampled_from("0123456789+-*/^!(){}[]\\,.$%=<>xyeipfracsqtbo _&|~"), max_size=120)
SPOILT = st.builds(
    lambda text, at, inserted: text[: at % (len(text) + 1)] + inserted + text[at % (len(text) + 1) :],
    st.sampled_from([answer for _, answer in NUMBERS_RIGHT + EXPRESSIONS_RIGHT + CHOICES_RIGHT]),
    st.integers(0, 40),
    st.text(max_size=10),
)


@pytest.mark.parametrize("grader", FAMILIES)
def test_any_text_raises_nothing_and_takes_less_than_a_second(grader):
    slowest = [0.0, ""]

    @settings(deadline=None, database=None, derandomize=True, suppress_health_check=HealthCheck)
    @given(st.one_of(st.text(max_size=300), MATHEMATICAL, SPOILT))
    def attempt(text):
        gc.disable()  # all the other tests' objects are not the grader's to collect
        started = time.thread_time()  # the machine may be busy with something else
        try:
            assert grader(GOLDS[grader], text) in (True, False)
            slowest[:] = max(slowest, [time.thread_time() - started, text])
        finally:
            gc.enable()

    attempt()
    assert slowest[0] < 1, slowest


@pytest.mark.parametrize("grader", FAMILIES)
def test_a_grader_works_in_a_thread(grader):
    verdicts = []
    pairs = [pairs[0] for pairs in FAMILIES[grader]]
    thread = threading.Thread(target=lambda: verdicts.extend(grader(*pair) for pair in pairs))
    thread.start()
    thread.join(10)
    assert verdicts == [True, False]


def test_squads_normalisation_is_squads():
    assert normalized("The  quick, brown-fox (an animal) ") == "quick brownfox animal"
    assert normalized("a theory of the an") == "theory of"
