"""Questions made from ICD-10-CM, the public classification of diagnoses: a small model can learn them."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from medkit.data.raw_questions import DataError, clean_text
from medkit.params import digest
from medkit.stage import reading


def read_icd_concepts(path: Path) -> pd.DataFrame:
    """Leaf diagnoses of the ICD-10-CM tabular list: code, description, category (A00), section, chapter.

    Raises DataError for a file that is not such a list.
    """
    with reading(path, DataError, "the source must be the tabular list of ICD-10-CM", "not xml"):
        chapters = list(ET.parse(path).getroot().iter("chapter"))
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


def make_icd_questions(concepts: pd.DataFrame, count: int, seed: int) -> Iterator[dict]:
    """`count` records, spread evenly over the chapters; −1 makes all. One seed, one result.

    Each asks which chapter lists a diagnosis, with three other chapters as wrong options.
    """
    rng = np.random.default_rng([seed, int(digest("icd_chapter"), 16)])
    shuffled = concepts.iloc[rng.permutation(len(concepts))]
    rank_in_chapter = shuffled.groupby("chapter").cumcount()
    chapters = concepts.chapter.unique()
    rows = shuffled.iloc[np.argsort(rank_in_chapter.to_numpy(), kind="stable")]
    for row in rows.iloc[: len(rows) if count < 0 else count].itertuples():
        wrong = chapters[chapters != row.chapter]
        options = [row.chapter, *wrong[rng.choice(len(wrong), 3, replace=False)]]
        order = rng.permutation(4)
        yield {
            "question": f"Which ICD-10-CM chapter lists “{row.description}”?",
            "context": "",
            "options": [str(options[i]) for i in order],
            "answer": int(np.argmin(order)),
            "subject": row.chapter,
            "kind": "icd_chapter",
            "pool": None,
            "group": f"icd:{row.category}",
        }
