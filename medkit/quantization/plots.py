"""Figures of notebook 04. Each function returns a figure; the notebook saves it with its table."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from medkit import plotting
from medkit.variants import VARIANTS


def plot_sensitivity(sensitivity: pd.DataFrame) -> Figure:
    """Heat map of the KL of single modules in NF4, with the sum of each layer in the last row."""
    nf4 = sensitivity[sensitivity.scheme == "nf4"]
    grid = 1e3 * nf4[nf4.layer.notna()].pivot(index="kind", columns="layer", values="kl_nats")
    grid.loc["whole layer"] = grid.sum()
    outside = ", ".join(f"{row.kind} {1e3 * row.kl_nats:.0f}" for row in nf4[nf4.layer.isna()].itertuples())
    figure, ax = plt.subplots(figsize=(9, 3.2))
    sns.heatmap(grid, norm=LogNorm(), cmap="rocket_r", ax=ax, cbar_kws={"label": "KL in NF4, 10⁻³ nats"})
    ax.axhline(len(grid) - 1, color="w", lw=4)
    ax.set(xlabel="decoder layer", ylabel="", title=f"Sensitivity of each module (outside the layers: {outside})")
    return figure


def plot_plans(plans: pd.DataFrame, calibrated_kl: float, positions: int) -> Figure:
    """KL of whole plans against their bytes. The first plan is ours; `calibrated_kl` is its KL with GPTQ rounding."""
    figure, ax = plt.subplots()
    for row in plans.itertuples():
        colour = "#08519c" if row.Index == 0 else "#bdbdbd" if row.plan.startswith("random") else "#6baed6"
        ax.scatter(row.share, row.kl_nats, color=colour, s=60)
        if row.plan not in ("random_1", "random_2"):
            place = (row.share, row.kl_nats)
            ax.annotate(row.plan.removesuffix("_0"), place, (6, 4), textcoords="offset points", fontsize=9)
    place = (plans.share[0], calibrated_kl)
    ax.scatter(*place, color=VARIANTS["plan"].colour, edgecolor="k", marker="D", s=80)
    ax.annotate("plan, calibrated", place, (6, 4), textcoords="offset points", fontsize=9)
    ax.set(yscale="log", xlabel="bytes of all weights, share of bf16", ylabel=f"KL, nats ({positions} positions)")
    ax.set_title("KL to the unquantized student against bytes")
    return figure


def plot_ledger(megabytes: pd.DataFrame) -> Figure:
    """Stacked bars of MB by component (columns), one bar per variant (rows); the dashed line is the student in bf16."""
    total = megabytes.sum(axis=1)
    figure, ax = plt.subplots(figsize=(plotting.SIZE[0], 3))
    labels = megabytes.rename(index=lambda name: VARIANTS[name].label)
    labels.plot.barh(stacked=True, ax=ax, colormap="viridis", width=0.65)
    ax.axvline(total["lora"], color="0.4", ls="--", lw=1)
    for y, mb in enumerate(total):
        ax.annotate(f"{mb:.0f}", (mb, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.invert_yaxis()
    ax.set(xlabel="MB of weights, bf16 where not quantized", ylabel="", title="Memory of the weights")
    ax.set_xlim(right=1.12 * total.max())
    ax.legend(title="", fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
