"""Figures of notebook 02. Each function draws one and returns it with the table of what it shows."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from medkit.distillation.teacher_cache import TeacherCache
from medkit.plotting import SIZE, plot_intervals
from medkit.statistics import gap_closed, mean_intervals
from medkit.variants import FINAL, VARIANTS

Drawn = tuple[Figure, pd.DataFrame]
THINKERS = {  # model of benchmarks/training/thinking.py → label, colour
    "teacher": ("teacher", "#7f7f7f"),
    "with_thoughts": ("student with thoughts", "#d55e00"),
    "equal_tokens": ("student without thoughts, equal tokens", "#0072b2"),
    "equal_examples": ("student without thoughts, equal examples", "#56b4e9"),
}


def plot_directions(
    place: Sequence[float], teacher: Sequence[float], best: Mapping[float, Sequence[float]], between: Sequence[float]
) -> Drawn:
    """A teacher with two peaks, and the best student with one, by β; on the right the mass between the peaks."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(SIZE[0], 3.2), gridspec_kw={"width_ratios": [3, 2], "wspace": 0.3})
    table = pd.DataFrame({"place": place, "teacher": teacher, "forward_kl": best[0.0], "reverse_kl": best[1.0]})
    left.fill_between(table.place, table.teacher, color="#d9d9d9", label="teacher")
    left.plot(table.place, table.forward_kl, color="#0072b2", label="forward KL")
    left.plot(table.place, table.reverse_kl, color="#d55e00", label="reverse KL")
    left.set(xlabel="token, 81 in a row", ylabel="probability", ylim=(0, None), xticks=[])
    left.set_title("One peak for two: cover both or choose one")
    left.legend(fontsize=9)
    right.plot(list(best), between, "o-", color="#cc79a7", ms=4)
    right.set(xlabel="β", ylabel="probability between the peaks", ylim=(0, None), title="JSD changes with β")
    return fig, table


def plot_kept_mass(cache: TeacherCache) -> Drawn:
    """How much probability the k most likely tokens hold, by k: quantiles over the cached positions."""
    count = cache.index["num_examples"]
    mass = torch.cat([cache.example(n)["teacher_logprobs"] for n in range(count)]).exp().cumsum(-1).numpy()
    table = pd.DataFrame(np.quantile(mass, [0.05, 0.25, 0.5], axis=0).T, columns=["5 %", "25 %", "50 %"])
    table.insert(0, "k", range(1, len(table) + 1))
    colours = ["#9ecae1", "#4292c6", "#084594"]
    ax = table.plot(x="k", logx=True, color=colours, xlabel="k, tokens kept (log scale)", ylabel="probability kept")
    ax.set(ylim=(0, 1.02), title=f"Probability of the teacher's k most likely tokens  (n = {len(mass):,} positions)")
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500) if k <= len(table)]
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    ax.legend(title="quantile of positions")
    return ax.figure, table


def plot_blocks(distances: Sequence[float], kept: Sequence[int]) -> Drawn:
    """How much each block of layers turns the hidden state (`measure_blocks`), and the block that goes."""
    table = pd.DataFrame({"first_layer": range(len(distances)), "distance": distances})
    first = next((layer for layer in table.first_layer if layer not in kept), None)
    table["removed"] = table.first_layer == first
    fig, ax = plt.subplots()
    ax.bar(table.first_layer, table.distance, color=np.where(table.removed, "#cb181d", "#9ecae1"))
    ax.set(xlabel="first layer of the block", ylabel="angle between input and output, 1 = 180°")
    ax.set_title(f"Red: the block that is removed, the one that changes least; {len(kept)} layers stay")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return fig, table


def plot_spans(sizes: Sequence[tuple[int, int, int]]) -> Drawn:
    """How two tokenizers cut the same answers: the share of bytes by tokens in a span (`measure_spans`)."""
    spans = pd.DataFrame(sizes, columns=["student", "teacher", "bytes"])
    shares = spans.groupby(["student", "teacher"]).bytes.sum() / spans.bytes.sum()
    table = shares.rename("share").nlargest(8).reset_index()
    fig, ax = plt.subplots()
    ax.bar(table.student.astype(str) + " : " + table.teacher.astype(str), table.share, color="#4292c6")
    ax.set(xlabel="tokens in a span, student : teacher", ylabel="share of the bytes in the answers")
    ax.set_title(f"How the two tokenizers cut the same answers  (n = {len(spans):,} spans)")
    return fig, table


def plot_curves(history: Mapping[str, pd.DataFrame]) -> Drawn:
    """The CE term of each training, and the divergence of student_kd: means over five steps, nats per token."""
    log = pd.concat([table.assign(run=name) for name, table in history.items()], ignore_index=True)
    fig, ax = plt.subplots()
    for name, table in history.items():
        variant = VARIANTS[name]
        ax.plot(table.step, table.ce.rolling(5, min_periods=1).mean(), color=variant.colour, label=variant.label)
        for term in {"forward_kl", "reverse_kl", "jsd", "span_kl"} & set(table):
            curve, label = table[term].rolling(5, min_periods=1).mean(), f"its {term.replace('_', ' ')}"
            ax.plot(table.step, curve, color=variant.colour, ls=":", label=label)
    ax.set(xlabel="optimiser step", ylabel="nats per predicted token", title="Training loss", ylim=(0, None))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return fig, log


def plot_closing(scores: Mapping[str, pd.DataFrame], confidence: float) -> tuple[Figure, pd.DataFrame, pd.DataFrame]:
    """Per task the mean score of each model on validation rows; the title says how much of the gap student_kd closes.

    scores: by variant a table of `evaluation.score_questions` of the same questions. Returns the figure, the means
    (variant, source, score, ci_low, ci_high, n), and by task the gap between student_ce and teacher with the share that
    is closed (`statistics.gap_closed`). Intervals are bootstraps over groups of questions.
    """
    table, means, shares = pd.concat(scores.values(), ignore_index=True), [], []
    size = (SIZE[0], 1.2 + 0.35 * len(scores))
    fig, axes = plt.subplots(1, table.source.nunique(), figsize=size, sharey=True, squeeze=False)
    for ax, (task, part) in zip(axes[0], table.groupby("source", sort=False), strict=True):
        by_id = part.pivot(index=["id", "group"], columns="variant", values="score")[list(scores)]
        groups = by_id.index.get_level_values("group")
        low, high = mean_intervals(by_id.to_numpy(), groups, confidence)
        columns = {"score": by_id.mean().to_numpy(), "ci_low": low, "ci_high": high, "n": len(by_id)}
        means.append(pd.DataFrame({"variant": list(scores), "source": task, **columns}))
        plot_intervals(means[-1], "score", f"score on {task}  (n = {len(by_id)})", ax)
        ax.set(yticklabels=[VARIANTS[name].label for name in scores], ylim=(len(scores) - 0.4, -0.8))
        closed = gap_closed(*(by_id[name] for name in ("student_ce", "student_kd", "teacher")), groups, confidence)
        shares.append({"source": task, **closed})
        share = f"{closed['share']:.0%} [{closed['ci_low']:.0%}, {closed['ci_high']:.0%}] of the gap closed"
        ax.set_title("no gap shown" if np.isnan(closed["share"]) else share, loc="left")
    return fig, pd.concat(means, ignore_index=True), pd.DataFrame(shares)


def plot_thinking(measured: Mapping) -> Drawn:
    """Accuracy over the tokens that a model writes, thought and answer: a point for each budget.

    measured: the committed result of benchmarks/training/thinking.py.
    """
    table = pd.DataFrame(measured["accuracy"])
    table["written"] = table.thinking_tokens + table.answer_tokens
    fig, ax = plt.subplots()
    for model, rows in table.groupby("model", sort=False):
        ends = (rows.accuracy - rows.ci_low, rows.ci_high - rows.accuracy)
        label, colour = THINKERS[model]
        ax.errorbar(rows.written, rows.accuracy, ends, fmt="o-", capsize=3, color=colour, label=label)
        for row in rows[rows.budget > 0].itertuples():
            ax.annotate(f"{row.budget}", (row.written, row.accuracy), (5, 5), textcoords="offset points", fontsize=9)
    ax.set(xlabel="tokens written per question, thought and answer", ylabel="accuracy, 21 chapters", ylim=(0, None))
    ax.set_title(f"Numbers: the budget of the thought, in tokens  (n = {table.n.max()} questions)")
    ax.legend()
    return fig, table


def plot_gains(measured: Mapping) -> Drawn:
    """What distillation adds to labels alone, with its interval: a point for each number of labels and kind of teacher.

    measured: the committed result of benchmarks/training/ablation.py whose name is `ablation_dials`.
    """
    table = pd.DataFrame(measured["table"])
    table = table[table.task == table.task.iloc[0]]  # the first task has as many options as a test question
    alone = table[table.student == "labels alone"].set_index("setup")["mean"]
    table = table[table.student == "distilled"].rename(columns={"mean": "score"}).reset_index(drop=True)
    table["alone"] = table.setup.map(alone)
    fig, ax = plt.subplots(figsize=(SIZE[0], 3.6))
    ends = (table.difference - table.ci_low, table.ci_high - table.difference)
    ax.axhline(0, color="#777777", lw=1)
    ax.errorbar(table.index, table.difference, ends, fmt="o", capsize=3, color=VARIANTS[FINAL].colour)
    for row in table.itertuples():
        text = f"{row.alone:.2f} → {row.score:.2f}"
        ax.annotate(text, (row.Index, row.difference), (8, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set(xlim=(-0.4, len(table) - 0.4), xticks=table.index, xticklabels=table.setup.str.replace(", ", "\n"))
    ax.set_ylabel("gain of distillation, accuracy")
    ax.set_title(f"Labels alone → distilled student  (n = {table.n.max()} questions)")
    return fig, table
