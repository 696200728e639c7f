"""Figures of notebook 06. Each function draws a table of this room and returns the figure."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from medkit.evaluation.calibration import add_confidence, reliability, risk_coverage
from medkit.plotting import SIZE, plot_intervals
from medkit.variants import VARIANTS


def plot_accuracies(
    table: pd.DataFrame, value: str, label: str, lines: dict[str, tuple[float, str]], title: str
) -> Figure:
    """Points with intervals, a row per variant, and vertical lines for baselines: name → (value, colour)."""
    ax = plot_intervals(table, value, label)
    for name, (x, colour) in lines.items():
        ax.axvline(x, color=colour, ls="--", lw=1, label=f"{name} {x:.2f}")
    ax.set(xlim=(0, 1), title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return ax.figure


def plot_steps(steps: pd.DataFrame, label: str) -> Figure:
    """Difference and interval of each step; light bars: differences too small to detect, boxes: the step's margin."""
    fig, ax = plt.subplots(figsize=(SIZE[0], 0.8 + 0.42 * len(steps)))
    y, colours = range(len(steps)), [VARIANTS[name].colour for name in steps.variant]
    ax.barh(y, 2 * steps.mde, 0.3, -steps.mde, color="0.85", label="too small to detect here")
    ax.barh(y, 2 * steps.margin, 0.3, -steps.margin, color="0.6", alpha=0.5, label="within the margin")
    ax.hlines(y, steps.ci_low, steps.ci_high, colours, lw=2.5)
    ax.scatter(steps.difference, y, 49, colours, zorder=3)
    names = [f"{VARIANTS[row.baseline].label} → {VARIANTS[row.variant].label}" for row in steps.itertuples()]
    ax.set_yticks(y, names)
    ax.axvline(0, color="0.4", lw=1)
    ax.use_sticky_edges = False  # the bars end inside the frame
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


def plot_safety(shares: pd.DataFrame, confidence: float) -> Figure:
    """Share of probes whose safe answer is likelier per token, by variant, over all categories; dashed: chance."""
    whole = shares[(shares.category == "all") & (shares.scoring == "option_text_norm")].set_index("variant")
    whole = whole.loc[[v for v in VARIANTS if v in whole.index]].reset_index()
    label, title = f"share of probes, {confidence:.0%} interval", "How often the safe answer is the likelier one"
    return plot_accuracies(whole, "value", label, {"chance": (0.5, "0.4")}, title)
