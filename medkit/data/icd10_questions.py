"""Questions made from ICD-10-CM, the public classification of diagnoses: a small model can learn them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd

from medkit.data.records import DataError, Kind, clean_text
from medkit.params import digest

ICD_KINDS = tuple(kind for kind in get_args(Kind) if kind.startswith("icd_"))


def read_icd_concepts(path: Path) -> pd.DataFrame:
    """Leaf diagnoses of the ICD-10-CM tabular list: code, description, category (A00), section, chapter.

    Raises DataError for a file that is not such a list.
    """
    try:
        chapters = list(ET.parse(path).getroot().iter("chapter"))
    except (ET.ParseError, IsADirectoryError) as error:
        raise DataError(f"{path}: not xml ({error}); the source must be the tabular list of ICD-10-CM") from error
    rows = []
    for chapter in chapters:
        name = re.sub(r" \([A-Z]\w\w-[A-Z]\w\w\)$", "", chapter.findtext("desc"))
        for section in chapter.iter("section"):
            for diagnosis in section.iter("diag"):
                if diagnosis.find("diag") is None:
                    code, text = diagnosis.findtext("name"), clean_text(diagnosis.findtext("desc"))
                    rows.append((code, text, code[:3], section.get("id"), name))
    concepts = pd.DataFrame(rows, columns=["code", "description", "category", "section", "chapter"])
    concepts = concepts[concepts.chapter != "Codes for special purposes"]
    return concepts.drop_duplicates("description").reset_index(drop=True)


def make_icd_questions(concepts: pd.DataFrame, kind: str, count: int, seed: int) -> Iterator[dict]:
    """`count` records with four options, spread evenly over the chapters; −1 makes all. One seed, one result.

    kind `icd_chapter`: which chapter lists a diagnosis. `icd_easy`, `icd_hard`: which diagnosis a code stands for,
    with wrong options from other chapters, or from the code's own section (as in MedConceptsQA).
    """
    rng = np.random.default_rng([seed, int(digest(kind), 16)])
    shuffled = concepts.iloc[rng.permutation(len(concepts))]
    rank_in_chapter = shuffled.groupby("chapter").cumcount()
    by_section = {name: rows.description.to_numpy() for name, rows in concepts.groupby("section")}
    outside = {name: concepts.description[concepts.chapter != name].to_numpy() for name in concepts.chapter.unique()}
    chapters = np.array(list(outside))
    for row in shuffled.iloc[np.argsort(rank_in_chapter.to_numpy(), kind="stable")].itertuples():
        if count == 0:
            return
        if kind == "icd_chapter":
            question = f"Which ICD-10-CM chapter lists “{row.description}”?"
            right, wrong = row.chapter, chapters[chapters != row.chapter]
        else:
            question = f"What does ICD-10-CM code {row.code} stand for?"
            right = row.description
            wrong = outside[row.chapter] if kind == "icd_easy" else by_section[row.section]
            wrong = wrong[wrong != right] if kind == "icd_hard" else wrong
        if len(wrong) < 3:
            continue  # a section with three codes has no hard question
        options = [right, *wrong[rng.choice(len(wrong), 3, replace=False)]]
        order = rng.permutation(4)
        count -= 1
        yield {
            "question": question,
            "context": "",
            "options": [str(options[i]) for i in order],
            "answer": int(np.argmin(order)),
            "subject": row.chapter,
            "kind": kind,
            "pool": None,
            "group": f"icd:{row.category}",
        }
