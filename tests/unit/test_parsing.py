"""Rendering and reading back are one pair; what is not plainly said stays unread: a wrong guess is worse than none."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medkit.parsing import normalise, parse
from medkit.prompts import ABSTRACT, LETTER, LETTERS, TEMPLATES, TEXT, answers

DRUGS = ["aspirin", "insulin", "metformin", "warfarin"]
GERMS = ["S. aureus", "C. difficile", "B. fragilis", "D. pneumoniae", "E. coli"]
VERDICTS = ["yes", "no", "maybe"]
A, B, C, D, E = range(5)


def question(*options: str, context: str = "") -> dict:
    return {"question": "Which one?", "context": context, "options": list(options)}


# --- reading letters -----------------------------------------------------------------------------------------------

DECLARED = [
    # the letter alone
    ("C", C),
    (" c \n", C),
    ("C.", C),
    ("C)", C),
    ("(C)", C),
    ("[C]", C),
    ("C:", C),
    ("**C**", C),
    ("A", A),
    # the letter and its option's text
    ("C. metformin", C),
    ("C) Metformin.", C),
    ("(C) metformin", C),
    ("C: metformin", C),
    ("C metformin", C),
    ("c. metformin", C),
    # the option's text
    ("metformin", C),
    ("Metformin.", C),
    ("  METFORMIN\n", C),
    ("**metformin**", C),
    ("The answer is metformin.", C),
    ("Answer: metformin", C),
    # a letter that is declared
    ("The answer is (C).", C),
    ("The answer is C.", C),
    ("the answer is c.", C),
    ("The answer is C", C),
    ("The answer is **C**.", C),
    ("**The answer is C.**", C),
    ("The answer is option C.", C),
    ("The correct answer is C.", C),
    ("The correct option is (C).", C),
    ("The best choice is C.", C),
    ("Answer: C", C),
    ("ANSWER: C", C),
    ("Final answer: C", C),
    ("**Answer:** c) metformin", C),
    ("**Answer**: C", C),
    ("Answer: C. metformin", C),
    ("The answer is C because it is first-line.", C),
    ("The answer is C, since the kidneys are well.", C),
    ("Because of the rash, the best step is D.", D),
    ("A patient like this should receive option C", C),
    ("I would choose option C.", C),
    (r"\boxed{B}", B),
    (r"So we get $\boxed{B}$.", B),
    (r"\boxed{\text{B}}", B),
    ("The answer is A.", A),
    ("Answer: A", A),
    ("Answer: B\nAnswer: B", B),
    # reasons that name other letters
    ("A is too weak, B acts too fast, D bleeds. The answer is C.", C),
    ("The answer is C. A is too weak and B acts too fast.", C),
    ("Option A treats pain; option B treats type 1.\n\nAnswer: C", C),
    # thinking is not answering
    ("<think>Perhaps the answer is A. Or B?</think>C", C),
    ("<think>\nThe answer is A.\n</think>\n\nThe answer is (C).", C),
    ("The answer is A? Hmm, no.</think>\n\nC", C),  # chat templates that open the block themselves
]

UNDECLARED = [
    "",
    " \n",
    ".",
    "maybe",
    "yes",
    "I do not know.",
    "none of these",
    # letters that are words, or parts of them
    "A patient with a rash should see a doctor.",
    "A rash is common here",
    "I think it is an infection.",
    "I",
    "The answer is a matter of debate.",
    "The answer is a beta blocker.",
    "The best next step is a CT scan.",
    "The best choice is a low dose of something else.",
    "Answer: a low dose of aspirin",
    "The answer is I think unclear",
    "The best step is D-dimer testing.",
    "The answer is B-cell lymphoma.",
    "The answer is vitamin C deficiency",
    "The answer is hepatitis B",
    "Give vitamin C.",
    "It is hepatitis B.",
    "The answer is A1c measurement.",
    "Answer: B12",
    "The answer is C. difficile infection.",
    "The answer is B. fragilis",
    "The answer isn't clear",
    # several, or one that is not there
    "A or B",
    "A, B",
    "A and C",
    "A/B",
    "A B C D",
    "The answer is A or B.",
    "The answer is A and C.",
    "The answer is A, C.",
    "The answer is A, B or C.",
    "Answer: A/B",
    "Answer: A & B",
    "The answer is (A) or (B).",
    "Answer: (A), (C)",
    "The answer is A. On reflection the answer is B.",
    r"\boxed{A} or \boxed{B}",
    r"\boxed{A, B}",
    r"\boxed{}",
    "E",
    "Answer: E",
    "The answer is (J).",
    r"\boxed{F}",
    "Z",
    "AB",
    "ABCD",
    # the letter says one thing and the words another
    "C. aspirin",
    "A metformin",
    "Answer: C. aspirin",
    "The answer is (A) metformin.",
    # denied
    "not A but B",
    "Not B.",
    "The answer is not A but B.",
    "The answer is not B.",
    "The answer is not option B.",
    "Anything except C.",
    "Do not choose option B.",
    "Never select option A.",
    "The patient should not receive option C.",
    "You shouldn't pick option D.",
    "The incorrect answer is B.",
    "The wrong answer is B.",
    # talked about, not given
    "A is wrong, C is right",
    "Option A treats pain; option B treats type 1.",
    "C is a drug for diabetes",
    "metformin or insulin",
    "Metformin is one of several drugs.",
    "The answer depends on A.",
    "Which answer? A, I guess, or C",
    # no end to the thinking
    "<think>The answer is A.",
    "<think>C</think>",
    "<think>\\boxed{C}</think>I am not sure.",
    "So the answer is A.</think>\n\nI am not sure.",
    # digits and other scripts
    "3",
    "(3)",
    "The answer is 3.",
    "٣",
    "३",
    "\u0421",  # a Cyrillic С
    "\u0391",  # a Greek Α
    "답: 다",
]


@pytest.mark.parametrize(("text", "choice"), DECLARED, ids=[repr(text)[:60] for text, _ in DECLARED])
def test_a_declared_answer_is_read(text, choice):
    assert parse(text, DRUGS, LETTER) == choice


@pytest.mark.parametrize("text", UNDECLARED, ids=[repr(text)[:60] for text in UNDECLARED])
def test_what_is_not_declared_stays_unread(text):
    assert parse(text, DRUGS, LETTER) is None


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("E", E),
        ("Answer: E", E),
        ("E. coli", E),
        ("The answer is E. coli.", E),
        ("E. E. coli", E),
        ("C. difficile", B),
        ("Answer: C. difficile", B),
        ("B. C. difficile", B),
        ("The answer is B. fragilis.", C),
        ("C. C. difficile", None),
        ("The answer is C. difficile, not S. aureus.", None),
        ("I would give nothing against E. coli", None),
    ],
)
def test_names_that_begin_like_a_letter_are_names(text, choice):
    assert parse(text, GERMS, LETTER) == choice


@pytest.mark.parametrize("letter", LETTERS)
def test_every_letter_up_to_the_last_option(letter):
    index = LETTERS.index(letter)
    for count in range(2, 11):
        options = [f"drug {number}" for number in range(count)]
        for text in (letter, f"({letter})", f"Answer: {letter}", f"The answer is ({letter}).", rf"\boxed{{{letter}}}"):
            assert parse(text, options, LETTER) == (index if index < count else None)


def test_options_that_are_letters_themselves():
    """The prompt asked for the letter before the option: blood groups are the case that happens."""
    groups = ["O", "A", "B", "AB"]
    for index, letter in enumerate("ABCD"):
        assert parse(letter, groups, LETTER) == index
        assert parse(f"Answer: {letter}", groups, LETTER) == index
    assert parse("AB", groups, LETTER) == 3
    assert parse("A. O", groups, LETTER) == 0
    for index, group in enumerate(groups):
        assert parse(group, groups, TEXT) == index


# --- reading words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("yes", 0),
        ("Yes.", 0),
        (" NO\n", 1),
        ("maybe", 2),
        ("**Maybe**", 2),
        ('"no"', 1),
        ("Answer: yes", 0),
        ("The answer is no.", 1),
        ("**Answer:** maybe", 2),
        ("<think>yes</think>no", 1),
        ("yes and no", None),
        ("Yes, it does.", None),
        ("not no", None),
        ("nothing", None),
        ("A", None),
        ("(C)", None),
        ("The answer is C.", None),
        (r"\boxed{A}", None),
        ("perhaps", None),
        ("1", None),
        ("", None),
        ("<think>yes", None),
    ],
)
def test_abstracts_are_answered_in_words(text, choice):
    assert parse(text, VERDICTS, ABSTRACT) == choice


@pytest.mark.parametrize("text", ["A", "C.", "(C)", "The answer is C.", r"\boxed{C}", "option C"])
def test_a_letter_means_nothing_where_none_was_listed(text):
    assert parse(text, DRUGS, TEXT) is None


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda t: t.name)
def test_options_that_read_alike_are_never_chosen_between(template):
    assert parse("aspirin", ["Aspirin", "aspirin.", "insulin"], template) is None
    assert parse("insulin", ["Aspirin", "aspirin.", "insulin"], template) == 2


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda t: t.name)
def test_nothing_said_chooses_nothing(template):
    for text in ("", " ", "*", "...", '""', "<think>", "<think></think>"):
        assert parse(text, ["*", "x", "y"], template) is None


def test_normalise_keeps_what_tells_options_apart():
    assert normalise("  **Aspirin\n 81 mg**. ") == "aspirin 81 mg"
    assert normalise("ﬁbrin") == normalise("FIBRIN")
    for one, other in (("1.5 mg", "15 mg"), ("T3", "T4"), ("CD4+", "CD4-"), (">5", "<5"), ("50%", "50"), ("(a)", "a")):
        assert normalise(one) != normalise(other)


# --- the round trip ------------------------------------------------------------------------------------------------

WORDS = st.text("abcdeABCDE 0123456789µé-+%().,;:/'<>*“", min_size=1, max_size=12).map(lambda t: " ".join(t.split()))
OPTIONS = st.lists(WORDS.filter(bool), min_size=2, max_size=10, unique=True)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(OPTIONS, st.sampled_from(list(TEMPLATES.values())))
def test_every_rendered_answer_reads_back(options, template):
    asked = question(*options)
    said = answers(asked, template)
    assert len(said) == len(options)
    for choice, text in enumerate(said):
        found = parse(text, options, template)
        plain = [normalise(option) for option in options]
        if template.lists_options or (plain.count(plain[choice]) == 1 and plain[choice]):
            assert found == choice
        else:
            assert found is None  # never another one


@settings(max_examples=150, deadline=None, derandomize=True)
@given(OPTIONS, st.data())
def test_the_letter_before_its_text_reads_back(options, choose):
    choice = choose.draw(st.integers(0, len(options) - 1))
    for form in ("{}. {}", "{}) {}", "({}) {}"):
        assert parse(form.format(LETTERS[choice], options[choice]), options, LETTER) in (choice, None)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("ABCDEabcdeino .,()*\n:-'", max_size=30), st.sampled_from(list(TEMPLATES.values())))
def test_any_text_is_read_as_an_option_or_not_at_all(text, template):
    found = parse(text, DRUGS, template)
    assert found is None or found in range(4)
    if found is not None and not template.lists_options:
        assert DRUGS[found] in text.casefold()
    if found is not None:
        assert re.search(rf"{LETTERS[found]}|{DRUGS[found]}", text, re.IGNORECASE)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text("ABCD answeri:().\n", max_size=30))
def test_thinking_never_changes_the_answer(thought):
    assume("<" not in thought)
    for answer in ("C", "The answer is (C).", "metformin", "I am not sure."):
        assert parse(f"<think>{thought}</think>\n{answer}", DRUGS, LETTER) == parse(answer, DRUGS, LETTER)
