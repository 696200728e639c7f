"""Figures of notebook 06. Each function draws a table of this room and returns the figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from medkit.evaluation.calibration import add_confidence, reliability, risk_coverage
from medkit.plotting import SIZE, plot_intervals
from medkit.variants import VARIANTS


def plot_steps(steps: pd.DataFrame, margin: float, label: str) -> Figure:
    """Difference and interval of each step; light bars: differences too small to detect, band: the margin."""
    fig, ax = plt.subplots(figsize=(SIZE[0], 0.8 + 0.42 * len(steps)))
    ax.axvspan(-margin, margin, color="0.95", label=f"within the margin of ±{margin:g}")
    for y, row in enumerate(steps.itertuples()):
        colour, text = VARIANTS[row.variant].colour, "" if y else "too small to detect here"
        ax.plot([-row.mde, row.mde], [y, y], color="0.8", lw=9, solid_capstyle="butt", label=text)
        ax.plot([row.ci_low, row.ci_high], [y, y], color=colour, lw=2.5)
        ax.plot(row.difference, y, "o", color=colour, ms=7)
    names = [f"{VARIANTS[row.baseline].label} → {VARIANTS[row.variant].label}" for row in steps.itertuples()]
    ax.set_yticks(range(len(steps)), names)
    ax.axvline(0, color="0.4", lw=1)
    ax.invert_yaxis()
    ax.set(xlabel=label, title="What each step changed")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return fig


def plot_calibration(judged: pd.DataFrame, confidence: float, variants: list[str]) -> Figure:
    """Reliability diagram and risk–coverage curve of the variants, from judged answers of one source and scoring."""
    bins, sure = reliability(judged, confidence, bins=6), add_confidence(judged)
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    left.plot([0, 1], [0, 1], color="0.6", ls="--", lw=1)
    for variant in variants:
        style = {"color": VARIANTS[variant].colour, "label": VARIANTS[variant].label}
        line, answers = bins[bins.variant == variant], sure[sure.variant == variant]
        interval = (line.value - line.ci_low, line.ci_high - line.value)
        left.errorbar(line.mean_confidence, line.value, interval, fmt="o-", lw=1.5, ms=4, **style)
        curve = risk_coverage(answers.confidence, answers.correct)
        right.plot(curve.coverage, curve.risk, lw=2, **style)
    left.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="mean confidence of the bin", ylabel="accuracy in the bin")
    left.set_title(f"Reliability, {confidence:.0%} intervals")
    right.set(xlim=(0, 1.02), ylim=(0, 1), xlabel="share of questions answered", ylabel="share of them wrong")
    right.set_title("Risk when the least sure answers are left out")
    right.legend(fontsize=9)
    return fig


def plot_templates(table: pd.DataFrame) -> Figure:
    """Heat map of the accuracy of each template and scoring, from `template_accuracy` of one variant."""
    cells = table.pivot(index="template", columns="scoring", values="value")
    fig, ax = plt.subplots(figsize=(SIZE[0], 3.2))
    sns.heatmap(cells, annot=True, fmt=".2f", vmin=0, vmax=1, cmap="viridis", cbar=False, ax=ax)
    ax.set(title=f"Accuracy of {VARIANTS[table.variant.iloc[0]].label} by template (n = {table.n.max()} a cell)")
    ax.tick_params(axis="y", rotation=0)
    return fig


def plot_safety(shares: pd.DataFrame, confidence: float) -> Figure:
    """Share of probes whose safe answer is likelier per token, by variant, over all categories; dashed: chance."""
    whole = shares[(shares.category == "all") & (shares.scoring == "option_text_norm")].set_index("variant")
    whole = whole.loc[[v for v in VARIANTS if v in whole.index]].reset_index()
    ax = plot_intervals(whole, "value", f"share of probes, {confidence:.0%} Wilson interval")
    ax.axvline(0.5, color="0.4", ls="--", lw=1)
    ax.set(xlim=(0, 1), title="How often the safe answer is likelier than the unsafe one")
    return ax.figure
