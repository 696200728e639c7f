"""What README and docs/ show of a run: the rows they read, and the figure of both tasks against megabytes.

`python -m medkit.reporting.readme outputs/tiny/results.json` takes them from a run; `make readme` calls it.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from medkit.params import load_params
from medkit.reporting import story
from medkit.reporting.forecast import DEVICE, add_up, forecast
from medkit.reporting.results import load_results
from medkit.stage import ROOT, atomic_path, write_text
from medkit.variants import FINAL

RESULTS = ROOT / "docs" / "results" / "tiny.json"
FIGURE = ROOT / "docs" / "figures" / "accuracy.png"
FACTS = ("run", "headline_source", "headline_scoring", "chance", "date", "git_commit", "device", "versions",
         "seen")  # fmt: skip
ANY_SCORING = ["memory_bytes", "memory_ratio", "latency_ratio", "ttft_s", "latency_s_per_token", "shuffle_consistency",
               "energy_wh_per_correct_answer", "cost_per_correct_answer", "field_f1", "exact", "invented",
               "missing", "dialogues", "field_delta", "certificate", "gap_closed", "kl_nats", "top1_changed",
               "duration_s"]  # fmt: skip
FINDINGS = ("student_ce", FINAL, "edge")
DROPPED_COLUMNS = ["stage", "file", "p_clustered", "p_equivalence", "chosen", "bins"]


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
    """README's findings, one markdown item each, computed from the committed results."""
    results, facts = load_results(RESULTS)
    without_notes = {**facts, "seen": {}}  # they stand beside the tables of docs/results.md
    return "\n".join(f"- {sentence}" for sentence in story.tell_story(results, without_notes, FINDINGS))


def duration() -> str:
    """One sentence: how long the committed run took, without notebook 06. Empty if its results do not tell."""
    results, facts = load_results(RESULTS)
    seconds = results[results.result.str.startswith("duration_s/")].value.sum()
    return f"This run took {seconds / 60:.0f} minutes on {facts['device']}." if seconds else ""


def forecasts(profiles: Sequence[str] = ("gpu", "paper")) -> str:
    """One sentence: what the profiles that were not run take on their device, by `forecast`."""
    hours = {name: add_up(forecast(load_params(ROOT / "params" / f"{name}.yaml"))).hours for name in profiles}
    listed = ", ".join(f"{count:.0f} for `{name}`" for name, count in hours.items())
    return f"Estimated {DEVICE['name']} hours: {listed}."


def main(results_file: Path) -> None:
    """Write docs/results/tiny.json from a run's results (if they are there), and README's figure from that file."""
    if results_file.is_file():
        content = select_results(*load_results(results_file))
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in content.pop("results"))
        write_text(RESULTS, f'{json.dumps(content, ensure_ascii=False)[:-1]}, "results": [\n{rows}\n]}}\n')
    figure = story.plot_story(*load_results(RESULTS))
    with atomic_path(FIGURE) as scratch:
        figure.savefig(scratch, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
