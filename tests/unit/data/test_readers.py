"""Every file in one schema: the wheels', the hub's with its official splits, a user's own, and without options."""

import itertools
import json
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


def test_every_file_of_the_wheel_is_read_into_one_schema(tmp_path):
    exam = [lettered("Which  drug?\n", "a", "b", "c", "d", "e", answer="E"), ""]
    write_jsonl(tmp_path / "MedQA" / "test.jsonl", exam)
    bones = lettered("Which bone?", "ulna", "radius", "tibia", "femur", answer="B")
    write_jsonl(tmp_path / "MMLU" / "clinical.jsonl", [bones])
    for folder, answer in (("MedMCQA-Validation", "C"), ("MedMCQA-Test", None)):
        record = lettered(f"{folder}?", "w", "x", "y", "z", answer=answer)
        write_jsonl(tmp_path / "MedMCQA" / folder / "Social_Preventive_Medicine.jsonl", [record])
    passage = "Context (1): First part.\nContext (12): Second part (n = 3)."
    for name, answer in (("pqal", "maybe"), ("pqaa", "no")):
        record = {"question": f"does {name} work?", "passage": passage, "answer": answer}
        write_jsonl(tmp_path / "PubMedQA" / name / "test.jsonl", [record])
    assert set(readers.READERS) == set(readers.HUB_COLUMNS) == set(readers.HUB_POOLS)
    datasets = {name: wanted() for name in readers.READERS}
    table, rejected = data.load_questions(datasets, dict.fromkeys(datasets, tmp_path), seed=0)
    assert set(data.COLUMNS) - {"split"} <= set(table.columns) and table.id.is_unique and rejected.empty
    right = [row.options[row.answer] if row.answer >= 0 else None for row in table.itertuples()]
    rows = table.assign(right=right)[["source", "question", "right", "pool", "kind", "context", "subject"]]
    rows = rows.astype(object).where(rows.notna(), None)
    abstract, topic = "First part. Second part (n = 3).", "Social Preventive Medicine"
    assert set(rows.itertuples(index=False, name=None)) == {
        ("medqa", "Which drug?", "e", "test", "choice", "", ""),
        ("mmlu", "Which bone?", "radius", "test", "choice", "", ""),
        ("medmcqa", "MedMCQA-Validation?", "y", None, "choice", "", topic),  # is split here
        ("medmcqa", "MedMCQA-Test?", None, "transfer", "choice", "", topic),  # its answers are not published
        ("pubmedqa", "does pqal work?", "maybe", "test", "abstract", abstract, "biomedical research"),
        ("pubmedqa_a", "does pqaa work?", "no", "train", "abstract", abstract, "biomedical research"),
    }


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


EVERY_FORM = [
    ({"answer_is": "index0"}, {"options": ["one", " two\n", "three"], "answer": 1}),
    ({"answer_is": "index1"}, {"options": ["one", "two", "three"], "answer": 2}),
    ({"answer_is": "letter"}, {"options": ["A. one", "B. two", "C. three"], "answer": "B"}),
    ({"answer_is": "letter"}, {"options": {"C": "three", "B": "two", "A": "one"}, "answer": "b"}),
    ({"answer_is": "text"}, {"options": {"a": "one", "b": "two", "c": "three"}, "answer": " two "}),
    ({"answer_is": "letter", "answer": "gold"}, {"options": ["one", "two", "three"], "gold": "(B)"}),
    ({"answer_is": "text", "options": [*"wxyz"]}, {"x": "two", "w": "one", "y": "three", "z": None, "answer": "two"}),
]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_one_question_in_every_form(tmp_path, ending):
    texts = {"question": "Which?", "context": "", "subject": ""}
    whole = {**texts, "options": ["one", "two", "three"], "answer": 1, "kind": "choice", "pool": "test"}
    for columns, row in EVERY_FORM:
        path = write_as(ending, tmp_path, [{"q": "Which?", "note": "not asked for", **row}])
        assert list(readers.read_table(path, table(**columns))) == [whole], row
    assert rejection_reason(whole) is None
    path = write_as(ending, tmp_path, [{"q": "Which?", "options": ["a", "b"]}])  # for transfer: without an answer
    (record,) = readers.read_table(path, table(answer="", pool="transfer"))
    assert record["answer"] == -1 and rejection_reason(record) is None


def test_a_csv_file_is_read_as_spreadsheets_write_it(tmp_path):
    """Texts with separators, quotes and line breaks, the text "NA", and an empty last option."""
    rows = pd.DataFrame([{"q": 'What is "pH",\n; or\tµ?', "a": "None", "b": "NA", "c": "", "answer": "B"}])
    for encoding, separator in itertools.product(["utf-8", "utf-8-sig", "utf-16"], ",;\t"):
        rows.to_csv(tmp_path / "m.csv", index=False, sep=separator, encoding=encoding)
        (record,) = readers.read_table(tmp_path / "m.csv", table(options=["a", "b", "c"]))
        assert (record["question"], record["options"], record["answer"]) == ('What is "pH", ; or μ?', ["None", "NA"], 1)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("m.csv", "q,a,b,answer\nWhich, if any?,x,y,A\n", r"m\.csv:2: not a csv line \(5 cells under 4 names\)"),
        ("m.csv", 'q,a,b,answer\n"cut of', r"m\.csv:2: not a csv line"),
        ("m.csv", "q,a,a,answer\n", "a name stands twice"), ("m.csv", "q,a,answer\nx,y,A\n", r"no column \['b'\]"),
        ("m.jsonl", '{"q": "?", "c": [], "a": "A"}', r"no column \['answer', 'b'\].*'a', 'c', 'q'"),
        ("m.xlsx", "x", r"m\.xlsx.*parquet"), ("m.parquet", '{"q": "Which?"}', r"m\.parquet"),
        *(("m.jsonl", f'{{"q": "Which?"}}\n\n{line}', r"m\.jsonl:3: (not a json object|this is a )")
          for line in ('{"question": "cut of', "[1, 2]", '"text"', "null", "\udcff\udcfe")),
    ],
)  # fmt: skip
def test_a_file_that_is_not_whole_or_lacks_a_column_is_named(tmp_path, name, text, sentence):
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=sentence):
        list(readers.read_table(tmp_path / name, table(options=["a", "b"])))
    for read in (readers.READERS["mmlu"], readers.read_open_questions):
        with pytest.raises(DataError, match="no such file"):
            list(read(tmp_path))


def test_options_are_read_wherever_their_meaning_is_plain_and_nowhere_else(tmp_path):
    for options in (
        [{"key": "A", "value": "one"}, {"key": "B", "value": "two"}],
        [{"text": "one", "label": "A"}, {"text": "two", "label": "B"}],
        {"text": ["one", "two"], "label": ["A", "B"]}, {"text": ["two", "one"], "label": ["B", "A"]},
        [{"aid": 1, "atext": "one"}, {"aid": 2, "atext": "two"}], {"1": "one", "2": "two"}, {"0": "one", "1": "two"},
        '["one", "two"]', "{'B': 'two', 'A': 'one'}", "A. one\nB. two", ["A) one", "B) two"],
        ["one\u200b", "\x00two", None],
    ):  # fmt: skip
        path = write_jsonl(tmp_path / "m.jsonl", [{"q": "Which?", "options": options, "answer": "two"}])
        (record,) = readers.read_table(path, table(answer_is="text"))
        assert (record["options"], record["answer"]) == (["one", "two"], 1), options
    unclear = {"options are not a list": {"A": "one", "C": "two"}, "an option is not text": ["one", None, "two"]}
    for reason, options in unclear.items():
        path = write_jsonl(tmp_path / "m.jsonl", [{"q": "Which?", "options": options, "answer": "two"}])
        (record,) = readers.read_table(path, table(answer_is="text"))
        assert rejection_reason(record).startswith(reason)


def test_json_is_read_however_it_is_laid_out(tmp_path):
    rows = [{"q": f"{n}?", "options": ["a", "b"], "answer": n} for n in (0, 1)]
    layouts = [("m.jsonl", json.dumps(rows, indent=2)), ("m.jsonl", json.dumps(rows)), ("m.json", json.dumps(rows))]
    layouts += [("m.jsonl", "\n".join(json.dumps(row, indent=1) for row in rows))]  # one object over many lines
    for name, text in layouts:
        (tmp_path / name).write_text(text)
        assert [row["answer"] for row in readers.read_table(tmp_path / name, table(answer_is="index0"))] == [0, 1]


# --- what users' files bring: small files in cases/ ----------------------------------------------------------------

CASES = Path(__file__).parent / "cases"


def load_own(path: Path, **columns) -> tuple[pd.DataFrame, pd.DataFrame]:
    return data.load_questions({"own": wanted(table(question="question", **columns))}, {"own": path}, seed=0)


PLAIN = [
    ("genus", "text", "A. fumigatus", ["A. fumigatus", "B. dermatitidis", "C. immitis"]),
    ("numopt", "letter", "10", ["5", "10", "15"]), ("strdigit", "index0", "b", ["a", "b"]),
    ("strdigit", "index1", "a", ["a", "b"]), ("contextlist", "text", "yes", ["yes", "no", "maybe"]),
]  # fmt: skip
REFUSED = [
    ("offbyone", "index0", "of 4 answers 0 are 0 and 1 are the number of options; write index1"),
    ("strdigit", "letter", "all answers are numbers; write index0 or index1"),
    ("conflict", "index0", "no answer is a number, as 'A'; write letter or text"),
    ("conflict", "text", "no usable question.*'answer is none of the options': 2"),
]


@pytest.mark.filterwarnings("ignore:own. 2 of 2 rows are rejected")
def test_what_is_plain_is_read_and_what_is_not_is_refused_with_evidence_and_cure():
    for file, answer_is, right, options in PLAIN:
        context = "context" * (file == "contextlist")
        questions, rejected = load_own(CASES / f"{file}.jsonl", answer_is=answer_is, context=context)
        (row,) = questions.to_dict("records")
        assert (row["options"][row["answer"]], row["options"]) == (right, options), file
        assert rejected.empty and row["context"] == ("One. Two." if context else "")
    for file, answer_is, sentence in REFUSED:
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
    assert rejected[["reason", "rows"]].values.tolist() == [["empty question", "1"], ["two equal options", "2"]]
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
    good, places = {"options": ["a", "b"], "answer": "A"}, ["Train", "test", "dev", "held out", None]
    of_drugs = enumerate(zip(["x", " X ", "y", 7, " "], places, strict=True))
    rows = [{**good, "question": f"{n}?", "drug": drug, "split": split} for n, (drug, split) in of_drugs]
    questions, rejected = load_own(write_jsonl(tmp_path / "m.jsonl", rows), group="drug", split="split")
    assert questions[["group", "pool"]].fillna("").values.tolist() == [
        ["table:x", "train"], ["table:x", "test"], ["table:y", "valid"], ["", "test"]
    ]  # fmt: skip
    assert rejected[["reason", "rows"]].values.tolist() == [["split is none of train, valid, test and transfer", "4"]]
    path = write_jsonl(tmp_path / "n.jsonl", [json.dumps(rows[0] | {"drug": "\ud800"}), *rows[1:3]])
    _, rejected = load_own(path, group="drug")
    assert rejected.reason[0].startswith("broken characters")


def test_a_folder_of_files_loses_no_row(tmp_path):
    """Names that a library would take for splits, two formats, an option that reads "None", hidden copies."""
    for name in ("more", ".copies", "empty", "valid", "a.csv"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "valid" / "0000.jsonl", [{"q": "! ", "a": "x", "b": "y", "answer": "A"}])
    write_jsonl(tmp_path / "a.csv" / "part.jsonl", [{"q": "in a folder", "a": "x", "b": "y", "answer": "A"}])
    text = "q,a,b,answer\n{0} one?,None,NA,A\n{0} two?,x,y,B\n"
    for name in ("cardiology_test.csv", "drugs.CSV", "test.csv", ".copies/drugs.csv"):
        (tmp_path / name).write_text(text.format(name))
    (tmp_path / "drugs.CSV").write_text("sep=;\r\n" + text.format("drugs.CSV").replace(",", ";"))  # as Excel does
    write_jsonl(tmp_path / "more" / "train-00000-of-00001.jsonl", [{"q": "?", "a": "x", "b": "y", "answer": "A"}])
    rows = list(readers.read_table(tmp_path, table(options=["a", "b"], pool=None, split="split")))
    assert [(row["question"], row["pool"]) for row in rows if "one?" not in row["question"]] == [
        ("in a folder", None), ("cardiology_test.csv two?", None), ("drugs.CSV two?", None), ("?", "train"),
        ("test.csv two?", "test"), ("!", "valid"),
    ]  # fmt: skip
    assert {tuple(row["options"]) for row in rows if "one?" in row["question"]} == {("None", "NA")}
    with pytest.raises(DataError, match=r"empty: no \.jsonl.* in this folder"):
        list(readers.read_table(tmp_path / "empty", table()))


def test_letters_are_labels_if_a_row_shows_it_beyond_doubt(tmp_path):
    rows = [["A. aspirin", "B. zinc"], ["A. fumigatus", "B. fragilis"]]
    written = [{"question": f"{options}?", "options": options, "answer": "A"} for options in rows]
    questions, _ = load_own(write_jsonl(tmp_path / "m.jsonl", written))
    assert list(questions.options) == [["aspirin", "zinc"], ["fumigatus", "fragilis"]]
    questions, _ = load_own(write_jsonl(tmp_path / "m.jsonl", [written[1], {**written[0], "options": ["a", "b"]}]))
    assert list(questions.options) == [["A. fumigatus", "B. fragilis"], ["a", "b"]]


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


def test_medmcqa_of_the_hub_keeps_its_official_splits(hub):
    record = {"opa": " w", "opb": "x\n", "opc": "y", "opd": "z", "exp": None, "subject_name": "Anatomy"}
    (hub / "data").mkdir(parents=True)
    for split, answers in (("train", [2, 0]), ("validation", [3]), ("test", [-1])):
        rows = pd.DataFrame([{**record, "question": f"{split} {i}?", "cop": cop} for i, cop in enumerate(answers)])
        rows.to_parquet(hub / "data" / f"{split}-00000-of-00001.parquet")
    table, rejected = from_hub("medmcqa", hub)
    right = [row.options[row.answer] if row.answer >= 0 else None for row in table.itertuples()]
    assert set(zip(table.question, table.pool, right, strict=True)) == {  # `cop` counts from zero
        ("train 0?", "train", "y"), ("train 1?", "train", "w"), ("validation 0?", "test", "z"),
        ("test 0?", "transfer", None),
    }  # fmt: skip
    assert set(table.subject) == {"Anatomy"} and set(table.source) == {"medmcqa"} and rejected.empty


def test_pubmedqa_of_the_hub_has_abstracts_and_its_artificial_answers_teach(hub):
    context = {"contexts": ["First  part.", "Second."], "labels": ["A", "B"], "meshes": []}
    rows = [{"question": f"{a}?", "final_decision": a, "context": context} for a in ("yes", "no", "maybe")]
    for name, pool in (("pubmedqa", "test"), ("pubmedqa_a", "train")):
        write_jsonl(hub / name / "train.jsonl", rows)
        table, _ = from_hub(name, hub / name)
        assert [f"{row.options[row.answer]}?" for row in table.itertuples()] == list(table.question)
        assert {*table.pool, *table.context, *table.kind} == {pool, "First part. Second.", "abstract"}


def test_medqa_and_mmlu_of_the_hub_are_cleaned_like_every_other_text(hub):
    options = {"A": " one", "B": "two  words", "C": "three\n", "D": "four"}
    exam = {"question": "q?", "options": options, "answer_idx": "C", "answer": "three"}
    write_jsonl(hub / "medqa" / "test.jsonl", [exam])
    record = {"question": "q?", "subject": "anatomy", "choices": list(options.values()), "answer": 1}
    write_jsonl(hub / "mmlu" / "test.jsonl", [record, {**record, "question": "law?", "subject": "jurisprudence"}])
    for name, right in (("medqa", "three"), ("mmlu", "two words")):
        table, _ = from_hub(name, hub / name)
        assert list(table.options.map(list)) == [["one", "two words", "three", "four"]]
        assert table.options[0][table.answer[0]] == right
        assert list(table.pool) == ["test"]


def test_what_cannot_be_loaded_is_named_not_lost(hub):
    row = {"question": "q?", "options": {"A": "a", "B": "b"}, "answer_idx": "A"}
    for name in "ab":
        write_jsonl(hub / "data" / f"{name}.jsonl", [{**row, "question": name}])
    files = "".join(f"  - split: {split}\n    path: data/{n}.jsonl\n" for split, n in (("train", "a"), ("extra", "b")))
    (hub / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    with pytest.raises(DataError, match=r"medqa: unknown split 'extra'.*HUB_POOLS"):
        from_hub("medqa", hub)
    with pytest.raises(DataError, match=r"medqa: cannot load .*subset"):
        from_hub("medqa", hub, "no_such_subset")


# --- questions without options -------------------------------------------------------------------------------------


def test_open_questions_are_cleaned_named_and_kept_once(tmp_path):
    write_jsonl(tmp_path / "healthsearchqa" / "test.jsonl", [{"question": q} for q in ("Is  it\u00a0bad?", "Why?", "")])
    write_jsonl(tmp_path / "LiveQA" / "test.jsonl", [{"question": "WHY?"}, {"question": "How?"}, {"other": "?"}])
    write_jsonl(tmp_path / "MedicationQA" / "test.jsonl", [{"Question": "how?"}, {"Question": "what is xanax "}])
    asked, refused = readers.read_open_questions(tmp_path)
    assert list(asked[["source", "question"]].itertuples(index=False, name=None)) == [
        ("healthsearchqa", "Is it bad?"), ("healthsearchqa", "Why?"), ("liveqa", "How?"),
        ("medicationqa", "what is xanax"),
    ]  # fmt: skip
    assert asked.id.is_unique and (asked.id.str.rsplit("-", n=1).str[0] == asked.source).all()
    assert list(refused.itertuples(index=False, name=None)) == [
        ("healthsearchqa", "empty question", 1, "3", ""),
        ("liveqa", "the same question again", 1, "1", "WHY?"),
        ("liveqa", "empty question", 1, "3", ""),
        ("medicationqa", "the same question again", 1, "1", "how?"),
    ]
    table, rejected = readers.read_open_questions(None)
    assert table.empty and list(table.columns) == readers.OPEN_COLUMNS
    assert rejected.empty and list(rejected.columns) == list(refused.columns)


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
