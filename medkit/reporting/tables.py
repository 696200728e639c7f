"""Markdown tables from the rows of `results.json` and from the results of the benchmarks.

README, docs, the report page, the model card and the command line show them. No number is measured here.
"""

import json
from collections.abc import Mapping, Sequence

import pandas as pd

from medkit.stage import ROOT
from medkit.variants import VARIANTS

STEP = ["result", "variant", "baseline"]
CLAIMED = [("teacher", "student_ce"), ("student_kd", "student_ce"), ("student_kd", "student_hard"),
           ("student_kd", "tfidf"), ("student_kd", "regex"), ("lora", "student_kd"), ("edge_lora", "lora"),
           ("plan", "nf4")]  # fmt: skip


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    """A markdown table of ready texts; empty text if there are no rows."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) if rows else ""


def rows_table(rows: Sequence[Mapping], columns: Mapping[str, str]) -> str:
    """A markdown table of `rows`; `columns`: heading → a format string over the keys of a row, as "{share:.1%}"."""
    return markdown(list(columns), [[style.format_map(row) for style in columns.values()] for row in rows])


def label(variant: str) -> str:
    """The variant's name for people."""
    return VARIANTS[variant].label if variant in VARIANTS else variant


def difference(row) -> str:
    """The value of a comparison with its interval, e.g. "+0.193 [+0.148, +0.237]"."""
    return f"{row.value:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"


def variants_table(results: pd.DataFrame, columns: Sequence[tuple[str, str, str, float]]) -> str:
    """Markdown: one row per variant, cells "0.52 [0.47, 0.57]"; "–" where nothing was measured.

    `columns`: (heading, result, number format, factor on the numbers). A result like `accuracy/*` gives one column for
    each source, with n in its heading. Columns without rows are left out.
    """
    heads, cells, order = [], {}, {name: place for place, name in enumerate(VARIANTS)}
    for heading, name, style, factor in columns:
        many = name.endswith("*")
        rows = results[results.result.str.startswith(name[:-1]) if many else results.result == name]
        for result, group in rows.groupby("result", sort=False):
            heads.append(f"{heading.format(result.split('/')[1])}<br>n = {group.n.max():.0f}" if many else heading)
            group = group.drop_duplicates("variant")
            for row in group.to_dict("records"):
                numbers = [row[name] for name in ("value", "ci_low", "ci_high") if pd.notna(row[name])]
                value, *interval = [f"{number * factor:{style}}" for number in numbers]
                cell = f"{value} [{', '.join(interval)}]" if interval else value
                cell += f", n = {row['n']:.0f}" if row["n"] < group.n.max() else ""
                if row.get("at_chance") is True:
                    cell += ", at chance"
                elif interval and row["ci_high"] < (row.get("chance") or 0):
                    cell += ", below chance"
                cells.setdefault(row["variant"], {})[heads[-1]] = cell
    variants = sorted(cells, key=lambda name: order.get(name, -1))  # baselines first
    return markdown(["variant", *heads], [[label(v), *(cells[v].get(h, "–") for h in heads)] for v in variants])


def steps_table(results: pd.DataFrame, source: str, scoring: str, name: str = "accuracy_delta") -> str:
    """Markdown: each step of the method on one source: paired difference, n, adjusted p, verdict, detectable effect."""
    table = results[(results.result == f"{name}/{source}") & (results.metric == scoring)]
    rows = [
        [f"{label(row.baseline)} → {label(row.variant)}", difference(row), f"{row.n:.0f}", f"{row.p_holm:.2g}",
         row.verdict, f"{row.mde:.3f}"]
        for row in table.itertuples()
    ]  # fmt: skip
    return markdown(["step", "difference [interval]", "n", "p (Holm)", "verdict", "detectable from"], rows)


def certificates_table(results: pd.DataFrame) -> str:
    """Markdown: what each compressed variant was shown to have kept, and how many questions would show it."""
    rows = []
    for row in results[results.result.str.startswith("certificate/")].itertuples():
        drift = results[(results.variant == row.variant) & results.result.isin(["kl_nats", "top1_changed"])]
        drift = drift.set_index("result").value
        shown = f"not shown; {row.n_needed:,.0f} needed if nothing is lost" if row.n_needed > row.n else "not shown"
        rows.append([
            f"{label(row.variant)}, {row.result.split('/')[1]}",
            difference(row), f"{row.n:.0f}", f"{row.gained:.0f} / {row.lost:.0f}", f"{row.margin:g}",
            f"{row.p_equivalence_holm:.2g}",
            "equivalent" if row.within_margin else shown,
            *(f"{drift[name]:{style}}" if name in drift else "–" for name, style in
              (("kl_nats", ".4f"), ("top1_changed", ".1%"))),
        ])  # fmt: skip
    headings = ["variant, questions", "difference [interval]", "n", "gained / lost", "margin", "p (Holm)", "within it?"]
    return markdown([*headings, "KL, nats", "top token changed"], rows)


def cost_table(results: pd.DataFrame, facts: Mapping) -> str:
    """Markdown: bytes of weights, time to first token and time per token of each variant, and how it was timed."""
    columns = [
        ("weights, MB (bfloat16 where not quantised)", "memory_bytes/weights", ".1f", 1e-6),
        ("first token, ms", "ttft_s", ".1f", 1e3),
        ("per further token, ms", "latency_s_per_token", ".2f", 1e3),
    ]
    table, timed = variants_table(results, columns), results[results.result == "latency_s_per_token"]
    if timed.empty:
        return table
    first = timed.iloc[0]
    stored = f" In transformers the weights are in {facts['dtype']}." if "dtype" in facts else ""
    others = [f", {label(row.variant)} by {row.metric}" for row in timed.itertuples() if row.metric != first.metric]
    return (
        f"{table}\n\nTimed on {first.requests:.0f} requests, one at a time, with {first.prompt_tokens:.0f} prompt "
        f"tokens and {first.output_tokens:.0f} new tokens in all, after a discarded warm-up; medians and ranges of "
        f"{first.n:.0f} repeats, by {first.metric}{''.join(others)}.{stored}"
    )


def run_tables(results: pd.DataFrame, facts: Mapping) -> dict[str, str]:
    """Title → markdown of every table that the run has results for."""
    source, scoring = facts["headline_source"], facts["headline_scoring"]
    scored, safety = results[results.metric == scoring], results[results.metric == "option_text_norm"]
    is_exam = scored.result.str.startswith("accuracy/") & (scored.result != f"accuracy/{source}")
    records = [
        ("F1 of the fields, {}", "field_f1/*", ".2f", 1),
        ("whole record right, {}", "exact/*", ".2f", 1),
        ("invented values, {}", "invented/*", ".3f", 1),
        ("missing values, {}", "missing/*", ".3f", 1),
        ("empty fields left empty, {}", "left_empty/*", ".2f", 1),
    ]
    calibration = [
        ("expected calibration error", f"ece/{source}", ".3f", 1),
        ("Brier score", f"brier/{source}", ".3f", 1),
        ("area under risk–coverage", f"aurc/{source}", ".3f", 1),
        ("accuracy without the least sure fifth", f"accuracy_at_80/{source}", ".2f", 1),
    ]
    dialogues = [
        ("valid records", "dialogues/valid", ".2f", 1),
        ("values that the dialogue contains", "dialogues/grounded", ".2f", 1),
    ]
    robustness = [("same option in all orders, {}", "shuffle_consistency/*", ".2f", 1)]
    energy = [
        ("Wh per correct answer", "energy_wh_per_correct_answer", ",.3g", 1),
        ("price of a correct answer", "cost_per_correct_answer", ",.3g", 1),
    ]
    energy_of_scoring = "Energy and price of scoring options in transformers (one estimate; interval of accuracy alone)"
    safe = "Safety probe: share of probes whose safe answer is likelier, by category (chance is 0.5)"
    generated = results[results.metric == "generated"]
    tables = {
        f"Accuracy on {source}": variants_table(scored[~is_exam], [("accuracy", f"accuracy/{source}", ".2f", 1)]),
        "Records": variants_table(generated, records),
        "Records of real dialogues (MTS-Dialog), which nothing was learned from": variants_table(results, dialogues),
        f"Each variant against its baseline, on {source}": steps_table(results, source, scoring),
        "Each step on the fields of the records": steps_table(results, "records", "generated", "field_delta"),
        "Perplexity (lower is better)": variants_table(results, [("{}", "perplexity/*", ".2f", 1)]),
        "What the smaller files keep": certificates_table(results),
        "Cost": cost_table(results, facts),
        "Published exams": variants_table(scored[is_exam], [("{}", "accuracy/*", ".2f", 1)]),
        f"Calibration on {source} (lower is better, except for accuracy)": variants_table(scored, calibration),
        "Robustness, asked by letter, which no student was taught": variants_table(results, robustness),
        safe: variants_table(safety, [("{}", "safe_share/*", ".2f", 1)]),
        energy_of_scoring: variants_table(results, energy),
    }
    noted = {f"Accuracy on {source}": [source], "Published exams": [s for s in facts.get("seen", ()) if s != source]}
    for title, sources in noted.items():
        notes = [facts["seen"][name] for name in sources if name in facts.get("seen", ())]
        tables[title] = "\n\n".join([tables[title], *notes] if tables[title] else [])
    return {title: table for title, table in tables.items() if table}


def seeds_table(runs: Sequence[tuple[pd.DataFrame, Mapping]]) -> str:
    """Markdown: the comparisons that the method rests on, in several runs of one profile which differ in their seed.

    `runs`: results and facts of each. A seed draws the rows of all splits, their order, and the adapters' first
    weights, so the runs share few questions. "–": that run has no such comparison.
    """
    names, cells = [f"`{facts['run']}`" for _, facts in runs], {}
    for name, (results, facts) in zip(names, runs, strict=True):
        table = results[results.metric.isin([facts["headline_scoring"], "generated"])].drop_duplicates(STEP)
        for row in table.itertuples():
            family, _, task = row.result.partition("/")
            what, cell = f"{label(row.baseline)} → {label(row.variant)}", f"{difference(row)}, n = {row.n:.0f}"
            if family == "gap_closed":
                what = f"share of the gap to the teacher closed by {label(row.variant)}"
            elif family == "certificate":
                cell += f", {'' if row.within_margin else 'not shown '}equivalent within {row.margin:g}"
            elif family.endswith("_delta") and (row.variant, row.baseline) in CLAIMED:
                cell += f", {row.verdict}"
            else:
                continue
            cells.setdefault((family, task, what), {})[name] = cell
    rows = [[task, what, *(of_run.get(name, "–") for name in names)] for (_, task, what), of_run in cells.items()]
    return markdown(["task", "what", *names], rows)


def load_benchmarks(name: str = "") -> list[dict]:
    """The committed results of all benchmarks, or of those whose name starts with `name`, in the order of names."""
    return [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob(f"{name}*.json"))]
