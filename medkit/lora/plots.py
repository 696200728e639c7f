"""Tables and figures of notebook 03."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from medkit import plotting
from medkit.variants import VARIANTS


def plot_rates(rates: pd.DataFrame, title: str) -> Figure:
    """`evaluation.measure_records` of one source: a group of bars per metric, a bar with its interval per variant."""
    figure, ax = plt.subplots()
    metrics, variants = rates.metric.unique(), rates.variant.unique()
    width = 0.8 / len(variants)
    for i, name in enumerate(variants):
        part = rates[rates.variant == name].set_index("metric").loc[metrics].fillna(0)
        at, spread = np.arange(len(metrics)) + i * width, [part.value - part.ci_low, part.ci_high - part.value]
        look = VARIANTS[name]
        ax.bar(at, part.value, width, yerr=spread, color=look.colour, label=look.label, error_kw={"lw": 1.5})
    ax.set_xticks(np.arange(len(metrics)) + 0.4 - width / 2, [metric.replace("_", "\n") for metric in metrics])
    ax.set(ylabel="share", ylim=(0, 1.02), title=title)
    ax.legend(ncols=len(variants), loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def tabulate_spectrum(values_by_module: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """Singular values as rows: layer, kind, direction (from 1), value, and its share of the module's squared values."""
    rows = [
        {"layer": name.split("layers.")[1].split(".")[0], "kind": name.rsplit(".", 1)[-1], "direction": i, "value": v}
        for name, values in values_by_module.items()
        for i, v in enumerate(values.tolist(), 1)
    ]
    table = pd.DataFrame(rows)
    energy = table.groupby(["layer", "kind"]).value.transform(lambda values: (values**2).sum())
    return table.assign(share=(table.value**2 / energy).fillna(0))  # no update: no energy


def plot_spectrum(spectrum: pd.DataFrame) -> Figure:
    """Energy in the largest directions by kind of module, median over layers."""
    energy = spectrum.assign(energy=spectrum.groupby(["layer", "kind"]).share.cumsum())
    figure, ax = plt.subplots()
    kinds = energy.pivot_table("energy", "direction", "kind", "median", sort=False)
    kinds.plot(ax=ax, style="o-", ms=4, colormap="viridis")
    ax.plot(kinds.index, kinds.index / len(kinds), "--", color="grey", label="all equal")
    title = "Energy of the update in its largest directions, median of layers"
    ax.set(xlabel="directions kept", ylabel="share of the squared singular values", title=title, ylim=(0, 1.02))
    ax.legend()
    return figure


def plot_changes(changes: pd.DataFrame, title: str) -> Figure:
    """Changes of the loss (`nll_change`) of NF4 models with their intervals, one row of the table below another."""
    figure, ax = plt.subplots(figsize=(plotting.SIZE[0], 0.8 + 0.42 * len(changes)))
    spread = [changes.nll_change - changes.ci_low, changes.ci_high - changes.nll_change]
    ax.errorbar(changes.nll_change, changes.index, xerr=spread, fmt="o", color=VARIANTS["nf4"].colour, lw=2.5)
    ax.axvline(0, color="grey", lw=1)
    labels = [f"{row.model} ({row.top1_changed:.1%} of top tokens changed)" for row in changes.itertuples()]
    ax.set_yticks(changes.index, labels)
    ax.set_ylim(len(changes) - 0.4, -0.6)
    ax.set(xlabel="nats per token, paired, 95 % interval", title=title)
    return figure
