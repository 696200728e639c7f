"""Readers, rejection, and above all the split: no near-duplicate of a test question may be learned from."""

import json
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medkit import data, icd, readers
from medkit.data import DataError, assign_pools, drop_long, take_splits, training_rows
from medkit.params import DatasetParams, Hub, Local
from medkit.readers import split_options

HERE = Local(kind="local", path="unused")


def wanted(train=0, valid=0, test=0, transfer=0, origin=HERE) -> DatasetParams:
    return DatasetParams(origin=origin, train=train, valid=valid, test=test, transfer=transfer)


def write_jsonl(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records))
    return path


def lettered(question: str, *options: str, answer: str | None = "A") -> dict:
    """A record of the lettered files: options in one string, the answer with its letter before it."""
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCDEFGHIJ", options, strict=False))
    record = {"question": question, "options": listed}
    return record if answer is None else {**record, "answer": f"{answer}. {options['ABCDEFGHIJ'.index(answer)]}"}


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("A. one\nB. two", ["one", "two"]),
        ("A. one\nB. two\nC. three\nD. four\nE. five", ["one", "two", "three", "four", "five"]),
        ("A. one\nmore of one\nB. two", ["one more of one", "two"]),
        ("A.one\nB.\ttwo", ["one", "two"]),
        ("A.  a  b \nB. c ", ["a b", "c"]),
        ("A. nan\nB. two", ["None", "two"]),
        ("A. banana\nB. nana", ["banana", "nana"]),
        ("A. 1.5 mg\nB. 2.5 mg", ["1.5 mg", "2.5 mg"]),
        ("A. Vitamin A. deficiency\nB. Vitamin B. excess", ["Vitamin A. deficiency", "Vitamin B. excess"]),
        ("A. E. coli\nB. C. difficile", ["E. coli", "C. difficile"]),
        ("A. one\nB. B and T cells", ["one", "B and T cells"]),
        ("A. cafe\u0301\nB. µ", ["café", "µ"]),
        ("A. \nB. two", ["", "two"]),
        ("A. one\nB. two\nand also\nE. coli\nC. three", ["one", "two and also E. coli", "three"]),
        ("", []),
        ("one or two", []),
    ],
)
def test_split_options(text, options):
    assert split_options(text) == options


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.from_regex(r"[a-z0-9][a-z0-9 ,()%-]{0,20}[a-z0-9]", fullmatch=True).filter(lambda t: t != "nan"),
        min_size=1,
        max_size=10,
    )
)
def test_options_written_with_letters_come_back(options):
    text = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False))
    assert split_options(text) == [" ".join(option.split()) for option in options]


# --- readers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel_data(tmp_path) -> Path:
    """A folder laid out like the pinned data wheel's."""
    write_jsonl(
        tmp_path / "MedQA" / "test.jsonl", [lettered("Which  drug?\n", "a", "b", "c", "d", "e", answer="E"), ""]
    )
    write_jsonl(
        tmp_path / "MMLU" / "clinical.jsonl", [lettered("Which bone?", "ulna", "radius", "tibia", "femur", answer="B")]
    )
    for folder, answer in (("MedMCQA-Validation", "C"), ("MedMCQA-Test", None)):
        for subject in ("Anatomy", "Social_Preventive_Medicine"):
            record = lettered(f"{folder} {subject}?", "w", "x", "y", "z", answer=answer)
            write_jsonl(tmp_path / "MedMCQA" / folder / f"{subject}.jsonl", [record])
    for name, answer in (("pqal", "maybe"), ("pqaa", "no")):
        passage = "Context (1): First part.\nContext (12): Second part (n = 3)."
        write_jsonl(
            tmp_path / "PubMedQA" / name / "test.jsonl",
            [{"question": f"does {name} work?", "passage": passage, "answer": answer}],
        )
    return tmp_path


def test_medqa_has_five_options_and_is_test(wheel_data):
    (row,) = readers.read_medqa(wheel_data)
    assert row["question"] == "Which drug?"
    assert row["options"][row["answer"]] == "e"
    assert (row["pool"], row["kind"], row["context"]) == ("test", "choice", "")


def test_mmlu_is_test(wheel_data):
    (row,) = readers.read_mmlu(wheel_data)
    assert (row["options"][row["answer"]], row["pool"]) == ("radius", "test")


def test_medmcqa_is_split_here_and_its_unlabelled_part_transfers(wheel_data):
    rows = list(readers.read_medmcqa(wheel_data))
    assert Counter(row["pool"] for row in rows) == {None: 2, "transfer": 2}
    assert {row["subject"] for row in rows} == {"Anatomy", "Social Preventive Medicine"}
    assert {row["answer"] for row in rows if row["pool"]} == {-1}
    assert {row["options"][row["answer"]] for row in rows if not row["pool"]} == {"y"}


def test_pubmedqa_has_its_abstract_without_the_numbering(wheel_data):
    (labelled,), (artificial,) = readers.read_pubmedqa(wheel_data), readers.read_pubmedqa_a(wheel_data)
    assert labelled["context"] == "First part. Second part (n = 3)."
    assert (labelled["options"][labelled["answer"]], labelled["pool"]) == ("maybe", "test")
    assert (artificial["options"][artificial["answer"]], artificial["pool"]) == ("no", "train")
    assert labelled["kind"] == artificial["kind"] == "abstract"


def test_all_readers_make_one_schema(wheel_data):
    datasets = {name: wanted() for name in readers.READERS}
    table, rejected = data.load_questions(datasets, dict.fromkeys(datasets, wheel_data), seed=0)
    assert set(data.COLUMNS) - {"split"} <= set(table.columns)
    assert set(table.source) == set(readers.READERS)
    assert table.id.is_unique
    assert rejected.empty
    assert list(rejected.columns) == ["source", "reason", "count"]
    assert (table.answer < table.options.str.len()).all()


def test_a_line_that_is_no_json_is_named_by_file_and_line(wheel_data):
    path = write_jsonl(wheel_data / "MedQA" / "test.jsonl", [lettered("q?", "a", "b"), "", '{"question": "cut of'])
    with pytest.raises(DataError, match=r"test\.jsonl:3") as error:
        list(readers.read_medqa(wheel_data))
    assert str(path) in str(error.value)


def test_ids_depend_on_content_alone(wheel_data):
    write_jsonl(wheel_data / "MedQA" / "test.jsonl", [lettered(f"q{i}?", "a", "b") for i in range(5)])
    load = lambda: data.load_questions({"medqa": wanted()}, {"medqa": wheel_data}, seed=0)[0]  # noqa: E731
    before = load()
    write_jsonl(wheel_data / "MedQA" / "test.jsonl", [lettered(f"q{i}?", "a", "b") for i in (9, 3, 0, 4)])
    after = load().set_index("question").id
    assert all(after[q] == i for q, i in zip(before.question, before.id, strict=True) if q in after)
    assert after["q9?"] not in set(before.id)


# --- rejection -----------------------------------------------------------------------------------------------------

GOOD = lettered("good?", "a", "b", "c", "d")
BAD = [
    ({"question": "no options?", "answer": "A. x"}, "fewer than two options"),
    ({"question": "none?", "options": "", "answer": "A. x"}, "fewer than two options"),
    ({"question": "prose?", "options": "yes or no", "answer": "A. x"}, "fewer than two options"),
    (lettered("one?", "a"), "fewer than two options"),
    (lettered("twice?", "a", "b", "a", "c"), "two options alike"),
    (lettered("twice?", "a  b", "c", "a b", "d"), "two options alike"),
    (lettered("empty?", "a", "", "c", "d"), "empty option"),
    (lettered("", "a", "b"), "empty question"),
    (lettered("  \n", "a", "b"), "empty question"),
    (lettered("unanswered?", "a", "b", answer=None), "no answer"),
    ({**lettered("blank?", "a", "b"), "answer": ""}, "no answer"),
    ({**lettered("beyond?", "a", "b", "c", "d"), "answer": "E. e"}, "answer is none of the options"),
]


@pytest.mark.parametrize(("record", "reason"), BAD, ids=[f"{reason}-{r['question'].strip()}" for r, reason in BAD])
def test_what_is_no_question_is_rejected_and_counted(wheel_data, record, reason):
    write_jsonl(wheel_data / "MedQA" / "test.jsonl", [record, GOOD, {**record, "id": 2}])
    table, rejected = data.load_questions({"medqa": wanted()}, {"medqa": wheel_data}, seed=0)
    assert list(table.question) == ["good?"]
    assert rejected.to_dict("records") == [{"source": "medqa", "reason": reason, "count": 2}]


@pytest.mark.parametrize(
    "record",
    [
        {"question": "null options?", "options": None, "answer": "A. x"},
        {**GOOD, "question": None},
        {"options": GOOD["options"], "answer": "A. a"},
        {**GOOD, "question": "null answer?", "answer": None},
        {**GOOD, "question": "number?", "answer": "1. a"},
        {**GOOD, "question": "words?", "answer": "none of them"},
        {},
    ],
    ids=[
        "null options",
        "null question",
        "no question",
        "null answer",
        "answer by number",
        "answer in words",
        "empty record",
    ],
)
def test_malformed_record_is_rejected_not_a_crash(wheel_data, record):
    write_jsonl(wheel_data / "MedQA" / "test.jsonl", [record, GOOD])
    table, rejected = data.load_questions({"medqa": wanted()}, {"medqa": wheel_data}, seed=0)
    assert list(table.question) == ["good?"]
    assert rejected["count"].sum() == 1


def test_malformed_abstract_is_rejected_not_a_crash(wheel_data):
    path = wheel_data / "PubMedQA" / "pqal" / "test.jsonl"
    good = json.loads(path.read_text())
    write_jsonl(path, [{**good, "question": "perhaps?", "answer": "perhaps"}, good])
    table, rejected = data.load_questions({"pubmedqa": wanted()}, {"pubmedqa": wheel_data}, seed=0)
    assert len(table) == 1
    assert rejected["count"].sum() == 1


def test_a_repeated_question_is_counted_not_kept(wheel_data):
    write_jsonl(wheel_data / "MedQA" / "test.jsonl", [GOOD, lettered("other?", "a", "b"), GOOD, GOOD])
    table, rejected = data.load_questions({"medqa": wanted()}, {"medqa": wheel_data}, seed=0)
    assert len(table) == 2
    assert rejected.to_dict("records") == [{"source": "medqa", "reason": "the same question again", "count": 2}]


def test_nothing_is_lost_in_silence(wheel_data):
    records = [GOOD, *(record for record, _ in BAD), *(lettered(f"q{i}?", "a", "b") for i in range(3)), GOOD]
    write_jsonl(wheel_data / "MedQA" / "test.jsonl", records)
    table, rejected = data.load_questions({"medqa": wanted()}, {"medqa": wheel_data}, seed=0)
    assert len(table) + rejected["count"].sum() == len(records)


def test_a_source_of_which_nothing_is_left_is_named(wheel_data):
    write_jsonl(wheel_data / "MedQA" / "test.jsonl", [record for record, _ in BAD])
    with pytest.raises(DataError, match=r"medqa.*fewer than two options"):
        data.load_questions({"mmlu": wanted(), "medqa": wanted()}, {"mmlu": wheel_data, "medqa": wheel_data}, seed=0)


def test_unknown_dataset_lists_the_known(tmp_path):
    with pytest.raises(DataError, match=r"medqaa.*medmcqa"):
        data.load_questions({"medqaa": wanted()}, {"medqaa": tmp_path}, seed=0)


# --- pools ---------------------------------------------------------------------------------------------------------

STEMS = [" ".join(f"s{n}w{i}" for i in range(12)) for n in range(6)]
ROW = st.tuples(
    st.sampled_from(STEMS),
    st.sampled_from(["", " once", " more once"]),
    st.sampled_from([None, "train", "test", "transfer"]),
    st.sampled_from(["one", "two"]),
    st.sampled_from([None, None, "icd:A00", "icd:B11"]),
    st.sampled_from(["choice", "abstract"]),
)


def pooled_input(rows) -> pd.DataFrame:
    """Rows (text, ending, official pool, source, own group, kind) as `load_questions` gives them."""
    records = [
        {
            "question": f"{ending}{stem}",
            "context": "",
            "options": ["x", "y"],
            "answer": 0,
            "subject": "",
            "kind": kind,
            "pool": pool,
            "group": group,
            "source": source,
            "id": f"q{i}",
        }
        for i, (stem, ending, pool, source, group, kind) in enumerate(rows)
    ]
    return pd.DataFrame(records)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(ROW, min_size=1, max_size=25), st.integers(0, 5))
def test_pools_never_leak(rows, seed):
    before = pooled_input(rows)
    after = assign_pools(before, seed)
    pools = after.groupby("group").pool.agg(set)
    assert all(found == {"test"} for found in pools if "test" in found)
    assert set(after.pool) <= {"train", "valid", "test", "transfer"}

    official = before.set_index("id").pool
    tested = official.index[official == "test"]
    assert set(tested) <= set(after.id[after.pool == "test"])  # nothing official is lost from a test set
    kept = after.set_index("id").pool
    assert all(kept[i] == official[i] for i in kept.index if official[i] in ("train", "transfer", "test"))

    dropped = before[~before.id.isin(after.id)]
    assert set(dropped.pool) <= {
        "train",
        "transfer",
    }  # only what has another official place, and only near a test question
    own = dropped.group.dropna()
    assert set(own) <= set(after.group[after.pool == "test"])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(ROW, min_size=1, max_size=15), st.integers(0, 5))
def test_pools_are_the_same_for_the_same_seed(rows, seed):
    table = pooled_input(rows)
    pd.testing.assert_frame_equal(assign_pools(table, seed), assign_pools(table.copy(), seed))


def free_rows(count: int, group: str = "icd:{}") -> pd.DataFrame:
    return pooled_input([(STEMS[0], "", None, "one", group.format(i), "choice") for i in range(count)])


def test_another_seed_gives_other_pools_of_about_the_same_size():
    one, other = assign_pools(free_rows(3000), 0), assign_pools(free_rows(3000), 1)
    assert (one.pool != other.pool).mean() > 0.3
    for table in (one, other):
        shares = table.pool.value_counts(normalize=True)
        assert all(abs(shares[pool] - share) < 0.04 for pool, share in data.POOL_SHARES.items())


def test_a_group_goes_to_one_pool_in_every_source():
    both = pd.concat([free_rows(200), free_rows(200).assign(source="two", id=lambda t: "x" + t.id)], ignore_index=True)
    assert assign_pools(both, 0).groupby("group").pool.nunique().eq(1).all()


def test_a_free_near_duplicate_of_a_test_question_is_tested_and_an_official_one_dropped():
    table = pooled_input(
        [
            (STEMS[0], "", "test", "one", None, "choice"),
            (STEMS[0], " once", None, "two", None, "choice"),
            (STEMS[0], " more once", "train", "two", None, "choice"),
            (STEMS[1], "", "train", "two", None, "choice"),
        ]
    )
    after = assign_pools(table, 0).set_index("id")
    assert after.pool.to_dict() == {"q0": "test", "q1": "test", "q3": "train"}
    assert after.group["q0"] == after.group["q1"] != after.group["q3"]


def test_a_free_near_duplicate_of_a_training_question_is_never_tested():
    rows = [
        row
        for stem in STEMS
        for row in ((stem, "", "train", "one", None, "choice"), (stem, " once", None, "two", None, "choice"))
    ]
    assert set(assign_pools(pooled_input(rows), 0).pool) == {"train"}


def test_yes_no_maybe_does_not_tell_abstracts_apart_or_join_them():
    table = pooled_input(
        [
            ("does it work", "", "test", "one", None, "abstract"),
            ("does it work", "", "train", "two", None, "abstract"),
            ("does it fail", "", "train", "two", None, "abstract"),
        ]
    )
    assert list(assign_pools(table, 0).id) == ["q0", "q2"]


def test_pools_need_no_free_text():
    """A profile of ICD questions alone: every row brings its group."""
    assert len(assign_pools(free_rows(30), 0)) == 30


def test_assign_pools_changes_no_input():
    table = pooled_input([(STEMS[0], "", None, "one", None, "choice")])
    before = table.copy(deep=True)
    assign_pools(table, 0)
    pd.testing.assert_frame_equal(table, before)


# --- splits --------------------------------------------------------------------------------------------------------


def pooled(**counts: int) -> pd.DataFrame:
    """A table after `assign_pools`: `one_train=5` gives five training rows of source `one`, each its own group."""
    rows = [(name, i) for name, count in counts.items() for i in range(count)]
    return pd.DataFrame(
        [
            {
                "id": f"{n}-{i}",
                "source": n.split("_")[0],
                "pool": n.split("_")[1],
                "group": f"g:{n}:{i}",
                "kind": "choice",
                "question": f"{n} {i}?",
                "context": "",
                "options": ["a", "b"],
                "answer": 0,
                "subject": "",
            }
            for n, i in rows
        ]
    )


def counted(table: pd.DataFrame) -> dict:
    return table.groupby(["source", "split"]).size().to_dict()


def test_splits_take_the_numbers_asked_for_from_their_own_pool():
    questions = pooled(one_train=9, one_valid=5, one_test=7, one_transfer=3, two_test=4)
    table = take_splits(questions, {"one": wanted(4, 2, 7, 1), "two": wanted(test=3)}, seed=0)
    assert counted(table) == {
        ("one", "train"): 4,
        ("one", "valid"): 2,
        ("one", "test"): 7,
        ("one", "transfer"): 1,
        ("two", "test"): 3,
    }
    assert list(table.columns) == data.COLUMNS
    assert table.id.is_unique
    assert (table.split == table.id.str.extract(r"_(\w+)-")[0]).all()


def test_all_takes_all():
    table = take_splits(
        pooled(one_train=9, one_test=7, one_transfer=3), {"one": wanted("all", 0, "all", "all")}, seed=0
    )
    assert counted(table) == {("one", "train"): 9, ("one", "test"): 7, ("one", "transfer"): 3}


def test_the_draw_depends_on_the_seed_alone():
    questions, asked = pooled(one_train=50, one_test=50), {"one": wanted(10, 0, 10)}
    draw = lambda seed: set(take_splits(questions, asked, seed).id)  # noqa: E731
    assert draw(0) == draw(0) != draw(1)


def test_a_larger_draw_holds_the_smaller():
    """So that raising a number keeps what was learned about the questions before."""
    questions = pooled(one_test=50)
    small, large = (set(take_splits(questions, {"one": wanted(test=n)}, 0).id) for n in (10, 30))
    assert small < large


@pytest.mark.parametrize("split", ["train", "valid", "test", "transfer"])
def test_a_pool_that_is_too_small_names_the_key(split):
    questions = pooled(one_train=3, one_valid=3, one_test=3, one_transfer=3)
    with pytest.raises(DataError, match=rf"4 .*{split}.*3.*data\.datasets\.one\.{split}"):
        take_splits(questions, {"one": wanted(**{split: 4})}, seed=0)


def test_an_empty_pool_names_the_key():
    with pytest.raises(DataError, match=r"data\.datasets\.one\.test"):
        take_splits(pooled(one_train=3), {"one": wanted(test=1)}, seed=0)


def test_valid_is_lent_by_train_where_there_is_no_pool_of_its_own():
    table = take_splits(pooled(one_train=10), {"one": wanted(6, 4)}, seed=0)
    assert counted(table) == {("one", "train"): 6, ("one", "valid"): 4}
    assert table.id.is_unique


@pytest.mark.parametrize("train", [8, "all"])
def test_no_row_is_lent_twice(train):
    try:
        table = take_splits(pooled(one_train=10), {"one": wanted(train, 4)}, seed=0)
    except DataError as error:
        assert train == 8 and "data.datasets.one.train" in str(error)
    else:
        assert table.id.is_unique
        assert counted(table) == {("one", "train"): 6, ("one", "valid"): 4}


def test_what_is_lent_to_valid_takes_its_near_duplicates_along():
    questions = pooled(one_train=40)
    questions["group"] = [f"g{i // 2}" for i in range(40)]
    table = take_splits(questions, {"one": wanted(20, 7)}, seed=0)
    assert counted(table) == {("one", "train"): 20, ("one", "valid"): 7}
    assert table.groupby("group").split.nunique().max() == 1


def test_a_leak_that_comes_in_does_not_go_out():
    questions = pooled(one_train=3, one_test=3)
    questions["group"] = "g"
    with pytest.raises(DataError, match="test and in another"):
        take_splits(questions, {"one": wanted(1, 0, 1)}, seed=0)


# --- what may be learned from --------------------------------------------------------------------------------------

SPLIT = take_splits(pooled(one_train=3, one_valid=2, one_test=3, one_transfer=1), {"one": wanted(3, 2, 3, 1)}, seed=0)


def test_test_rows_are_never_training_rows():
    with pytest.raises(DataError, match="'test'"):
        training_rows(SPLIT, "test")
    for split in ("train", "valid", "transfer"):
        rows = training_rows(SPLIT, split)
        assert set(rows.split) == {split}
        assert list(rows.index) == list(range(len(rows)))


@pytest.mark.parametrize("split", ["valid", "transfer", "trian"])
def test_an_empty_split_is_refused_by_name(split):
    with pytest.raises(DataError, match=split):
        training_rows(SPLIT[SPLIT.split == "train"], split)


def test_long_prompts_are_dropped_at_the_limit():
    lengths = dict(zip(SPLIT.id, [5, 6, 7, 5, 5, 5, 5, 5, 5], strict=True))
    kept = drop_long(SPLIT, lambda row: lengths[row["id"]], 6)
    assert set(SPLIT.id) - set(kept.id) == {i for i, n in lengths.items() if n == 7}
    assert list(kept.prompt_tokens) == [lengths[i] for i in kept.id]


def test_a_split_that_loses_every_row_is_named():
    with pytest.raises(DataError, match=r"'one', 'valid'.*max_prompt_tokens=6"):
        drop_long(SPLIT, lambda row: 7 if row["split"] == "valid" else 6, 6)


# --- ICD-10-CM -----------------------------------------------------------------------------------------------------


def icd_xml(path: Path) -> Path:
    """A small tabular list: 6 chapters of 3 sections of 4 categories of 3 diagnoses, and the odd cases."""
    chapters = []
    for c, letter in enumerate("ABCDEF"):
        sections = []
        for s in range(3):
            categories = []
            for k in range(4):
                code = f"{letter}{s}{k}"
                leaves = "".join(
                    f"<diag><name>{code}.{d}</name><desc>Illness  {letter}{s}{k}{d}</desc></diag>" for d in range(3)
                )
                categories.append(f"<diag><name>{code}</name><desc>Illnesses {code}</desc>{leaves}</diag>")
            sections.append(
                f'<section id="{letter}{s}0-{letter}{s}9"><desc>Section</desc>{"".join(categories)}</section>'
            )
        small = "".join(
            f"<diag><name>{letter}9{k}</name><desc>Rare illness {letter}9{k}</desc></diag>" for k in range(3)
        )
        sections.append(f'<section id="{letter}90-{letter}92"><desc>Only three</desc>{small}</section>')
        same = f"<diag><name>{letter}95</name><desc>Told the same in every chapter</desc></diag>"
        sections.append(f'<section id="{letter}95-{letter}95"><desc>Once</desc>{same}</section>')
        name = f"<name>{c + 1}</name><desc>Chapter {letter} ({letter}00-{letter}99)</desc>"
        chapters.append(f"<chapter>{name}{''.join(sections)}</chapter>")
    special = '<section id="U00-U49"><diag><name>U07.1</name><desc>New illness</desc></diag></section>'
    chapters.append(f"<chapter><name>22</name><desc>Codes for special purposes (U00-U85)</desc>{special}</chapter>")
    path.write_text(f"<ICD10CM.tabular><version>2026</version>{''.join(chapters)}</ICD10CM.tabular>")
    return path


@pytest.fixture(scope="module")
def concepts(tmp_path_factory) -> pd.DataFrame:
    return icd.read_icd_concepts(icd_xml(tmp_path_factory.mktemp("icd") / "tabular.xml"))


def test_concepts_are_leaves_with_their_places(concepts):
    assert len(concepts) == 6 * (3 * 4 * 3 + 3) + 1
    assert concepts.description.is_unique
    assert set(concepts.chapter) == {f"Chapter {letter}" for letter in "ABCDEF"}
    leaf = concepts.set_index("code").loc["B12.0"]
    assert tuple(leaf) == ("Illness B120", "B12", "B10-B19", "Chapter B")
    assert "A00" not in set(concepts.code)  # a category with codes below it
    assert "A90" in set(concepts.code)  # a category that is a code itself


@pytest.mark.parametrize("kind", icd.ICD_KINDS)
def test_icd_questions_are_sound(concepts, kind):
    by_text, by_code = concepts.set_index("description"), concepts.set_index("code")
    rows = list(icd.make_icd_questions(concepts, kind, 100, seed=3))
    assert len(rows) == 100
    assert len({row["question"] for row in rows}) == 100
    for row in rows:
        assert len(set(row["options"])) == 4
        assert row["pool"] is None
        assert row["kind"] == kind
        right, wrong = row["options"][row["answer"]], [o for i, o in enumerate(row["options"]) if i != row["answer"]]
        if kind == "icd_chapter":
            concept = by_text.loc[row["question"].split("“")[1].split("”")[0]]
            assert right == concept.chapter
        else:
            concept = by_code.loc[re.search(r"\b[A-F]\d\d(?:\.\d)?\b", row["question"])[0]]
            assert right == concept.description
            places = by_text.loc[wrong]
            assert (
                (places.section == concept.section).all()
                if kind == "icd_hard"
                else (places.chapter != concept.chapter).all()
            )
        assert row["group"] == f"icd:{concept.category}"
        assert row["subject"] == concept.chapter


@pytest.mark.parametrize("kind", icd.ICD_KINDS)
def test_icd_questions_depend_on_the_seed_alone(concepts, kind):
    make = lambda seed, count=40: list(icd.make_icd_questions(concepts, kind, count, seed))  # noqa: E731
    assert make(1) == make(1)
    assert make(1) != make(2)
    assert make(1)[:20] == make(1, 20)


def test_icd_questions_spread_over_chapters_and_places(concepts):
    rows = list(icd.make_icd_questions(concepts, "icd_chapter", 120, seed=0))
    assert set(Counter(row["subject"] for row in rows).values()) == {20}
    assert min(Counter(row["answer"] for row in rows).values()) > 15


def test_icd_gives_all_it_has_and_no_more(concepts):
    assert len(list(icd.make_icd_questions(concepts, "icd_chapter", -1, seed=0))) == len(concepts)
    hard = list(icd.make_icd_questions(concepts, "icd_hard", -1, seed=0))
    assert len(hard) == 6 * 3 * 4 * 3  # a section of three codes has no hard question
    assert list(icd.make_icd_questions(concepts, "icd_easy", 0, seed=0)) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_category_is_never_learned_in_one_kind_and_tested_in_another(tmp_path, seed):
    path = icd_xml(tmp_path / "tabular.xml")
    datasets = {kind: wanted(20, 1, 10) for kind in icd.ICD_KINDS}
    questions, _ = data.load_questions(datasets, dict.fromkeys(datasets, path), seed)
    after = assign_pools(questions, seed)
    assert after.groupby("group").pool.nunique().max() == 1
    assert after.groupby("group").kind.nunique().max() == 3  # the kinds do share categories
    table = take_splits(after, datasets, seed)
    assert not set(table.group[table.split == "test"]) & set(table.group[table.split != "test"])


# --- the hub's layout ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    datasets.disable_progress_bars()
    return tmp_path / "snapshot"


def from_hub(name: str, folder: Path, subset: str = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    origin = Hub(kind="hub", repo="owner/set", revision="abc", type="dataset", subset=subset)
    return data.load_questions({name: wanted(origin=origin)}, {name: folder}, seed=0)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_medmcqa_of_the_hub_keeps_its_official_splits(hub, ending):
    record = {
        "id": "x",
        "opa": " w",
        "opb": "x\n",
        "opc": "y",
        "opd": "z",
        "cop": 2,
        "choice_type": "single",
        "exp": None,
        "subject_name": "Anatomy",
        "topic_name": "Bones",
    }
    (hub / "data").mkdir(parents=True)
    for split, answers in (("train", [2, 0]), ("validation", [3]), ("test", [-1])):
        rows = pd.DataFrame([{**record, "question": f"{split}  {i}?", "cop": cop} for i, cop in enumerate(answers)])
        path = hub / "data" / f"{split}-00000-of-00001.{ending}"
        rows.to_parquet(path) if ending == "parquet" else write_jsonl(path, rows.to_dict("records"))
    table, rejected = from_hub("medmcqa", hub)
    assert dict(zip(table.question, table.pool, strict=True)) == {
        "train 0?": "train",
        "train 1?": "train",
        "validation 0?": "test",
        "test 0?": "transfer",
    }
    answers = {
        q: o[a] if a >= 0 else None for q, o, a in table[["question", "options", "answer"]].itertuples(index=False)
    }
    assert answers == {"train 0?": "y", "train 1?": "w", "validation 0?": "z", "test 0?": None}  # cop counts from zero
    assert set(table.subject) == {"Anatomy"}
    assert set(table.source) == {"medmcqa"}
    assert rejected.empty


def test_pubmedqa_of_the_hub_takes_the_subset_asked_for(hub):
    def rows(name: str, *answers: str) -> list[dict]:
        return [
            {
                "pubid": i,
                "question": f"{name} {i}?",
                "long_answer": "Because.",
                "final_decision": answer,
                "context": {"contexts": ["First  part.", "Second."], "labels": ["A", "B"], "meshes": []},
            }
            for i, answer in enumerate(answers)
        ]

    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("pqa_labeled", "pqa_artificial")
    )
    write_jsonl(hub / "pqa_labeled" / "train-00000-of-00001.jsonl", rows("labelled", "yes", "no", "maybe"))
    write_jsonl(hub / "pqa_artificial" / "train-00000-of-00001.jsonl", rows("artificial", "no"))
    (hub / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    table, _ = from_hub("pubmedqa", hub, "pqa_labeled")
    assert [options[answer] for options, answer in zip(table.options, table.answer, strict=True)] == [
        "yes",
        "no",
        "maybe",
    ]
    assert set(table.pool) == {"test"}
    assert set(table.context) == {"First part. Second."}
    assert set(table.kind) == {"abstract"}
    table, _ = from_hub("pubmedqa_a", hub, "pqa_artificial")
    assert (list(table.question), set(table.pool)) == (["artificial 0?"], {"train"})


def test_medqa_and_mmlu_of_the_hub_are_cleaned_like_every_other_text(hub):
    options = {"A": " one", "B": "two  words", "C": "three\n", "D": "four"}
    write_jsonl(
        hub / "medqa" / "test.jsonl", [{"question": "q?", "options": options, "answer_idx": "C", "answer": "three"}]
    )
    record = {"question": "q?", "subject": "anatomy", "choices": list(options.values()), "answer": 1}
    write_jsonl(hub / "mmlu" / "test.jsonl", [record, {**record, "question": "law?", "subject": "jurisprudence"}])
    for name, right in (("medqa", "three"), ("mmlu", "two words")):
        table, _ = from_hub(name, hub / name)
        assert list(table.options.map(list)) == [["one", "two words", "three", "four"]]
        assert table.options[0][table.answer[0]] == right
        assert list(table.pool) == ["test"]
