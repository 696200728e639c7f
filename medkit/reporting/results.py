"""`results.json`: every number that a run measured, one row each. README, docs, report and model card read only it.

A row holds the number with its interval, the number of observations, the unit, the variant it is compared with, and the
file with the observations. Nothing is measured here: notebooks hand in tables.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from medkit.stage import DISCLAIMER, StageError, provenance, reading, write_text
from medkit.statistics import median_and_range
from medkit.variants import FINAL, VARIANTS

COLUMNS = ["result", "variant", "metric", "value", "ci_low", "ci_high", "n", "unit", "baseline", "stage", "file"]


def from_table(table: pd.DataFrame, name: str, file: str, unit: str = "fraction", extras: str = "") -> Iterator[dict]:
    """Yield one row of `results.json` for each row of a tidy table that has a value.

    `name` is a pattern over the table's columns, e.g. `"{metric}/{source}"`. The columns `variant`, `value`, `ci_low`,
    `ci_high`, `n`, `unit` and `baseline` are copied where they exist, and so are `extras` (names separated by spaces).
    The row's `metric` is the table's `scoring`, or else its `category`.
    """
    copied = [c for c in ("ci_low", "ci_high", "n", "baseline", *extras.split()) if c in table]
    metric = next((c for c in ("scoring", "category") if c in table), None)
    for row in table[table.value.notna()].to_dict("records"):
        columns = {column: row[column] for column in copied} | {"metric": row[metric] if metric else ""}
        columns = {"unit": row.get("unit", unit), "stage": "06_evaluation", "file": file} | columns
        yield result_row(name.format(**row), row.get("variant", ""), row["value"], **columns)


def result_row(result: str, variant: str, value: float, **columns) -> dict:
    """One row with every column; numpy numbers become Python numbers, an undefined number becomes None."""
    row = {**dict.fromkeys(COLUMNS), "result": result, "variant": variant, "metric": "", "value": float(value)}
    row |= {"unit": "", "stage": "", "file": "", **columns}
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    return {key: None if isinstance(value, float) and pd.isna(value) else value for key, value in plain.items()}


def from_records(table: pd.DataFrame) -> Iterator[dict]:
    """Rows `<metric>/<source>` of the records: field_f1, exact, valid, invented, missing, left_empty, tokens."""
    units = table.metric.map({"tokens": "tokens"}).fillna("fraction")
    table = table.assign(scoring="generated", unit=units)
    return from_table(table, "{metric}/{source}", "records.parquet")


def from_steps(table: pd.DataFrame, name: str = "accuracy_delta") -> Iterator[dict]:
    """Rows `<name>/<source>` with flips, adjusted p, verdict and detectable effect."""
    tests = "p_value p_holm p_equivalence verdict margin mde gained lost accuracy accuracy_baseline"
    return from_table(table.assign(value=table.difference), name + "/{source}", "steps.parquet", extras=tests)


def from_ledger(ledger: pd.DataFrame) -> Iterator[dict]:
    """Rows `memory_bytes/weights`: stored bytes per variant, quantisation state included. Exact, so no interval."""
    where = {"metric": "as stored", "unit": "bytes", "stage": "04_quantization", "file": "ledger.parquet"}
    for variant, size in ledger.groupby("variant", sort=False).bytes.sum().items():
        yield result_row("memory_bytes/weights", variant, size, **where)


def from_drift(table: pd.DataFrame) -> Iterator[dict]:
    """Rows `kl_nats` and `top1_changed`: how far a compressed variant's predictions are from those of its baseline."""
    where = {"stage": "04_quantization", "file": "certificates.parquet"}
    for name, unit in (("kl_nats", "nats"), ("top1_changed", "fraction")):
        for row in table.to_dict("records"):
            yield result_row(name, row["variant"], row[name], n=row["positions"], unit=unit, **where)


def from_bench(bench: pd.DataFrame) -> Iterator[dict]:
    """Rows `ttft_s`, `latency_s_per_token` (single requests) and `throughput_tokens_per_s/<workload>`.

    Values are medians over the repeats, `ci_low` and `ci_high` the least and the greatest. `metric` is the engine, or
    how requests were scheduled.
    """
    for (variant, workload, engine), repeats in bench.groupby(["variant", "workload", "engine"], sort=False):
        lengths = repeats[["prompt_tokens", "output_tokens", "requests"]].iloc[0]
        where = {"metric": engine, "n": len(repeats), "stage": "05_inference", "file": "bench.parquet", **lengths}
        single = workload == "single"
        for column in ("ttft_s", "latency_s_per_token") if single else ("throughput_tokens_per_s",):
            value, low, high = median_and_range(repeats[column])
            name, unit = (column, "s") if single else (f"{column}/{workload}", "tokens/s")
            yield result_row(name, variant, value, ci_low=low, ci_high=high, unit=unit, **where)


def ratios(rows: list[dict]) -> Iterator[dict]:
    """Rows `memory_ratio` and `latency_ratio`: each variant made from the distilled student over that student.

    Below 1 is smaller or faster. `unit` says what was divided.
    """
    table = pd.DataFrame(rows)
    pairs = [(v.name, v.baseline) for v in VARIANTS.values() if v.baseline == FINAL]
    for name, measured, unit in (
        ("memory", "memory_bytes/weights", "bytes of weights"),
        ("latency", "latency_s_per_token", "time per token at equal length"),
    ):
        by_variant = table[table.result == measured].set_index("variant")
        for variant, baseline in pairs:
            if {variant, baseline} <= set(by_variant.index):
                ratio = by_variant.value[variant] / by_variant.value[baseline]
                engines = by_variant.metric[[variant, baseline]]
                what = f"{unit}, {' against '.join(engines)}" if engines.nunique() > 1 else unit
                where = {"stage": by_variant.stage[variant], "file": by_variant.file[variant]}
                yield result_row(f"{name}_ratio", variant, ratio, metric="ratio", baseline=baseline, unit=what, **where)


def from_manifests(manifests: dict[str, dict]) -> Iterator[dict]:
    """Rows `duration_s/<stage>` of every finished stage."""
    for stage, manifest in manifests.items():
        if manifest:
            where = {"stage": stage, "file": "manifest.json"}
            yield result_row(f"duration_s/{stage}", "", manifest["duration_s"], unit="s", **where)


def write_results(folder: Path, rows: list[dict], facts: dict, manifests: dict[str, dict]) -> Path:
    """Write `results.json` into a run's folder: `facts`, where and when, and the rows. Returns its path.

    manifests: of the stages before. The device is theirs, and `commits` says which code made which stage.
    """
    made = {key: value for key, value in provenance().items() if key in ("date", "device", "git_commit", "versions")}
    whole = {stage: manifest for stage, manifest in manifests.items() if manifest}
    made["device"] = ", ".join(dict.fromkeys(one["device"] for one in whole.values())) or made["device"]
    made["commits"] = {stage: one["git_commit"] for stage, one in whole.items()}
    content = {**facts, **made, "disclaimer": DISCLAIMER, "results": rows}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return write_text(folder / "results.json", text + "\n")


def load_results(path: Path) -> tuple[pd.DataFrame, dict]:
    """The rows of a results file as a table, and its facts (run, device, date, params, …).

    Raises StageError if the file is missing or damaged.
    """
    with reading(path, StageError, "`python -m medkit run` writes it in its last notebook", "no whole results file"):
        content = json.loads(path.read_text())
        return pd.DataFrame(content.pop("results")), content
