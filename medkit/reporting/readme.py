"""What README and docs/ show of a run: the rows they read, and the figure of accuracy against megabytes.

`python -m medkit.reporting.readme outputs/tiny/results.json` takes them from a run; `make readme` calls it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from medkit.plotting import set_style
from medkit.reporting.results import load_results
from medkit.reporting.tables import label
from medkit.stage import ROOT, atomic_path
from medkit.variants import VARIANTS

RESULTS = ROOT / "docs" / "results" / "tiny.json"
FIGURE = ROOT / "docs" / "figures" / "accuracy.png"
FACTS = ("run", "headline_source", "headline_scoring", "chance", "date", "git_commit", "device", "versions")
ANY_SCORING = ["memory_bytes", "memory_ratio", "latency_ratio", "ttft_s", "latency_s_per_token", "shuffle_consistency",
               "swap_drop", "energy_wh_per_1000_answers", "energy_wh_per_correct_answer", "cost_per_1000_answers",
               "cost_per_correct_answer"]  # fmt: skip
DROPPED_COLUMNS = ["stage", "file", "p_clustered", "p_equivalence", "gained", "lost", "chosen", "bins"]


def select_results(results: pd.DataFrame, facts: dict) -> dict:
    """The rows and facts that README and docs/ read, as the content of a smaller results file."""
    source, family = facts["headline_source"], results.result.str.split("/").str[0]
    scored = results.metric == facts["headline_scoring"]
    of_source = [f"{name}/{source}" for name in ("accuracy_delta", "ece", "brier", "aurc", "accuracy_at_80")]
    selected = family.isin(ANY_SCORING) | (family == "safe_share") & (results.metric == "option_text_norm")
    selected |= scored & (family.isin(["accuracy", "accuracy_clean"]) | results.result.isin(of_source))
    table = results[selected].drop(columns=DROPPED_COLUMNS, errors="ignore")
    rows = [{k: v for k, v in row.items() if not pd.isna(v)} for row in table.to_dict("records")]
    return {key: facts[key] for key in FACTS if key in facts} | {"results": rows}


def plot_accuracy_against_size(results: pd.DataFrame, facts: dict) -> plt.Figure:
    """Accuracy on the headline source with intervals, against megabytes of weights.

    A variant whose bytes were not counted has the shapes of its model: those of the teacher or of the LoRA student.
    """
    scored = (results.result == f"accuracy/{facts['headline_source']}") & (results.metric == facts["headline_scoring"])
    table = results[scored].drop_duplicates("variant").reset_index(drop=True)
    counted = results[results.result == "memory_bytes/weights"].set_index("variant").value / 1e6
    same_shapes = {v: "teacher_base" if v.startswith("teacher") else "lora" for v in VARIANTS}
    table["megabytes"] = [counted.get(v, counted.get(same_shapes.get(v))) for v in table.variant]
    table = table.dropna(subset="megabytes").sort_values("megabytes", ignore_index=True)
    table["cluster"] = (table.megabytes.diff() > 20).cumsum()  # variants of one size stand side by side

    set_style()
    fig, ax = plt.subplots(figsize=(9.5, 4.8))
    clusters = [cluster.sort_values("value", ignore_index=True) for _, cluster in table.groupby("cluster")]
    for cluster, after in zip(clusters, [*clusters[1:], None], strict=True):
        places = cluster.megabytes + 4 * (cluster.index - (len(cluster) - 1) / 2)
        left = after is not None and after.megabytes.min() - places.max() < 40 < places.min()  # no room on the right
        height = -1.0
        for x, row in zip(places, cluster.itertuples(), strict=True):
            colour = VARIANTS[row.variant].colour if row.variant in VARIANTS else "0.5"
            ax.errorbar(x, row.value, [[row.value - row.ci_low], [row.ci_high - row.value]], fmt="o", color=colour)
            height = max(row.value, height + 0.045)
            place, side = (places.min() - 4, "right") if left else (places.max() + 4, "left")
            ax.annotate(label(row.variant), (place, height), va="center", ha=side, fontsize=9, color=colour)
    right = table.megabytes.max() + 75
    ax.axhline(facts["chance"], color="0.4", ls="--", lw=1)
    ax.annotate(f"chance {facts['chance']:.2f}", (right - 5, facts["chance"] - 0.03), fontsize=9, ha="right")
    ax.set(xlim=(-8, right), ylim=(0, 1), xlabel="weights, MB", ylabel="accuracy, 95 % interval")
    ax.set_title(f"Accuracy on {facts['headline_source']} (n = {table.n.max():.0f}) against the size of the weights")
    return fig


def describe_step(variant: str, baseline: str) -> str:
    """The comparison of two variants on the headline source, e.g. "0.77 → 0.72, −0.050 [−0.096, −0.003], …"."""
    results, facts = load_results(RESULTS)
    scored = results[results.metric == facts["headline_scoring"]]
    accuracy = scored[scored.result == f"accuracy/{facts['headline_source']}"].set_index("variant").value
    steps = scored[scored.result == f"accuracy_delta/{facts['headline_source']}"]
    row = steps[(steps.variant == variant) & (steps.baseline == baseline)].iloc[0]
    change = f"{row.value:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
    return f"{accuracy[baseline]:.2f} → {accuracy[variant]:.2f}, {change}, n = {row.n:.0f}, {row.verdict}"


def megabytes(variant: str) -> str:
    """Stored size of a variant's weights, as text."""
    results, _ = load_results(RESULTS)
    rows = results[(results.result == "memory_bytes/weights") & (results.variant == variant)]
    return f"{rows.value.iloc[0] / 1e6:.0f} MB"


def main(results_file: Path) -> None:
    """Write docs/results/tiny.json from a run's results (if they are there), and README's figure from that file."""
    if results_file.is_file():
        content = select_results(*load_results(results_file))
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in content.pop("results"))
        with atomic_path(RESULTS) as scratch:
            scratch.write_text(f'{json.dumps(content, ensure_ascii=False)[:-1]}, "results": [\n{rows}\n]}}\n')
    figure = plot_accuracy_against_size(*load_results(RESULTS))
    with atomic_path(FIGURE) as scratch:
        figure.savefig(scratch, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
