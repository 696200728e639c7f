"""Every file in one schema: the wheels', the hub's with its official splits, a user's own, and without options."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from medkit.data import readers
from medkit.data import splits as data
from medkit.data.raw_questions import DataError, rejection_reason
from medkit.params import SPLITS, DatasetParams, Hub, Local, Table

HERE = Local(kind="local", path="unused")


def wanted(origin=HERE) -> DatasetParams:
    return DatasetParams(origin=origin, **dict.fromkeys(SPLITS, 0))


def write_jsonl(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records))
    return path


def lettered(question: str, *options: str, answer: str | None = "A") -> dict:
    """A record of the lettered files: options in one string, the answer with its letter before it."""
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCDEFGHIJ", options, strict=False))
    record = {"question": question, "options": listed}
    return record if answer is None else {**record, "answer": f"{answer}. {options['ABCDEFGHIJ'.index(answer)]}"}


# --- wheels --------------------------------------------------------------------------------------------------------


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
    (row,) = readers.READERS["medqa"](wheel_data)
    assert row["question"] == "Which drug?"
    assert row["options"][row["answer"]] == "e"
    assert (row["pool"], row["kind"], row["context"]) == ("test", "choice", "")


def test_medmcqa_is_split_here_and_its_unlabelled_part_transfers(wheel_data):
    rows = list(readers.READERS["medmcqa"](wheel_data))
    assert Counter(row["pool"] for row in rows) == {None: 2, "transfer": 2}
    assert {row["subject"] for row in rows} == {"Anatomy", "Social Preventive Medicine"}
    assert {row["answer"] for row in rows if row["pool"]} == {-1}
    assert {row["options"][row["answer"]] for row in rows if not row["pool"]} == {"y"}


def test_pubmedqa_has_its_abstract_without_the_numbering(wheel_data):
    (labelled,), (artificial,) = readers.READERS["pubmedqa"](wheel_data), readers.READERS["pubmedqa_a"](wheel_data)
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
    assert (table.answer < table.options.str.len()).all()


def test_every_dataset_is_read_from_wheel_and_hub():
    assert set(readers.READERS) == set(readers.HUB_COLUMNS) == set(readers.HUB_POOLS)


@pytest.mark.parametrize("line", ['{"question": "cut of', "[1, 2]", '"text"', "null", b"\xff\xfe"])
def test_a_line_that_is_no_json_object_is_named_by_file_and_line(wheel_data, line):
    path = wheel_data / "MedQA" / "test.jsonl"
    first = json.dumps(lettered("q?", "a", "b")).encode()
    path.write_bytes(b"\n".join([first, b"", line if isinstance(line, bytes) else line.encode()]))
    with pytest.raises(DataError, match=r"test\.jsonl:3") as error:
        list(readers.READERS["medqa"](wheel_data))
    assert str(path) in str(error.value)


GOOD = lettered("good?", "a", "b", "c", "d")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "no options?", "answer": "A. x"}, "fewer than two options"),
        ({"question": "prose?", "options": "yes or no", "answer": "A. x"}, "fewer than two options"),
        (lettered("twice?", "a  b", "c", "a b", "d"), "two options alike"),
        (lettered("empty?", "a", "", "c", "d"), "empty option"), (lettered("  \n", "a", "b"), "empty question"),
        ({"options": GOOD["options"], "answer": "A. a"}, "empty question"),
        (lettered("unanswered?", "a", "b", answer=None), "no answer"),
        ({**GOOD, "answer": "E. e"}, "answer is none of the options"),
        ({**GOOD, "answer": "B. a"}, "answer is none of the options"),
        ({**GOOD, "answer": 1}, "answer is none of the options"), ({}, "empty question"),
    ],
)  # fmt: skip
def test_malformed_record_gets_a_reason_not_a_crash(wheel_data, record, reason):
    write_jsonl(wheel_data / "MedQA" / "test.jsonl", [record, GOOD])
    bad, good = readers.READERS["medqa"](wheel_data)
    assert rejection_reason(bad) == reason
    assert rejection_reason(good) is None


# --- a table of ones own -------------------------------------------------------------------------------------------


def table(options="options", answer="answer", answer_is="letter", pool="test", **columns) -> Table:
    named = {"question": "q", "options": options, "answer": answer, "context": "", "subject": "", **columns}
    return Table(kind="table", path="unused", pool=pool, columns=named, answer_is=answer_is)


def write_as(ending: str, folder: Path, rows: list[dict]) -> Path:
    path = folder / f"mine.{ending}"
    if ending == "jsonl":
        return write_jsonl(path, rows)
    table = pd.DataFrame(rows)
    table.to_parquet(path) if ending == "parquet" else table.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"answer_is": "index0"}, {"options": ["one", " two\n", "three"], "answer": 1}),
        ({"answer_is": "index1"}, {"options": ["one", "two", "three"], "answer": 2}),
        ({"answer_is": "letter"}, {"options": ["A. one", "B. two", "C. three"], "answer": "B"}),
        ({"answer_is": "letter"}, {"options": {"A": "one", "B": "two", "C": "three"}, "answer": "b"}),
        ({"answer_is": "letter"}, {"options": {"C": "three", "B": "two", "A": "one"}, "answer": "B"}),
        ({"answer_is": "text"}, {"options": {"a": "one", "b": "two", "c": "three"}, "answer": " two "}),
        (
            {"answer_is": "text", "options": ["opa", "opb", "opc", "opd"]},
            {"opb": "two", "opa": "one", "opc": "three", "opd": None, "answer": "two"},
        ),
        ({"answer_is": "letter", "answer": "gold"}, {"options": ["one", "two", "three"], "gold": "(B)"}),
    ],
)
def test_one_question_in_every_form(tmp_path, ending, columns, row):
    path = write_as(ending, tmp_path, [{"q": "Which?", "note": "not asked for", **row}])
    (record,) = readers.read_table(path, table(**columns))
    texts = {"question": "Which?", "context": "", "subject": ""}
    assert record == {**texts, "options": ["one", "two", "three"], "answer": 1, "kind": "choice", "pool": "test"}
    assert rejection_reason(record) is None


def test_a_table_without_answers_is_for_transfer(tmp_path):
    path = write_jsonl(tmp_path / "m.jsonl", [{"q": "Which?", "options": ["a", "b"]}])
    (record,) = readers.read_table(path, table(answer="", pool="transfer"))
    assert record["answer"] == -1
    assert rejection_reason(record) is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"options": {"A": "one", "C": "two"}}, "options are not a list"),
        ({"options": ["one", None, "two"]}, "an option is not text or a number"),
        ({"answer": "C"}, "answer is none of the options"), ({"answer": "one"}, "answer is none of the options"),
        ({"q": 7}, "question is not text"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_gets_a_reason(tmp_path, row, reason):
    good = {"q": "Which?", "options": ["one", "two"], "answer": "A"}
    first, second = readers.read_table(write_jsonl(tmp_path / "m.jsonl", [{**good, **row}, good]), table())
    assert rejection_reason(first).split(":")[0] == reason
    assert rejection_reason(second) is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_file_is_read_as_spreadsheets_write_it(tmp_path, encoding, separator):
    """Texts with separators, quotes and line breaks, the text "NA", and an empty last option."""
    rows = [{"q": 'What is "pH",\n; or\tµ?', "a": "None", "b": "NA", "c": "", "answer": "B"}]
    path = tmp_path / "m.csv"
    pd.DataFrame(rows).to_csv(path, index=False, sep=separator, encoding=encoding)
    (record,) = readers.read_table(path, table(options=["a", "b", "c"]))
    assert (record["question"], record["options"], record["answer"]) == ('What is "pH", ; or μ?', ["None", "NA"], 1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("q,a,b,answer\nWhich, if any?,x,y,A\n", r"m\.csv:2: not a csv line \(5 cells under 4 names\)"),
        ('q,a,b,answer\n"cut of', r"m\.csv:2: not a csv line"),
        ("q,a,a,answer\n", "a name stands twice"), ("q,a,answer\nx,y,A\n", r"no column \['b'\]"),
    ],
)  # fmt: skip
def test_a_csv_file_that_is_not_whole_is_named_by_its_line(tmp_path, text, sentence):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(DataError, match=sentence):
        list(readers.read_table(tmp_path / "m.csv", table(options=["a", "b"])))


@pytest.mark.parametrize(
    "options",
    [
        [{"key": "A", "value": "one"}, {"key": "B", "value": "two"}],
        [{"text": "one", "label": "A"}, {"text": "two", "label": "B"}],
        {"text": ["one", "two"], "label": ["A", "B"]}, {"text": ["two", "one"], "label": ["B", "A"]},
        [{"aid": 1, "atext": "one"}, {"aid": 2, "atext": "two"}], {"1": "one", "2": "two"}, {"0": "one", "1": "two"},
        '["one", "two"]', "{'B': 'two', 'A': 'one'}", "A. one\nB. two", ["A) one", "B) two"],
        ["one\u200b", "\x00two", None],
    ],
)  # fmt: skip
def test_options_are_read_wherever_their_meaning_is_plain(tmp_path, options):
    path = write_jsonl(tmp_path / "m.jsonl", [{"q": "Which?", "options": options, "answer": "two"}])
    (record,) = readers.read_table(path, table(answer_is="text"))
    assert (record["options"], record["answer"]) == (["one", "two"], 1)


@pytest.mark.parametrize("layout", ["array", "one line", "over lines", "json"])
def test_json_is_read_however_it_is_laid_out(tmp_path, layout):
    rows = [{"q": f"{n}?", "options": ["a", "b"], "answer": n} for n in (0, 1)]
    texts = {"array": json.dumps(rows, indent=2), "one line": json.dumps(rows), "json": json.dumps(rows)}
    texts["over lines"] = "\n".join(json.dumps(row, indent=1) for row in rows)
    path = tmp_path / ("m.json" if layout == "json" else "m.jsonl")
    path.write_text(texts[layout])
    assert [row["answer"] for row in readers.read_table(path, table(answer_is="index0"))] == [0, 1]


def test_a_column_that_is_nowhere_is_named_with_those_that_are_there(tmp_path):
    path = write_jsonl(tmp_path / "m.jsonl", [{"q": "Which?", "choices": ["a", "b"], "answer": "A"}])
    with pytest.raises(DataError, match=r"no column \['options', 'topic'\].*'answer', 'choices', 'q'"):
        list(readers.read_table(path, table(subject="topic")))


@pytest.mark.parametrize("name", ["mine.txt", "mine.xlsx", "mine", "mine.parquet"])
def test_a_file_of_another_format_is_refused(tmp_path, name):
    (tmp_path / name).write_text('{"q": "Which?"}')
    with pytest.raises(DataError, match=r"mine.*parquet"):
        list(readers.read_table(tmp_path / name, table()))


# --- what users' files bring: small files in cases/ ----------------------------------------------------------------

CASES = Path(__file__).parent / "cases"


def load_own(path: Path, **columns) -> tuple[pd.DataFrame, pd.DataFrame]:
    return data.load_questions({"own": wanted(table(question="question", **columns))}, {"own": path}, seed=0)


@pytest.mark.parametrize(
    ("file", "answer_is", "expected"),
    [
        ("genus", "text", ("A. fumigatus", ["A. fumigatus", "B. dermatitidis", "C. immitis"])),
        ("genus", "letter", ("A. fumigatus", ["A. fumigatus", "B. dermatitidis", "C. immitis"])),
        ("numopt", "letter", ("10", ["5", "10", "15"])), ("strdigit", "index0", ("b", ["a", "b"])),
        ("strdigit", "index1", ("a", ["a", "b"])), ("bigbio", "text", ("a", ["a", "b"])),
        ("contextlist", "text", ("yes", ["yes", "no", "maybe"])),
        ("pretty", "letter", ("metformin", ["metformin", "aspirin"])),
        ("utf16", "letter", ("metformin", ["metformin", "aspirin"])),
    ],
)  # fmt: skip
def test_what_is_plain_is_read(file, answer_is, expected):
    questions, rejected = load_own(CASES / f"{file}.jsonl", answer_is=answer_is, context="context" * (file[0] == "c"))
    (row,) = questions.to_dict("records")
    assert (row["options"][row["answer"]], row["options"]) == expected
    assert rejected.empty
    assert row["context"] == ("One. Two." if file == "contextlist" else "")


@pytest.mark.parametrize(
    ("file", "answer_is", "sentence"),
    [
        ("offbyone", "index0", "of 4 answers 0 are 0 and 1 are the number of options; write index1"),
        ("strdigit", "letter", "all answers are numbers; write index0 or index1"),
        ("conflict", "index0", "no answer is a number, as 'A'; write letter or text"),
        ("conflict", "text", "no usable question.*'answer is none of the options': 2"),
    ],
)
@pytest.mark.filterwarnings("ignore:own. 2 of 2 rows are rejected")
def test_what_is_not_is_refused_with_evidence_and_cure(file, answer_is, sentence):
    with pytest.raises(DataError, match=sentence):
        load_own(CASES / f"{file}.jsonl", answer_is=answer_is)


def test_answers_from_one_are_read_as_such_and_from_zero_are_refused(tmp_path):
    questions, _ = load_own(CASES / "offbyone.jsonl", answer_is="index1")
    assert [row.options[row.answer][0] for row in questions.itertuples()] == list("abcd")
    rows = [{"question": f"q{n}?", "options": ["a", "b", "c"], "answer": 1 + n % 2} for n in range(30)]
    with pytest.warns(UserWarning, match="none of 30 answers is 0"):
        load_own(write_jsonl(tmp_path / "m.jsonl", rows), answer_is="index0")
    with pytest.raises(DataError, match="write index0"):
        load_own(write_jsonl(tmp_path / "m.jsonl", [row | {"answer": 0} for row in rows]), answer_is="index1")


def test_a_row_that_is_refused_is_counted_with_its_number_and_reason(tmp_path):
    questions, rejected = load_own(CASES / "huge_int.jsonl")
    assert list(questions.options) == [["metformin", "aspirin"]]
    assert rejected[["reason", "rows"]].values.tolist() == [["answer is none of the options", "1"]]
    with pytest.warns(UserWarning, match="2 of 3 rows are rejected"):
        questions, rejected = load_own(CASES / "zero_width.jsonl")
    assert (list(questions.question), list(questions.answer)) == (["What is it?"], [0])
    assert rejected[["reason", "rows"]].values.tolist() == [["empty question", "1"], ["two options alike", "2"]]
    good = {"question": "good?", "options": ["a", "b"], "answer": "A", "subject": float("nan")}
    rows = [*(json.loads(line) for line in (CASES / "conflict.jsonl").open()), good]
    rows += [{**good, "question": "twice?", "options": ["b", "a"]}, {**good, "question": "twice?"}]
    path = write_jsonl(tmp_path / "m.jsonl", [json.dumps(row) for row in [*rows, {**good, "question": "\ud800?"}]])
    questions, rejected = load_own(path, subject="subject")
    assert list(questions.question) == ["good?"]
    assert rejected[["reason", "count", "rows"]].values.tolist() == [
        ["broken characters (lone surrogates, or bytes that are not UTF-8)", 1, "6"],
        ["one question with two answers", 4, "1, 2, 4, 5"],
    ]


def test_a_tables_own_groups_and_splits_are_kept(tmp_path):
    good = {"options": ["a", "b"], "answer": "A"}
    drugs, places = ["x", "x", "y", 7, None], ["Train", "test", "dev", "held out", None]
    rows = [
        {**good, "question": f"{n}?", "drug": d, "split": s} for n, (d, s) in enumerate(zip(drugs, places, strict=True))
    ]
    questions, rejected = load_own(write_jsonl(tmp_path / "m.jsonl", rows), group="drug", split="split")
    assert questions[["group", "pool"]].fillna("").values.tolist() == [
        ["table:x", "train"], ["table:x", "test"], ["table:y", "valid"], ["", "test"]
    ]  # fmt: skip
    assert rejected[["reason", "rows"]].values.tolist() == [["split is none of train, valid, test and transfer", "4"]]
    broken = [json.dumps(row | {"drug": "\ud800"}) for row in rows[:1]] + [json.dumps(row) for row in rows[1:3]]
    _, rejected = load_own(write_jsonl(tmp_path / "n.jsonl", broken), group="drug", split="split")
    assert rejected.reason[0].startswith("broken characters")
    pools = data.assign_pools(questions, seed=0)
    assert list(pools[pools.group == "table:x"].pool) == ["test"]  # a group of test questions teaches nobody


def test_letters_are_labels_if_a_row_shows_it_beyond_doubt(tmp_path):
    rows = [["A. aspirin", "B. zinc"], ["A. fumigatus", "B. fragilis"]]
    written = [{"question": f"{options}?", "options": options, "answer": "A"} for options in rows]
    questions, _ = load_own(write_jsonl(tmp_path / "m.jsonl", written))
    assert list(questions.options) == [["aspirin", "zinc"], ["fumigatus", "fragilis"]]
    questions, _ = load_own(write_jsonl(tmp_path / "m.jsonl", [written[1], {**written[0], "options": ["a", "b"]}]))
    assert list(questions.options) == [["A. fumigatus", "B. fragilis"], ["a", "b"]]


def test_a_missing_file_is_named(tmp_path):
    for read in (readers.READERS["mmlu"], readers.read_open_questions):
        with pytest.raises(DataError, match="no such file"):
            list(read(tmp_path))


# --- the hub's layout ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    import datasets

    monkeypatch.setenv("MEDKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "elsewhere")
    datasets.disable_progress_bars()
    yield tmp_path / "snapshot"
    assert not (tmp_path / "elsewhere").exists()  # all that is made is made in our own cache


def from_hub(name: str, folder: Path, subset: str = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    origin = Hub(kind="hub", repo="owner/set", revision="abc", type="dataset", subset=subset)
    return data.load_questions({name: wanted(origin)}, {name: folder}, seed=0)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_medmcqa_of_the_hub_keeps_its_official_splits(hub, ending):
    answer = {"opa": " w", "opb": "x\n", "opc": "y", "opd": "z", "cop": 2}
    record = {"id": "x", **answer, "choice_type": "single", "exp": None, "subject_name": "Anatomy"}
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


def test_an_unknown_split_is_named_not_lost(hub):
    row = {"question": "q?", "options": {"A": "a", "B": "b"}, "answer_idx": "A"}
    (hub / "data").mkdir(parents=True)
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: data/a.jsonl\n  - split: extra\n    path: data/b.jsonl\n---\n"
    )
    for name in "ab":
        write_jsonl(hub / "data" / f"{name}.jsonl", [{**row, "question": name}])
    with pytest.raises(DataError, match=r"medqa: unknown split 'extra'.*HUB_POOLS"):
        from_hub("medqa", hub)


def test_files_that_cannot_be_loaded_are_named(hub):
    write_jsonl(hub / "test.jsonl", [{"question": "q?", "options": {"A": "a", "B": "b"}, "answer_idx": "A"}])
    with pytest.raises(DataError, match=r"medqa: cannot load .*subset"):
        from_hub("medqa", hub, "no_such_subset")


# --- questions without options -------------------------------------------------------------------------------------


def test_open_questions_are_cleaned_named_and_kept_once(tmp_path):
    write_jsonl(tmp_path / "healthsearchqa" / "test.jsonl", [{"question": q} for q in ("Is  it\u00a0bad?", "Why?", "")])
    write_jsonl(tmp_path / "LiveQA" / "test.jsonl", [{"question": "WHY?"}, {"question": "How?"}, {"other": "?"}])
    write_jsonl(tmp_path / "MedicationQA" / "test.jsonl", [{"Question": "how?"}, {"Question": "what is xanax "}])
    asked, refused = readers.read_open_questions(tmp_path)
    assert list(asked[["source", "question"]].itertuples(index=False, name=None)) == [
        ("healthsearchqa", "Is it bad?"),
        ("healthsearchqa", "Why?"),
        ("liveqa", "How?"),
        ("medicationqa", "what is xanax"),
    ]
    assert asked.id.is_unique
    assert (asked.id.str.rsplit("-", n=1).str[0] == asked.source).all()
    assert list(refused.itertuples(index=False, name=None)) == [
        ("healthsearchqa", "empty question", 1, "3", ""),
        ("liveqa", "the same question again", 1, "1", "WHY?"),
        ("liveqa", "empty question", 1, "3", ""),
        ("medicationqa", "the same question again", 1, "1", "how?"),
    ]


def test_no_folder_gives_empty_tables_with_their_columns():
    table, rejected = readers.read_open_questions(None)
    assert table.empty and list(table.columns) == readers.OPEN_COLUMNS
    assert rejected.empty and list(rejected.columns) == ["source", "reason", "count", "rows", "example"]


# --- dialogues -----------------------------------------------------------------------------------------------------


def test_a_turn_of_a_real_dialogue_is_a_line(tmp_path):
    (tmp_path / "MTSDialog").mkdir()
    (tmp_path / "ACIBench").mkdir()
    said = "Doctor: Any pain? \n Patient: No. Doctor: Any\nfever?\nGuest_family: A little, he told me: 38."
    rows = pd.DataFrame([{"ID": "0", "section_header": "CC", "section_text": "None", "dialogue": said}])
    rows.to_csv(tmp_path / "MTSDialog" / "validation.csv", index=False)
    visit = {"src": "[doctor] hi , andrew\n[patient] hey .", "tgt": "CHIEF COMPLAINT\n\nCough.", "file": "D2N088"}
    (tmp_path / "ACIBench" / "aci_bench_test_1.json").write_text(json.dumps([visit]))
    table = readers.read_dialogues(tmp_path)
    assert list(table.columns) == readers.DIALOGUE_COLUMNS
    assert list(table.id) == ["mts_dialog-0", "aci_bench-D2N088"]
    assert table.dialogue[0] == "D: Any pain?\nP: No.\nD: Any fever?\nG: A little, he told me: 38."
    assert table.dialogue[1] == "D: hi , andrew\nP: hey ."
    assert list(table.section_header) == ["CC", "whole note"]
    assert table.section_text[0] == "None"
    assert readers.read_dialogues(None).empty
    with pytest.raises(DataError, match="laid out like the data wheel"):
        readers.read_dialogues(tmp_path / "MTSDialog")
