"""The run in one figure: how good a model is at both tasks, against the megabytes of its weights; and in sentences.

Everything is read from the rows of `results.json`: README, notebook 06 and the report page show the same.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from medkit.plotting import set_style
from medkit.reporting.tables import label
from medkit.variants import FINAL, VARIANTS

SHOWN = ("tfidf", "regex", "teacher", "student_ce", "student_hard", FINAL, "edge", "edge_small")
LINES = ("majority", "tfidf", "regex")
RECORDS = "field_f1/records"


def headline(facts: Mapping) -> str:
    """The name of the headline result: `accuracy/<source>`."""
    return f"accuracy/{facts['headline_source']}"


def rows_of(results: pd.DataFrame, result: str, facts: Mapping) -> pd.DataFrame:
    """The rows of one result by variant, as it is read in the headline; generated text for records."""
    scoring = facts["headline_scoring"] if result == headline(facts) else "generated"
    rows = results[(results.result == result) & (results.metric == scoring)]
    return rows.drop_duplicates("variant").set_index("variant")


def megabytes(results: pd.DataFrame) -> dict[str, float]:
    """Megabytes of each variant's weights. One whose bytes were not counted has the shapes of teacher or student."""
    counted = results[results.result == "memory_bytes/weights"].set_index("variant").value / 1e6
    same_shapes = {v: "teacher_base" if v.startswith("teacher") else FINAL for v, one in VARIANTS.items() if one.folder}
    sizes = {v: counted.get(v, counted.get(same_shapes.get(v))) for v in VARIANTS}
    return {v: float(size) for v, size in sizes.items() if size is not None}


def plot_story(results: pd.DataFrame, facts: Mapping) -> plt.Figure:
    """A panel per task: points with intervals against megabytes (log axis), baselines as dashed lines."""
    sizes = megabytes(results)
    titles = {headline(facts): f"{facts['headline_source']}: accuracy", RECORDS: "records: F1 of the fields"}
    panels = {result: rows_of(results, result, facts) for result in titles}
    panels = {result: rows for result, rows in panels.items() if len(rows)}
    set_style()
    fig, axes = plt.subplots(1, len(panels), figsize=(1 + 5.5 * len(panels), 4.6), squeeze=False, layout="constrained")
    for ax, (result, rows) in zip(axes[0], panels.items(), strict=True):
        for name, row in rows[rows.index.isin(LINES)].iterrows():
            ax.axhline(row.value, color=VARIANTS[name].colour, ls="--", lw=1, zorder=0, label=_name(name, row))
        shown = [v for v in SHOWN if v in rows.index and v in sizes and v not in LINES]
        for name, row in rows.loc[shown].iterrows():
            interval = [[row.value - row.ci_low], [row.ci_high - row.value]]
            ax.errorbar(sizes[name], row.value, interval, fmt="o", color=VARIANTS[name].colour, capsize=2,
                        label=_name(name, row))  # fmt: skip
        ax.set(xscale="log", ylim=(0, 1.02), xlabel="weights, MB", ylabel="score, with its 95 % interval")
        ax.set_title(f"{titles[result]} (n = {rows.n.max():.0f})")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.margins(x=0.2)
        ax.legend(loc="lower left", fontsize=8, ncols=2, frameon=True)
    return fig


def _name(variant: str, row: pd.Series) -> str:
    return f"{label(variant)}, {row.value:.2f}"


def describe_step(results: pd.DataFrame, facts: Mapping, variant: str, baseline: str) -> str | None:
    """A comparison on the headline source, e.g. "0.77 → 0.72, -0.050 [-0.096, -0.003], n = 240, worse"."""
    accuracy, row = rows_of(results, headline(facts), facts).value, _step(results, facts, variant, baseline)
    if row is None or not {variant, baseline} <= set(accuracy.index):
        return None
    change = f"{row.value:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
    return f"{accuracy[baseline]:.2f} → {accuracy[variant]:.2f}, {change}, n = {row.n:.0f}, {row.verdict}"


def _step(results: pd.DataFrame, facts: Mapping, variant: str, baseline: str) -> pd.Series | None:
    """The row of a comparison on the headline source, as it is read in the headline."""
    rows = results[results.result == f"accuracy_delta/{facts['headline_source']}"]
    rows = rows[(rows.variant == variant) & (rows.baseline == baseline) & (rows.metric == facts["headline_scoring"])]
    return None if rows.empty else rows.iloc[0]


def tell_story(results: pd.DataFrame, facts: Mapping, variants: Sequence[str] = SHOWN) -> list[str]:
    """One computed sentence per point of the figure: size, both tasks, and what the comparison showed."""
    sizes, sentences = megabytes(results), []
    accuracy, records = (rows_of(results, result, facts) for result in (headline(facts), RECORDS))

    def numbers(variant: str) -> str:
        tasks = [(accuracy, "accuracy"), (records, "F1 of the record fields")]
        found = [
            f"{task} {rows.value[variant]:.2f} [{rows.ci_low[variant]:.2f}, {rows.ci_high[variant]:.2f}]"
            for rows, task in tasks
            if variant in rows.index
        ]
        size = f"{sizes[variant]:.3g} MB, " if variant in sizes else ""
        return size + ", ".join(found)

    for variant in [v for v in variants if v in accuracy.index or v in records.index]:
        text = f"**{label(variant)}**: {numbers(variant)}."
        more = [
            _certificate(results, facts, variant),
            _gain(results, facts, variant),
            _over_baselines(results, facts, variant),
        ]
        sentences.append(" ".join([text, *(part for part in more if part)]))
    return sentences


def _certificate(results: pd.DataFrame, facts: Mapping, variant: str) -> str | None:
    rows = results[(results.result == f"certificate/{facts['headline_source']}") & (results.variant == variant)]
    if rows.empty:
        return None
    row, sizes = rows.iloc[0], megabytes(results)
    share = f"{sizes[variant] / sizes[row.baseline]:.0%} of the bytes of {label(row.baseline)} in bf16; " if (
        {variant, row.baseline} <= set(sizes)) else ""  # fmt: skip
    cure = f"p = {row.p_equivalence_holm:.2g} after Holm's correction"
    if row.n_needed > row.n:
        cure = f"that needs about {row.n_needed:,.0f} questions"
    shown = (
        f"equivalent to it within {row.margin:g}"
        if row.within_margin
        else f"not shown to be equivalent to it within {row.margin:g} ({cure})"
    )
    return f"It has {share}{shown}: {row.value:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}], n = {row.n:.0f}."


def _gain(results: pd.DataFrame, facts: Mapping, variant: str) -> str | None:
    if variant != FINAL or (step := describe_step(results, facts, FINAL, "student_ce")) is None:
        return None
    closed = [
        f"{row.value:.0%} [{row.ci_low:.0%}, {row.ci_high:.0%}] of the gap to the teacher on {row.result.split('/')[1]}"
        for row in results[results.result.str.startswith("gap_closed/")].itertuples()
    ]
    return f"Against labels alone: {step}." + (f" It closes {' and '.join(closed)}." if closed else "")


def _over_baselines(results: pd.DataFrame, facts: Mapping, variant: str) -> str | None:
    """Whether a model beats what needs no language model, on each task."""
    sentences = []
    of_task = {"tfidf": ("accuracy", _step(results, facts, variant, "tfidf"))}
    fields = results[(results.result == RECORDS.replace("field_f1", "field_delta")) & (results.baseline == "regex")]
    fields = fields[fields.variant == variant]
    of_task["regex"] = ("share of right fields", None if fields.empty else fields.iloc[0])
    for baseline, (measure, row) in of_task.items():
        if row is not None:
            verb = "It beats" if row.verdict == "better" else "It does not beat"
            change = f"{row.value:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
            sentences.append(f"{verb} {label(baseline)}: {change} in {measure}.")
    return " ".join(sentences) or None
