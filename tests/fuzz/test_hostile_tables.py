"""Rows of a user's table, of a folder laid out like the data wheel's, and of the dialogues."""

import json
import warnings
from pathlib import Path

import pandas as pd
import pyarrow
import pytest
from hostile import assert_promise, changed, damaged, tries
from hypothesis import assume, given
from hypothesis import strategies as st
from pyarrow import parquet

from medkit.data import readers, splits
from medkit.params import SPLITS, DatasetParams, Instructions, Table

CASES = Path(__file__).parents[1] / "unit" / "data" / "cases"
OPTIONS = ["insulin", "A. glucagon", "cortisol 5 mg"]
ROWS = [
    {"q": "Which hormone lowers glucose?", "o": OPTIONS, "a": 0, "c": "A man of 43.", "s": "x", "g": "d1", "p": "test"},
    {"q": "Is it 37 °C?", "o": ["yes", "no"], "a": 1, "c": ["One.", "Two."], "s": None, "g": 7, "p": "dev"},
    {"q": "Which  bone?\u200b", "o": {"A": "ulna", "B": "radius"}, "a": "B", "c": "", "s": "bones", "g": None, "p": ""},
    {"q": "x", "o": [{"key": "A", "value": "a"}, {"key": "B", "value": "b"}], "a": "a", "c": "", "s": "", "g": "d1"},
]  # fmt: skip
COLUMNS = {"question": "q", "options": "o", "answer": "a", "context": "c", "subject": "s", "group": "g", "split": "p"}
TEXTS = ["\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()]
TEXTS += [path.read_bytes() for path in CASES.glob("*.jsonl")]
FORMS, POOLS = st.sampled_from(["index0", "index1", "letter", "text"]), st.sampled_from(["train", "test", None])


def assert_table(path: Path, form: str, pool: str | None, few_columns: bool) -> None:
    columns = {"question": "question", "options": "options", "answer": "answer", "context": "", "subject": ""}
    columns = columns if few_columns else COLUMNS
    table = Table(kind="table", path=str(path), pool=pool, columns=columns, answer_is=form)
    dataset = {"own": DatasetParams(origin=table, **dict.fromkeys(SPLITS, 0))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loaded = assert_promise(tuple, splits.load_questions, dataset, {"own": path}, 0)
    if loaded is not None:  # no row is lost, and the questions can be stored and read again
        questions, rejected = loaded
        rows = assert_promise(list, lambda: list(readers.read_table(path, table)))
        assert len(questions) + rejected["count"].sum() == len(rows)
        for name, stored in (("questions", questions), ("rejected", rejected)):
            stored.to_parquet(path.with_name(f"{name}.parquet"))
        again = pd.read_parquet(path.with_name("questions.parquet"))
        assert list(again.question) == list(questions.question)
        assert all(0 <= row.answer < len(row.options) for row in again.itertuples())


def as_lines(rows: list, ascii_only: bool) -> bytes:
    lines = [json.dumps(row, ensure_ascii=ascii_only, default=str) for row in rows]
    return "\n".join(lines).encode(errors="surrogatepass")


LINES = damaged(TEXTS) | st.builds(as_lines, changed([ROWS]), st.booleans())


@tries(60, 2000)
@given(text=LINES, form=FORMS, pool=POOLS, few=st.booleans())
def test_lines_of_json(tmp_path, text, form, pool, few):
    (tmp_path / "mine.jsonl").write_bytes(text)
    assert_table(tmp_path / "mine.jsonl", form, pool, few)


@tries(30, 1000)
@given(text=damaged([pd.DataFrame(ROWS).to_csv(index=False, sep=sep).encode() for sep in ",;"]), form=FORMS, pool=POOLS)
def test_lines_of_csv(tmp_path, text, form, pool):
    (tmp_path / "mine.csv").write_bytes(text)
    assert_table(tmp_path / "mine.csv", form, pool, False)


def write_parquet(path: Path, rows: list) -> None:
    """The rows as parquet, each cell of the type that its column can have."""
    columns = {name: [row.get(name) if isinstance(row, dict) else None for row in rows] for name in COLUMNS.values()}
    arrays = {}
    for name, cells in columns.items():
        try:
            arrays[name] = pyarrow.array(cells)
            parquet.write_table(pyarrow.table({name: arrays[name]}), path)  # no column of objects without any key
        except (pyarrow.ArrowException, OverflowError, ValueError, TypeError):
            arrays[name] = pyarrow.array([None if cell is None else ascii(cell) for cell in cells])
    parquet.write_table(pyarrow.table(arrays), path)


@tries(30, 750)
@given(rows=changed([ROWS, ROWS[:1] * 3, ROWS[1:2] * 2]), form=FORMS, pool=POOLS)
def test_rows_of_parquet(tmp_path, rows, form, pool):
    assume(rows)
    write_parquet(tmp_path / "mine.parquet", rows)
    assert_table(tmp_path / "mine.parquet", form, pool, False)


@pytest.fixture(scope="module")
def parquet_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("parquet") / "mine.parquet"
    write_parquet(path, ROWS[:1] * 3)
    return path.read_bytes()


@tries(30, 1000)
@given(data=st.data(), form=FORMS)
def test_a_parquet_file(tmp_path, parquet_bytes, data, form):
    (tmp_path / "mine.parquet").write_bytes(data.draw(damaged([parquet_bytes])))
    assert_table(tmp_path / "mine.parquet", form, "test", False)


CHAT = [{"role": role, "content": f"{role}\n\tsays"} for role in ("system", "user", "assistant", "user", "assistant")]


@tries(30, 1000)
@given(rows=changed([[{"chat": CHAT}, {"chat": CHAT[1:3]}, {"chat": json.dumps(CHAT[1:])}]]), pool=POOLS)
def test_chats(tmp_path, rows, pool):
    path = tmp_path / "chats.jsonl"
    text = "\n".join(json.dumps(row, ensure_ascii=False, default=str) for row in rows)
    path.write_bytes(text.encode(errors="surrogatepass"))
    origin = Instructions(kind="instructions", path=str(path), pool=pool, columns={"messages": "chat"})
    dataset = {"own": DatasetParams(origin=origin, **dict.fromkeys(SPLITS, 0))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loaded = assert_promise(tuple, splits.load_questions, dataset, {"own": path}, 0)
    for name, table in zip(("questions", "rejected"), loaded or (), strict=False):
        table.to_parquet(tmp_path / f"{name}.parquet")


# --- a folder laid out like the data wheel's -------------------------------------------------------------------------

CSV = b'ID,section_header,section_text,dialogue\n0,ALLERGY,"None, known.","Doctor: Hello.\nPatient: Hi."\n'
VISITS = [{"file": "a", "src": "[doctor] hello [patient] hi", "tgt": "note"}]


@tries(20, 500)
@given(
    csv=damaged([CSV]) | st.just(CSV),
    visits=changed([VISITS]).map(lambda tree: json.dumps(tree, default=str).encode())
    | damaged([json.dumps(VISITS).encode()]),
)
def test_dialogues(tmp_path, csv, visits):
    for name, content in (("MTSDialog/validation.csv", csv), ("ACIBench/aci_bench_test_1.json", visits)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    table = assert_promise(pd.DataFrame, readers.read_dialogues, tmp_path)
    if table is not None:
        table.to_parquet(tmp_path / "stored.parquet")
