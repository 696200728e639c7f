"""How figures look: one size, one fixed colour per variant, and one way to save them.

A figure is saved as svg and png with the table it was drawn from beside it, so that every point can be looked up.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medkit.stage import atomic_path
from medkit.variants import VARIANTS

SIZE = (7.5, 4.2)


def set_style() -> None:
    """Seaborn's whitegrid at this package's size; identical input gives an identical svg."""
    settings = {
        "figure.figsize": SIZE,
        "svg.hashsalt": "medkit",
        "figure.dpi": 100,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.labelsize": 10,
        "legend.frameon": False,
    }
    sns.set_theme(style="whitegrid", context="notebook", rc=settings)


def save_figure(figure: Figure, folder: Path, name: str, table: pd.DataFrame) -> None:
    """Write `name`.svg, `name`.png and `name`.csv (what was plotted) into `folder`, and close nothing."""
    with atomic_path(folder / f"{name}.svg") as scratch:
        figure.savefig(scratch, format="svg", metadata={"Date": None}, bbox_inches="tight")
    with atomic_path(folder / f"{name}.png") as scratch:
        figure.savefig(scratch, format="png", dpi=150, bbox_inches="tight")
    with atomic_path(folder / f"{name}.csv") as scratch:
        table.to_csv(scratch, index=False)


def plot_intervals(table: pd.DataFrame, value: str, label: str, ax: Axes | None = None) -> Axes:
    """Horizontal points with intervals, a row per variant, n at its label; on `ax`, or on a new figure (None)."""
    ax = ax or plt.subplots(figsize=(SIZE[0], 0.8 + 0.42 * len(table)))[1]
    for y, row in enumerate(table.itertuples()):
        colour, x = VARIANTS[row.variant].colour, getattr(row, value)
        ax.plot([row.ci_low, row.ci_high], [y, y], color=colour, lw=2.5, solid_capstyle="round")
        ax.plot(x, y, "o", color=colour, ms=7)
        ax.annotate(f"{x:.2f}", (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    ax.set_yticks(
        range(len(table)), [f"{VARIANTS[v].label}  (n={n})" for v, n in zip(table.variant, table.n, strict=True)]
    )
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xlabel(label)
    return ax
