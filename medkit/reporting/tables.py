"""Markdown tables from the rows of `results.json` and from the results of the benchmarks.

README, docs, the report page, the model card and the command line show them. No number is measured here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from medkit.stage import DISCLAIMER, ROOT
from medkit.variants import VARIANTS

BENCHMARKS = ROOT / "benchmarks"


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    """A markdown table of ready texts; empty text if there are no rows."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) if rows else ""


def label(variant: str) -> str:
    """The variant's name for people."""
    return VARIANTS[variant].label if variant in VARIANTS else variant


def variants_table(columns: Mapping[str, tuple[pd.DataFrame, str, float]]) -> str:
    """Markdown: one row per variant, one column per heading, cells "0.52 [0.47, 0.57]"; "–" where nothing was measured.

    `columns`: heading → (rows of results, number format, factor on the numbers). Columns without rows are left out.
    """
    present = {head: rows.drop_duplicates("variant").set_index("variant") for head, (rows, *_) in columns.items()}
    present = {head: rows for head, rows in present.items() if len(rows)}
    rows = []
    names = dict.fromkeys(variant for column in present.values() for variant in column.index)
    for variant in sorted(
        names, key=lambda name: [*VARIANTS].index(name) if name in VARIANTS else -1
    ):  # baselines first
        cells = []
        for head, column in present.items():
            _, style, factor = columns[head]
            numbers = (
                [column.loc[variant, c] for c in ("value", "ci_low", "ci_high")] if variant in column.index else []
            )
            value, *interval = [f"{x * factor:{style}}" for x in numbers if not pd.isna(x)] or ["–"]
            cells.append(f"{value} [{', '.join(interval)}]" if interval else value)
        rows.append([label(variant), *cells])
    return markdown(["variant", *present], rows)


def _by_source(results: pd.DataFrame, name: str, heading: str, style: str) -> dict:
    """Columns for `variants_table`: one for each source of the results `<name>/<source>`, n in the heading."""
    rows = results[results.result.str.startswith(f"{name}/")]
    return {
        f"{heading.format(result.split('/')[1])}<br>n = {group.n.max():.0f}": (group, style, 1)
        for result, group in rows.groupby("result", sort=False)
    }


def accuracy_table(results: pd.DataFrame, scoring: str, name: str = "accuracy") -> str:
    """Markdown: accuracy of each variant on each test source, with intervals."""
    return variants_table(_by_source(results[results.metric == scoring], name, "{}", ".2f"))


def steps_table(results: pd.DataFrame, source: str, scoring: str) -> str:
    """Markdown: each step of the method on one source: paired difference, n, adjusted p, verdict, detectable effect."""
    table = results[(results.result == f"accuracy_delta/{source}") & (results.metric == scoring)]
    rows = [
        [f"{label(row.baseline)} → {label(row.variant)}", f"{row.value:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]",
         f"{row.n:.0f}", f"{row.p_holm:.2g}", row.verdict, f"{row.mde:.3f}"]
        for row in table.itertuples()
    ]  # fmt: skip
    return markdown(["step", "difference [interval]", "n", "p (Holm)", "verdict", "detectable from"], rows)


def cost_table(results: pd.DataFrame) -> str:
    """Markdown: bytes of weights, time to first token and time per token of each variant, and how it was timed."""
    columns = {
        heading: (results[results.result == name], style, factor)
        for heading, name, style, factor in (
            ("weights, MB", "memory_bytes/weights", ".1f", 1e-6),
            ("first token, ms", "ttft_s", ".1f", 1e3),
            ("per further token, ms", "latency_s_per_token", ".2f", 1e3),
        )
    }
    table, timed = variants_table(columns), results[results.result == "latency_s_per_token"]
    if timed.empty:
        return table
    first = timed.iloc[0]
    others = "".join(
        f", {label(row.variant)} by {row.metric}" for row in timed[timed.metric != first.metric].itertuples()
    )
    return (
        f"{table}\n\nTimed on {first.requests:.0f} requests, one at a time, with {first.prompt_tokens:.0f} prompt "
        f"tokens and {first.output_tokens:.0f} new tokens in all, after a discarded warm-up; medians of {first.n:.0f} "
        f"repeats, by {first.metric}{others}."
    )


def calibration_table(results: pd.DataFrame, source: str, scoring: str) -> str:
    """Markdown: does a variant's confidence mean anything? Lower is better, except for accuracy."""
    rows = results[results.metric == scoring]
    return variants_table(
        {
            heading: (rows[rows.result == f"{name}/{source}"], style, 1)
            for heading, name, style in (
                ("expected calibration error", "ece", ".3f"),
                ("Brier score", "brier", ".3f"),
                ("area under risk–coverage", "aurc", ".3f"),
                ("accuracy without the least sure fifth", "accuracy_at_80", ".2f"),
            )
        }
    )


def robustness_table(results: pd.DataFrame) -> str:
    """Markdown: do answers depend on the order of the options, or on the name that a drug is given?"""
    return variants_table(
        {
            **_by_source(results, "shuffle_consistency", "same answer in other orders, {}", ".2f"),
            **_by_source(results, "swap_drop", "change of accuracy under another drug name, {}", "+.3f"),
        }
    )


def safety_table(results: pd.DataFrame) -> str:
    """Markdown: share of probes whose safe answer is likelier than the unsafe one, by category; chance is 0.5."""
    scored = results[results.metric == "option_text_norm"]
    return variants_table(_by_source(scored, "safe_share", "{}", ".2f"))


def energy_table(results: pd.DataFrame) -> str:
    """Markdown: energy and price of 1,000 answers and of one correct answer."""
    return variants_table(
        {
            heading: (results[results.result == name], ",.3g", 1)
            for heading, name in (
                ("Wh per 1,000 answers", "energy_wh_per_1000_answers"),
                ("Wh per correct answer", "energy_wh_per_correct_answer"),
                ("price of 1,000 answers", "cost_per_1000_answers"),
                ("price of a correct answer", "cost_per_correct_answer"),
            )
        }
    )


def run_tables(results: pd.DataFrame, facts: Mapping) -> dict[str, str]:
    """Title → markdown of every table that the run has results for."""
    source, scoring = facts["headline_source"], facts["headline_scoring"]
    tables = {
        f"Accuracy, scored by {scoring.replace('_', ' ')}": accuracy_table(results, scoring),
        "Accuracy without test questions that resemble a training question": accuracy_table(
            results, scoring, "accuracy_clean"
        ),
        f"Each step against the variant it starts from, on {source}": steps_table(results, source, scoring),
        "Cost": cost_table(results),
        f"Calibration on {source}": calibration_table(results, source, scoring),
        "Robustness": robustness_table(results),
        "Safety probe: share of probes whose safe answer is likelier": safety_table(results),
        "Energy and price (estimates)": energy_table(results),
    }
    return {title: table for title, table in tables.items() if table}


def provenance_line(facts: Mapping) -> str:
    """One sentence: which run, where, when, and the disclaimer."""
    return f"Run `{facts['run']}` on {facts['device']}, {facts['date']}. {DISCLAIMER}"


# --- benchmarks ------------------------------------------------------------------------------------------------------


def load_benchmarks(name: str = "", folder: Path = BENCHMARKS) -> list[dict]:
    """The committed results of all benchmarks, or of those whose name starts with `name`, in the order of names."""
    contents = [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]
    contents = [c for c in contents if "ratios" in c and c["name"].startswith(name)]
    return sorted(contents, key=lambda content: content["name"])


def benchmarks_table(benchmarks: Sequence[dict], goals_only: bool = False) -> str:
    """Markdown: every ratio of the benchmarks beside its goal, or only the ratios that have a goal."""
    rows = []
    for content in benchmarks:
        for what, ratio in content["ratios"].items():
            higher, goal, value = ratio["better"] == "higher", ratio["goal"], ratio["value"]
            if goal is None and not goals_only:
                rows.append([content["name"], content["device"], f"`{what}`", f"{value:.2f}", "", "–"])
            elif goal is not None:
                met = "yes" if (value >= goal if higher else value <= goal) else "no"
                sign = "≥" if higher else "≤"
                rows.append([content["name"], content["device"], f"`{what}`", f"{value:.2f}", f"{sign} {goal:g}", met])
    return markdown(["benchmark", "device", "ratio", "measured", "goal", "met"], rows)


def ablation_table(benchmarks: Sequence[dict]) -> str:
    """Markdown: students without one part of distillation, the difference to the full recipe, and whether it helps."""
    table = next((c["raw"]["table"] for c in benchmarks if c["name"] == "ablation" and "raw" in c), [])
    by_row = {(row["row"], row["metric"]): row for row in table}
    rows = []
    for name in dict.fromkeys(row["row"] for row in table):
        cells = [name]
        for metric, below, above in (("valid_nll", "helps", "harms"), ("accuracy", "harms", "helps")):
            row = by_row[name, metric]
            low, high = row["ci_low"], row["ci_high"]
            verdict = below if high < 0 else above if low > 0 else "not detectable"
            difference = f"{row['full_minus_row']:+.3f} [{low:+.3f}, {high:+.3f}] {verdict}"
            cells += [f"{row['mean']:.3f} ± {row['std_over_seeds']:.3f}", "–" if name == "full" else difference]
        rows.append(cells)
    return markdown(["student", "validation loss, nats", "full minus it", "accuracy", "full minus it"], rows)


def plans_table(estimates: Mapping[str, Sequence]) -> str:
    """Markdown: how much memory each quantization plan needs, from shapes alone.

    `estimates`: model → what `memory_budget.estimate_presets` gives. One row per plan, with the cache in bf16.
    """
    headers, columns = ["plan"], []
    for model, of_model in estimates.items():
        headers += [f"{model}:<br>stored, GiB", "total, GiB", "below bf16"]
        columns.append({e.plan: e for e in of_model})
    rows = []
    for plan in columns[0]:
        cells = []
        for column in columns:
            e, bf16 = column[plan], column["bf16"]
            below = "–" if plan == "bf16" else f"{100 * (1 - e.total / bf16.total):.1f} %"
            cells += [f"{(e.weights + e.scales) / 2**30:.2f}", f"{e.total / 2**30:.2f}", below]
        rows.append([f"`{plan}`", *cells])
    return markdown(headers, rows)
