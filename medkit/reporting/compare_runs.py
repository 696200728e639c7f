"""Two runs beside each other: answers to the same questions in pairs, costs, and what was set or installed differently.

Reads what both runs wrote and measures nothing. Only questions that both answered are compared: an id is a hash of the
question's content. Times of two runs are never divided by one another, since machine and hour differ; only ratios taken
inside each run stand side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from medkit.plotting import SIZE, save_figure, set_style
from medkit.reporting import tables
from medkit.stage import DISCLAIMER, StageError, atomic_path
from medkit.statistics import paired_difference, verdicts
from medkit.variants import VARIANTS

JUDGED = "06_evaluation/judged.parquet"
KEYS = ["variant", "source", "scoring"]
REFERENCE = "lora"
"""Variant that the costs of a run are divided by: what the compressed ones are made from."""
COSTS = {
    "memory_bytes/weights": ("weights, MB", 1e-6),
    "ttft_s": ("first token, ms", 1e3),
    "latency_s_per_token": ("per further token, ms", 1e3),
}
TIMES = ("ttft_s", "latency_s_per_token")


@dataclass(frozen=True)
class Comparison:
    """What `compare_runs` found. Differences are B − A: above zero, B answers more questions right.

    source, scoring: A's headline, or what has most pairs if that has none. deltas: variant, source, scoring,
    accuracy_a, accuracy_b, and the columns of `statistics.verdicts`. coverage: variant, source, scoring, both, only_a,
    only_b (questions), also where nothing could be paired. costs: claim, variant, a, b, b_over_a (NaN for times),
    ratio_a, ratio_b (over `REFERENCE` in the same run). params, environment: key, a, b, where they differ.
    """

    name_a: str
    name_b: str
    source: str
    scoring: str
    confidence: float
    margin: float
    deltas: pd.DataFrame
    coverage: pd.DataFrame
    costs: pd.DataFrame
    params: pd.DataFrame
    environment: pd.DataFrame


def compare_runs(folder_a: Path, folder_b: Path, confidence: float, power: float, margin: float) -> Comparison:
    """Compare two runs' folders; A is what B is measured against.

    Raises StageError if a run has no results or no judged answers, or if no variant answered the same question in both.
    """
    (claims_a, facts_a), (claims_b, facts_b) = (tables.load_results(f / "results.json") for f in (folder_a, folder_b))
    judged = [_judged(folder) for folder in (folder_a, folder_b)]
    pairs, coverage = _pairs(*judged), _coverage(*judged)
    if pairs.empty:
        raise StageError(
            f"{folder_a.name} and {folder_b.name} have no question in common that the same variant answered in the "
            f"same way: compare runs whose data sections name the same sources"
        )
    source, scoring = _headline(pairs, facts_a)
    return Comparison(
        name_a=folder_a.name,
        name_b=folder_b.name,
        source=source,
        scoring=scoring,
        confidence=confidence,
        margin=margin,
        deltas=_deltas(pairs, confidence, power, margin),
        coverage=coverage,
        costs=_costs(claims_a, claims_b),
        params=_differing(dict(_dotted(facts_a.get("params", {}))), dict(_dotted(facts_b.get("params", {})))),
        environment=_differing(_environment(facts_a), _environment(facts_b)),
    )


# --- answers ---------------------------------------------------------------------------------------------------------


def _judged(folder: Path) -> pd.DataFrame:
    path = folder / JUDGED
    if not path.is_file():
        raise StageError(
            f"{path}: not there, so the run's answers cannot be paired; write it with "
            f"`python -m medkit run --run {folder.name} --from 06_evaluation` and the run's own --params"
        )
    return pd.read_parquet(path, columns=[*KEYS, "id", "group", "correct"])


def _pairs(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    return a.merge(b.drop(columns="group"), on=[*KEYS, "id"], suffixes=("_a", "_b"), validate="one_to_one")


def _headline(pairs: pd.DataFrame, facts: Mapping) -> tuple[str, str]:
    counts = pairs.groupby(["source", "scoring"], sort=False).id.nunique()
    wanted = (facts["headline_source"], facts["headline_scoring"])
    return wanted if wanted in counts.index else counts.idxmax()


def _coverage(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Questions per variant, source and scoring that both runs answered, or one alone."""
    keys = [*KEYS, "id"]
    where = a[keys].merge(b[keys], on=keys, how="outer", indicator="where")
    for name, value in (("both", "both"), ("only_a", "left_only"), ("only_b", "right_only")):
        where[name] = where["where"] == value
    return _ordered(where.groupby(KEYS, as_index=False)[["both", "only_a", "only_b"]].sum())


def _deltas(pairs: pd.DataFrame, confidence: float, power: float, margin: float) -> pd.DataFrame:
    """B − A per variant, source and scoring; Holm runs over all rows."""
    rows = []
    for key, group in pairs.groupby(KEYS, sort=False):
        found = paired_difference(group.correct_b, group.correct_a, confidence, power, group.group)
        means = {"accuracy_a": group.correct_a.mean(), "accuracy_b": group.correct_b.mean()}
        rows.append({**dict(zip(KEYS, key, strict=True)), **means, **found})
    return _ordered(verdicts(pd.DataFrame(rows), confidence, margin))


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """By source and scoring, and inside them in the order in which the method makes the variants."""
    order = table.variant.map({variant: number for number, variant in enumerate(VARIANTS)})
    return (
        table.assign(order=order).sort_values(["source", "scoring", "order"], ignore_index=True).drop(columns="order")
    )


# --- costs, settings, machines ---------------------------------------------------------------------------------------


def _costs(claims_a: pd.DataFrame, claims_b: pd.DataFrame) -> pd.DataFrame:
    costs = pd.merge(
        _ratios(claims_a), _ratios(claims_b), on=["claim", "variant"], how="outer", suffixes=("_a", "_b"), sort=False
    )
    costs = costs.rename(columns={"value_a": "a", "value_b": "b"})
    costs["b_over_a"] = (costs.b / costs.a).where(~costs.claim.isin(TIMES))
    place = costs.claim.map([*COSTS].index) * len(VARIANTS) + costs.variant.map(VARIANTS.index)
    order = place.sort_values().index
    return costs.loc[order, ["claim", "variant", "a", "b", "b_over_a", "ratio_a", "ratio_b"]].reset_index(drop=True)


def _ratios(claims: pd.DataFrame) -> pd.DataFrame:
    rows = claims[claims.claim.isin(COSTS)].drop_duplicates(["claim", "variant"])
    reference = rows[rows.variant == REFERENCE].set_index("claim").value
    return rows[["claim", "variant", "value"]].assign(ratio=rows.value / rows.claim.map(reference))


def _dotted(params: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted key and value of every leaf; lists are leaves."""
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _environment(facts: Mapping) -> dict:
    plain = {key: facts.get(key) for key in ("date", "device", "git_commit")}
    return plain | {f"{name} version": version for name, version in facts.get("versions", {}).items()}


def _differing(a: Mapping, b: Mapping) -> pd.DataFrame:
    keys = [key for key in dict.fromkeys([*a, *b]) if key not in a or key not in b or a[key] != b[key]]
    rows = [(key, *(_say(side[key]) if key in side else "–" for side in (a, b))) for key in keys]
    return pd.DataFrame(rows, columns=["key", "a", "b"])


def _say(value) -> str:
    return "none" if value is None else str(value)


# --- for people ------------------------------------------------------------------------------------------------------


def draw(comparison: Comparison) -> Figure:
    """Paired differences per variant on the headline source, their intervals, the margin, and each verdict."""
    shown = headline(comparison)
    set_style()
    fig, ax = plt.subplots(figsize=(SIZE[0], 1.2 + 0.42 * len(shown)))
    ax.axvspan(-comparison.margin, comparison.margin, color="0.93")
    for y, row in enumerate(shown.itertuples()):
        colour = VARIANTS[row.variant].colour if row.variant in VARIANTS else "0.3"
        ax.plot([row.ci_low, row.ci_high], [y, y], color=colour, lw=2.5, solid_capstyle="round")
        ax.plot(row.difference, y, "o", color=colour, ms=7)
        ax.annotate(row.verdict, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    ax.axvline(0, color="0.4", lw=1)
    ax.set_yticks(range(len(shown)), [f"{_label(r.variant)}  (n={r.n})" for r in shown.itertuples()])
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlabel(
        f"accuracy in {comparison.name_b} minus {comparison.name_a}\n"
        f"{comparison.confidence:.0%} interval of each alone; grey: margin of equivalence, ±{comparison.margin:g}"
    )
    ax.set_title(f"The same questions of {comparison.source}, answered in both runs")
    ax.annotate("after Holm:", (1.01, 1.02), xycoords="axes fraction", va="bottom", fontsize=9, color="0.3")
    return fig


def headline(comparison: Comparison) -> pd.DataFrame:
    """The deltas on the comparison's source and scoring, a row per variant."""
    deltas = comparison.deltas
    mine = deltas[(deltas.source == comparison.source) & (deltas.scoring == comparison.scoring)]
    return mine.reset_index(drop=True)


def text(comparison: Comparison) -> str:
    """The comparison as markdown."""
    a, b, deltas = comparison.name_a, comparison.name_b, comparison.deltas
    counts = deltas.verdict.value_counts()
    elsewhere = deltas[(deltas.source != comparison.source) | (deltas.scoring != comparison.scoring)]
    found = elsewhere[elsewhere.verdict.isin(["better", "worse"])]
    parts = [
        f"# `{b}` against `{a}`",
        f"{len(deltas)} comparisons of a variant on the questions that both runs answered: "
        + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        + f". Holm over all of them; margin of equivalence {comparison.margin:g}. {DISCLAIMER}",
        f"## {comparison.source}, by {comparison.scoring}",
        _deltas_table(headline(comparison), a, b),
        "## Where else a difference was found",
        _deltas_table(found, a, b) if len(found) else "Nowhere.",
        "## Questions",
        _coverage_text(comparison),
        "## Costs",
        _costs_text(comparison),
        "## Settings that differ",
        _differences_text(comparison.params, a, b),
        "## Machine and versions that differ",
        _differences_text(comparison.environment, a, b),
    ]
    return "\n\n".join(parts) + "\n"


def _deltas_table(deltas: pd.DataFrame, a: str, b: str) -> str:
    rows = [
        [
            _label(r.variant),
            r.source,
            r.scoring,
            f"{r.accuracy_a:.3f}",
            f"{r.accuracy_b:.3f}",
            f"{r.difference:+.3f} [{r.ci_low:+.3f}, {r.ci_high:+.3f}]",
            f"{r.gained} / {r.lost}",
            f"{r.n}",
            f"{r.p_holm:.2g}",
            r.verdict,
            f"{r.mde:.3f}",
        ]
        for r in deltas.itertuples()
    ]
    headers = ["variant", "source", "read by", f"right in {a}", f"right in {b}", "difference [interval]"]
    return tables.markdown([*headers, "gained / lost", "n", "p (Holm)", "verdict", "detectable from"], rows)


def _coverage_text(comparison: Comparison) -> str:
    by_source = comparison.coverage.groupby(["source", "scoring"], sort=False)[["both", "only_a", "only_b"]].sum()
    rows = [
        [*key, *(f"{count}" for count in counts)] for key, counts in zip(by_source.index, by_source.values, strict=True)
    ]
    headers = ["source", "read by", "in both", f"only in {comparison.name_a}", f"only in {comparison.name_b}"]
    return "Answers, all variants together; only those in both are compared.\n\n" + tables.markdown(headers, rows)


def _costs_text(comparison: Comparison) -> str:
    a, b = comparison.name_a, comparison.name_b
    rows = []
    for r in comparison.costs.itertuples():
        name, scale = COSTS[r.claim]
        cells = [_number(value * scale, ",.4g") for value in (r.a, r.b)]
        rows.append([name, _label(r.variant), *cells, *(_number(v, ".3f") for v in (r.b_over_a, r.ratio_a, r.ratio_b))])
    headers = [
        "cost",
        "variant",
        a,
        b,
        f"{b} / {a}",
        f"over {VARIANTS[REFERENCE].label} in {a}",
        f"over {VARIANTS[REFERENCE].label} in {b}",
    ]
    warning = (
        "Times of two runs cannot be compared: the machine, its load and the hour differ. The last two columns can, as "
        "each is a ratio inside one run."
    )
    return f"{warning}\n\n{tables.markdown(headers, rows)}"


def _number(value: float, style: str) -> str:
    return "–" if pd.isna(value) else format(value, style)


def _differences_text(table: pd.DataFrame, a: str, b: str) -> str:
    if table.empty:
        return "None, as far as the results tell."
    return tables.markdown(["what", a, b], [[f"`{r.key}`", r.a, r.b] for r in table.itertuples()])


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write `comparison.md`, every delta as `deltas.csv` and the figure into `folder`; returns the text's path."""
    figure = draw(comparison)
    save_figure(figure, folder, "headline_deltas", headline(comparison))
    plt.close(figure)
    with atomic_path(folder / "deltas.csv") as scratch:
        comparison.deltas.to_csv(scratch, index=False)
    with atomic_path(folder / "comparison.md") as scratch:
        scratch.write_text(text(comparison))
    return folder / "comparison.md"


def _label(variant: str) -> str:
    return VARIANTS[variant].label if variant in VARIANTS else variant
