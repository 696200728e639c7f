"""Cleaning, tested on what the published files really hold; and the reason why a record is rejected."""

import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from medkit.data import raw_questions
from medkit.data.raw_questions import answer_index, clean_text, rejection_reason, split_options, strip_letters

CLEANED = [
    ("37\u00a0°C, 5\u2009mg, a\u2003b\u2005c\u200ad", "37 °C, 5 mg, a b c d"),  # PubMedQA's spaces
    ("\ufeffWhich of these", "Which of these"),  # MMLU has a byte order mark inside two questions
    ("cafe\u0301", "café"), ("as\u00adpi\u200brin\u2060\u202c\u200d", "aspirin"), ("\u200b", ""),
    ("ﬁnal Polysulﬁde ﬂuted eﬃcient eﬀect", "final Polysulfide fluted efficient effect"),  # MedMCQA's ligatures
    ("36.6℃ (97.9℉)", "36.6°C (97.9°F)"),  # MedQA
    ("5 \u00b5g of a \u03bc agonist", "5 \u03bcg of a \u03bc agonist"),  # micro sign and Greek letter, in MedQA
    ("А 43-уеаr-old mаn", "A 43-year-old man"),  # Cyrillic А, у, е, а, in MedQA
    ("Не also сomрlаіnѕ", "He also complains"), ("μ, к, and ẟ", "μ, κ, and ẟ"),
    ('Propranolol\n"', "Propranolol"),  # a quote at the end of 69 questions and 52 options of MedQA
]  # fmt: skip
KEPT = [
    "p <or = 6 or> 5",  # PubMedQA: no tag
    "R&D; AT&T", "He says “no” – the dose’s ±5 × 10³", 'the so-called "burn"',
    "Что такое аорта",  # means its Cyrillic letters
    "abdominal obesity І) and waist П)", "H₂O, IFN-γ, º", "", "می\u200cخواهم",
]  # fmt: skip


def test_what_occurs_is_cleaned_and_what_means_something_is_kept():
    for written, clean in [*CLEANED, *((text, text) for text in KEPT)]:
        assert clean_text(written) == clean


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(st.characters() | st.sampled_from('"" \n\ufeffﬁеаА\u0301\u0308µ℃\u200b\u200dم'), max_size=12))
def test_cleaning_twice_changes_nothing_more(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert once == once.strip()


SPLIT = [
    ("A. one\nB. two", ["one", "two"]), ("A. one\nmore of one\nB. two", ["one more of one", "two"]),
    ("A.  a  b \nB. c ", ["a b", "c"]), ("A. nan\nB. two", ["None", "two"]),
    ("A. banana\nB. nana", ["banana", "nana"]),
    ("A. Vitamin A. deficiency\nB. Vitamin B. excess", ["Vitamin A. deficiency", "Vitamin B. excess"]),
    ("A. E. coli\nB. C. difficile", ["E. coli", "C. difficile"]), ("A: one\nB: two: three", ["one", "two: three"]),
    ("A. one\nB. two\nand also\nE. coli\nC. three", ["one", "two and also E. coli", "three"]), ("", []),
]  # fmt: skip
STRIPPED = [
    (["A. one", "B. two"], ["one", "two"]), (["(A) one", "(B) two", "(C) three"], ["one", "two", "three"]),
    (["a) one", "b) two"], ["one", "two"]),  # MedMCQA has a question lettered twice over
    (["A. baumannii", "B. fragilis"], ["baumannii", "fragilis"]),
    *((same, same) for same in (
        ["A. one", "two"], ["A. one", 2], ["B. one", "A. two"],
        ["A. fumigatus", "C. albicans"],  # not the letter that is due
        ["A.", "B."],  # nothing behind the letter
    )),
]  # fmt: skip


def test_letters_go_only_if_every_option_carries_the_one_that_is_due():
    for text, options in SPLIT:
        assert split_options(text) == options
    for written, plain in STRIPPED:
        assert strip_letters(written) == plain


ANSWERS = [
    (0, "index0", 0), (3, "index0", None), (2.0, "index0", 2), (float("nan"), "index0", None),
    (True, "index0", None), ("1", "index0", 1), ("1.", "index0", None), (10**400, "index0", None),
    (1e400, "index1", None), (1, "index1", 0), (0, "index1", None),
    ("A", "letter", 0), ("c", "letter", 2), ("(B)", "letter", 1), ("B. two", "letter", 1),
    ("B. three", "letter", None),  # letter and text disagree
    ("D", "letter", None), ("1. one", "letter", None), ("two", "letter", None), (1, "letter", None),
    ("two", "text", 1), ("Two", "text", None), ("B", "text", None), ("B. two", "text", 1), (["two"], "text", None),
    *((nothing, form, -1) for nothing in (None, "", -1) for form in ("index0", "index1", "letter", "text")),
]  # fmt: skip


def test_answers_are_read_as_declared_and_no_other_way():
    for answer, form, index in ANSWERS:
        assert answer_index(answer, ["one", "two", "three"], form) == index, (answer, form)


REASONS = [
    ({}, None), ({"options": list("abcdefghij"), "answer": 9, "pool": None, "group": "icd:A00"}, None),
    ({"answer": -1, "pool": "transfer"}, None),
    ({"question": ""}, "empty question"), ({"question": 5}, "question is not text"),
    ({"context": ["a"]}, "context is not text"), ({"options": ["a"]}, "fewer than two options"),
    ({"options": list("abcdefghijk")}, "more than 10 options"), ({"options": ["a", ""]}, "empty option"),
    ({"options": ["a", "b", "a"]}, "two equal options"), ({"options": "a or b"}, "options are not a list"),
    ({"options": None}, "options are not a list"), ({"options": ["a", None]}, "an option is not text or a number"),
    ({"answer": 2}, "answer is none of the options"), ({"answer": None}, "answer is none of the options"),
    ({"answer": -1}, "no answer"), ({"answer": -1, "pool": None}, "no answer"),
    ({"answer": -2, "pool": "transfer"}, "answer is none of the options"),
]  # fmt: skip


def test_an_unusable_record_is_rejected_with_its_reason():
    whole = {"question": "which?", "context": "", "options": ["a", "b"], "answer": 0, "subject": "", "kind": "choice"}
    for changes, reason in REASONS:
        found = rejection_reason({**whole, "pool": "test", **changes})
        assert (found and found.split(":")[0]) == reason, changes


def test_rejected_records_are_counted_in_order_with_the_first_example_cut():
    rejected = [("b", "long", 1, "x" * 200), ("a", "short", 1, "\ud800"), ("b", "long", 3, "z"), ("b", "short", 4, "")]
    table = raw_questions.count_rejected(rejected)
    assert list(table.itertuples(index=False, name=None)) == [
        ("b", "long", 2, "1, 3", "x" * 80),
        ("a", "short", 1, "1", "\\ud800"),
        ("b", "short", 1, "4", ""),
    ]
    assert list(raw_questions.count_rejected([]).columns) == list(table.columns)
