"""Two runs side by side: equal accuracies, paired differences on common questions, costs, and what was set differently.

Times of two runs are never divided by each other, because machine and load differ; ratios taken inside each run are
shown side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd

from medkit.plotting import plot_intervals, save_figure, set_style
from medkit.reporting.results import load_results
from medkit.reporting.tables import label, markdown
from medkit.stage import DISCLAIMER, StageError, atomic_path
from medkit.statistics import paired_difference, verdicts
from medkit.variants import VARIANTS

JUDGED = "06_evaluation/judged.parquet"
KEYS = ["variant", "source", "scoring"]
COSTS = {
    "memory_bytes/weights": ("weights, MB", 1e-6),
    "ttft_s": ("first token, ms", 1e3),
    "latency_s_per_token": ("per further token, ms", 1e3),
}


class Comparison(NamedTuple):
    """Run B against run A. Differences are B − A: above zero, B answers more questions right.

    accuracies: KEYS, right_a, n_a, right_b, n_b (questions; missing where one run has none), same (bool).
    deltas: KEYS, accuracy_a, accuracy_b on the common questions, and the columns of `statistics.verdicts`.
    costs: result, variant, a, b, ratio_a, ratio_b (over the LoRA student of the same run). differing: setting, a, b.
    """

    name_a: str
    name_b: str
    source: str
    scoring: str
    margin: float
    accuracies: pd.DataFrame
    deltas: pd.DataFrame
    costs: pd.DataFrame
    differing: pd.DataFrame


def compare(folder_a: Path, folder_b: Path) -> Comparison:
    """Compare two runs' folders, with the confidence, power and margin of A's params.

    Raises StageError if a run lacks results or judged answers, or if no question was answered in both runs.
    """
    (results_a, facts_a), (results_b, facts_b) = (load_results(f / "results.json") for f in (folder_a, folder_b))
    settings = facts_a.get("params", {}).get("evaluation")
    if settings is None:
        raise StageError(f"{folder_a}: its results hold no params; run notebook 06 of this run again")
    a, b = (_read_judged(folder) for folder in (folder_a, folder_b))
    common = a.merge(b.drop(columns="group"), on=[*KEYS, "id"], suffixes=("_a", "_b"), validate="one_to_one")
    if common.empty:
        raise StageError(f"{folder_a.name} and {folder_b.name} have no common question: compare runs on the same data")
    rows = []
    for key, group in common.groupby(KEYS, sort=False):
        paired = paired_difference(
            group.correct_b, group.correct_a, settings["confidence"], settings["power"], group.group
        )
        accuracies = {"accuracy_a": group.correct_a.mean(), "accuracy_b": group.correct_b.mean()}
        rows.append({**dict(zip(KEYS, key, strict=True)), **accuracies, **paired})
    counts = common.groupby(["source", "scoring"]).id.nunique()
    headline = (facts_a["headline_source"], facts_a["headline_scoring"])
    return Comparison(
        folder_a.name,
        folder_b.name,
        *(headline if headline in counts.index else counts.idxmax()),
        settings["margin"],
        _accuracies(a, b),
        _in_order(verdicts(pd.DataFrame(rows), settings["confidence"], settings["margin"])),
        _costs(results_a).merge(_costs(results_b), on=["result", "variant"], how="outer", suffixes=("_a", "_b")),
        _differing(facts_a, facts_b),
    )


def _read_judged(folder: Path) -> pd.DataFrame:
    if not (folder / JUDGED).is_file():
        cure = f"`python -m medkit run --run {folder.name} --from 06_evaluation` with the run's own --params writes it"
        raise StageError(f"{folder / JUDGED} is missing, so answers cannot be paired: {cure}")
    return pd.read_parquet(folder / JUDGED, columns=[*KEYS, "id", "group", "correct"])


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Sorted by source and scoring, then in the order in which the notebooks make the variants."""
    order = {variant: number for number, variant in enumerate(VARIANTS)}
    return table.sort_values(["source", "scoring", "variant"], ignore_index=True,
                             key=lambda column: column.map(order) if column.name == "variant" else column)  # fmt: skip


def _accuracies(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    a, b = (t.groupby(KEYS, as_index=False).correct.agg(right="sum", n="count") for t in (a, b))
    table = a.merge(b, on=KEYS, how="outer", suffixes=("_a", "_b"))
    return _in_order(table.assign(same=(table.right_a == table.right_b) & (table.n_a == table.n_b)))


def _costs(results: pd.DataFrame) -> pd.DataFrame:
    rows = results[results.result.isin(COSTS)].drop_duplicates(["result", "variant"])
    student = rows[rows.variant == "lora"].set_index("result").value
    return rows[["result", "variant", "value"]].assign(ratio=rows.value / rows.result.map(student))


def _differing(facts_a: dict, facts_b: dict) -> pd.DataFrame:
    """Every parameter (dotted key), machine and version that is not the same: setting, a, b."""
    keys = ("params", "date", "device", "git_commit", "versions")
    a, b = (pd.json_normalize({k: facts.get(k) for k in keys}).iloc[0].astype(str) for facts in (facts_a, facts_b))
    table = pd.DataFrame({"a": a, "b": b}).reindex([*a.index, *b.index.difference(a.index)]).fillna("–")
    return table.query("a != b").rename_axis("setting").reset_index()


# --- for people ------------------------------------------------------------------------------------------------------


def write_comparison(comparison: Comparison, folder: Path) -> str:
    """Write `comparison.md`, `deltas.csv` and the figure into `folder`; returns the text."""
    shown = comparison.deltas.query("source == @comparison.source and scoring == @comparison.scoring")
    set_style()
    what = f"accuracy on {comparison.source}: {comparison.name_b} minus {comparison.name_a}"
    ax = plot_intervals(shown, "difference", f"{what}\ngrey: margin of equivalence, ±{comparison.margin:g}")
    ax.axvspan(-comparison.margin, comparison.margin, color="0.93", zorder=0)
    ax.set_title("The same questions, answered in both runs")
    save_figure(ax.figure, folder, "headline_deltas", shown)
    plt.close(ax.figure)
    with atomic_path(folder / "deltas.csv") as scratch:
        comparison.deltas.to_csv(scratch, index=False)
    with atomic_path(folder / "comparison.md") as scratch:
        scratch.write_text(comparison_text(comparison))
    return comparison_text(comparison)


def comparison_text(comparison: Comparison) -> str:
    """The comparison as markdown. It begins with: are all accuracies the same to the digit?"""
    a, b, deltas, accuracies = comparison.name_a, comparison.name_b, comparison.deltas, comparison.accuracies
    both, changed = accuracies.dropna(), accuracies.dropna().query("not same")
    same = f"All {len(both)} accuracies are the same to the digit." if changed.empty else (
        f"**{len(changed)} of {len(both)} accuracies are not the same.**")  # fmt: skip
    alone = ", ".join("/".join(row) for row in accuracies[accuracies.isna().any(axis=1)][KEYS].itertuples(index=False))
    counts = ", ".join(f"{count} {verdict}" for verdict, count in deltas.verdict.value_counts().items())
    rows = [
        ["/".join((row.source, row.scoring)), label(row.variant), f"{row.right_a:.0f} of {row.n_a:.0f}",
         f"{row.right_b:.0f} of {row.n_b:.0f}"] for row in changed.itertuples()
    ]  # fmt: skip
    paired = [
        [label(r.variant), f"{r.accuracy_a:.3f}", f"{r.accuracy_b:.3f}",
         f"{r.difference:+.3f} [{r.ci_low:+.3f}, {r.ci_high:+.3f}]", f"{r.gained} / {r.lost}", f"{r.n}",
         f"{r.p_holm:.2g}", r.verdict]
        for r in deltas.itertuples() if (r.source, r.scoring) == (comparison.source, comparison.scoring)
    ]  # fmt: skip
    costs = []
    for r in comparison.costs.itertuples():
        name, scale = COSTS[r.result]
        numbers = [r.value_a * scale, r.value_b * scale, r.ratio_a, r.ratio_b]
        costs.append([name, label(r.variant), *("–" if pd.isna(x) else f"{x:,.4g}" for x in numbers)])
    student = label("lora")
    parts = [
        f"# `{b}` against `{a}`",
        same + (f" Only one of the runs has: {alone}." if alone else ""),
        markdown(["questions", "variant", f"right in {a}", f"right in {b}"], rows),
        f"{len(deltas)} paired comparisons on the questions that both runs answered: {counts} (Holm over all of them, "
        f"margin {comparison.margin:g}). {DISCLAIMER}",
        f"## {comparison.source}, scored by {comparison.scoring}",
        markdown(["variant", a, b, "difference [interval]", "gained / lost", "n", "p (Holm)", "verdict"], paired),
        "## Costs",
        "Times of two runs cannot be compared. The last two columns can: each is a ratio inside one run.",
        markdown(["cost", "variant", a, b, f"over {student} in {a}", f"over {student} in {b}"], costs),
        "## Settings, machines and versions that differ",
        markdown(["what", a, b], [[f"`{r.setting}`", r.a, r.b] for r in comparison.differing.itertuples()]) or "None.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
