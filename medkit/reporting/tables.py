"""Tables for people from `results.json`, from benchmarks' json, and from what `budget` computes; from nothing else.

README, the log and the command line print these. A number that is not in one of them cannot be in a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from medkit.stage import DISCLAIMER, StageError, atomic_path, provenance, run_dir
from medkit.variants import VARIANTS

STAGES = ["01_data", "02_distillation", "03_lora", "04_quantization", "05_inference", "06_evaluation"]


def load_results(path: Path) -> tuple[pd.DataFrame, dict]:
    """The claims of a results file as a table, and the rest of it (run, device, date, commit)."""
    if not path.is_file():
        raise StageError(f"{path}: no results there; `python -m medkit run` writes them in its last notebook")
    try:
        content = json.loads(path.read_text())
        return pd.DataFrame(content.pop("claims")), content
    except (ValueError, KeyError) as error:
        raise StageError(f"{path}: not a whole results file ({error!r}); run notebook 06 again") from error


def write_results(folder: Path, rows: list[dict], facts: dict) -> Path:
    """Write a run's `results.json`: `facts`, where and when, and the claims (see `claims.COLUMNS`)."""
    device = {key: value for key, value in provenance().items() if key in ("date", "device", "git_commit", "versions")}
    content = {**facts, **device, "disclaimer": DISCLAIMER, "claims": rows}
    with atomic_path(folder / "results.json") as scratch:
        scratch.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return folder / "results.json"


def results_of(run: str) -> Path:
    """Where a run's results are."""
    return run_dir(run) / "results.json"


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    """A markdown table of ready texts."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def accuracy_table(claims: pd.DataFrame, scoring: str) -> str:
    """Markdown: a row per variant, a column per test source, "0.52 [0.47, 0.57]"; n in the header."""
    table = claims[claims.claim.str.startswith("accuracy/") & (claims.metric == scoring)]
    sources = list(dict.fromkeys(table.claim.str.removeprefix("accuracy/")))
    n = table.groupby("claim").n.max()
    headers = ["variant", *(f"{s}<br>n = {n[f'accuracy/{s}']:.0f}" for s in sources)]
    rows = []
    for variant in (v for v in VARIANTS if v in set(table.variant)):
        mine = table[table.variant == variant].set_index("claim")
        cells = [mine.loc[f"accuracy/{s}"] if f"accuracy/{s}" in mine.index else None for s in sources]
        rows.append(
            [
                VARIANTS[variant].label,
                *(f"{c.value:.2f} [{c.ci_low:.2f}, {c.ci_high:.2f}]" if c is not None else "–" for c in cells),
            ]
        )
    return markdown(headers, rows)


def steps_table(claims: pd.DataFrame, source: str, scoring: str) -> str:
    """Markdown: each step of the method on one source: paired difference, interval, n, verdict, what could be seen."""
    table = claims[(claims.claim == f"accuracy_delta/{source}") & (claims.metric == scoring)]
    rows = [
        [
            f"{VARIANTS[c.baseline].label} → {VARIANTS[c.variant].label}",
            f"{c.value:+.3f} [{c.ci_low:+.3f}, {c.ci_high:+.3f}]",
            f"{c.n:.0f}",
            f"{c.p_holm:.2g}",
            c.verdict,
            f"{c.mde:.3f}",
        ]
        for c in table.itertuples()
    ]
    return markdown(["step", "difference [interval]", "n", "p (Holm)", "verdict", "detectable from"], rows)


def cost_table(claims: pd.DataFrame) -> str:
    """Markdown: bytes of weights, time to first token and time per token, per variant, and how it was timed."""
    wanted = {
        "memory_bytes/weights": ("weights, MB", 1e-6),
        "ttft_s": ("first token, ms", 1e3),
        "latency_s_per_token": ("per further token, ms", 1e3),
    }
    rows = []
    for variant in (v for v in VARIANTS if v in set(claims[claims.claim.isin(wanted)].variant)):
        mine = claims[claims.variant == variant].drop_duplicates("claim").set_index("claim")
        cells = [f"{mine.loc[c].value * scale:,.4g}" if c in mine.index else "–" for c, (_, scale) in wanted.items()]
        rows.append([VARIANTS[variant].label, *cells])
    table = markdown(["variant", *(name for name, _ in wanted.values())], rows)
    timed = claims[claims.claim == "latency_s_per_token"]
    if timed.empty:
        return table
    first = timed.iloc[0]
    others = timed[timed.metric != first.metric]
    engines = "".join(f", {VARIANTS[c.variant].label} by {c.metric}" for c in others.itertuples())
    return (
        f"{table}\n\nTimed on {first.requests:.0f} requests, one at a time, with {first.prompt_tokens:.0f} prompt "
        f"tokens and {first.output_tokens:.0f} new tokens in all, after a discarded warm-up; medians of {first.n:.0f} "
        f"repeats{f', by {first.metric}' if engines else ''}{engines}."
    )


def benchmarks_table(folder: Path, goals_only: bool = False) -> str:
    """Markdown: the ratios of every `benchmarks/results/*.json`, each beside its goal, or those alone that have one."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        for what, ratio in content["ratios"].items():
            higher, goal = ratio["better"] == "higher", ratio["goal"]
            if goals_only and goal is None:
                continue
            reached = goal is not None and (ratio["value"] >= goal if higher else ratio["value"] <= goal)
            met = "–" if goal is None else "yes" if reached else "no"
            sign = "" if goal is None else f"{'≥' if higher else '≤'} {goal:g}"
            rows.append([content["name"], content["device"], f"`{what}`", f"{ratio['value']:.2f}", sign, met])
    return markdown(["benchmark", "device", "ratio", "measured", "goal", "met"], rows)


def engine_parts_table(path: Path, part: str) -> str:
    """Markdown: throughput of every contender of one part of the `mieo` benchmark, medians with the range of passes."""
    passes = pd.DataFrame(json.loads(path.read_text())["raw"][part]["passes"])
    rows, full = [], None
    for name, speeds in passes.groupby("engine", sort=False).throughput_tokens_per_s:
        full = full or speeds.median()
        spread = f"{speeds.min():.1f} to {speeds.max():.1f}"
        rows.append([name, f"{speeds.median():.1f}", spread, f"{full / speeds.median():.2f}", str(len(speeds))])
    return markdown(["contender", "tokens/s", "range", "first over it", "passes"], rows)


def ablation_table(path: Path) -> str:
    """Markdown: students that lack a part of distillation, what the whole has over each of them, and whether it helps.

    A part helps or harms where its interval leaves zero, each interval by itself.
    """
    found = {(row["row"], row["metric"]): row for row in json.loads(path.read_text())["raw"]["table"]}
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        cells = [name]
        for metric in ("valid_nll", "accuracy"):
            own = found[name, metric]
            low, high = own["ci_low"], own["ci_high"]
            below, above = ("helps", "harms") if metric == "valid_nll" else ("harms", "helps")
            verdict = below if high < 0 else above if low > 0 else "not detectable"
            difference = f"{own['full_minus_row']:+.3f} [{low:+.3f}, {high:+.3f}] {verdict}"
            cells += [f"{own['mean']:.3f} ± {own['std_over_seeds']:.3f}", "–" if name == "full" else difference]
        rows.append(cells)
    loss, right = (found["full", metric] for metric in ("valid_nll", "accuracy"))
    counted = f"n = {loss['n']} and {right['n']} questions, {right['seeds']} seeds"
    headers = ["student", "validation loss, nats", "full minus it", "accuracy", "full minus it"]
    said = f"Mean ± standard deviation over seeds; paired by question, {counted}; each interval by itself."
    return f"{markdown(headers, rows)}\n\n{said}"


def recipes_table(estimates: Mapping[str, Sequence]) -> str:
    """Markdown: a row per recipe with the cache in bf16; per model what is stored, the total, and that below bf16's.

    `estimates` holds what `budget.estimate` gives for each model.
    """
    headers, columns = ["recipe"], []
    for model, found in estimates.items():
        totals = {e.recipe: e for e in found if e.kv_format == "bf16"}
        headers += [f"{model}:<br>stored, GiB", "total, GiB", "below bf16"]
        columns.append(totals)
    rows = []
    for recipe in columns[0]:
        cells = []
        for totals in columns:
            e, whole = totals[recipe], totals["bf16"].total
            below = "–" if recipe == "bf16" else f"{100 * (1 - e.total / whole):.1f} %"
            cells += [f"{(e.weights + e.state) / 2**30:.2f}", f"{e.total / 2**30:.2f}", below]
        rows.append([f"`{recipe}`", *cells])
    return markdown(headers, rows)


def provenance_line(facts: dict) -> str:
    """One sentence: which run, where, when, under what disclaimer."""
    return f"Run `{facts['run']}` on {facts['device']}, {facts['date']}. {DISCLAIMER}"
