"""`student.tasks.json` beside an edge file: what it was taught and how it did in the test. `medkit serve` reads it."""

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from medkit.data.splits import SECOND_FORM
from medkit.prompts.templates import FORMS
from medkit.quantization.gguf_export import check_manifest
from medkit.stage import DISCLAIMER, run_dir, write_text
from medkit.variants import TASKS, VARIANTS

FEW = 30  # options: so many are asked one by one where a question lists none


def write_tasks(
    run: str, variant: str, questions: pd.DataFrame, results: pd.DataFrame, facts: Mapping, least_confidence: pd.Series
) -> Path:
    """Write the tasks of an edge file, from `results.json` (`load_results`) and `evaluation.least_confidence`.

    A task is a source with rows that the student learned from and that the file answered in the test; the second form
    is one where the adapter stands beside the file.
    """
    path = run_dir(run) / VARIANTS[variant].folder
    learned = questions[questions.split.isin(["labelled", "transfer"])]
    tasks = []
    for source, kind in learned[["source", "kind"]].drop_duplicates().itertuples(index=False):
        answered_by = f"{variant}_lora" if kind == SECOND_FORM else variant
        metric, scoring = ("field_f1", "generated") if kind in FORMS else ("accuracy", facts["headline_scoring"])
        rows = results[(results.variant == answered_by) & (results.result == f"{metric}/{source}")]
        options = [] if kind in FORMS else sorted(set(questions.options[questions.source == source].explode().dropna()))
        for row in rows[rows.metric == scoring].itertuples():
            task = {"source": source, "kind": kind, "scoring": scoring, "metric": metric, "value": row.value}
            task |= {"ci_low": row.ci_low, "ci_high": row.ci_high, "n": int(row.n)}
            task |= {"options": options if len(options) <= FEW else []}
            tasks.append(task | {"least_confidence": least_confidence.get((variant, source, scoring))})
    content = {"file": path.name, "sha256": check_manifest(path)["sha256"], "run": run, "tasks": tasks}
    text = json.dumps({**content, "disclaimer": DISCLAIMER}, indent=1, ensure_ascii=False)
    return write_text(path.with_suffix(TASKS), text + "\n")
