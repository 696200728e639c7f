"""The run in one figure: how good a model is at both tasks, against the megabytes of its weights; and in sentences.

Everything is read from the rows of `results.json`. README and the report page show the same; notebook 06 shows what it
has measured so far.
"""

from collections.abc import Iterator, Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from medkit.plotting import set_style
from medkit.reporting.tables import difference, label
from medkit.variants import FINAL, VARIANTS

SHOWN = ("tfidf", "regex", "teacher", "student_ce", "student_hard", FINAL, "edge", "edge_small")
LINES = ("majority", "tfidf", "regex")
RECORDS = "field_f1/records"


def headline(facts: Mapping) -> str:
    """The name of the headline result: `accuracy/<source>`."""
    return f"accuracy/{facts['headline_source']}"


def rows_of(results: pd.DataFrame, result: str, facts: Mapping) -> pd.DataFrame:
    """The rows of one result by variant, as it is read in the headline; generated text for records."""
    return _scored(results, result, facts).drop_duplicates("variant").set_index("variant")


def _scored(results: pd.DataFrame, result: str, facts: Mapping) -> pd.DataFrame:
    scoring = facts["headline_scoring"] if result.endswith(f"/{facts['headline_source']}") else "generated"
    return results[(results.result == result) & (results.metric == scoring)]


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
        for place, (name, row) in enumerate(rows.loc[shown].iterrows()):
            same_size = [sizes[other] for other in shown[:place]].count(sizes[name])
            interval, size = [[row.value - row.ci_low], [row.ci_high - row.value]], sizes[name] * 1.05**same_size
            ax.errorbar(size, row.value, interval, fmt="o", color=VARIANTS[name].colour, capsize=2,
                        label=_name(name, row))  # fmt: skip
        ax.set(
            xscale="log",
            ylim=(0, 1.02),
            xlabel="weights, MB (models of one size stand side by side)",
            ylabel="score, with its 95 % interval",
        )
        ax.set_title(f"{titles[result]} (n = {rows.n.max():.0f})")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.margins(x=0.2)
        ax.legend(loc="lower left", fontsize=8, ncols=2, frameon=True)
    return fig


def _name(variant: str, row: pd.Series) -> str:
    return f"{label(variant)}, {row.value:.2f}"


def tell_story(results: pd.DataFrame, facts: Mapping, variants: Sequence[str] = SHOWN) -> list[str]:
    """One computed sentence per point of the figure: size, both tasks, and what the comparisons showed.

    The smaller files are compared with the student that they were made from, the other models with the baselines.
    """
    sizes, sentences = megabytes(results), []
    tasks = {"accuracy": rows_of(results, headline(facts), facts)}
    tasks["F1 of records"] = rows_of(results, RECORDS, facts)
    for variant in [v for v in variants if any(v in rows.index for rows in tasks.values())]:
        numbers = [f"{sizes[variant]:.3g} MB"] if variant in sizes else []
        for task, rows in tasks.items():
            if variant in rows.index:
                row = rows.loc[variant]
                numbers.append(f"{task} {row.value:.2f} [{row.ci_low:.2f}, {row.ci_high:.2f}], n = {row.n:.0f}")
        parts = [
            f"**{label(variant)}**: {'; '.join(numbers)}.",
            *_certificate(results, variant),
            *(_gain(results, facts) if variant == FINAL else ()),
            *(_over_baselines(results, facts, variant) if VARIANTS[variant].baseline != FINAL else ()),
            *_on_dialogues(results, variant),
        ]
        sentences.append(" ".join(parts))
    return sentences + [note for source, note in facts.get("seen", {}).items() if source == facts["headline_source"]]


def _step(results: pd.DataFrame, result: str, facts: Mapping, variant: str, baseline: str) -> Iterator:
    """The row of a comparison, if the run has it."""
    rows = _scored(results, result, facts)
    yield from rows[(rows.variant == variant) & (rows.baseline == baseline)].head(1).itertuples()


def _certificate(results: pd.DataFrame, variant: str) -> Iterator[str]:
    """The share of the student's bytes that a smaller file has, and on which tasks equivalence to it was shown."""
    sizes, student = megabytes(results), VARIANTS[variant].baseline
    certificates = results[results.result.str.startswith("certificate/") & (results.variant == variant)]
    name, tasks = label(student), []
    if len(certificates) and {variant, student} <= set(sizes):
        yield f"It has {sizes[variant] / sizes[student]:.0%} of the bytes of {name} in bf16."
        name = "it"
    for row in certificates.itertuples():
        cure = f"p = {row.p_equivalence_holm:.2g} after Holm's correction"
        if row.n_needed > row.n:
            cure = f"that needs n = {row.n_needed:,.0f} or more"
        shown = "shown" if row.within_margin else f"not shown ({cure})"
        n = f"n = {row.n:.0f}" + " fields" * ("/records" in row.result)
        tasks.append(f"{shown} on {row.result.split('/')[1]}, {difference(row)}, {n}")
    if tasks:
        yield f"Equivalence to {name} within {certificates.margin.iloc[0]:g}: {'; '.join(tasks)}."


def _gain(results: pd.DataFrame, facts: Mapping) -> Iterator[str]:
    """What the distilled student has over labels alone, and over the student of the teacher's answers as text."""
    result = f"accuracy_delta/{facts['headline_source']}"
    for row in _step(results, result, facts, FINAL, "student_ce"):
        yield f"Against labels alone: {difference(row)} in accuracy, n = {row.n:.0f}, {row.verdict}."
        closed = [
            f"{gap.value:.0%} [{gap.ci_low:.0%}, {gap.ci_high:.0%}] on {gap.result.split('/')[1]}"
            for gap in results[results.result.str.startswith("gap_closed/")].itertuples()
        ]
        if closed:
            yield f"Of the gap to the teacher it closes {' and '.join(closed)}."
    for row in _step(results, result, facts, FINAL, "student_hard"):
        yield f"Against the teacher's answers as text: {difference(row)} in accuracy, {row.verdict}."


def _over_baselines(results: pd.DataFrame, facts: Mapping, variant: str) -> Iterator[str]:
    """Whether a model beats what needs no language model, on each task."""
    for result, baseline, measure in (
        (f"accuracy_delta/{facts['headline_source']}", "tfidf", "accuracy"),
        ("field_delta/records", "regex", "share of right fields"),
    ):
        for row in _step(results, result, facts, variant, baseline):
            verb = {"better": "beats", "worse": "is worse than"}.get(row.verdict, "is not shown to beat")
            yield f"It {verb} {label(baseline)}: {difference(row)} in {measure}, n = {row.n:.0f}."


def _on_dialogues(results: pd.DataFrame, variant: str) -> Iterator[str]:
    """What a variant writes of real dialogues, for which it was not taught."""
    of_variant = results[results.variant == variant].set_index("result")
    if {"dialogues/valid", "dialogues/grounded"} <= set(of_variant.index):
        valid, grounded = (of_variant.loc[f"dialogues/{name}"] for name in ("valid", "grounded"))
        yield (
            f"Of its records of real dialogues a share of {valid.value:.2f} is valid; "
            f"{grounded.value:.0%} [{grounded.ci_low:.0%}, {grounded.ci_high:.0%}] of their values are in the dialogue."
        )
