"""Two runs side by side: are the accuracies equal, paired differences on common questions, settings that differ."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from medkit.reporting.results import load_results
from medkit.reporting.tables import label, markdown
from medkit.stage import DISCLAIMER, StageError, atomic_path, write_text
from medkit.statistics import paired_difference, verdicts
from medkit.variants import VARIANTS

JUDGED = "06_evaluation/judged.parquet"
KEYS = ["variant", "source", "scoring"]


class Comparison(NamedTuple):
    """Run B against run A. Differences are B − A: above zero, B answers more questions right."""

    name_a: str
    name_b: str
    accuracies: pd.DataFrame
    """KEYS, right_a, n_a, right_b, n_b (questions; missing where one run has none), same (bool)."""
    deltas: pd.DataFrame
    """KEYS, accuracy_a, accuracy_b on the common questions, and the columns of `statistics.verdicts`."""
    differing: pd.DataFrame  # setting (a dotted key of the params, or a library), a, b


def compare(folder_a: Path, folder_b: Path) -> Comparison:
    """Compare two runs' folders, with the confidence, power and margin of A's params.

    Raises StageError if a run lacks results or judged answers, or if no question was answered in both runs.
    """
    facts_a, facts_b = (load_results(folder / "results.json")[1] for folder in (folder_a, folder_b))
    settings = facts_a.get("params", {}).get("evaluation")
    if settings is None:
        raise StageError(f"{folder_a}: its results hold no params; run notebook 06 of this run again")
    a, b = (_read_judged(folder) for folder in (folder_a, folder_b))
    common = a.merge(b.drop(columns="group"), on=[*KEYS, "id"], suffixes=("_a", "_b"), validate="one_to_one")
    if common.empty:
        raise StageError(f"{folder_a.name} and {folder_b.name} have no common question: compare runs on the same data")
    rows = []
    for key, group in common.groupby(KEYS, sort=False):
        sizes = settings["confidence"], settings["power"], group.group
        means = {"accuracy_a": group.correct_a.mean(), "accuracy_b": group.correct_b.mean()}
        paired = paired_difference(group.correct_b, group.correct_a, *sizes)
        rows.append(dict(zip(KEYS, key, strict=True)) | means | paired)
    counts = (t.groupby(KEYS, as_index=False).correct.agg(right="sum", n="count") for t in (a, b))
    accuracies = pd.merge(*counts, on=KEYS, how="outer", suffixes=("_a", "_b"))
    accuracies["same"] = (accuracies.right_a == accuracies.right_b) & (accuracies.n_a == accuracies.n_b)
    deltas = verdicts(pd.DataFrame(rows), settings["confidence"], settings["margin"])
    place = {variant: number for number, variant in enumerate(VARIANTS)}
    deltas = deltas.sort_values(KEYS, key=lambda column: column.map(place) if column.name == "variant" else column)
    keys = ("params", "date", "device", "git_commit", "versions")
    values = (pd.json_normalize({k: facts.get(k) for k in keys}).iloc[0].astype(str) for facts in (facts_a, facts_b))
    differing = pd.concat(values, axis=1, keys=["a", "b"]).fillna("–").query("a != b").rename_axis("setting")
    names = folder_a.name, folder_b.name
    return Comparison(*names, accuracies, deltas.reset_index(drop=True), differing.reset_index())


def _read_judged(folder: Path) -> pd.DataFrame:
    if not (folder / JUDGED).is_file():
        cure = f"`python -m medkit run --run {folder.name} --from 06_evaluation` writes it"
        raise StageError(f"{folder / JUDGED} is missing, so answers cannot be paired: {cure}")
    return pd.read_parquet(folder / JUDGED, columns=[*KEYS, "id", "group", "correct"])


def write_comparison(comparison: Comparison, folder: Path) -> str:
    """Write `comparison.md` and `deltas.csv` into `folder`; returns the text."""
    with atomic_path(folder / "deltas.csv") as scratch:
        comparison.deltas.to_csv(scratch, index=False)
    text = comparison_text(comparison)
    write_text(folder / "comparison.md", text)
    return text


def comparison_text(comparison: Comparison) -> str:
    """The comparison as markdown. It begins with: are all accuracies the same to the digit?"""
    a, b, accuracies = comparison.name_a, comparison.name_b, comparison.accuracies
    both = accuracies.dropna()
    changed = len(both) - int(both.same.sum())
    same = f"All {len(both)} accuracies are the same to the digit."
    if changed:
        same = f"**{changed} of {len(both)} accuracies are not the same.**"
    alone = ", ".join("/".join(row) for row in accuracies[accuracies.isna().any(axis=1)][KEYS].itertuples(index=False))
    counts = ", ".join(f"{count} {verdict}" for verdict, count in comparison.deltas.verdict.value_counts().items())
    rows = [
        [label(r.variant), f"{r.source}, {r.scoring}", f"{r.accuracy_a:.3f}", f"{r.accuracy_b:.3f}",
         f"{r.difference:+.3f} [{r.ci_low:+.3f}, {r.ci_high:+.3f}]", f"{r.n}", f"{r.p_holm:.2g}", r.verdict]
        for r in comparison.deltas.itertuples()
    ]  # fmt: skip
    parts = [
        f"# `{b}` against `{a}`",
        same + (f" Only one of the runs has: {alone}." if alone else ""),
        f"On the questions that both runs answered: {counts} (Holm over all comparisons). {DISCLAIMER}",
        markdown(["variant", "questions", a, b, "difference [interval]", "n", "p (Holm)", "verdict"], rows),
        "## Settings, machines and versions that differ",
        markdown(["what", a, b], comparison.differing.to_numpy().tolist()) or "None.",
    ]
    return "\n\n".join(parts) + "\n"
