"""One question as a record: cleaned text, options without their letters, the answer as an index; and what is refused.

Readers build every record with `make_record`, so all files go through the same cleaning; `refusal` says in a few words
why a record is no question. Nothing is guessed: what cannot be resolved is left for `refusal` to name.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Literal

import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from medkit.params import AnswerForm
from medkit.prompts.templates import LETTERS

Kind = Literal["choice", "abstract", "icd_chapter", "icd_easy", "icd_hard"]
Pool = Literal["train", "valid", "test", "transfer"]
EXAMPLE_CHARACTERS = 80
# two spellings of one thing, each found in the published files: a byte order mark inside MMLU, ligatures of typeset
# pages in MedMCQA, and in MedQA one-character degrees and both signs for micro
SPELLINGS = {"\ufeff": "", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "℃": "°C", "℉": "°F", "\u00b5": "\u03bc"}
# Cyrillic letters that stand for Latin ones in MedQA (“А 43-уеаr-old mаn”), and к for the Greek letter
LOOKALIKES = dict(zip("АНОаеісорухѕјк", "AHOaeicopyxsjκ", strict=True))
CARRIED = re.compile(r"\(?([A-Ja-j])[).:]+\s*(.+)")
TOLD = re.compile(r"\(?([A-Ja-j])(?:[).:]+\s*(.*))?")


def clean_text(text: str) -> str:
    """NFC, one spelling (SPELLINGS), single spaces, and no closing quote that was never opened.

    Cyrillic look-alikes become the letters they stand for, unless the text has other Cyrillic letters and means them.
    """
    if not text.isascii():
        text = re.sub(f"[{''.join(SPELLINGS)}]", lambda found: SPELLINGS[found[0]], unicodedata.normalize("NFC", text))
        cyrillic = set(re.findall(r"[\u0400-\u04ff]", text))
        if cyrillic and cyrillic <= LOOKALIKES.keys():
            text = unicodedata.normalize("NFC", text.translate(str.maketrans(LOOKALIKES)))
    text = " ".join(text.split())
    return text[:-1].rstrip() if text.endswith('"') and text.count('"') % 2 else text


def split_options(text: str) -> list[str]:
    """`"A. one\\nB. two"` or `"A: one\\nB: two"` → `["one", "two"]`; a line break inside an option stays inside it.

    The 103 validation questions of MedMCQA with an option `nan` had the text "None" there before pandas read them.
    """
    parts: list[str] = []
    for line in text.splitlines():
        due = LETTERS[len(parts) : len(parts) + 1] or "$."
        if re.match(rf"{due}[.:]", line):  # the letter that is due, and no other
            parts.append(line[2:])
        elif parts:
            parts[-1] += "\n" + line
    return ["None" if clean_text(part) == "nan" else clean_text(part) for part in parts]


def without_letters(options: list) -> list:
    """Options without the letters they carry (`A. one`, `(B) two`), if every one carries the letter that is due."""
    carried = [isinstance(option, str) and CARRIED.fullmatch(option) for option in options]
    if all(found and found[1].upper() == due for found, due in zip(carried, LETTERS, strict=False)):
        return [found[2] for found in carried]
    return options


def answer_index(told, options: list[str], told_as: AnswerForm) -> int | None:
    """Index of the answer among the options, −1 where nothing is told (null, empty, −1), None if it is none of them.

    A letter may bring the option's text with it (`B. two`), a text its letter; then the two must agree.
    """
    if told is None or told in ("", -1):
        return -1
    place = -1
    if told_as in ("index0", "index1"):
        # parquet tells whole numbers as 2.0 where some are missing
        if isinstance(told, int | float) and not isinstance(told, bool) and float(told).is_integer():
            place = int(told) - (told_as == "index1")
    elif told_as == "text" and told in options:
        place = options.index(told)
    elif isinstance(told, str) and (found := TOLD.fullmatch(told)):
        letter, text = LETTERS.find(found[1].upper()), found[2]
        if letter < len(options) and (text == options[letter] or (told_as == "letter" and not text)):
            place = letter
    return place if 0 <= place < len(options) else None


def _cleaned(value):
    return clean_text(value) if isinstance(value, str) else value


def make_record(
    question, options, answer, *, told_as: AnswerForm, pool: Pool | None, context="", subject="", kind: Kind = "choice"
) -> dict:
    """The record of what a file says; a value of the wrong type stays as it is, for `refusal` to name."""
    written = [_cleaned(option) for option in options] if isinstance(options, list) else []
    plain = without_letters(written)
    index = answer_index(_cleaned(answer), written, told_as)  # MedMCQA has options whose letter is there twice
    return {
        "question": _cleaned("" if question is None else question),
        "context": _cleaned("" if context is None else context),
        "options": plain if isinstance(options, list) else options,
        "answer": answer_index(_cleaned(answer), plain, told_as) if index is None else index,
        "subject": _cleaned("" if subject is None else subject),
        "kind": kind,
        "pool": pool,
    }


def _all_different(options: list[str]) -> list[str]:
    if len(set(options)) < len(options):
        raise PydanticCustomError("refused", "two options alike")
    return options


Text = Annotated[str, Field(min_length=1)]


class Record(BaseModel):
    """A usable question."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: Text
    context: str
    options: Annotated[list[Text], Field(min_length=2, max_length=len(LETTERS)), AfterValidator(_all_different)]
    answer: int
    """Index into `options`; −1, not known, is for `transfer` alone."""
    subject: str
    kind: Kind
    pool: Pool | None
    """The question's official place, None if it has none."""
    group: str | None = None
    """Questions that must not be split; None leaves it to near-duplicates."""

    @model_validator(mode="after")
    def _answer_is_an_option(self) -> Record:
        if self.answer == -1 and self.pool != "transfer":
            raise PydanticCustomError("refused", "no answer")
        if not -1 <= self.answer < len(self.options):
            raise PydanticCustomError("refused", "answer is none of the options")
        return self


REASONS = {
    ("question", "string_too_short"): "empty question",
    ("question", "string_type"): "question is no text",
    ("context", "string_type"): "context is no text",
    ("subject", "string_type"): "subject is no text",
    ("options", "list_type"): "options are no list",
    ("options", "too_short"): "fewer than two options",
    ("options", "too_long"): f"more than {len(LETTERS)} options",
    ("options", "string_too_short"): "empty option",
    ("options", "string_type"): "an option is no text",
    ("answer", "int_type"): "answer is none of the options",
}


def refusal(record: dict) -> str | None:
    """Why a record is no usable question, in a few words; None if it is one."""
    try:
        Record.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "refused":
            return first["msg"]
        return REASONS.get((first["loc"][0], first["type"]), f"{first['loc'][0]}: {first['msg']}")
    return None


def rejected_table(refused: list[tuple[str, str, str]]) -> pd.DataFrame:
    """(source, reason, question) of all that was refused → source, reason, count, and the first one's text, cut."""
    table = pd.DataFrame(refused, columns=["source", "reason", "example"]).astype(str)
    table["example"] = table.example.str[:EXAMPLE_CHARACTERS]
    counted = table.groupby(["source", "reason"], sort=False).example.agg(count="size", example="first")
    return counted.reset_index()
