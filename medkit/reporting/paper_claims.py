"""The paper's numbers (arXiv 2505.00025), ours beside them, and a verdict computed by rule.

The paper's numbers are in `paper_claims.yaml`. Ours come from a run's results, from the benchmark at 7B shapes (random
weights), from the models' shapes, or from the paper's own table. Verdicts:
reproduced: our number, or an end of its interval, reaches the paper's number as printed (a starting point: within 5 %).
beaten: our whole interval is better than the paper's number by more than 5 % of it.
cannot hold: arithmetic contradicts the paper's number. not measured: we have no number.
other quantity: the paper's number is of seconds per problem, and its answers became shorter; ours is per token.
other scale: our model is more than twice smaller or larger than the paper's 7B student.
not comparable: our number is from another kind of device, or from an engine that the paper did not have.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

from medkit.reporting.tables import label, load_benchmarks, markdown
from medkit.statistics import median_and_range
from medkit.variants import FINAL, MADE_FROM_FINAL, VARIANTS

TOLERANCE = 0.05
SAME_SCALE = 2.0
GIB = 2**30
BF16_BYTES = 2
STUDENT, TEACHER = "DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Llama-70B"
CONTENDERS = {"bf16_eager": "16 bits", "paper_mix": "the paper's mix, with the head in NF4 too"}


class PaperClaim(NamedTuple):
    id: str
    where: str
    what: str
    value: float | None
    unit: str
    digits: int
    success: str
    contenders: Sequence[str] = ()


CLAIMS = {c["id"]: PaperClaim(**c) for c in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())}


class Ours(NamedTuple):
    """Our number beside a claim; `low` and `high` equal `value` if it is exact. `verdict` None: `judge` decides."""

    value: float | None
    low: float | None
    high: float | None
    measured_on: str
    why: str
    verdict: str | None = None


def compare_with_paper(results: pd.DataFrame, facts: Mapping, benchmarks: Sequence[dict]) -> pd.DataFrame:
    """One row per claim of the paper and number of ours. Columns: id, claim, paper, ours, measured_on, verdict, why
    (texts); ours_value, ci_low, ci_high (numbers; in GiB where the paper says GB).
    """
    rows = []
    for claim in CLAIMS.values():
        numbers = [*_from_arithmetic(claim), *_from_benchmark(claim, benchmarks), *_from_run(claim, results, facts)]
        for ours in numbers or [Ours(None, None, None, "–", "no model of this size was run here", "not measured")]:
            verdict = ours.verdict or judge(claim, ours.low, ours.high)
            paper = "no number given" if claim.value is None else show(claim, claim.value)
            shown = "–" if ours.value is None else show(claim, *ours[:3]).replace(" GB", " GiB")
            texts = (claim.id, f"{claim.what} ({claim.where})", paper, shown, ours.measured_on, verdict, ours.why)
            rows.append((*texts, ours.value, ours.low, ours.high))
    columns = ["id", "claim", "paper", "ours", "measured_on", "verdict", "why", "ours_value", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=columns)


def paper_table(results: pd.DataFrame, facts: Mapping) -> str:
    """Markdown of `compare_with_paper`, with the committed benchmarks, and its criteria."""
    table = compare_with_paper(results, facts, load_benchmarks("shape7b"))
    headers = ["the paper's claim", "paper", "ours", "ours measured on", "verdict", "why"]
    rows = table[["claim", "paper", "ours", "measured_on", "verdict", "why"]].to_numpy().tolist()
    criteria = " ".join(__doc__.partition("Verdicts:\n")[2].split())
    size = f"{weight_bytes(STUDENT) / 1e9:.2f} · 10⁹ bytes of weights, {weight_bytes(STUDENT) / GIB:.2f} GiB"
    unit = f"The paper's GB must be GiB: its 7B model has {size}."
    return f"{markdown(headers, rows)}\n\n{criteria[0].upper()}{criteria[1:]} {unit}"


def judge(claim: PaperClaim, low: float, high: float) -> str:
    """reproduced, beaten or not reproduced (module docstring). A change whose interval holds 0 reproduces nothing."""
    slack = TOLERANCE * abs(claim.value)
    if claim.success == "near":
        return "reproduced" if low <= claim.value + slack and high >= claim.value - slack else "not reproduced"
    sign = 1 if claim.success == "higher" else -1
    best, worst = (high, low) if sign > 0 else (low, high)
    if claim.unit == "share" and low <= 0 <= high:
        return "not reproduced"
    if sign * (worst - claim.value) > slack:
        return "beaten"
    return "reproduced" if sign * (best - claim.value) >= -0.5 * 10**-claim.digits else "not reproduced"


@cache
def weight_bytes(model: str, plan: str = "bf16") -> int:
    """Bytes of a known model's weights under a plan, quantisation state included, from its shapes."""
    from medkit.quantization import memory_budget, memory_ledger  # imports torch, which other tables do not need

    shapes = memory_ledger.model_shapes(memory_budget.read_config(model))
    schemes = memory_budget.preset_plans(shapes)[plan].schemes
    return int(memory_ledger.plan_bytes(shapes, schemes, BF16_BYTES, True).bytes.sum())


def tokens_per_problem(model: str) -> float:
    """Length of the paper's answers by its own table: seconds per problem times tokens per second."""
    return CLAIMS[f"{model}_latency"].value * CLAIMS[f"{model}_rate"].value


def change_per_token() -> float:
    """Change of the paper's time per token from FP16 to 4 bits, by its own tokens per second. Above 0 is slower."""
    return CLAIMS["student_rate"].value / CLAIMS["method_rate"].value - 1


def quotient(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """(value, low, high) of ours / theirs − 1. Opposite ends are divided, so the interval is rather too wide."""
    return ours[0] / theirs[0] - 1, ours[1] / theirs[2] - 1, ours[2] / theirs[1] - 1


def _from_arithmetic(claim: PaperClaim) -> Iterator[Ours]:
    if claim.id == "memory_change":
        for plan in ("paper_mix", "nf4"):
            change = weight_bytes(STUDENT, plan) / weight_bytes(STUDENT) - 1
            why = f"plan `{plan}`; embeddings and head stay in 16 bits"
            yield Ours(change, change, change, f"{STUDENT}, weights from shapes", why)
    if claim.id == "latency_change":
        before, after, slower = tokens_per_problem("student"), tokens_per_problem("method"), change_per_token()
        why = f"per token: {before:.1f} tokens a problem before, {after:.1f} after; shorter answers, each token slower"
        yield Ours(slower, slower, slower, "the paper's own table", why, "other quantity")
    if claim.id == "teacher_memory":
        size = weight_bytes(TEACHER)
        bits = 8 * claim.value * GIB / (size / BF16_BYTES)
        why = f"{size / BF16_BYTES / 1e9:.2f} B weights × 2 bytes; {claim.value} GiB would be {bits:.1f} bits each"
        yield Ours(*[size / GIB] * 3, f"{TEACHER}, weights from shapes", why, "cannot hold")


def _from_benchmark(claim: PaperClaim, benchmarks: Sequence[dict]) -> Iterator[Ours]:
    """Both contenders of a ratio come from the same file, because times of two runs differ."""
    quantity = claim.id.split("_")[0 if claim.unit == "share" else -1]
    for content in benchmarks if claim.contenders else ():
        measured = [content["raw"]["contenders"].get(name, {}) for name in claim.contenders]
        if not all("generation_peak_bytes" in one for one in measured):
            continue
        times = [median_and_range(one["latency_s_per_token_runs"]) for one in measured]
        peaks = [one["generation_peak_bytes"] for one in measured]
        why = ", against ".join(CONTENDERS[name] for name in claim.contenders)
        if quantity == "memory":
            numbers, why = [peaks[0] / peaks[1] - 1 if len(peaks) > 1 else peaks[0] / GIB] * 3, f"{why}; peak"
        elif len(measured) > 1:
            numbers, why = quotient(*times), f"{why}; time per token at equal length"
        elif quantity == "rate":
            numbers = [1 / times[0][place] for place in (0, 2, 1)]
        else:
            tokens = tokens_per_problem(claim.id.split("_")[0])
            numbers = [measured[0]["time_to_first_token_s"] + (tokens - 1) * each for each in times[0]]
            why += f"; at the {tokens:.1f} tokens of the paper's own table"
        yield Ours(*numbers, f"7B shapes, random weights, {content['device']}", why)
        return


def _from_run(claim: PaperClaim, results: pd.DataFrame, facts: Mapping) -> Iterator[Ours]:
    weights = results[(results.result == "memory_bytes/weights") & (results.variant == FINAL)].value
    size = weights.iloc[0] / BF16_BYTES if len(weights) else 0  # weights that are not quantised count in bf16
    same_scale = 1 / SAME_SCALE <= size * BF16_BYTES / weight_bytes(STUDENT) <= SAME_SCALE
    verdict = None if same_scale else "other scale"
    measured_on = f"run `{facts['run']}`: {size / 1e9:.2f} B weights, {facts['device']}"
    source, times = facts["headline_source"], results[results.result == "latency_s_per_token"]
    scored = results[results.metric == facts["headline_scoring"]]
    if claim.id == "usmle":
        exam = scored[scored.result == "accuracy/medqa"].set_index("variant")
        for variant in [v for v in reversed(VARIANTS) if v in exam.index][:1]:
            row = exam.loc[variant]
            why = f"{label(variant)} on MedQA, n = {row.n:.0f}; the paper names neither its test set nor n"
            yield Ours(row.value, row.ci_low, row.ci_high, measured_on, why, verdict)
    elif claim.id == "accuracy_kept":
        words = {"equivalent": "reproduced", "better": "beaten"}
        kept = scored[(scored.baseline == FINAL) & scored.variant.isin(MADE_FROM_FINAL)]
        for row in kept[kept.result == f"accuracy_delta/{source}"].itertuples():
            why = f"{label(row.variant)} against {label(FINAL)} on {source}, n = {row.n:.0f}: {row.verdict}"
            kept_or_not = verdict or words.get(row.verdict, "not reproduced")
            yield Ours(row.value, row.ci_low, row.ci_high, measured_on, why, kept_or_not)
    elif claim.unit == "share":
        name = claim.id.replace("change", "ratio")
        for row in results[(results.result == name) & (results.baseline == FINAL)].itertuples():
            numbers, other = [row.value - 1] * 3, None
            if name == "latency_ratio":
                pair = [times[times.variant == v].iloc[0] for v in (row.variant, FINAL)]
                numbers = quotient(*(one[["value", "ci_low", "ci_high"]].tolist() for one in pair))
                if "cores" in facts["device"] or pair[0].metric != pair[1].metric:
                    other = "not comparable"
            why = f"{label(row.variant)} against {label(FINAL)}, {row.unit}"
            yield Ours(*numbers, measured_on, why, verdict or other)


def show(claim: PaperClaim, *numbers: float) -> str:
    """A number, or a number and the ends of its interval, in the claim's unit with the paper's printed decimals."""
    style, unit = f".{claim.digits}f", f" {claim.unit}"
    if claim.value is None:  # a difference of two accuracies
        style, unit = "+.3f", ""
    elif claim.unit in ("share", "accuracy"):
        style, unit = f"+.{claim.digits - 2}%" if claim.unit == "share" else ".1%", ""
    value, *ends = [f"{number:{style}}" for number in numbers]
    return f"{value}{unit}" + (f" [{', '.join(ends)}]" if len(set(ends)) > 1 else "")
