"""One question as a record: clean text, options without their letters, the answer as an index; and why one is rejected.

A record is a dict with question, context, options, answer, subject, kind and pool, and with group where it is known.
Every reader builds its records with `make_record`, so all files are cleaned in the same way. Nothing is guessed: a
value that cannot be used stays in the record, and `rejection_reason` names it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Literal

import pandas as pd

from medkit.params import AnswerForm
from medkit.prompts.templates import FORMS, LETTERS
from medkit.stage import MedkitError

Kind = Literal["choice", "abstract", "icd_chapter", "record", "record_b"]
Pool = Literal["train", "valid", "test", "transfer"]
POOL_SHARES = {"test": 0.35, "valid": 0.05, "train": 0.60}  # of the groups of a source that has no official split
EXAMPLE_CHARACTERS = 80
# Two spellings of one thing, each found in the published files: a byte order mark inside MMLU, typographic ligatures
# in MedMCQA, one-character degrees and both signs for micro in MedQA.
SPELLINGS = {"\ufeff": "", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "℃": "°C", "℉": "°F", "\u00b5": "\u03bc"}
# Cyrillic letters that stand for Latin ones in MedQA (“А 43-уеаr-old mаn”), and к for the Greek letter.
LOOKALIKES = dict(zip("АНОаеісорухѕјк", "AHOaeicopyxsjκ", strict=True))
LETTERED_OPTION = re.compile(r"\(?([A-Ja-j])[).:]+\s*(.+)")
LETTERED_ANSWER = re.compile(r"\(?([A-Ja-j])(?:[).:]+\s*(.*))?")


class DataError(MedkitError):
    """Data that cannot be used as asked; the message names the source, the value and the cure."""


def pool_of_group(group: str, seed: int) -> Pool:
    """The pool of a group without an official place: by a seeded hash of its name, so the same in every source."""
    share = int(hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()[:8], 16) / 16**8
    for pool, size in POOL_SHARES.items():
        if share < size:
            return pool
        share -= size
    return "train"


def clean_text(text: str) -> str:
    """The text in NFC with one spelling (SPELLINGS), single spaces, and no closing quote that was never opened.

    Cyrillic look-alikes become Latin letters, unless the text has other Cyrillic letters too.
    """
    if not text.isascii():
        text = re.sub(f"[{''.join(SPELLINGS)}]", lambda match: SPELLINGS[match[0]], unicodedata.normalize("NFC", text))
        cyrillic = set(re.findall(r"[\u0400-\u04ff]", text))
        if cyrillic and cyrillic <= LOOKALIKES.keys():
            text = unicodedata.normalize("NFC", text.translate(str.maketrans(LOOKALIKES)))
    text = " ".join(text.split())
    return text[:-1].rstrip() if text.endswith('"') and text.count('"') % 2 else text


def split_options(text: str) -> list[str]:
    """`"A. one\\nB. two"` or `"A: one\\nB: two"` → `["one", "two"]`; a line break inside an option stays inside it.

    103 validation questions of MedMCQA have an option `nan`: it was the text "None" before pandas read the file.
    """
    options: list[str] = []
    for line in text.splitlines():
        next_letter = LETTERS[len(options) : len(options) + 1] or "$."
        if re.match(rf"{next_letter}[.:]", line):
            options.append(line[2:])
        elif options:
            options[-1] += "\n" + line
    return ["None" if clean_text(option) == "nan" else clean_text(option) for option in options]


def strip_letters(options: list) -> list:
    """The options without their letters (`A. one`, `(B) two`), if every option has the letter of its place."""
    matches = [isinstance(option, str) and LETTERED_OPTION.fullmatch(option) for option in options]
    if all(match and match[1].upper() == letter for match, letter in zip(matches, LETTERS, strict=False)):
        return [match[2] for match in matches]
    return options


def answer_index(answer, options: list[str], form: AnswerForm) -> int | None:
    """Index of the answer among the options; −1 if no answer is given (null, empty, −1), None if it is no option.

    A letter may come with the option's text (`B. two`), and a text with its letter; then the two must agree.
    """
    if answer is None or answer in ("", -1):
        return -1
    index = -1
    if form in ("index0", "index1"):
        # a parquet column of whole numbers holds 2.0 where some values are missing
        if isinstance(answer, int | float) and not isinstance(answer, bool) and float(answer).is_integer():
            index = int(answer) - (form == "index1")
    elif form == "text" and answer in options:
        index = options.index(answer)
    elif isinstance(answer, str) and (match := LETTERED_ANSWER.fullmatch(answer)):
        letter, text = LETTERS.find(match[1].upper()), match[2]
        if letter < len(options) and (text == options[letter] or (form == "letter" and not text)):
            index = letter
    return index if 0 <= index < len(options) else None


def make_record(
    question,
    options,
    answer,
    *,
    answer_form: AnswerForm,
    pool: Pool | None,
    context="",
    subject="",
    kind: Kind = "choice",
) -> dict:
    """The record of what a file holds. A value of the wrong type stays as it is; `rejection_reason` names it later.

    `pool` is the question's official split, None if it has none. An `answer` of −1 is not known: for `transfer` alone.
    """

    def clean(value):
        return clean_text(value) if isinstance(value, str) else value

    answer, index = clean(answer), None
    if isinstance(options, list):
        as_written = [clean(option) for option in options]
        options = strip_letters(as_written)
        index = answer_index(answer, as_written, answer_form)  # MedMCQA has options whose letter is there twice
        index = answer_index(answer, options, answer_form) if index is None else index
    texts = {"question": question, "context": context, "subject": subject}
    texts = {name: clean("" if text is None else text) for name, text in texts.items()}
    return {**texts, "options": options, "answer": index, "kind": kind, "pool": pool}


def rejection_reason(record: dict) -> str | None:
    """Why a record is not a usable question, in a few words; None if it is usable."""
    options, answer = record["options"], record["answer"]
    for field in ("question", "context", "subject"):
        if not isinstance(record[field], str):
            return f"{field} is not text"
    if not record["question"]:
        return "empty question"
    if not isinstance(options, list):
        return "options are not a list"
    if not all(isinstance(option, str) for option in options):
        return "an option is not text"
    if "" in options:
        return "empty option"
    if len(options) < 2 and record["kind"] not in FORMS:
        return "fewer than two options"
    if len(options) > len(LETTERS):
        return f"more than {len(LETTERS)} options"
    if len(set(options)) < len(options):
        return "two options alike"
    if answer == -1 and record["pool"] != "transfer":
        return "no answer"
    return "answer is none of the options" if answer is None or not -1 <= answer < len(options) else None


def count_rejected(rejected: list[tuple[str, str, str]]) -> pd.DataFrame:
    """(source, reason, question) of each rejected record → source, reason, count, and the first question, cut."""
    table = pd.DataFrame(rejected, columns=["source", "reason", "example"]).astype(str)
    table["example"] = table.example.str[:EXAMPLE_CHARACTERS]
    counted = table.groupby(["source", "reason"], sort=False).example.agg(count="size", example="first")
    return counted.reset_index()
