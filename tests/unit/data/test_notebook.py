"""Notebook 01 with a user's own table alone, without open questions."""

import json

import matplotlib as mpl
import nbformat
import pandas as pd
import pytest

from medkit.stage import ROOT, Stage


@pytest.mark.weights
def test_runs_on_a_users_own_table_without_the_optional_files(tmp_path, monkeypatch, capsys):
    questions = [{"q": " ".join(f"w{i}x{j}" for j in range(12)), "o": ["a", "b"], "a": i % 2} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    columns = {"question": "q", "options": "o", "answer": "a", "context": "", "subject": ""}
    table = {"kind": "table", "path": str(tmp_path / "mine.jsonl"), "pool": None, "columns": columns}
    counts = {"private": 6, "labelled": 2, "transfer": 2, "valid": 1, "test": 8}
    mine = {"origin": {**table, "answer_is": "index0"}, **counts}
    texts = [" ".join(f"v{i}x{j}" for j in range(12)) for i in range(41)]
    chats = [[("user", text), ("assistant", "Yes:\n- a")] for text in [*texts[:-1], "long " * 2000]]
    rows = [{"chat": [{"role": role, "content": content} for role, content in chat]} for chat in chats]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = {"kind": "instructions", "path": str(tmp_path / "notes.jsonl"), "columns": {"messages": "chat"}}
    notes = {"origin": {**notes, "pool": "train"}, **counts, "private": "all", "test": 0}
    overrides = {
        "data.datasets": {"mine": mine, "notes": notes},
        "data.open_questions": None,
        "inference.questions": {"option_text": {"mine": 4}},
        "inference.exams": {},
        "inference.shuffle.questions": {"mine": 2},
        "evaluation.headline_source": "mine",
    }
    monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.chdir(ROOT / "notebooks")
    cells = [cell for cell in nbformat.read("01_data.ipynb", as_version=4).cells if cell.cell_type == "code"]
    assert "parameters" in cells.pop(0).metadata.tags
    names = {"params_file": "../params/smoke.yaml", "run": "mine", "overrides": overrides, "display": print}
    with mpl.rc_context():
        exec("\n".join(cell.source for cell in cells), names)  # in this process, which has imported torch already
    printed = capsys.readouterr().out
    assert "data.open_questions is null" in printed and "1 of 60 rows are longer than data.max_prompt_tokens" in printed
    stage = Stage("mine", "01_data")
    questions = pd.read_parquet(stage.dir / "questions.parquet")
    assert stage.is_whole() and questions.source.value_counts().to_dict() == {"notes": 40, "mine": 19}
    assert set(questions.options[questions.source == "notes"].str[0]) == {"Yes:\n- a"}
    empty = pd.read_parquet(stage.dir / "open_questions.parquet")
    assert empty.empty and "question" in empty
