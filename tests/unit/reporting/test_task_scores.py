"""What travels with an edge file is what `results.json` says of it."""

import json

import pandas as pd
import pytest

from medkit.inference.tasks import read_tasks
from medkit.quantization import gguf_export
from medkit.reporting import load_results, write_tasks
from medkit.variants import TASKS, VARIANTS


def test_tasks_are_those_that_the_student_learned_with_their_scores(make_run, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path))
    results, facts = load_results(make_run(tmp_path / "toy") / "results.json")
    file = tmp_path / "toy" / VARIANTS["edge"].folder
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    file.with_suffix(gguf_export.MANIFEST).write_text(json.dumps({"bytes": 1, "sha256": gguf_export.sha256_of(file)}))
    kinds = {"icd_chapter": "icd_chapter", "records": "record", "records_b": "record_b", "medqa": "choice"}
    rows = [(source, kind, split, ["Injury", "Neoplasms"]) for source, kind in kinds.items()
            for split in ("labelled", "test") if (split, source) != ("labelled", "medqa")]  # fmt: skip
    questions = pd.DataFrame(rows, columns=["source", "kind", "split", "options"])
    least = pd.Series({("edge", "icd_chapter", "option_text"): 0.4, ("nf4", "icd_chapter", "option_text"): 0.9})
    written = write_tasks("toy", "edge", questions, results, facts, least)
    assert written == file.with_suffix(TASKS)
    chapter, record = read_tasks(file)  # no variant with an adapter answered in the second form
    rows = results[results.variant == "edge"].set_index(["result", "metric"])
    assert (chapter.kind, chapter.options, chapter.least_confidence) == ("icd_chapter", ["Injury", "Neoplasms"], 0.4)
    assert chapter.value == rows.value["accuracy/icd_chapter", "option_text"] and chapter.n == 240
    assert (record.kind, record.metric, record.options, record.least_confidence) == ("record", "field_f1", [], None)
    assert record.value == pytest.approx(rows.value["field_f1/records", "generated"])
    tuned = results[results.variant == "edge"].replace({"edge": "edge_lora", "field_f1/records": "field_f1/records_b"})
    write_tasks("toy", "edge", questions, pd.concat([results, tuned]), facts, least)
    assert [task.kind for task in read_tasks(file)] == ["icd_chapter", "record", "record_b"]
