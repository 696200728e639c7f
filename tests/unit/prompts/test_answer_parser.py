"""Rendering and reading back are one pair; what is not plainly said stays unread: a wrong guess is worse than none."""

import json
import random
import re
import time
import unicodedata
from datetime import date
from typing import Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from medkit.prompts.answer_parser import normalise, parse, parse_record
from medkit.prompts.templates import ABSTRACT, LETTER, LETTERS, TEMPLATES, TEXT, Record, answers

DRUGS = ["aspirin", "insulin", "metformin", "warfarin"]
GERMS = ["S. aureus", "C. difficile", "B. fragilis", "D. pneumoniae", "E. coli"]
VERDICTS = ["yes", "no", "maybe"]
A, B, C, D, E = range(5)


def question(*options: str, context: str = "") -> dict:
    return {"question": "Which one?", "context": context, "options": list(options)}


# --- reading letters -----------------------------------------------------------------------------------------------

DECLARED = [
    # the letter alone
    ("C", C), (" c \n", C), ("C.", C), ("C)", C), ("(C)", C), ("[C]", C), ("C:", C), ("**C**", C), ("A", A),
    # the letter and its option's text
    ("C. metformin", C), ("C) Metformin.", C), ("(C) metformin", C), ("C: metformin", C), ("C metformin", C),
    ("c. metformin", C),
    # the option's text
    ("metformin", C), ("Metformin.", C), ("  METFORMIN\n", C), ("**metformin**", C), ("The answer is metformin.", C),
    ("Answer: metformin", C),
    # a letter that is declared
    ("The answer is (C).", C), ("The answer is C.", C), ("the answer is c.", C), ("The answer is C", C),
    ("The answer is **C**.", C), ("**The answer is C.**", C), ("The answer is option C.", C),
    ("The correct answer is C.", C), ("The correct option is (C).", C), ("The best choice is C.", C),
    ("Answer: C", C), ("ANSWER: C", C), ("Final answer: C", C), ("**Answer:** c) metformin", C), ("**Answer**: C", C),
    ("Answer: C. metformin", C), ("The answer is C because it is first-line.", C),
    ("The answer is C, since the kidneys are well.", C), ("Because of the rash, the best step is D.", D),
    ("A patient like this should receive option C", C), ("I would choose option C.", C), (r"\boxed{B}", B),
    (r"So we get $\boxed{B}$.", B), (r"\boxed{\text{B}}", B), ("The answer is A.", A), ("Answer: A", A),
    ("Answer: B\nAnswer: B", B), ("The answer is: B", B), ("The correct answer is: **C**", C),
    ("Correct answer: **C**", C), ("Correct option: (C)", C), ("Answer - C", C), ("Answer – C", C), ("Answer = C", C),
    ("Answer C", C), ("Answer choice: C", C), ("Option C", C), ("Option C.", C), ("Choice (C)", C),
    ("The answer is the letter C.", C), ('The answer is "C".', C), ("So the answer is $C$.", C),
    ("The answer to this question is C.", C), ("The answer is clearly C.", C), ("The answer must be C.", C),
    ("The most likely diagnosis is C.", C), ("The most appropriate next step in management is D.", D),
    ("I choose C", C), ("I'd go with C.", C), ("I would pick (C).", C),
    ("We select C, since the kidneys are well.", C), ("In short:\nFinal answer: C", C), ("answer: a", A),
    ("the answer is a.", A),
    # Markdown, tags, signs, width
    ("**C.** metformin", C), ("__C__", C), ("`C`", C), ("### Answer\nC", C), ("**Answer**\n\nC) metformin", C),
    ("## Final answer: C", C), ("## C", C), ("<answer>C</answer>", C), ("C ✅", C), ("C!", C),
    ("\uff23", C),  # full-width ("Answer\uff1a\uff08\uff23\uff09", C), (r"\boxed{C. metformin}", C),
    (r"\boxed{metformin}", C), (r"The final answer is $\boxed{C}$.", C),
    # a verdict
    ("C is correct", C), ("C is the correct answer", C), ("(C) is correct because it lowers glucose.", C),
    ("Option C is right.", C), ("Thus C is the best choice.", C), ("Option C (metformin) is correct.", C),
    ("Metformin is the correct answer.", C), ("C. Metformin is correct.", C), ("A is wrong, C is right", C),
    ("Neither A nor B is correct; C is correct.", C),
    # the letter, its option's text and more
    ("The correct option is (C) metformin", C), ("The correct answer is:\n\nC. Metformin", C),
    ("The answer is C (metformin).", C), ("Answer: C – metformin", C),
    ("C. Metformin\n\nExplanation: insulin comes later.", C),
    ("C. Metformin is the first drug to try in type 2 diabetes.", C),
    ("The answer is C. Metformin is the first drug to try.", C),
    ("Answer: C\n\nA. Aspirin treats pain.\nB. Insulin comes later.", C),
    # the option's text in a sentence
    ("Metformin, because the kidneys are well.", C), ("Metformin. It is the first drug to try.", C),
    ("I would choose metformin.", C), ("The answer is “metformin”.", C),
    ("The answer is metformin, which lowers glucose.", C),
    # other languages, where a colon or an "is" declares the letter
    ("答案是C", C), ("正确答案：C。因为它有效。", C), ("La respuesta es C", C), ("La respuesta correcta es C.", C),
    ("Réponse : C", C), ("Antwort: C", C),
    # reasons that name other letters
    ("A is too weak, B acts too fast, D bleeds. The answer is C.", C),
    ("The answer is C. A is too weak and B acts too fast.", C),
    ("Option A treats pain; option B treats type 1.\n\nAnswer: C", C),
    ("A is wrong because it bleeds, B is wrong because it is late, so the answer is C", C),
    ("A is not correct. B is incorrect. The answer is C.", C),
    ("A. aspirin\nB. insulin\nC. metformin\nD. warfarin\n\nAnswer: C", C),
    ("The patient has hepatitis B and takes vitamin D. The answer is C.", C),
    ("C is not a symptom of diabetes, so the answer is C.", C),  # a question may ask for the exception
    ("One might think the answer is A, but the answer is C.", C),
    ("If he bled, the answer would be D. The answer is C.", C),
    # one thing and not another
    ("not A but B", B), ("The answer is not A but B.", B), ("Final answer: not A but B", B),
    ("not aspirin but metformin", C), ("I am sure that it is not A but B.", B), ("C, not A", C),
    ("The answer is C, rather than A.", C),
    # a final answer or a box counts alone
    ("At first the answer is A. Final answer: C", C), ("The answer is A. No, wait.\n\n**Final answer:** (C)", C),
    (r"The answer is A. No, wait. \boxed{C}", C), (r"C is wrong. \boxed{C}", C),
    # thinking is not answering
    ("<think>Perhaps the answer is A. Or B?</think>C", C),
    ("<think>\nThe answer is A.\n</think>\n\nThe answer is (C).", C),
    ("The answer is A? Hmm, no.</think>\n\nC", C),  # chat templates that open the block themselves
]  # fmt: skip

UNDECLARED = [
    "", " \n", ".", "maybe", "yes", "I do not know.", "none of these",
    # letters that are words, or parts of them
    "A patient with a rash should see a doctor.", "A rash is common here", "I think it is an infection.", "I",
    "The answer is a matter of debate.", "The answer is a beta blocker.", "The best next step is a CT scan.",
    "The best choice is a low dose of something else.", "Answer: a low dose of aspirin",
    "The answer is I think unclear", "The best step is D-dimer testing.", "The answer is B-cell lymphoma.",
    "The answer is vitamin C deficiency", "The answer is hepatitis B", "Give vitamin C.", "Vitamin C",
    "Vitamin C is the best choice.", "Type A", "Hepatitis B", "D-dimer", "A 30-year-old man with a rash.", "E. coli",
    "The answer is insulin glargine.", "Metformin lowers glucose.", "It is hepatitis B.",
    "The answer is A1c measurement.", "Answer: B12", "The answer is C. difficile infection.",
    "The answer is B. fragilis", "The answer isn't clear",
    # several, or one that is not there
    "A or B", "A, B", "A and C", "A/B", "A B C D", "Both A and C are correct.",
    "Either option A or option C is correct.", "The answer is C as well as D.", "Answer: C. Metformin or warfarin",
    "The answer is A or B.", "The answer is A and C.", "The answer is A, C.", "The answer is A, B or C.",
    "Answer: A/B", "Answer: A & B", "The answer is (A) or (B).", "Answer: (A), (C)",
    "The answer is A. On reflection the answer is B.", r"\boxed{A} or \boxed{B}", r"\boxed{A, B}", r"\boxed{}", "E",
    "Answer: E", "The answer is (J).", r"\boxed{F}", "Z", "AB", "ABCD",
    # the letter says one thing and the words another
    "C. aspirin", "C. Gliclazide", "The answer is C. Insulin glargine.", "The answer is C. Sodium bicarbonate.",
    "A metformin", "Answer: C. aspirin", "The answer is (A) metformin.",
    # denied
    "Not B.", "The answer is not B.", "The answer is not option B.", "Anything except C.", "Do not choose option B.",
    "Never select option A.", "The patient should not receive option C.", "You shouldn't pick option D.",
    "The incorrect answer is B.", "The wrong answer is B.", "I don't think the answer is C.",
    "It is not true that C is correct.", "C is not correct.", "C is wrong.", "Neither A nor C is correct.",
    "Neither option A nor option C is correct.", "The answer is C. C is wrong.", "not A but B or C",
    "It might be not A but B.", "The answer is C. On reflection: never C.", "Not A. But B",
    # asked, supposed, half said
    "Is the answer C?", "The answer is C?", "If the patient were pregnant, the answer would be C.",
    "Unless he bleeds, D is correct.", "You might think that C is correct.", "C is correct only in children.",
    "C is correct, but D is better.", "The answer is a",  # cut off, it may go on "The answer is metformin or",
    # final, and not one choice
    "The answer is A. Final answer: A or C.", "Final answer: A. Final answer: C.",
    # a list
    "A. aspirin\nB. insulin\nC. metformin\nD. warfarin",
    "A. Aspirin is too weak.\nB. Insulin comes later.\nC. Metformin is the first to try.",
    "Answer:\nA. aspirin\nB. insulin", "Answer: A\nB", "Answer: A\nC", "aspirin\ninsulin",
    "C\n\nQuestion: What else?\nAnswer: B",  # a base model that goes on
    # refused
    "As an AI I cannot give medical advice.", "I'm sorry, but I can't help with that. A doctor can.", "I'm not sure.",
    "not sure", "👍", "\U0001f170",  # a sign, a blood group
    # talked about, not given
    "Option A treats pain; option B treats type 1.", "C is a drug for diabetes", "metformin or insulin",
    "Metformin is one of several drugs.", "The answer depends on A.", "Which answer? A, I guess, or C",
    # no end to the thinking
    "<think>The answer is A.", "<think>C</think>", "<think>\\boxed{C}</think>I am not sure.",
    "So the answer is A.</think>\n\nI am not sure.",
    # digits and other scripts
    "3", "(3)", "The answer is 3.", "٣", "३", "３", "④", "\u216d",  # a Roman hundred "\u0421",  # a Cyrillic С
    "\u0391",  # a Greek Α "답: 다",
]  # fmt: skip


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
        ("The answer is C. difficile, not S. aureus.", B),
        ("C. Difficile", B),
        ("C. Difficile is the most common cause here.", None),
        ("E. Coli", E),
        ("The answer is E. Coli infection", None),
        ("S. aureus is the correct answer.", A),
        ("not S. aureus but E. coli", E),
        ("I would give nothing against E. coli", None),
    ],
)
def test_names_that_begin_like_a_letter_are_names(text, choice):
    assert parse(text, GERMS, LETTER) == choice


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Vitamin C", B),
        ("The answer is vitamin C.", B),
        ("Vitamin C is correct.", B),
        ("B. Vitamin C", B),
        ("C", C),
        ("C. Vitamin C", None),
        ("not pure", E),  # an option, not a denial of D
        ("The answer is not pure.", E),
        ("The water is not pure.", None),
        ("A. Folic acid", A),  # the beginning of its text
        ("A. Folic", None),  # of its text and of another one's
        ("D. Pure", D),
        ("The answer is B. -4", None),
    ],
)
def test_the_letter_and_the_text_agree_or_nothing_is_read(text, choice):
    options = ["Folic acid 5 mg daily", "Vitamin C", "Folic anhydride", "pure", "not pure"]
    assert parse(text, options, LETTER) == choice


def test_two_readings_of_equal_length_are_none():
    assert parse("The answer is A. insulin.", ["insulin", "A. insulin"], LETTER) is None
    assert parse("The answer is A. insulin.", ["insulin", "A. insulin"], TEXT) == B


def test_a_species_is_not_a_letter_and_a_sentence():
    options = ["Escherichia coli", "Klebsiella", "Proteus", "Candida", "None of these"]
    assert parse("E. Coli is the most common cause here.", options, LETTER) is None
    assert parse("E. Fungi are not the most common cause here.", options, LETTER) == E


def test_a_sign_belongs_to_a_number():
    assert parse("B. -4", ["4", "-4"], LETTER) == B
    assert parse("A. -4", ["4", "-4"], LETTER) is None
    assert parse("Answer: -4", ["4", "-4"], TEXT) == B


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
        ("yes or no", None),
        # the first word, where no other verdict begins a sentence
        ("Yes, it does.", 0),
        ("Yes, because the trial was large.", 0),
        ("Yes because the trial was large.", 0),
        ("No. The difference was small.", 1),
        ("No: the difference was small.", 1),
        ("**Yes**, it does.", 0),
        ("Maybe, but the trial was small.", 2),
        ("No, there was no difference.", 1),
        ("Yes!", 0),
        ("Yes, no", None),
        ("No. Yes.", None),
        ("Yes, but no.", None),
        ("Yes. It works. No, it does not.", None),
        ("No significant difference was found.", None),
        ("Maybe.", 2),
        ("maybe yes", None),
        ("It may be yes", None),
        ("The answer is yes, because it works.", 0),
        ("The answer is no longer clear.", None),
        ("not yes but no", 1),
        ("I'm not sure.", None),
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


LEADS = [
    *("{}", "Answer: {}", "The answer is {}", "The correct answer is: {}", "Final answer: {}", "Correct answer: {}"),
    *(
        "I choose {}",
        "I would go with {}",
        "The best choice is {}",
        "So the most likely diagnosis is {}",
        "Answer - {}",
    ),
    *("A is wrong, so the answer is {}", "Rash and fever.\n\nAnswer:\n{}", "{} is correct", "{} is the best answer"),
    r"\boxed{{{}}}",
]


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(list(TEMPLATES.values())), st.sampled_from(LEADS))
def test_every_answer_reads_back_after_every_lead(data, template, lead):
    names = ["aspirin", "E. coli", "HLA-B*27", "vitamin C", "CD4+ cells", "5 mg/kg (i.v.)", "no", "a CT scan", "-4"]
    options = data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=9, unique=True))
    choice = data.draw(st.integers(0, len(options) - 1))
    said = answers(question(*options), template)[choice].removeprefix(template.lead)
    assume(lead != "A is wrong, so the answer is {}" or choice)
    said = data.draw(st.sampled_from([said, said.upper(), f"**{said}**", f"({said})", f'"{said}"']))
    case = data.draw(st.sampled_from([str, str.upper, str.lower])) if "boxed" not in lead else str
    end = data.draw(st.sampled_from(["", ".", "!", "\n", ".\n\nMore."]))
    text = "{}".join(case(part) for part in lead.split("{}")).format(said) + end
    assert parse(text, options, template) == choice


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


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.permutations(range(4)), st.integers(0, 3), st.sampled_from(LEADS))
def test_other_places_give_the_same_answer(order, choice, lead):
    """What a text says of an option does not depend on where it stands; a letter follows its option."""
    moved = [DRUGS[i] for i in order]
    assert parse(lead.format(DRUGS[choice]), moved, TEXT) == order.index(choice)
    assume(not lead.startswith("A is wrong"))
    for name in ("{}", "({})", "{}. {{}}"):
        before, after = (name.format(LETTERS[i]).format(DRUGS[choice]) for i in (choice, order.index(choice)))
        assert parse(lead.format(before), DRUGS, LETTER) == choice
        assert parse(lead.format(after), moved, LETTER) == order.index(choice)


PIECES = [
    *("the answer is", "final answer:", "correct", "option", "not", "but", "because", "so", "best", "choose", "sure"),
    *("drug", "glucose", "patient's", "yes", "maybe", "3", "④", "٣", "β", "ж", "否", "İ", "\ud800", "\x00", "</think>"),
    *("(", ")", ".", ",", ":", "**", "\n", "-", "\\boxed{", "}"),
]


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    st.one_of(st.lists(st.sampled_from(PIECES), max_size=25).map(" ".join), st.text(max_size=40)),
    st.sampled_from([LETTER, TEXT]),
)
def test_a_text_that_names_no_option_is_no_answer(text, template):
    plain = unicodedata.normalize("NFKC", text)
    assume(not re.search(r"(?i)(?<![^\W_])[a-j](?![^\W_])", plain) and not any(drug in plain.lower() for drug in DRUGS))
    assert parse(text, DRUGS, template) is None


@pytest.mark.parametrize(
    "unit",
    [
        *("answer is ", "(", "best ", "best-", "not A but ", "A. ", "The answer is A. ", "Final answer: A\n", "\"'"),
        *(
            "if answer is C ",
            "a b\n",
            "A)\n",
            "C. Metformin is correct, ",
            "metformin, ",
            r"\boxed{",
            "*",
            "# ",
            " ",
            "x",
        ),
        *("<think>", "</think>", "so option ", "not sure ", '{"a":', "{", "["),
    ],
)
def test_long_texts_take_no_longer_than_their_length(unit):
    text = (unit * 100_000)[:100_000]
    start = time.process_time()
    parse(text, DRUGS, LETTER)
    assert time.process_time() - start < 1
    assert parse_record(text, Record) is None
    assert time.process_time() - start < 2


# --- reading records -----------------------------------------------------------------------------------------------

PATIENT = {"age": 43, "sex": "male", "complaint": "rash", "duration": "2 weeks", "drug": "aspirin", "dose": "100 mg"}
PATIENT |= {"allergy": None, "denies": "fever"}


class Visit(BaseModel):
    day: date
    place: Literal["ward", "clinic"]
    weight_kg: float | None = None


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        " \n{}\n",
        "```json\n{}\n```",
        "```\n{}\n```",
        "Here is the record:\n```json\n{}\n```\nAnything else?",
        "The record is {} as asked.",
        '<think>Perhaps {{}}? Or {{"age": 1}}?</think>\n{}',
        "Two sources [1] say: {}",
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_the_record(form, indent):
    text = form.format(json.dumps(PATIENT, indent=indent))
    assert parse_record(text, Record) == Record(**PATIENT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no record",
        "null",
        "{}",
        "[]",
        "{{}}",
        '"age": 43',
        json.dumps([PATIENT]),
        json.dumps({"patient": PATIENT}),
        json.dumps(PATIENT)[:-1],
        json.dumps(PATIENT) + "}",
        "{" + json.dumps(PATIENT),
        json.dumps(PATIENT) * 2,
        f"{json.dumps(PATIENT)}\n```json\n{json.dumps(PATIENT)}\n```",
        f"```json\n{json.dumps(PATIENT)}\n```\nor {{}}",
        f"<think>{json.dumps(PATIENT)}</think>",
        f"<think>{json.dumps(PATIENT)}",
        json.dumps(PATIENT).replace("43", "043"),
        json.dumps(PATIENT).replace("43", "NaN"),
        json.dumps(PATIENT).replace('"', "'"),
        json.dumps(PATIENT).replace("}", ",}"),
        json.dumps(PATIENT).replace("}", ' // "no"\n}'),
        json.dumps(PATIENT).replace("{", '{"age": 43, '),
        json.dumps(PATIENT | {"age": "43"}),
        json.dumps(PATIENT | {"age": 43.5}),
        json.dumps(PATIENT | {"age": True}),
        json.dumps(PATIENT | {"sex": "M"}),
        json.dumps(PATIENT | {"complaint": ["rash"]}),
        json.dumps(PATIENT | {"complaint": 1}),
        json.dumps(PATIENT | {"name": "X"}),
        json.dumps({key: value for key, value in PATIENT.items() if key != "allergy"}),
        '{"age":' * 5000,
    ],
    ids=lambda text: text[:40],
)
def test_what_is_not_one_proper_object_is_no_record(text):
    assert parse_record(text, Record) is None


def test_a_schema_is_read_as_json_has_it():
    """A date is a string there; a key that the schema lacks is refused also where the schema itself lets it pass."""
    assert parse_record('{"day": "2025-05-01", "place": "ward"}', Visit) == Visit(day=date(2025, 5, 1), place="ward")
    assert parse_record('{"day": "2025-05-01", "place": "ward", "weight_kg": "70"}', Visit) is None
    assert parse_record('{"day": "2025-05-01", "place": "ward", "ward": 3}', Visit) is None
    assert parse_record('{"day": "2025-05-01", "place": "ward", "weight_kg": NaN}', Visit) is None
    assert parse_record('{"day": "May", "place": "ward"}', Visit) is None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {
            "age": st.none() | st.integers(0, 120),
            "sex": st.sampled_from(["female", "male", None]),
            **{key: st.none() | st.text('ab {}[]\\"é\n', max_size=8) for key in list(PATIENT)[2:]},
        }
    ),
    st.booleans(),
)
def test_every_written_record_reads_back(values, ascii_only):
    record = Record(**values)
    text = json.dumps(record.model_dump(), ensure_ascii=ascii_only)
    assert parse_record(f"Record:\n```json\n{text}\n```", Record) == record
    keys = list(values)
    random.Random(len(text)).shuffle(keys)
    assert parse_record(json.dumps({key: values[key] for key in keys}), Record) == record
    assert parse_record(text + text, Record) is None
