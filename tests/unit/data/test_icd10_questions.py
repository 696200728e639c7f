"""Questions made from ICD-10-CM: sound, spread evenly, the same for the same seed, and as hard as their name says."""

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from medkit.data import icd10_questions
from medkit.data.raw_questions import DataError


def icd_xml(path: Path) -> Path:
    """A small tabular list: 6 chapters of 3 sections of 4 categories of 3 diagnoses, and the odd cases."""

    def diagnosis(code: str, text: str, inner: str = "") -> str:
        return f"<diag><name>{code}</name><desc>{text}</desc>{inner}</diag>"

    def section(codes: str, content: str) -> str:
        return f'<section id="{codes}"><desc>Section</desc>{content}</section>'

    chapters = ""
    for c, letter in enumerate("ABCDEF"):
        content = ""
        for s in range(3):
            categories = ""
            for code in (f"{letter}{s}{k}" for k in range(4)):
                leaves = "".join(diagnosis(f"{code}.{d}", f"Illness  {code}{d}") for d in range(3))
                categories += diagnosis(code, f"Illnesses {code}", leaves)
            content += section(f"{letter}{s}0-{letter}{s}9", categories)
        rare = "".join(diagnosis(f"{letter}9{k}", f"Rare illness {letter}9{k}") for k in range(3))
        content += section(f"{letter}90-{letter}92", rare)
        content += section(f"{letter}95-{letter}95", diagnosis(f"{letter}95", "Told the same in every chapter"))
        name = f"<name>{c + 1}</name><desc>Chapter {letter} ({letter}00-{letter}99)</desc>"
        chapters += f"<chapter>{name}{content}</chapter>"
    special = section("U00-U49", diagnosis("U07.1", "New illness"))
    chapters += f"<chapter><name>22</name><desc>Codes for special purposes (U00-U85)</desc>{special}</chapter>"
    path.write_text(f"<ICD10CM.tabular><version>2026</version>{chapters}</ICD10CM.tabular>")
    return path


def test_another_file_is_named(tmp_path):
    (tmp_path / "codes.csv").write_text("A00,Cholera")
    with pytest.raises(DataError, match=r"codes\.csv: not xml"):
        icd10_questions.read_icd_concepts(tmp_path / "codes.csv")


@pytest.fixture(scope="module")
def concepts(tmp_path_factory) -> pd.DataFrame:
    return icd10_questions.read_icd_concepts(icd_xml(tmp_path_factory.mktemp("icd") / "tabular.xml"))


def test_concepts_are_leaves_with_their_places(concepts):
    assert len(concepts) == 6 * (3 * 4 * 3 + 3) + 1
    assert concepts.description.is_unique
    assert set(concepts.chapter) == {f"Chapter {letter}" for letter in "ABCDEF"}
    leaf = concepts.set_index("code").loc["B12.0"]
    assert (leaf.description, leaf.category, leaf.chapter) == ("Illness B120", "B12", "Chapter B")
    assert "A00" not in set(concepts.code)  # a category with codes below it
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
