"""The thinking experiment: paths are judged by ICD-10-CM."""

import pandas as pd

from benchmarks.training import thinking

CHAPTERS = ["Digestion", "Infections"]
HIERARCHY = thinking.Hierarchy(
    {"cholera, classical": "Cholera > Gut", "cholera, El Tor": "Cholera > Gut", "gastric ulcer": "Ulcer > Stomach"},
    {"Gut": "Infections", "Stomach": "Digestion"},
)


def test_a_path_is_judged_by_its_names_and_by_what_the_diagnosis_is_in():
    rows = [  # diagnosis, thought, and the chapter that was answered
        ("cholera, classical", "Cholera > Gut", 1),  # all of it
        ("cholera, El Tor", "Plague > Gut", 1),  # no such path, the block is true
        ("gastric ulcer", "Cholera > Gut", 1),  # a path of another diagnosis, and the answer follows it
        ("gastric ulcer", "Ulcer > Stomach", -1),  # a true path, and an answer that is no chapter
        ("gastric ulcer", "Ulcer > Belly", 0),  # no such block
    ]
    table = pd.DataFrame(rows, columns=["diagnosis", "thought", "choice"])
    table = table.assign(model="student", budget=thinking.WHOLE, group=table.index, options=[CHAPTERS] * len(rows))
    table["question"] = "Which ICD-10-CM chapter lists “" + table.diagnosis + "”?"
    table["correct"] = [True, True, False, False, True]
    found = {row["what"]: (row["value"], row["n"]) for row in thinking.measure_paths(table, HIERARCHY, 0.95)}
    assert found == {
        "path exists": (3 / 5, 5), "path true": (2 / 5, 5), "category true": (3 / 5, 5),
        "block exists": (4 / 5, 5), "block true": (3 / 5, 5), "answer is the chapter of the block": (3 / 4, 4),
        "accuracy, path true": (1 / 2, 2), "accuracy, path false": (2 / 3, 3),
        "accuracy, block true": (2 / 3, 3), "accuracy, block false": (1 / 2, 2),
    }  # fmt: skip
