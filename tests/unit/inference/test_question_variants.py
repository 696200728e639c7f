"""What is asked of whom: orders that no letter survives, and the questions of each variant."""

import itertools

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from medkit.inference import question_variants
from medkit.variants import REASONERS, VARIANTS


@given(st.integers(2, 10), st.integers(1, 12), st.integers(0, 2**32))
def test_orders_begin_with_the_own_one_and_show_no_option_at_one_place_twice(options, orders, seed):
    found = question_variants.option_orders({"id": "x", "options": [f"drug {i}" for i in range(options)]}, orders, seed)
    assert found[0] == list(range(options))
    assert len(found) == min(orders, options)
    assert all(sorted(order) == found[0] for order in found)
    for place in range(options):
        assert len({order[place] for order in found}) == len(found)


def test_orders_depend_on_seed_and_question_and_on_nothing_else():
    def drawn(name, seed):
        return question_variants.option_orders({"id": name, "options": list("abcdefgh")}, 3, seed)

    assert drawn("x", 0) == drawn("x", 0)
    assert len({str(drawn(name, seed)) for name, seed in itertools.product("xyz", range(3))}) == 9


def test_the_right_answer_comes_to_every_place_alike():
    places = [
        order.index(1)
        for i in range(1500)
        for order in question_variants.option_orders({"id": str(i), "options": list("abcd")}, 3, 0)[1:]
    ]
    assert all(abs(places.count(place) - 1000) < 130 for place in (0, 2, 3))  # 5 standard deviations
    assert places.count(1) == 0  # its own place is the first order's


def test_every_question_is_shuffled_and_says_how(questions):
    asked = question_variants.shuffled(questions[questions.split == "test"].assign(scoring="letter"), 2, seed=0)
    assert asked.groupby("id").size().to_dict() == {"q0": 2, "q1": 2, "q2": 2}
    assert not asked.assign(order=asked.order.map(str)).duplicated(["id", "order"]).any()
    assert asked[asked.id == "q2"].order.iloc[0] == [0, 1, 2]


def test_claims_answer_everything_the_others_the_first_few_and_exams_are_for_start_and_end():
    """Every variant's questions are the first of what a claim answers, so that any two can be paired."""
    kinds = {"icd": "icd_chapter", "scored": "icd_chapter", "records": "record", "records_b": "record_b"}
    rows = [(f"{source}{i}", source, kind, "generated") for source, kind in kinds.items() for i in range(6)]
    asked = pd.DataFrame(rows, columns=["id", "source", "kind", "scoring"])
    asked.loc[asked.source == "scored", "scoring"] = "option_text"
    exams = pd.DataFrame([{"id": "e0", "source": "medqa", "kind": "choice", "scoring": "option_text"}])
    for variant in VARIANTS:
        rows = question_variants.rows_for(variant, asked, exams, ["student_ce", "edge"], few=2)
        of_source = {source: rows.id[rows.source == source].tolist() for source in (*kinds, "medqa")}
        count = 6 if variant in ("student_ce", "edge") else 2
        assert of_source["icd"] == [f"icd{i}" for i in range(count)]
        assert of_source["records"] == [f"records{i}" for i in range(count)]
        assert bool(of_source["records_b"]) == (variant in ("student_kd", "lora", "edge_lora"))
        assert bool(of_source["medqa"]) == (variant in ("base", "student_kd"))
        reasoned = rows.id[rows.template == "rationale"].tolist() if "template" in rows else []
        assert reasoned == (["icd0", "icd1"] if variant in REASONERS else [])


def test_real_dialogues_are_asked_for_the_first_form_without_an_answer():
    texts = ["D: Hi.", "D: " * 999, "P: No."]
    dialogues = pd.DataFrame({"id": ["a", "b", "c"], "source": "mts_dialog", "dialogue": texts})
    rows = question_variants.dialogue_rows(dialogues, "all")
    assert rows.id.tolist() == ["a", "c"] and rows.question.tolist() == ["D: Hi.", "P: No."]
    assert set(rows.kind) == {"record"} and rows.options.tolist() == [[""], [""]]
    assert question_variants.dialogue_rows(dialogues, 1).id.tolist() == ["a"]
    assert question_variants.dialogue_rows(dialogues, 0).empty
