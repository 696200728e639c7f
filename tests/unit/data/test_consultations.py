"""Consultations: every gold value can be read from the dialogue, and what tests is not what was learned from."""

import json
import re

import pytest

from medkit.data import consultations
from medkit.data.consultations import NUMBERS, make_consultations, phrases_of, read_drug_names
from medkit.data.raw_questions import POOL_SHARES, DataError, rejection_reason
from medkit.evaluation.records import CONVERTED, occurs_in
from medkit.prompts import answer_parser
from medkit.prompts.templates import FORMS

NAMES = {f"g{''.join('abcdefghij'[int(d)] for d in str(100 + i))}ine": [] for i in range(120)}
NAMES = {generic: [generic, f"brand{generic[1:]}", f"new{generic[1:]}"] for generic in NAMES}
COUNTS = {"train": 200, "valid": 40, "test": 150}


def make(kind="record", seed=0, counts=COUNTS):
    return list(make_consultations(NAMES, kind, counts, seed))


def test_gold_is_the_form_in_compact_json_and_its_order():
    for row in (row for kind in FORMS for row in make(kind)):
        (gold,), form = row["options"], FORMS[row["kind"]]
        record = answer_parser.parse_record(gold, form)
        assert record is not None and rejection_reason(row) is None
        assert list(json.loads(gold)) == list(form.model_fields)
        assert gold == json.dumps(record.model_dump(), separators=(",", ":"))


def test_every_value_of_the_first_form_can_be_read():
    for row in make():
        gold, dialogue = json.loads(row["options"][0]), row["question"]
        spoken = dialogue.replace("milligrams", "mg")
        for number, word in enumerate(NUMBERS):
            spoken = re.sub(rf"\b{word}(?= (?:day|week|month))", str(number), spoken)
        for field in ("complaint", "duration", "drug", "dose", "allergy", "denies", "age"):
            assert gold[field] is None or re.search(rf"(?<!\w){gold[field]}(?!\w)", spoken), (field, row)
        woman, man = (
            re.search(rf"\b(?:{words})\b", re.sub(r"[Mm]y \w+", "", dialogue))
            for words in (r"Mrs|Ms|ma'am|woman|mother|grandmother", r"Mr|sir|man|father|grandfather")
        )
        assert bool(woman) == (gold["sex"] == "female") and bool(man) == (gold["sex"] == "male"), row


def test_only_converted_values_may_be_absent_from_the_dialogue():
    for row in (row for kind in FORMS for row in make(kind)):
        for field, value in json.loads(row["options"][0]).items():
            assert value is None or field in CONVERTED or occurs_in(value, row["question"]), (field, row)


def test_the_second_form_says_the_same_in_other_units():
    for row in make("record_b"):
        gold = json.loads(row["options"][0])
        assert re.fullmatch(r"[2-8]0-[2-8]9", gold["band"]) and gold["band"][0] == gold["band"][3]
        assert gold["rx"] != gold["stop"] and (gold["rx"] is None) == (gold["g"] is None)
        assert gold["g"] is None or re.search(rf"\b{1000 * gold['g']:g} m", row["question"])
        for field in ("cc", "rx", "alg", "stop"):
            assert gold[field] is None or gold[field] in row["question"]
        amounts = re.findall(rf"(\d|{'|'.join(NUMBERS[2:])}) (day|week|month)s", row["question"])
        days = [consultations.DAYS[unit] * (NUMBERS.index(n) if n in NUMBERS else int(n)) for n, unit in amounts]
        assert gold["days"] in days


@pytest.mark.parametrize("seed", [0, 1])
def test_no_drug_is_in_two_pools_under_any_name(seed):
    generic_of = {name: generic for generic, names in NAMES.items() for name in names}
    drugs = {pool: set() for pool in POOL_SHARES}
    for row in make("record", seed) + make("record_b", seed):
        drugs[row["pool"]] |= {generic_of.get(word) for word in re.findall(r"\w+", row["question"])} - {None}
    assert all(drugs.values())
    assert not drugs["train"] & drugs["valid"] and not drugs["test"] & (drugs["train"] | drugs["valid"])


def test_no_phrase_is_in_two_pools():
    by_pool = {pool: phrases_of(pool) for pool in POOL_SHARES}
    for name, texts in consultations.WRITTEN["phrases"].items():
        parts = [by_pool[pool][name] for pool in POOL_SHARES]
        assert all(len(part) >= 2 for part in parts) and sorted(sum(parts, [])) == sorted(texts)  # noqa: RUF017
        assert len(set(texts)) == len(texts)
    skeletons = {}
    for pool, phrases in by_pool.items():
        skeletons[pool] = {re.sub(r"\{\w+\}", "…", text) for texts in phrases.values() for text in texts}
    assert not skeletons["test"] & (skeletons["train"] | skeletons["valid"]) - {"…"}


def test_one_seed_gives_one_result():
    assert make(seed=3) == make(seed=3)
    questions = {row["question"] for row in make(seed=3)}
    assert not questions & {row["question"] for row in make(seed=4)}
    assert not questions & {row["question"] for row in make("record_b", seed=3)}


def test_the_answer_is_not_always_the_first_thing_of_its_kind():
    """A search for the first age, dose and drug must fail often enough; a null must be a possible answer."""
    rows = [(json.loads(row["options"][0]), row["question"]) for row in make()]
    names = "|".join(sum(NAMES.values(), []))  # noqa: RUF017
    for field, pattern in {"age": r"\b([2-9]\d)\b(?! m)", "dose": r"(\d+) m", "drug": rf"\b({names})\b"}.items():
        first = [(gold[field], re.search(pattern, dialogue)) for gold, dialogue in rows]
        right = sum(match is not None and str(value).split()[0] == match[1] for value, match in first)
        assert 0.4 < right / len(rows) < 0.9, field
    for field in ("drug", "dose", "allergy", "denies"):
        assert 0.05 < sum(gold[field] is None for gold, _ in rows) / len(rows) < 0.7, field


def test_drug_names_are_single_words_of_one_drug(tmp_path):
    def entry(brand, *generics):
        return {"key": brand, "relations": [{"key": "generic", "values": list(generics)}]}

    (tmp_path / "resources").mkdir()
    pairs = [("zocor", "simvastatin"), ("vytorin", "simvastatin", "ezetimibe"), ("tylenol pm", "paracetamol"),
             ("lipex", "simvastatin"), ("simvastatin", "ezetimibe"), ("ezetrol", "ezetimibe")]  # fmt: skip
    table = tmp_path / "resources" / "chunk_mapper_b2g_dataset.json"
    table.write_text(json.dumps({"mappings": [entry(*pair) for pair in pairs]}))
    assert read_drug_names(tmp_path) == {"simvastatin": ["simvastatin", "zocor", "lipex"]}
    with pytest.raises(DataError, match="laid out like the data wheel"):
        read_drug_names(tmp_path / "elsewhere")
