"""Figures of notebook 05."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from medkit import plotting
from medkit.inference.torch_engine import SCHEDULERS


def plot_timelines(lines: pd.DataFrame) -> plt.Figure:
    """A panel per scheduler (`workloads.timeline` with a column `engine`): waiting, reading, and a stroke per token."""
    fig, axes = plt.subplots(
        len(SCHEDULERS), sharex=True, figsize=(plotting.SIZE[0], 1.7 * len(SCHEDULERS)), layout="constrained"
    )
    for ax, scheduler in zip(axes, SCHEDULERS, strict=True):
        shown = lines[lines.engine == scheduler]
        for request, tokens in shown.groupby("request"):
            begun, first, last = tokens.begun_s.iloc[0], tokens.time_s.iloc[0], tokens.time_s.iloc[-1]
            ax.barh(request, begun, height=0.62, color="#e5e5e5")
            ax.barh(request, first - begun, left=begun, height=0.62, color="#fdae6b")
            ax.plot([first, last], [request] * 2, color="#6baed6", lw=1, zorder=2)
            ax.vlines(tokens.time_s, request - 0.31, request + 0.31, color="#08519c", lw=1, zorder=3)
        ax.set(yticks=sorted(shown.request.unique()), ylabel="request")
        ax.set_title(f"{scheduler}: done after {shown.time_s.max():.1f} s")
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    axes[-1].set_xlabel("seconds; grey: the request waits, orange: its prompt is read, blue stroke: one token")
    return fig


def plot_throughput(passes: pd.DataFrame) -> plt.Figure:
    """Bars of the median tokens per second by workload and engine, with a point per timed pass."""
    fig, ax = plt.subplots()
    what = {"x": "workload", "y": "throughput_tokens_per_s", "hue": "engine", "ax": ax}
    sns.barplot(passes, estimator="median", errorbar=None, palette=["#bdbdbd", "#6baed6", "#08519c"], **what)
    sns.stripplot(passes, dodge=True, palette=["k"] * passes.engine.nunique(), size=4, legend=False, **what)
    ax.set(xlabel="lengths of the answers", ylabel="generated tokens per second", title="Throughput by scheduling")
    ax.legend(title="")
    return fig
