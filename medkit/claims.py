"""`results.json`: the rows that README, report and model card are made of, and the only place they come from.

A claim is one measured number with its interval, its n, its unit, what it is compared with and the file that holds the
observations. Tables come in from the notebook; nothing here measures.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from medkit.evaluation import median_interval

COLUMNS = ["claim", "variant", "metric", "value", "ci_low", "ci_high", "n", "unit", "baseline", "stage", "file"]


def _claim(claim: str, variant: str, value: float, **more) -> dict:
    row = {
        "claim": claim,
        "variant": variant,
        "metric": "",
        "value": float(value),
        "ci_low": None,
        "ci_high": None,
        "n": None,
        "unit": "",
        "baseline": None,
        "stage": "",
        "file": "",
        **more,
    }
    return {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}


def from_accuracy(table: pd.DataFrame, claim: str = "accuracy") -> Iterator[dict]:
    """`<claim>/<source>` and, for `accuracy`, `unparsed_rate/<source>`; metric is the scoring method."""
    where = {"unit": "fraction", "stage": "06_evaluation", "file": "metrics.parquet"}
    for r in table.itertuples():
        yield _claim(
            f"{claim}/{r.source}",
            r.variant,
            r.accuracy,
            metric=r.scoring,
            ci_low=r.ci_low,
            ci_high=r.ci_high,
            n=r.n,
            **where,
        )
        if claim == "accuracy" and r.scoring == "generated":
            yield _claim(f"unparsed_rate/{r.source}", r.variant, r.unparsed_rate, metric=r.scoring, n=r.n, **where)


def from_steps(table: pd.DataFrame) -> Iterator[dict]:
    """`accuracy_delta/<source>` and `flips/<source>` of each step, with adjusted p, verdict and detectable effect."""
    for r in table.itertuples():
        where = {"metric": r.scoring, "baseline": r.baseline, "n": r.n, "stage": "06_evaluation"}
        yield _claim(
            f"accuracy_delta/{r.source}",
            r.variant,
            r.difference,
            ci_low=r.ci_low,
            ci_high=r.ci_high,
            unit="fraction",
            file="steps.parquet",
            p_holm=r.p_holm,
            verdict=r.verdict,
            mde=r.mde,
            **where,
        )
        yield _claim(
            f"flips/{r.source}",
            r.variant,
            r.gained + r.lost,
            unit="questions",
            file="flips.parquet",
            gained=r.gained,
            lost=r.lost,
            **where,
        )


def from_ledger(ledger: pd.DataFrame) -> Iterator[dict]:
    """`memory_bytes/weights` per variant (quantisation state included): exact, so without an interval."""
    for variant, rows in ledger.groupby("variant", sort=False):
        yield _claim(
            "memory_bytes/weights",
            variant,
            rows.bytes.sum(),
            metric="as stored",
            unit="bytes",
            stage="04_quantization",
            file="ledger.parquet",
        )


def from_bench(bench: pd.DataFrame, confidence: float) -> Iterator[dict]:
    """`ttft_s`, `latency_s_per_token` (single requests), `throughput_tokens_per_s/<workload>`: medians over repeats."""
    for (variant, workload, scheduler), rows in bench.groupby(["variant", "workload", "scheduler"], sort=False):
        names = ("ttft_s", "latency_s_per_token") if workload == "single" else ("throughput_tokens_per_s",)
        for name in names:
            value, low, high = median_interval(rows[name], confidence)
            claim = name if workload == "single" else f"{name}/{workload}"
            yield _claim(
                claim,
                variant,
                value,
                ci_low=low,
                ci_high=high,
                n=len(rows),
                metric=scheduler,
                unit="s" if workload == "single" else "tokens/s",
                stage="05_inference",
                file="bench.parquet",
                prompt_tokens=rows.prompt_tokens.iloc[0],
                output_tokens=rows.output_tokens.iloc[0],
                requests=rows.requests.iloc[0],
            )


def ratios(claims: list[dict]) -> Iterator[dict]:
    """Memory of weights and latency per token: 4-bit variants over the student they come from, and over the teacher.

    `unit` says what was divided by what; below 1 is smaller or faster. Timings of one run only.
    """
    table = pd.DataFrame(claims)
    for name, claim, unit in (
        ("memory", "memory_bytes/weights", "bytes of weights"),
        ("latency", "latency_s_per_token", "time per token at equal length"),
    ):
        rows = table[table.claim == claim].set_index("variant")
        for variant, baseline in (("nf4", "lora"), ("edge", "lora"), ("nf4", "teacher_base")):
            if {variant, baseline} <= set(rows.index):
                yield _claim(
                    f"{name}_ratio",
                    variant,
                    rows.value[variant] / rows.value[baseline],
                    metric="ratio",
                    baseline=baseline,
                    unit=unit,
                    stage=rows.stage[variant],
                    file=rows.file[variant],
                )


def from_manifests(manifests: dict[str, dict]) -> Iterator[dict]:
    """`duration_s/<stage>` of every finished stage, and `signal_bytes_per_token` of the distillation."""
    for stage, manifest in manifests.items():
        if manifest:
            yield _claim(f"duration_s/{stage}", "", manifest["duration_s"], unit="s", stage=stage, file="manifest.json")
            if "signal_bytes_per_token" in manifest["facts"]:
                yield _claim(
                    "signal_bytes_per_token",
                    "teacher",
                    manifest["facts"]["signal_bytes_per_token"],
                    unit="bytes",
                    stage=stage,
                    file="manifest.json",
                )
