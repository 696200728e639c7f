"""Figures of notebook 04. Each function returns a figure; the notebook saves it with its table."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from medkit import plotting
from medkit.quantization.memory_ledger import COMPONENTS
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
    _write_plain_numbers(ax)
    return figure


def plot_levels(block: torch.Tensor, levels: torch.Tensor) -> Figure:
    """Histogram of a block's weights, divided by the largest, between the sixteen levels of NF4."""
    figure, ax = plt.subplots()
    ax.hist(block.numpy(), bins=40, color="#d9d9d9", label="the block's 64 weights, scaled")
    ax.vlines(levels, 0, 8, color="#084594", lw=1, label="the sixteen levels of NF4")
    ax.set(ylim=(0, 11), xlabel="weight / largest magnitude of the block", ylabel="weights")
    ax.set_title("A real block between NF4's levels")
    ax.legend(loc="upper center", ncols=2)
    return figure


def plot_ledger(ledger: pd.DataFrame) -> Figure:
    """Stacked bars of MB by component, one bar per variant; the dashed line is the student in bf16."""
    table = 1e-6 * ledger.pivot_table(index="variant", columns="component", values="bytes", aggfunc="sum", fill_value=0)
    table = table.loc[ledger.variant.unique(), [c for c in COMPONENTS if c in table]]
    total = table.sum(axis=1)
    figure, ax = plt.subplots(figsize=(plotting.SIZE[0], 3))
    labels = table.rename(index=lambda name: VARIANTS[name].label)
    labels.plot.barh(stacked=True, ax=ax, colormap="viridis", width=0.65)
    ax.axvline(total["student_kd"], color="0.4", ls="--", lw=1)
    for y, mb in enumerate(total):
        ax.annotate(f"{mb:.0f}", (mb, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.invert_yaxis()
    ax.set(xlabel="MB of weights, bf16 where not quantized", ylabel="", title="Memory of the weights")
    ax.set_xlim(right=1.12 * total.max())
    ax.legend(title="", fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_certificates(certificates: pd.DataFrame) -> Figure:
    """KL to the student against the share of its bf16 bytes, one point per quantized variant."""
    figure, ax = plt.subplots()
    middle = (certificates.share.min() + certificates.share.max()) / 2
    for row in certificates.itertuples():
        ax.scatter(row.share, row.kl_nats, color=VARIANTS[row.variant].colour, s=70)
        label = f"{VARIANTS[row.variant].label}\n{row.top1_changed:.1%} of top tokens changed"
        side, offset = ("right", (-8, 0)) if row.share > middle else ("left", (8, 0))
        place = (row.share, row.kl_nats)
        ax.annotate(label, place, offset, textcoords="offset points", fontsize=9, ha=side, va="center")
    ax.set(yscale="log", xlabel="bytes of all weights, share of the student in bf16", ylabel="KL to the student, nats")
    ax.set_title("How far each form is from the student")
    ax.margins(0.1, 0.25)
    _write_plain_numbers(ax)
    return figure


def _write_plain_numbers(ax: Axes) -> None:
    """0.01, 0.02 and 0.05 at a logarithmic y axis, in place of powers of ten."""
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
