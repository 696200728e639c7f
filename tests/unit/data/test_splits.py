"""The questions table, and above all the split: no near-duplicate of a test question may be learned from."""

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medkit.data import splits
from medkit.data.splits import DataError, assign_pools, drop_long, take_splits, training_rows, transfer_answers
from medkit.params import DatasetParams, Local, Table

HERE = Local(kind="local", path="unused")


def wanted(private=0, labelled=0, transfer=0, valid=0, test=0) -> DatasetParams:
    counts = {"private": private, "labelled": labelled, "transfer": transfer, "valid": valid, "test": test}
    return DatasetParams(origin=HERE, **counts)


def test_unknown_dataset_lists_the_known_and_the_way_to_bring_ones_own(tmp_path):
    with pytest.raises(DataError, match=r"medqaa.*icd_chapter.*medmcqa.*table"):
        splits.load_questions({"medqaa": wanted()}, {"medqaa": tmp_path}, seed=0)


def test_a_table_of_ones_own_may_not_have_the_name_of_a_known_dataset(tmp_path):
    columns = {"question": "q", "options": "o", "answer": "a", "context": "", "subject": ""}
    origin = Table(kind="table", path="unused", pool=None, columns=columns, answer_is="text")
    with pytest.raises(DataError, match="medqa: a dataset that medkit knows has this name"):
        splits.load_questions({"medqa": wanted().model_copy(update={"origin": origin})}, {"medqa": tmp_path}, seed=0)


STEMS = [" ".join(f"s{n}w{i}" for i in range(12)) for n in range(6)]
ROW = st.tuples(
    st.sampled_from(STEMS),
    st.sampled_from(["", " once", " more once"]),
    st.sampled_from([None, "train", "test", "transfer"]),
    st.sampled_from(["one", "two"]),
    st.sampled_from([None, None, "icd:A00", "icd:B11", "table:p1", "table:p2"]),
    st.sampled_from(["choice", "abstract"]),
)


def pooled_input(rows) -> pd.DataFrame:
    """Rows (text, ending, official pool, source, own group, kind) as `load_questions` gives them."""
    same = {"context": "", "options": ["x", "y"], "answer": 0, "subject": ""}
    named = ("pool", "source", "group", "kind")
    return pd.DataFrame(
        {"id": f"q{i}", "question": f"{ending}{stem}", **same, **dict(zip(named, values, strict=True))}
        for i, (stem, ending, *values) in enumerate(rows)
    )


@settings(max_examples=30, deadline=None, derandomize=True)
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

    dropped = before[~before.id.isin(after.id)]  # what has another official place, and only near a test question
    assert set(dropped.pool) <= {"train", "transfer"}
    icd = dropped.group[dropped.group.fillna("").str.startswith("icd:")]
    assert set(icd) <= set(after.group[after.pool == "test"])
    named = before.set_index("id").group.reindex(after.id).to_numpy()
    for name in ("table:p1", "table:p2"):
        assert after.group[named == name].nunique() <= 1


def test_a_group_that_a_file_names_is_joined_with_the_near_duplicates_of_its_rows():
    """A chain: near-duplicate, same patient, near-duplicate; another patient with another question stays apart."""
    rows = [
        (STEMS[0], "", None, "one", "table:p1", "choice"),
        (STEMS[0], " once", None, "one", "table:p2", "choice"),
        (STEMS[1], "", None, "one", "table:p2", "choice"),
        (STEMS[1], " once", None, "two", None, "choice"),
        (STEMS[2], "", None, "one", "table:p3", "choice"),
    ]
    groups = assign_pools(pooled_input(rows), 0).set_index("id").group
    assert groups["q0"] == groups["q1"] == groups["q2"] == groups["q3"] != groups["q4"]


def test_another_seed_gives_other_pools_of_about_the_same_size():
    free = pooled_input([(STEMS[0], "", None, "one", f"icd:{i}", "choice") for i in range(3000)])
    one, other = assign_pools(free, 0), assign_pools(free, 1)
    assert (one.pool != other.pool).mean() > 0.3
    for table in (one, other):
        shares = table.pool.value_counts(normalize=True)
        assert all(abs(shares[pool] - share) < 0.04 for pool, share in splits.POOL_SHARES.items())


def test_near_duplicates_of_test_questions_are_tested_where_they_are_free_and_dropped_elsewhere():
    """Over all sources, so your copy of an exam question is not learned; yes, no and maybe join no abstracts."""
    rows = [
        (STEMS[0], "", "test", "one", None, "choice"),
        (STEMS[0], " once", None, "two", None, "choice"),
        (STEMS[0], " more once", "train", "two", None, "choice"),
        (STEMS[1], "", "train", "two", None, "choice"),
        ("does it work", "", "test", "one", None, "abstract"),
        ("does it work", "", "train", "two", None, "abstract"),
        ("does it fail", "", "train", "two", None, "abstract"),
    ]
    after = assign_pools(pooled_input(rows), 0).set_index("id")
    assert after.pool.to_dict() == {"q0": "test", "q1": "test", "q3": "train", "q4": "test", "q6": "train"}
    assert after.group["q0"] == after.group["q1"] != after.group["q3"]


def pooled(**counts: int) -> pd.DataFrame:
    """A table after `assign_pools`: `one_train=5` gives five training rows of source `one`, each its own group."""
    rows = [(name, i) for name, count in counts.items() for i in range(count)]
    same = {"kind": "choice", "context": "", "options": ["a", "b"], "answer": 0, "subject": ""}
    table = pd.DataFrame([{"id": f"{n}-{i}", "group": f"g:{n}:{i}", "question": f"{n} {i}?", **same} for n, i in rows])
    return table.assign(source=[n.split("_")[0] for n, _ in rows], pool=[n.split("_")[1] for n, _ in rows])


def counted(table: pd.DataFrame) -> dict:
    return table.groupby(["source", "split"]).size().to_dict()


def test_splits_take_the_numbers_asked_for():
    questions = pooled(one_train=19, one_valid=5, one_test=7, one_transfer=3, two_test=4)
    table = take_splits(questions, {"one": wanted(8, 5, 6, 2, 7), "two": wanted(test=3)}, seed=0)
    wanted_counts = {"private": 8, "labelled": 5, "transfer": 6, "valid": 2, "test": 7}
    assert counted(table) == {("one", split): n for split, n in wanted_counts.items()} | {("two", "test"): 3}
    assert list(table.columns) == splits.COLUMNS
    assert table.id.is_unique
    pools = table.id.str.extract(r"_(\w+)-")[0]
    assert (table.split == pools)[table.split.isin(["valid", "test"])].all()
    assert set(pools[table.split.isin(["private", "labelled"])]) == {"train"}
    assert (pools[table.split == "transfer"] == "transfer").sum() == 3, "what has no published answer comes first"
    table = take_splits(pooled(one_train=9, one_transfer=3), {"one": wanted("all", 2, "all")}, seed=0)
    assert counted(table) == {("one", "transfer"): 3, ("one", "labelled"): 2, ("one", "private"): 7}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 30), min_size=84, max_size=84), st.integers(0, 9), st.sampled_from([(0, 0), (8, 16)]))
def test_no_group_is_in_two_splits(groups, seed, official):
    """Rows of one group may have official places of their own."""
    valid, transfer = official
    questions = pooled(one_train=84 - valid - transfer, one_valid=valid, one_transfer=transfer)
    questions["group"] = [f"g{number}" for number in groups]
    try:
        table = take_splits(questions, {"one": wanted(12, 3, 8, 7)}, seed)
    except DataError:  # a large group can leave too little for the next split
        return
    assert table.split.value_counts().to_dict() == {"private": 12, "labelled": 3, "transfer": 8, "valid": 7}
    assert table.groupby("group").split.nunique().max() == 1


@pytest.mark.parametrize("seed", range(4))
def test_labels_come_from_as_many_groups_as_there_are_labels_and_from_every_subject(seed):
    questions = pooled(one_train=200).assign(group=[f"g{i // 4}" for i in range(200)])
    questions["subject"] = [f"rare{i // 4}" if i < 28 else "common" for i in range(200)]
    table = take_splits(questions, {"one": wanted(100, 10)}, seed)
    labelled = table[table.split == "labelled"]
    assert labelled.group.is_unique and labelled.subject.nunique() == 8


def test_a_leak_does_not_go_out():
    leaking = pooled(two_train=3, one_test=3).assign(group="g")
    with pytest.raises(DataError, match="test and in another"):
        take_splits(leaking, {"one": wanted(test=1), "two": wanted(private=1)}, seed=0)


SPLIT = take_splits(pooled(one_train=4, one_valid=2, one_test=3), {"one": wanted(2, 1, 1, 2, 3)}, seed=0)


def test_training_rows_hold_no_test_row_and_no_answer_of_a_transfer_row():
    """Those answers are for the ceiling alone."""
    with pytest.raises(DataError, match="'test'"):
        training_rows(SPLIT, "test")
    for split in ("private", "labelled", "transfer", "valid"):
        rows = training_rows(SPLIT, split)
        assert set(rows.split) == {split}
        assert list(rows.index) == list(range(len(rows)))
    for split in ("valid", "labeled"):
        with pytest.raises(DataError, match=split):
            training_rows(SPLIT[SPLIT.split == "private"], split)
    known, hidden = transfer_answers(SPLIT), training_rows(SPLIT, "transfer")
    assert list(known.id) == list(hidden.id)
    assert known.answer.tolist() == [0] and known.options.map(list).tolist() == [["a", "b"]]
    assert hidden.answer.tolist() == [-1] and hidden.options.map(list).tolist() == [[]]
    assert transfer_answers(SPLIT.assign(answer=-1)).empty


def test_the_second_form_is_for_the_adapter_alone():
    both = pd.concat([SPLIT, SPLIT.assign(kind="record_b")])
    for split in ("private", "labelled", "valid"):
        assert training_rows(both, split).equals(training_rows(SPLIT, split))
        assert set(training_rows(both, split, second_form=True).kind) == {"record_b"}
    with pytest.raises(DataError, match="labelled"):
        training_rows(SPLIT, "labelled", second_form=True)


def test_long_prompts_are_dropped_at_the_limit():
    lengths = dict(zip(SPLIT.id, [5, 6, 7, 5, 5, 5, 5, 5, 5], strict=True))
    kept = drop_long(SPLIT, lambda row: lengths[row["id"]], 6)
    assert set(SPLIT.id) - set(kept.id) == {i for i, n in lengths.items() if n == 7}
    assert list(kept.prompt_tokens) == [lengths[i] for i in kept.id]
    with pytest.raises(DataError, match=r"'one', 'valid'.*max_prompt_tokens=6"):
        drop_long(SPLIT, lambda row: 7 if row["split"] == "valid" else 6, 6)
