"""Questions made from ICD-10-CM: sound, spread evenly, the same for the same seed, and as hard as their name says."""

from collections import Counter

import pandas as pd
import pytest

from medkit.data import icd10_questions
from medkit.data.raw_questions import DataError


@pytest.fixture(scope="module")
def concepts(tmp_path_factory) -> pd.DataFrame:
    """Those of a small tabular list: 6 chapters of 12 categories of 3 diagnoses, and the odd cases."""

    def diagnosis(code: str, text: str, inner: str = "") -> str:
        return f"<diag><name>{code}</name><desc>{text}</desc>{inner}</diag>"

    def chapter(number: int, name: str, *sections: str) -> str:
        content = "".join(f'<section id="{place}">{section}</section>' for place, section in enumerate(sections))
        return f"<chapter><name>{number}</name><desc>{name}</desc>{content}</chapter>"

    chapters = chapter(22, "Codes for special purposes (U00-U85)", diagnosis("U07.1", "New illness"))
    for number, letter in enumerate("ABCDEF"):
        usual = ""
        for code in (f"{letter}{category:02}" for category in range(1, 13)):
            leaves = "".join(diagnosis(f"{code}.{leaf}", f"Illness  {code}{leaf}") for leaf in range(3))
            usual += diagnosis(code, f"Illnesses {code}", leaves)
        rare = "".join(diagnosis(f"{letter}9{k}", f"Rare illness {letter}9{k}") for k in range(3))
        shared = diagnosis(f"{letter}95", "Told the same in every chapter")
        chapters += chapter(number, f"Chapter {letter} ({letter}00-{letter}99)", usual, rare, shared)
    path = tmp_path_factory.mktemp("icd") / "tabular.xml"
    path.write_text(f"<ICD10CM.tabular><version>2026</version>{chapters}</ICD10CM.tabular>")
    return icd10_questions.read_icd_concepts(path)


def test_another_file_is_named(tmp_path):
    (tmp_path / "codes.csv").write_text("A00,Cholera")
    with pytest.raises(DataError, match=r"codes\.csv: not xml"):
        icd10_questions.read_icd_concepts(tmp_path / "codes.csv")


def test_concepts_are_leaves_with_their_places(concepts):
    assert len(concepts) == 6 * (12 * 3 + 3) + 1
    assert concepts.description.is_unique
    assert set(concepts.chapter) == {f"Chapter {letter}" for letter in "ABCDEF"}
    leaf = concepts.set_index("code").loc["B12.0"]
    assert (leaf.description, leaf.category, leaf.chapter) == ("Illness B120", "B12", "Chapter B")
    assert "A01" not in set(concepts.code)  # a category with codes below it
    assert "A90" in set(concepts.code)  # a category that is a code itself


def test_icd_questions_are_sound(concepts):
    by_text = concepts.set_index("description")
    rows = list(icd10_questions.make_icd_questions(concepts, 100, seed=3))
    assert len({row["question"] for row in rows}) == 100
    for row in rows:
        assert len(set(row["options"])) == 4
        assert (row["pool"], row["kind"]) == (None, "icd_chapter")
        concept = by_text.loc[row["question"].split("“")[1].split("”")[0]]
        assert row["options"][row["answer"]] == row["subject"] == concept.chapter
        assert row["group"] == f"icd:{concept.category}"


def test_icd_questions_depend_on_the_seed_alone_and_spread_over_chapters_and_places(concepts):
    make = lambda seed, count=40: list(icd10_questions.make_icd_questions(concepts, count, seed))  # noqa: E731
    assert make(1) == make(1) != make(2)
    assert make(1)[:20] == make(1, 20)
    rows = make(0, 120)
    assert set(Counter(row["subject"] for row in rows).values()) == {20}
    assert min(Counter(row["answer"] for row in rows).values()) > 15
