"""What arXiv 2505.00025 says in numbers, what was measured here, and whether the two agree.

The paper's numbers are in `paper_numbers`; ours come from a run's claims and from `benchmarks/results/shape7b*.json`;
what can be known without measuring is computed from the models' shapes or from the paper's own table. Nothing is
measured here, and no verdict is typed. "reproduced": ours, or an end of its interval, reaches the paper's number as
printed. "beaten": the whole interval is beyond it by more than `TOLERANCE` of it. "cannot hold": arithmetic contradicts
it. A number that is a starting point and no achievement is reproduced when ours is within `TOLERANCE` of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from medkit.reporting.paper_numbers import CLAIM, PAPER_CLAIMS, PaperClaim, change_per_token, tokens_per_problem
from medkit.reporting.tables import markdown
from medkit.statistics import median_interval
from medkit.variants import VARIANTS

TOLERANCE = 0.05
SAME_SCALE = 2.0
"""Models up to this factor larger or smaller than the paper's student are its scale, for accuracies."""
GIB = 2**30
BF16_BYTES = 2
STUDENT, TEACHER = "DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Llama-70B"
CONTENDERS = {
    "bf16_eager": "16 bits",
    "paper_mix": "the paper's recipe with its head in NF4 too",
    "int4_lean_graph": "own 4-bit kernel in a CUDA graph, embeddings in 4 bits, head in 8",
}
"""Of `benchmarks/shape7b.py`: what each one is."""


@dataclass(frozen=True)
class Ours:
    """What stands beside a claim. `low` and `high` equal `value` for exact numbers; `verdict` None: `judge` decides."""

    value: float | None
    low: float | None
    high: float | None
    scale: str
    why: str
    verdict: str | None = None


@dataclass(frozen=True)
class Evidence:
    """A run's claims and facts, and the benchmarks at 7B shapes."""

    claims: pd.DataFrame
    facts: Mapping
    benchmarks: list[dict]


Rule = Callable[[Evidence], Iterator[Ours]]


# --- arithmetic ------------------------------------------------------------------------------------------------------


@cache
def weight_bytes(model: str, recipe: str = "bf16", double_quant: bool = True) -> int:
    """Bytes of a known model's weights under a preset plan, scales included, from its shapes."""
    from medkit.quantization import memory_budget, memory_ledger

    shapes = memory_ledger.model_shapes(memory_budget.read_config(model))
    schemes = memory_budget.preset_schemes(shapes)[recipe]
    return int(memory_ledger.plan_bytes(shapes, schemes, BF16_BYTES, double_quant).bytes.sum())


def quotient(ours: tuple[float, float, float], theirs: tuple[float, float, float]) -> tuple[float, float, float]:
    """(value, low, high) of ours / theirs − 1; opposite ends are divided, so the interval is rather too wide."""
    return ours[0] / theirs[0] - 1, ours[1] / theirs[2] - 1, ours[2] / theirs[1] - 1


def judge(claim: PaperClaim, value: float, low: float, high: float) -> str:
    """reproduced, beaten or not reproduced, by the criteria in this module's docstring.

    A change whose interval holds zero reproduces nothing.
    """
    slack = TOLERANCE * abs(claim.value)
    if claim.reach == "near":
        return "reproduced" if low <= claim.value + slack and high >= claim.value - slack else "not reproduced"
    sign = 1 if claim.reach == "higher" else -1
    best, worst = (high, low) if sign > 0 else (low, high)
    if claim.unit == "share" and low <= 0 <= high:
        return "not reproduced"
    if sign * (worst - claim.value) > slack:
        return "beaten"
    printed = 0.5 * 10**-claim.digits
    return "reproduced" if sign * (best - claim.value) >= -printed else "not reproduced"


# --- what stands beside each claim -----------------------------------------------------------------------------------


def _exact(value: float, scale: str, why: str, verdict: str | None = None) -> Ours:
    return Ours(value, value, value, scale, why, verdict)


def _run_scale(evidence: Evidence) -> str:
    facts, size = evidence.facts, _run_weights(evidence)
    many = f"{size / 1e9:.2f} B weights, " if size else ""
    return f"run `{facts['run']}`: {many}{facts['device']}"


def _run_weights(evidence: Evidence) -> float | None:
    table = evidence.claims
    found = table[(table.claim == "memory_bytes/weights") & (table.variant == "lora")].value
    return found.iloc[0] / BF16_BYTES if len(found) else None  # the student before quantisation is counted in bf16


def _ratios(evidence: Evidence, name: str) -> Iterator[pd.Series]:
    table = evidence.claims
    return table[(table.claim == name) & (table.baseline == "lora")].itertuples()


def _contender(evidence: Evidence, *names: str) -> tuple[list[dict], str] | None:
    """Measurements of the named contenders in the first file that has them all: timings of one run only."""
    for content in evidence.benchmarks:
        found = [content["raw"]["contenders"].get(name, {"error": ""}) for name in names]
        if not any("error" in one for one in found):
            return found, f"7B shapes, random weights, {content['device']}"
    return None


def _median(contender: dict) -> tuple[float, float, float]:
    return median_interval(contender["latency_s_per_token_runs"], 0.95)


def _memory_change(evidence: Evidence) -> Iterator[Ours]:
    whole = weight_bytes(STUDENT)
    uniform, single, mixed = (
        weight_bytes(STUDENT, *recipe) / whole - 1 for recipe in (("nf4", True), ("nf4", False), ("paper_mix", True))
    )
    scale, ends = f"{STUDENT}, weights from shapes", "embeddings and head stay in 16 bits"
    yield _exact(mixed, scale, f"the paper's recipe, attention in 8 bits and the rest in NF4; {ends}")
    yield _exact(uniform, scale, f"uniform NF4 by the library, {single:+.1%} without double quantisation; {ends}")
    for name in ("paper_mix", "int4_lean_graph"):
        if found := _contender(evidence, name, "bf16_eager"):
            (mine, theirs), scale = found
            change = mine["generation_peak_bytes"] / theirs["generation_peak_bytes"] - 1
            yield _exact(change, scale, f"{CONTENDERS[name]}; peak of a generation")
    for row in _ratios(evidence, "memory_ratio"):
        why = f"{VARIANTS[row.variant].label} against {VARIANTS[row.baseline].label}, {row.unit}"
        yield _exact(row.value - 1, _run_scale(evidence), why)


def _latency_change(evidence: Evidence) -> Iterator[Ours]:
    before, after, slower = tokens_per_problem("student"), tokens_per_problem("method"), change_per_token()
    if slower > 0:
        why = f"per token: {before:.1f} tokens a problem before, {after:.1f} after; shorter answers, each token slower"
        yield _exact(slower, "the paper's own table", why, "cannot hold")
    for name, baseline, against in (
        ("paper_mix", "bf16_eager", "16 bits"),
        ("int4_lean_graph", "bf16_eager", "16 bits without a graph"),
        ("int4_lean_graph", "bf16_graph", "16 bits in a graph"),
    ):
        if found := _contender(evidence, name, baseline):
            (mine, theirs), scale = found
            why = f"{CONTENDERS[name]}, against {against}; time per token at equal length"
            yield Ours(*quotient(_median(mine), _median(theirs)), scale, why)
    timed = evidence.claims[evidence.claims.claim == "latency_s_per_token"].drop_duplicates("variant")
    timed = timed.set_index("variant")
    for row in _ratios(evidence, "latency_ratio"):
        pair = [tuple(timed.loc[v, ["value", "ci_low", "ci_high"]]) for v in (row.variant, row.baseline)]
        why = f"{VARIANTS[row.variant].label} against {VARIANTS[row.baseline].label}, {row.unit}"
        yield Ours(*quotient(*pair), _run_scale(evidence), why)


def _memory(contender: str) -> Rule:
    def find(evidence: Evidence) -> Iterator[Ours]:
        if found := _contender(evidence, contender):
            (mine,), scale = found
            yield _exact(mine["generation_peak_bytes"] / GIB, scale, f"{CONTENDERS[contender]}; peak of a generation")

    return find


def _rate(contender: str) -> Rule:
    def find(evidence: Evidence) -> Iterator[Ours]:
        if found := _contender(evidence, contender):
            (mine,), scale = found
            value, low, high = _median(mine)
            yield Ours(1 / value, 1 / high, 1 / low, scale, f"{CONTENDERS[contender]}; decoding alone")

    return find


def _latency(contender: str, stage: str) -> Rule:
    def find(evidence: Evidence) -> Iterator[Ours]:
        if found := _contender(evidence, contender):
            (mine,), scale = found
            tokens = tokens_per_problem(stage)
            times = [mine["time_to_first_token_s"] + (tokens - 1) * each for each in _median(mine)]
            yield Ours(*times, scale, f"{CONTENDERS[contender]}; at the {tokens:.1f} tokens of the paper's own table")

    return find


def _teacher_memory(_: Evidence) -> Iterator[Ours]:
    size, printed = weight_bytes(TEACHER), CLAIM["teacher_memory"].value
    if size / GIB > printed:  # GiB is the kinder reading of "GB"
        count, bits = size / BF16_BYTES, 8 * printed * GIB / (size / BF16_BYTES)
        why = f"{count / 1e9:.2f} B weights × {BF16_BYTES} bytes; {printed} GiB would be {bits:.1f} bits each"
        yield _exact(size / GIB, f"{TEACHER}, weights from shapes", why, "cannot hold")


def _usmle(evidence: Evidence) -> Iterator[Ours]:
    table, size = evidence.claims, _run_weights(evidence)
    table = table[(table.claim == "accuracy/medqa") & (table.metric == evidence.facts["headline_scoring"])]
    present = [v for v in ["nf4", *reversed(VARIANTS)] if v in set(table.variant)]
    if not present:  # nf4 is the end of the paper's method; without it the last variant of the run stands in
        return
    mine = table[table.variant == present[0]].iloc[0]
    theirs = weight_bytes(STUDENT) / BF16_BYTES
    same = size is not None and abs(math.log(size / theirs)) <= math.log(SAME_SCALE)
    why = f"{VARIANTS[mine.variant].label} on MedQA, n = {mine.n:.0f}; the paper names neither its test set nor n"
    if not same:
        why += "; a model this much smaller says nothing about a 7B one"
    yield Ours(mine.value, mine.ci_low, mine.ci_high, _run_scale(evidence), why, None if same else "not measured")


def _accuracy_kept(evidence: Evidence) -> Iterator[Ours]:
    table, source = evidence.claims, evidence.facts["headline_source"]
    table = table[(table.claim == f"accuracy_delta/{source}") & (table.metric == evidence.facts["headline_scoring"])]
    words = {"equivalent": "reproduced", "better": "beaten"}
    for row in table[table.baseline == "lora"].itertuples():
        found = f"{row.verdict}{', and not equivalent either' if row.verdict == 'not detectable' else ''}"
        why = f"{VARIANTS[row.variant].label} against {VARIANTS[row.baseline].label} on {source}, "
        why += f"n = {row.n:.0f}: {found}"
        verdict = words.get(row.verdict, "not reproduced")
        yield Ours(row.value, row.ci_low, row.ci_high, _run_scale(evidence), why, verdict)


RULES = {
    "memory_change": [_memory_change],
    "latency_change": [_latency_change],
    "usmle": [_usmle],
    "accuracy_kept": [_accuracy_kept],
    "teacher_memory": [_teacher_memory],
    "student_memory": [_memory("bf16_eager")],
    "student_latency": [_latency("bf16_eager", "student")],
    "student_rate": [_rate("bf16_eager")],
    "method_memory": [_memory("paper_mix"), _memory("int4_lean_graph")],
    "method_latency": [_latency("paper_mix", "method"), _latency("int4_lean_graph", "method")],
    "method_rate": [_rate("paper_mix"), _rate("int4_lean_graph")],
}
"""Claim → what finds ours. A claim without a rule, or whose rules find nothing, is not measured."""


# --- the table -------------------------------------------------------------------------------------------------------


def show(claim: PaperClaim, value: float | None, digits: int | None = None) -> str:
    """A number in the claim's unit, with its printed decimals or `digits`. Ours in GiB, the paper's GB as printed."""
    if value is None:
        return "–"
    digits = claim.digits if digits is None else digits
    if claim.unit == "share":
        return f"{value:+.{digits - 2}%}"
    if claim.unit == "accuracy":
        return f"{value:.{digits - 2}%}"
    return f"{value:.{digits}f} {claim.unit}"


def compare_with_paper(claims: pd.DataFrame, facts: Mapping, benchmarks_folder: Path) -> pd.DataFrame:
    """A row per claim of the paper and measurement beside it.

    Columns: id, claim, paper, ours, scale, verdict, why (texts for people); paper_value, ours_value, ci_low,
    ci_high (numbers; ours in GiB where the paper says GB); unit. `facts` need run, device, headline_source and
    headline_scoring.
    """
    files = sorted(benchmarks_folder.glob("shape7b*.json"))
    evidence = Evidence(claims, facts, [json.loads(path.read_text()) for path in files])
    rows = []
    for claim in PAPER_CLAIMS:
        found = [ours for rule in RULES.get(claim.id, []) for ours in rule(evidence)]
        for ours in found or [Ours(None, None, None, "–", "no model of this size was run here", "not measured")]:
            verdict = ours.verdict or judge(claim, ours.value, ours.low, ours.high)
            rows.append(_row(claim, ours, verdict))
    return pd.DataFrame(rows)


def _row(claim: PaperClaim, ours: Ours, verdict: str) -> dict:
    text = _show_ours(claim, ours.value)
    if ours.value is not None and ours.low != ours.high:
        low, high = (_show_ours(claim, end).removesuffix(f" {claim.unit}") for end in (ours.low, ours.high))
        text += f" [{low}, {high}]"
    return {
        "id": claim.id,
        "claim": f"{claim.what} ({claim.where})",
        "paper": show(claim, claim.value) if claim.value is not None else "no number given",
        "ours": text,
        "scale": ours.scale,
        "verdict": verdict,
        "why": ours.why,
        "paper_value": claim.value,
        "ours_value": ours.value,
        "ci_low": ours.low,
        "ci_high": ours.high,
        "unit": claim.unit,
    }


def _show_ours(claim: PaperClaim, value: float | None) -> str:
    if value is not None and claim.value is None:
        return f"{value:+.3f}"  # a difference of accuracies
    return show(claim, value).replace("GB", "GiB")


def paper_table(claims: pd.DataFrame, facts: Mapping, benchmarks_folder: Path) -> str:
    """Markdown of `compare_with_paper`, and under it the criteria and what "GB" has been taken to be."""
    table = compare_with_paper(claims, facts, benchmarks_folder)
    shown = table[["claim", "paper", "ours", "scale", "verdict", "why"]]
    headers = ["the paper's claim", "paper", "ours", "ours measured on", "verdict", "why"]
    size, printed = weight_bytes(STUDENT), CLAIM["student_memory"].value
    note = (
        f"reproduced: ours, or an end of its interval, reaches the printed number (starting points: within "
        f"{TOLERANCE:.0%}); beaten: all of the interval is beyond it by more than {TOLERANCE:.0%} of it; cannot hold: "
        f"arithmetic contradicts it."
    )
    if size / 1e9 > printed > size / GIB:
        note += (
            f" The paper's GB must be GiB: the weights of its 7B model alone are {size / 1e9:.2f} · 10⁹ bytes in 16 "
            f"bits, {size / GIB:.2f} GiB."
        )
    return f"{markdown(headers, shown.to_numpy().tolist())}\n\n{note}"
