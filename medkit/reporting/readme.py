"""What README, docs/ and the notebooks show of a run: rows of results, minutes, the figure of tasks over megabytes.

`python -m medkit.reporting.readme outputs/tiny/results.json` takes them from a run; `make readme` calls it.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from medkit.params import load_params
from medkit.reporting import story
from medkit.reporting.forecast import DEVICE, add_up, forecast
from medkit.reporting.results import load_results
from medkit.stage import ROOT, STAGES, atomic_path, write_text
from medkit.variants import FINAL

RESULTS = ROOT / "docs" / "results" / "tiny.json"
FIGURE = ROOT / "docs" / "figures" / "accuracy.png"
FACTS = ("run", "headline_source", "headline_scoring", "chance", "date", "git_commit", "commits", "device", "dtype",
         "versions", "seen")  # fmt: skip
ANY_SCORING = ["memory_bytes", "memory_ratio", "latency_ratio", "ttft_s", "latency_s_per_token", "shuffle_consistency",
               "energy_wh_per_correct_answer", "cost_per_correct_answer", "field_f1", "exact", "invented",
               "missing", "left_empty", "dialogues", "field_delta", "certificate", "gap_closed", "kl_nats",
               "top1_changed", "duration_s"]  # fmt: skip
FINDINGS = ("student_ce", FINAL, "edge")
LONG_S = 60  # the text before a cell that took longer says so
TIME, TOOK = r"(?<=\| \*\*Time\*\* \| )[^;|]*(?=;| \|)", r"\n\n\*The code below took [^\n]*\*$"
DROPPED_COLUMNS = ["stage", "file", "p_value", "p_equivalence", "chosen", "bins", "accuracy", "accuracy_baseline"]


def select_results(results: pd.DataFrame, facts: dict) -> dict:
    """The rows and facts that README and docs/ read, as the content of a smaller results file."""
    source, family = facts["headline_source"], results.result.str.split("/").str[0]
    scored = results.metric == facts["headline_scoring"]
    of_source = [f"{name}/{source}" for name in ("accuracy_delta", "ece", "brier", "aurc", "accuracy_at_80")]
    selected = family.isin(ANY_SCORING) | (family == "safe_share") & (results.metric == "option_text_norm")
    selected |= scored & ((family == "accuracy") | results.result.isin(of_source))
    table = results[selected].drop(columns=DROPPED_COLUMNS, errors="ignore")
    rows = [{k: v for k, v in row.items() if not pd.isna(v)} for row in table.to_dict("records")]
    return {key: facts[key] for key in FACTS if key in facts} | {"results": rows}


def findings() -> str:
    """README's findings, one markdown item each, computed from the committed results.

    Then the size of the student, how long the run took, without notebook 06, and what the profiles that were not run
    take on their device, by `forecast`.
    """
    results, facts = load_results(RESULTS)
    without_notes = {**facts, "seen": {}}  # they stand beside the tables of docs/results.md
    items = "\n".join(f"- {sentence}" for sentence in story.tell_story(results, without_notes, FINDINGS))
    sizes, seconds = story.megabytes(results), results[results.result.str.startswith("duration_s/")].value.sum()
    size = f"The student has {sizes[FINAL] / sizes['teacher']:.0%} of the teacher's weights."
    took = f"Notebooks 1 to 5 of this run took {seconds / 60:.0f} minutes on {facts['device']}."
    hours = {name: add_up(forecast(load_params(ROOT / "params" / f"{name}.yaml"))).hours for name in ("gpu", "paper")}
    listed = ", ".join(f"{count:.0f} for `{name}`" for name, count in hours.items())
    return f"{items}\n\n{size} {took} Estimated {DEVICE['name']} hours: {listed}."


def cell_times(folder: Path) -> Iterator[dict]:
    """Rows `cell_s/<stage>/<cell>`: seconds of the long cells of executed notebooks, by papermill's clock.

    Of a run that was killed and went on, they are those of the last attempt; `duration_s` counts what was read back.
    """
    for path in sorted(folder.glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            seconds = cell["metadata"].get("papermill", {}).get("duration") or 0
            if seconds >= LONG_S:
                row = {"result": f"cell_s/{path.stem}/{cell['id']}", "variant": "", "metric": "", "unit": "s"}
                yield row | {"value": round(seconds, 1)}


def tell_times(name: str, notebook: dict, results: pd.DataFrame, facts: dict) -> dict:
    """A notebook (its JSON) whose text says how long it took in a run: the row **Time**, and a line before long code.

    A notebook whose time was not measured keeps its row. The line stands at the end of the text before the code.
    """
    took, cells, seconds = results.set_index("result").value, [], 0.0
    if f"duration_s/{name}" not in took:
        return notebook
    total = f"{took[f'duration_s/{name}'] / 60:.0f} min"
    for cell in reversed(notebook["cells"]):
        seconds += took.get(f"cell_s/{name}/{cell['id']}", 0.0)
        if cell["cell_type"] == "markdown":
            text = re.sub(TIME, f"{total} with `{facts['run']}` on {facts['device']}", "".join(cell["source"]))
            text = re.sub(TOOK, "", text)
            if seconds:
                text += f"\n\n*The code below took {seconds / 60:.0f} min of the {total} of this notebook "
                text += f"(`{facts['run']}`, {facts['device']}).*"
            cell, seconds = cell | {"source": text.splitlines(keepends=True)}, 0.0
        cells.insert(0, cell)
    return notebook | {"cells": cells}


def main(results_file: Path) -> None:
    """Write docs/results/tiny.json from a run's results (if they are there); from it README's figure, and times."""
    if results_file.is_file():
        content = select_results(*load_results(results_file))
        content["results"] += cell_times(results_file.parent / "notebooks")
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in content.pop("results"))
        write_text(RESULTS, f'{json.dumps(content, ensure_ascii=False)[:-1]}, "results": [\n{rows}\n]}}\n')
    shown = load_results(RESULTS)
    figure = story.plot_story(*shown)
    with atomic_path(FIGURE) as scratch:
        figure.savefig(scratch, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    for path in (ROOT / "notebooks" / f"{name}.ipynb" for name in STAGES):
        notebook = tell_times(path.stem, json.loads(path.read_text(encoding="utf-8")), *shown)
        write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
