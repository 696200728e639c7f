"""The runs of a sweep side by side: scores by setting, and paired differences to the first setting."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from medkit import plotting
from medkit.reporting.compare_runs import compare
from medkit.reporting.results import load_results
from medkit.reporting.tables import label, markdown
from medkit.stage import DISCLAIMER, run_dir, write_text

SCORES = ("accuracy/", "field_f1/")
SEED = "seed"
KEYS = ["variant", "result", "scoring"]


def collect_scores(points: Mapping[str, dict]) -> pd.DataFrame:
    """A row per run, variant and score that is not the same in all runs.

    `points`: run → its settings (`sweep.name_points`). Columns: run, setting (all but the seed), seed, variant, result,
    scoring, value, ci_low, ci_high, n; for accuracies also difference, its interval, n_paired and verdict, against the
    first run with the same seed. A seed draws the questions, so other seeds are not paired.
    """
    tables, first = [], {}
    for run, point in points.items():
        table = load_results(run_dir(run) / "results.json")[0]
        table = table[table.result.str.startswith(SCORES)].rename(columns={"metric": "scoring"})
        table = table[[*KEYS, "value", "ci_low", "ci_high", "n"]]
        baseline = first.setdefault(point.get(SEED), run)
        if baseline != run:
            deltas = compare(run_dir(baseline), run_dir(run)).deltas
            deltas = deltas.assign(result="accuracy/" + deltas.source).rename(columns={"n": "n_paired"})
            columns = ["difference", "ci_low", "ci_high", "n_paired", "verdict"]
            table = table.merge(deltas[[*KEYS, *columns]], "left", KEYS, suffixes=("", "_difference"))
        setting = ", ".join(f"{key}={value}" for key, value in point.items() if key != SEED) or "as it is"
        tables.append(table.assign(run=run, setting=setting, seed=point.get(SEED)))
    scores = pd.concat(tables, ignore_index=True)
    varied = scores.groupby(KEYS).value.transform("nunique") > 1
    return scores[varied]


def write_sweep(name: str, points: Mapping[str, dict]) -> str:
    """Write `sweep.csv`, `sweep.md` and a figure into the sweep's folder; returns the text."""
    scores, folder = collect_scores(points), run_dir(name)
    parts = [f"# Sweep `{name}`: {len(points)} runs", "Scores that are the same in all runs are left out."]
    if scores.empty:
        parts[1] = "All scores are the same in all runs."
    else:
        parts.append(_scores_text(scores))
        figure = plot_sweep(scores)
        plotting.save_figure(figure, folder, "sweep", scores)
        plt.close(figure)
    if scores.seed.nunique() > 1:
        keys = ["setting", "variant", "result", "scoring"]
        spread = scores.groupby(keys, as_index=False, sort=False).agg(
            mean=("value", "mean"), std=("value", "std"), seeds=("seed", "nunique")
        )
        rows = [[r.setting, label(r.variant), _score(r), f"{r.mean:.3f} ± {r.std:.3f} ({r.seeds})"]
                for r in spread.itertuples()]  # fmt: skip
        parts += ["## Over seeds", markdown(["setting", "variant", "score", "mean ± deviation (seeds)"], rows)]
    text = "\n\n".join([*parts, DISCLAIMER]) + "\n"
    write_text(folder / "sweep.md", text)
    return text


def _scores_text(scores: pd.DataFrame) -> str:
    rows = []
    for row in scores.itertuples():
        difference = "–"
        if pd.notna(getattr(row, "difference", None)):
            interval = f"[{row.ci_low_difference:+.3f}, {row.ci_high_difference:+.3f}]"
            difference = f"{row.difference:+.3f} {interval}, n = {row.n_paired:.0f}, {row.verdict}"
        value = f"{row.value:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]"
        seed = "" if pd.isna(row.seed) else str(row.seed)
        rows.append([row.setting, seed, label(row.variant), _score(row), value, f"{row.n:.0f}", difference])
    headings = ["setting", "seed", "variant", "score", "value [interval]", "n", "against the first setting"]
    return markdown(headings, rows)


def _score(row) -> str:
    return f"{row.result}, {row.scoring}" if row.scoring else row.result


def plot_sweep(scores: pd.DataFrame) -> plt.Figure:
    """A panel per score: settings along the axis, a line per variant; points of several seeds are averaged."""
    shown = scores.assign(variant=scores.variant.map(label), result=scores.apply(_score, axis=1))
    grid = sns.relplot(
        shown, x="setting", y="value", hue="variant", col="result", col_wrap=2, kind="line", marker="o", errorbar=None,
        facet_kws={"sharey": False}, height=3.4, aspect=1.3,
    )  # fmt: skip
    for ax in grid.axes.flat:
        ax.tick_params(axis="x", rotation=20)
    grid.set_titles("{col_name}").set_axis_labels("", "score")
    return grid.figure
