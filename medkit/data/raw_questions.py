"""One question as a record: clean text, options without their letters, the answer as an index; and why one is rejected.

A record is a dict with question, context, options, answer, subject, kind and pool, and with group where it is known.
Nothing is guessed: a value that cannot be used stays in the record, and `rejection_reason` names it.
"""

import hashlib
import re
import unicodedata
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args

import pandas as pd

from medkit.params import AnswerForm
from medkit.prompts.templates import INSTRUCTION, LETTERS, WRITTEN
from medkit.stage import MedkitError

Pool = Literal["train", "valid", "test", "transfer"]
POOL_SHARES = {"test": 0.35, "valid": 0.05, "train": 0.60}  # of the groups of a source that has no official split
# Characters that nobody sees, such as the byte order marks inside MMLU; joiners stay where Arabic, Indian scripts and
# emoji need them.
INVISIBLE = re.compile(
    r"[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f"
    r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0001]"
    r"|(?<![\u0600-\u0dff\ufe0f\U0001f300-\U0001faff])[\u200c\u200d]"
)
# Two spellings of one thing, each found in the published files: typographic ligatures in MedMCQA, one-character degrees
# and both signs for micro in MedQA.
SPELLINGS = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "℃": "°C", "℉": "°F", "\u00b5": "\u03bc"}
# Cyrillic letters that stand for Latin ones in MedQA (“А 43-уеаr-old mаn”), and к for the Greek letter.
LOOKALIKES = dict(zip("АНОаеісорухѕјк", "AHOaeicopyxsjκ", strict=True))
SURROGATE = re.compile("[\ud800-\udfff]")
LETTERED_OPTION = re.compile(r"\(?([A-Ja-j])[).:]+\s*(.+)")
SPECIES = re.compile(r"[A-J]\. ?[a-z]+(?:us|is|um|ae?|i|ns|es|ile|ale|ger)\b.*")  # A. fumigatus
LETTERED_ANSWER = re.compile(r"\(?([A-Ja-j])(?:[).:]+\s*(.*))?")


class DataError(MedkitError):
    """Data that cannot be used as asked; the message names the source, the value and the cure."""


def wheel_file(path: Path) -> Path:
    """The path of a file of the data wheel. Raises DataError if it is not there."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; the source must be a folder laid out like the data wheel's")
    return path


def pool_of_group(group: str, seed: int) -> Pool:
    """The pool of a group without an official place: by a seeded hash of its name, so the same in every source."""
    share = int(hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()[:8], 16) / 16**8
    ends = zip(POOL_SHARES, accumulate(POOL_SHARES.values()), strict=True)
    return next(pool for pool, end in ends if share < end)


def clean_text(text: str, lines: bool = False) -> str:
    """The text in NFC with one spelling (SPELLINGS), single spaces, nothing invisible, no closing quote never opened.

    Cyrillic look-alikes become Latin letters, unless the text has other Cyrillic letters too. With `lines` its line
    breaks, indentation and quotes stay.
    """
    if not text.isprintable() or not text.isascii():
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
        text = re.sub(f"[{''.join(SPELLINGS)}]", lambda match: SPELLINGS[match[0]], text)
        cyrillic = set(re.findall(r"[\u0400-\u04ff]", text))
        if cyrillic and cyrillic <= LOOKALIKES.keys():
            text = unicodedata.normalize("NFC", text.translate(str.maketrans(LOOKALIKES)))
    if lines:
        return "\n".join(re.sub(r"[^\S\t]", " ", line).rstrip() for line in text.splitlines()).strip()
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


def strip_letters(options: list, labelled: bool = True) -> list:
    """The options without their letters (`A. one`, `(B) two`), if every option has the letter of its place.

    labelled: letters are known to be labels. If not, options that all read like species (`A. fumigatus`) stay whole.
    """
    matches = [isinstance(option, str) and LETTERED_OPTION.fullmatch(option) for option in options]
    lettered = all(match and match[1].upper() == letter for match, letter in zip(matches, LETTERS, strict=False))
    if lettered and (labelled or not all(SPECIES.fullmatch(option) for option in options)):
        return [match[2] for match in matches]
    return options


def answer_index(answer, options: list[str], form: AnswerForm) -> int | None:
    """Index of the answer among the options; −1 if no answer is given (null, empty, −1), None if it is no option.

    A letter may come with the option's text (`B. two`), and a text with its letter; then the two must agree.
    """
    if answer is None or answer in ("", -1, "-1"):
        return -1
    index = -1
    if form in ("index0", "index1"):
        number = whole_number(answer)
        index = -1 if number is None else number - (form == "index1")
    elif form == "text" and answer in options:
        index = options.index(answer)
    elif isinstance(answer, str) and (match := LETTERED_ANSWER.fullmatch(answer)):
        letter, text = LETTERS.find(match[1].upper()), match[2]
        if letter < len(options) and (options[letter] in (text, answer) or (form == "letter" and not text)):
            index = letter
    return index if 0 <= index < len(options) else None


def whole_number(value) -> int | None:
    """2, "2", and 2.0 or "2.0" (pandas, of whole numbers where some are missing) → 2; anything else → None."""
    if isinstance(value, str):
        return int(float(value)) if re.fullmatch(r"[0-9]{1,9}(\.0+)?", value) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and (isinstance(value, int) or value.is_integer()) else None


def make_record(
    question, options, answer, *, answer_form: AnswerForm, pool, context="", subject="", kind="choice", labelled=True
) -> dict:
    """The record of what a file holds; a value that cannot be used stays as it is.

    A list of texts as context is joined, PubMedQA's `contexts` too, an answer alone in a list is taken out,
    numbers as options become text. `pool` (Pool) is the question's official split, None if it has none. `kind`:
    choice, abstract, icd_chapter, record or record_b. `labelled`: see `strip_letters`. An `answer` of −1 is not known:
    for `transfer` alone.
    """

    def clean(value):
        return clean_text(value) if isinstance(value, str) else value

    def as_text(value):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value).removesuffix(".0") if is_number else clean(value)

    context = context.get("contexts", context) if isinstance(context, dict) else context
    if isinstance(context, list) and all(isinstance(part, str) for part in context):
        context = " ".join(context)
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    answer, index = as_text(answer) if answer_form == "text" and answer != -1 else clean(answer), None
    if isinstance(options, list):
        as_written = [as_text(option) for option in options]
        options = strip_letters(as_written, labelled)
        index = answer_index(answer, as_written, answer_form)  # MedMCQA has options whose letter is there twice
        index = answer_index(answer, options, answer_form) if index is None else index
    texts = {"question": question, "context": context, "subject": subject}
    texts = {name: clean("" if text is None else text) for name, text in texts.items()}
    return {**texts, "options": options, "answer": index, "kind": kind, "pool": pool}


def rejection_reason(record: dict) -> str | None:
    """Why a record is not a usable question, in a few words; None if it is usable."""
    options, answer = record["options"], record["answer"]
    if "fault" in record:
        return record["fault"]
    for field in ("question", "context", "subject"):
        if not isinstance(record[field], str):
            return f"{field} is not text: name another column as `columns.{field}`, or write texts into it"
    if record["pool"] not in (None, *get_args(Pool)):
        return "split is none of train, valid, test and transfer"
    if not record["question"]:
        return "empty question"
    if not isinstance(options, list):
        return "options are not a list: `columns.options` names a column of lists or of letter → text, or many columns"
    if not all(isinstance(option, str) for option in options):
        return "an option is not text or a number: correct `columns.options` or the row"
    texts = [*(record[f] for f in ("question", "context", "subject")), *options]
    texts += [record.get(field) or "" for field in ("group", "prompts")]
    if any(map(SURROGATE.search, texts)):
        return "broken characters (lone surrogates, or bytes that are not UTF-8)"
    if "" in options:
        return "empty option"
    if len(options) < 2 and record["kind"] not in WRITTEN:
        return "fewer than two options"
    if len(options) > len(LETTERS):
        return f"more than {len(LETTERS)} options"
    if len(set(options)) < len(options):
        return "two equal options"
    if answer == -1 and record["pool"] != "transfer":
        of_chat = "no response to the user's last turn: only rows of pool transfer may be without"
        return of_chat if record["kind"] == INSTRUCTION else "no answer"
    return "answer is none of the options" if answer is None or not -1 <= answer < len(options) else None


def count_rejected(rejected: list[tuple[str, str, int, str]]) -> pd.DataFrame:
    """(source, reason, row from 1, question) of each rejected record → one line for each source and reason.

    Columns source, reason, count, rows (the first ten, as text) and example, the first question, cut.
    """
    # pandas cannot hold a lone surrogate
    rows = [(*start, str(question).encode(errors="backslashreplace").decode()[:80]) for *start, question in rejected]
    table = pd.DataFrame(rows, columns=["source", "reason", "rows", "example"]).astype(str)
    groups = table.groupby(["source", "reason"], sort=False)
    first_rows = {"rows": ("rows", lambda rows: ", ".join(rows[:10])), "example": ("example", "first")}
    return groups.agg(count=("rows", "size"), **first_rows).reset_index()
