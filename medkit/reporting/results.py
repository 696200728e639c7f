"""`results.json`: the rows that README, report and model card are made of, and the only place they come from.

A claim is one measured number with its interval, its n, its unit, what it is compared with and the file that holds the
observations. Tables come in from the notebook; nothing here measures.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from medkit.statistics import median_interval

COLUMNS = ["claim", "variant", "metric", "value", "ci_low", "ci_high", "n", "unit", "baseline", "stage", "file"]


def _claim(claim: str, variant: str, value: float, **more) -> dict:
    """One row: every column there, numpy's numbers as Python's, and null where a number is undefined."""
    row = {**dict.fromkeys(COLUMNS), "claim": claim, "variant": variant, "metric": "", "value": float(value)}
    row |= {"unit": "", "stage": "", "file": "", **more}
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    return {key: None if isinstance(value, float) and pd.isna(value) else value for key, value in plain.items()}


def from_table(
    table: pd.DataFrame, claim: str, file: str, unit: str = "fraction", stage: str = "06_evaluation", extras: str = ""
) -> Iterator[dict]:
    """A claim per row of a tidy table, whatever it measures.

    `claim` is a pattern over the table's columns, e.g. `"{metric}/{source}"`. Of the columns `variant`, `value`,
    `ci_low`, `ci_high`, `n` and `baseline` those that are there go over; a claim's `metric` is the table's `scoring`,
    or its `category`. `extras` names further columns to keep, separated by spaces.
    """
    kept = [c for c in ("ci_low", "ci_high", "n", "baseline", *extras.split()) if c in table]
    method = next((c for c in ("scoring", "category") if c in table), None)
    for row in table.to_dict("records"):
        if not pd.isna(row["value"]):
            more = {column: row[column] for column in kept} | {"metric": row[method] if method else ""}
            more = {"unit": row.get("unit", unit), "stage": stage, "file": file} | more
            yield _claim(claim.format(**row), row.get("variant", ""), row["value"], **more)


def from_accuracy(table: pd.DataFrame, claim: str = "accuracy") -> Iterator[dict]:
    """`<claim>/<source>` and, for `accuracy`, `unparsed_rate/<source>`; metric is the scoring method."""
    yield from from_table(table.assign(value=table.accuracy), claim + "/{source}", "metrics.parquet")
    if claim == "accuracy":
        silent = table[table.scoring == "generated"].drop(columns=["ci_low", "ci_high"])
        yield from from_table(silent.assign(value=silent.unparsed_rate), "unparsed_rate/{source}", "metrics.parquet")


def from_steps(table: pd.DataFrame) -> Iterator[dict]:
    """`accuracy_delta/<source>` and `flips/<source>` of each step, with adjusted p, verdict and detectable effect."""
    tests = "p_clustered p_holm p_equivalence verdict margin mde"
    deltas = table.assign(value=table.difference)
    yield from from_table(deltas, "accuracy_delta/{source}", "steps.parquet", extras=tests)
    flips = table.assign(value=table.gained + table.lost).drop(columns=["ci_low", "ci_high"])
    yield from from_table(flips, "flips/{source}", "flips.parquet", unit="questions", extras="gained lost")


def from_ledger(ledger: pd.DataFrame) -> Iterator[dict]:
    """`memory_bytes/weights` per variant (quantisation state included): exact, so without an interval."""
    totals = ledger.groupby("variant", sort=False).bytes.sum().rename("value").reset_index()
    where = {"unit": "bytes", "stage": "04_quantization"}
    yield from from_table(totals.assign(scoring="as stored"), "memory_bytes/weights", "ledger.parquet", **where)


def from_bench(bench: pd.DataFrame, confidence: float) -> Iterator[dict]:
    """`ttft_s`, `latency_s_per_token` (single requests), `throughput_tokens_per_s/<workload>`: medians over repeats.

    `metric` is the engine, or the way in which requests were scheduled.
    """
    rows = []
    for (variant, workload, engine), repeats in bench.groupby(["variant", "workload", "engine"], sort=False):
        single = workload == "single"
        for name in ("ttft_s", "latency_s_per_token") if single else ("throughput_tokens_per_s",):
            value, low, high = median_interval(repeats[name], confidence)
            row = {"claim": name if single else f"{name}/{workload}", "unit": "s" if single else "tokens/s"}
            row |= {"variant": variant, "scoring": engine, "value": value, "ci_low": low, "ci_high": high}
            lengths = repeats[["prompt_tokens", "output_tokens", "requests"]].iloc[0]
            rows.append({**row, "n": len(repeats), **lengths})
    lengths = "prompt_tokens output_tokens requests"
    yield from from_table(pd.DataFrame(rows), "{claim}", "bench.parquet", stage="05_inference", extras=lengths)


def ratios(claims: list[dict]) -> Iterator[dict]:
    """Memory of weights and latency per token: compressed variants over the student they come from, and the teacher.

    `unit` says what was divided by what; below 1 is smaller or faster. Timings of one run only.
    """
    table = pd.DataFrame(claims)
    for name, claim, unit in (
        ("memory", "memory_bytes/weights", "bytes of weights"),
        ("latency", "latency_s_per_token", "time per token at equal length"),
    ):
        measured = table[table.claim == claim].set_index("variant")
        pairs = [(variant, "lora") for variant in ("nf4", "paper_mix", "plan", "edge")] + [("nf4", "teacher_base")]
        for variant, baseline in pairs:
            if {variant, baseline} <= set(measured.index):
                ratio = measured.value[variant] / measured.value[baseline]
                engines = measured.metric[[variant, baseline]]
                by = f", {' against '.join(engines)}" if engines.nunique() > 1 else ""
                where = {"unit": unit + by, "stage": measured.stage[variant], "file": measured.file[variant]}
                yield _claim(f"{name}_ratio", variant, ratio, metric="ratio", baseline=baseline, **where)


def from_manifests(manifests: dict[str, dict]) -> Iterator[dict]:
    """`duration_s/<stage>` of every finished stage, and `signal_bytes_per_token` of the distillation."""
    for stage, manifest in manifests.items():
        if manifest:
            where = {"stage": stage, "file": "manifest.json"}
            yield _claim(f"duration_s/{stage}", "", manifest["duration_s"], unit="s", **where)
            if "signal_bytes_per_token" in manifest["facts"]:
                per_token = manifest["facts"]["signal_bytes_per_token"]
                yield _claim("signal_bytes_per_token", "teacher", per_token, unit="bytes", **where)
