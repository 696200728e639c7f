"""Tables and figures of notebook 03."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from medkit import plotting


def tabulate_spectrum(values_by_module: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """Singular values as rows: layer, kind, direction (from 1), value, and its share of the module's squared values."""
    rows = [
        {"layer": name.split("layers.")[1].split(".")[0], "kind": name.rsplit(".", 1)[-1], "direction": i, "value": v}
        for name, values in values_by_module.items()
        for i, v in enumerate(values.tolist(), 1)
    ]
    table = pd.DataFrame(rows)
    energy = table.groupby(["layer", "kind"]).value.transform(lambda values: (values**2).sum())
    return table.assign(share=table.value**2 / energy)


def plot_spectrum(spectrum: pd.DataFrame) -> Figure:
    """Energy in the largest directions by kind of module: the median over layers, and a band from 10 to 90 %."""
    energy = spectrum.assign(energy=spectrum.groupby(["layer", "kind"]).share.cumsum())
    quantiles = energy.groupby(["kind", "direction"], sort=False).energy.quantile([0.1, 0.5, 0.9]).unstack()
    figure, ax = plt.subplots()
    kinds = spectrum.kind.unique()
    for kind, colour in zip(kinds, plt.cm.viridis(np.linspace(0, 0.85, len(kinds))), strict=True):
        band = quantiles.loc[kind]
        ax.plot(band.index, band[0.5], "o-", ms=4, color=colour, label=kind)
        ax.fill_between(band.index, band[0.1], band[0.9], color=colour, alpha=0.12)
    ranks = np.arange(1, spectrum.direction.max() + 1)
    ax.plot(ranks, ranks / len(ranks), "--", color="grey", label="all equal")
    title = "Energy of the update in its largest directions, median of layers (band: 10 to 90 %)"
    ax.set(xlabel="directions kept", ylabel="share of the squared singular values", title=title, ylim=(0, 1.02))
    ax.legend()
    return figure


def plot_changes(table: pd.DataFrame, value: str, labels: Sequence[str], colours: Sequence[str], title: str) -> Figure:
    """Paired differences of the loss with their intervals (`ci_low`, `ci_high`), one row of the table below another."""
    figure, ax = plt.subplots(figsize=(plotting.SIZE[0], 0.8 + 0.42 * len(table)))
    spread = [table[value] - table.ci_low, table.ci_high - table[value]]
    ax.errorbar(table[value], table.index, xerr=spread, fmt="none", ecolor=colours, lw=2.5)
    ax.scatter(table[value], table.index, color=colours, zorder=3)
    ax.axvline(0, color="grey", lw=1)
    ax.set_yticks(table.index, labels)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set(xlabel="nats per token, paired, 95 % interval", title=title)
    return figure
