"""The figures of notebook 01. Each function draws one figure and saves it, with its table, in `folder`."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from medkit import plotting
from medkit.data.problem_types import LABELS
from medkit.params import SPLITS
from medkit.prompts.templates import LETTERS


def plot_confusions(labelled: pd.DataFrame, folder: Path) -> None:
    """Labels × types by keywords, on the random sample."""
    sample, (figure, ax) = labelled[labelled.drawn == "random"], plt.subplots()
    counts = pd.crosstab(sample.label, sample.keywords).reindex(index=LABELS, columns=LABELS, fill_value=0)
    sns.heatmap(counts, annot=True, fmt="d", cmap="Blues", cbar=False, ax=ax)
    ax.set(title=f"Problem types by keywords (n = {len(sample)})", xlabel="classified as", ylabel="label")
    plotting.save_figure(figure, folder, "problem_types", counts)


def plot_sizes_and_lengths(table: pd.DataFrame, folder: Path) -> None:
    """Questions per source and split, and the distribution of prompt lengths in tokens."""
    order = table.groupby("source").prompt_tokens.median().sort_values().index
    figure, (left, right) = plt.subplots(1, 2, figsize=(1.6 * plotting.SIZE[0], plotting.SIZE[1]), sharey=True)
    counts = pd.crosstab(table.source, table.split).reindex(order, columns=SPLITS, fill_value=0)
    counts.plot.barh(stacked=True, ax=left, colormap="crest", width=0.7)
    left.set(xlabel="questions", ylabel="", title="Sizes by split")
    left.legend(title="")
    sns.boxplot(table, x="prompt_tokens", y="source", order=order, color="#9ecae1", fliersize=2, ax=right)
    right.set(xscale="log", xlabel="tokens in the prompt (log scale)", ylabel="", title="Prompt lengths")
    right.set_xticks([30, 50, 100, 200, 400], ["30", "50", "100", "200", "400"])
    right.minorticks_off()
    plotting.save_figure(figure, folder, "sizes_and_lengths", table[["source", "split", "prompt_tokens"]])


def plot_places_and_subjects(table: pd.DataFrame, folder: Path) -> None:
    """Place of the right answer among the options of test questions, and the subjects of the broadest source."""
    tested = table[(table.answer >= 0) & (table.split == "test") & (table.kind != "abstract")]
    if (several := tested.options.map(len) > 1).any():  # a record has one answer, which has no place
        tested = tested[several]
    places = pd.crosstab(tested.source, tested.answer.map(lambda i: LETTERS[i]), normalize="index")
    exams = table[table.kind == "choice"] if (table.kind == "choice").any() else table
    broadest = exams.groupby("source").subject.nunique().idxmax()
    subjects = table[table.source == broadest].subject.value_counts()
    size = (1.6 * plotting.SIZE[0], 1.2 * plotting.SIZE[1])
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
    if places.empty:  # all are abstracts
        left.set_axis_off()
    else:
        places.plot.barh(stacked=True, ax=left, colormap="crest", width=0.7)
        left.set(xlabel="share of test questions", ylabel="", title="Place of the right answer", xlim=(0, 1))
        left.legend(title="", ncols=places.shape[1], loc="upper center", bbox_to_anchor=(0.5, -0.12))
    subjects.head(15)[::-1].rename(lambda name: name[:40]).plot.barh(ax=right, color="#9ecae1", width=0.7)
    right.set(
        xlabel="questions", ylabel="", title=f"Subjects of {broadest} ({min(15, len(subjects))} of {len(subjects)})"
    )
    plotting.save_figure(figure, folder, "places_and_subjects", tested[["source", "answer", "subject"]])
