"""The paper's numbers beside ours: arithmetic checked by hand, verdicts by their stated criterion, nothing typed."""

import json
import math
import re

import pandas as pd
import pytest

from medkit.reporting import paper_claims
from medkit.stage import ROOT

FACTS = {"run": "toy", "device": "Toy CPU", "headline_source": "exam", "headline_scoring": "letter"}
COLUMNS = ["claim", "variant", "metric", "value", "ci_low", "ci_high", "n", "unit", "baseline", "verdict"]
ROWS = [
    ("memory_bytes/weights", "lora", "as stored", 2e8, None, None, None, "bytes", None, None),
    ("memory_ratio", "nf4", "ratio", 0.5, None, None, None, "bytes of weights", "lora", None),
    ("memory_ratio", "edge", "ratio", 0.25, None, None, None, "bytes of weights", "lora", None),
    ("memory_ratio", "nf4", "ratio", 0.1, None, None, None, "bytes of weights", "teacher_base", None),
    ("latency_s_per_token", "lora", "sequential", 0.050, 0.048, 0.052, 3, "s", None, None),
    ("latency_s_per_token", "nf4", "sequential", 0.040, 0.039, 0.0401, 3, "s", None, None),
    ("latency_ratio", "nf4", "ratio", 0.8, None, None, None, "time per token at equal length", "lora", None),
    ("accuracy/medqa", "nf4", "letter", 0.25, 0.2, 0.3, 250, "fraction", None, None),
    ("accuracy/medqa", "lora", "letter", 0.95, 0.9, 0.99, 250, "fraction", None, None),
    ("accuracy/medqa", "nf4", "generated", 0.99, 0.9, 1.0, 250, "fraction", None, None),
    ("accuracy_delta/exam", "nf4", "letter", -0.01, -0.02, 0.003, 900, "fraction", "lora", "equivalent"),
    ("accuracy_delta/exam", "edge", "letter", -0.1, -0.2, -0.05, 900, "fraction", "lora", "worse"),
    ("accuracy_delta/exam", "lora", "letter", 0.1, 0.05, 0.2, 900, "fraction", "student_kd", "better"),
]
CLAIMS = pd.DataFrame(ROWS, columns=COLUMNS)
CLAIM = paper_claims.CLAIM


def bench(folder, name="shape7b", **contenders):
    """A benchmark's file: contender → (peak bytes, seconds per token of each run)."""
    made = {
        one: {"generation_peak_bytes": peak, "time_to_first_token_s": 0.1, "latency_s_per_token_runs": runs}
        for one, (peak, runs) in contenders.items()
    }
    content = {"name": name, "device": "Toy GPU", "raw": {"contenders": {"other": {"error": "not run"}, **made}}}
    (folder / f"{name}.toy.json").write_text(json.dumps(content))
    return folder


def table_of(folder, claims=CLAIMS, **facts) -> pd.DataFrame:
    return paper_claims.compare_with_paper(claims, FACTS | facts, folder)


def rows_of(table, claim, scale=""):
    return table[(table.id == claim) & table.scale.str.contains(scale, regex=False)]


PRINTED = """
teacher 78.6 2.06 25.13
student 14.9 1.45 28.13
method  5.25 1.27 24.96
"""


# --- the paper's own numbers ---------------------------------------------------------------------------------------


def test_the_table_is_as_printed():
    for line in PRINTED.strip().splitlines():
        stage, *values = line.split()
        for quantity, value in zip(("memory", "latency", "rate"), values, strict=True):
            claim = CLAIM[f"{stage}_{quantity}"]
            assert paper_claims.show(claim, claim.value).split()[0] == value
    assert [paper_claims.show(c, c.value) for c in paper_claims.PAPER_CLAIMS[:4]] == ["-64.7%", "-12.4%", "92.1%", "–"]


def test_the_printed_changes_follow_from_the_printed_table():
    memory = CLAIM["method_memory"].value / CLAIM["student_memory"].value - 1
    latency = CLAIM["method_latency"].value / CLAIM["student_latency"].value - 1
    assert memory == pytest.approx(CLAIM["memory_change"].value, abs=0.001)
    assert latency == pytest.approx(CLAIM["latency_change"].value, abs=0.001)


def test_shorter_answers_and_slower_tokens_follow_from_latency_and_rate():
    before, after = 1.45 * 28.13, 1.27 * 24.96
    assert paper_claims.tokens_per_problem("student") == pytest.approx(before)
    assert paper_claims.tokens_per_problem("method") == pytest.approx(after)
    assert paper_claims.change_per_token() == pytest.approx((1.27 / after) / (1.45 / before) - 1)
    assert paper_claims.change_per_token() == pytest.approx(0.127, abs=0.0005)


def test_bytes_of_the_papers_models_follow_from_their_shapes():
    hidden, inner, vocabulary, layers = 8192, 28672, 128256, 80
    attention, mlp = hidden * (2 * hidden + 2 * hidden // 8), 3 * hidden * inner
    weights = layers * (attention + mlp + 2 * hidden) + hidden + 2 * vocabulary * hidden
    assert paper_claims.weight_bytes(paper_claims.TEACHER) == 2 * weights
    assert paper_claims.weight_bytes(paper_claims.TEACHER) / paper_claims.GIB == pytest.approx(131.4, abs=0.05)
    whole = paper_claims.weight_bytes(paper_claims.STUDENT)
    assert whole / paper_claims.GIB == pytest.approx(14.19, abs=0.005)
    kept = 2 * 2 * 152064 * 3584  # embeddings and head in 16 bits
    assert paper_claims.weight_bytes(paper_claims.STUDENT, "nf4") - kept == pytest.approx((whole - kept) / 4, rel=0.05)
    assert paper_claims.weight_bytes(paper_claims.STUDENT, "nf4", double_quant=False) > paper_claims.weight_bytes(
        paper_claims.STUDENT, "nf4"
    )


def test_every_claim_is_named_once_and_every_rule_has_its_claim():
    assert len(CLAIM) == len(paper_claims.PAPER_CLAIMS)
    assert set(paper_claims.RULES) <= set(CLAIM)
    for claim in paper_claims.PAPER_CLAIMS:
        if claim.value is not None:
            assert round(claim.value, claim.digits) == claim.value


# --- criteria ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "ours", "verdict"),
    [
        ("memory_change", (-0.647, -0.647, -0.647), "reproduced"),
        ("memory_change", (-0.6466, -0.6466, -0.6466), "reproduced"),  # the same when printed
        ("memory_change", (-0.6464, -0.6464, -0.6464), "not reproduced"),
        ("memory_change", (-0.66, -0.66, -0.66), "reproduced"),  # beyond, by less than the tolerance
        ("memory_change", (-0.70, -0.70, -0.70), "beaten"),
        ("memory_change", (0.7, 0.7, 0.7), "not reproduced"),
        ("latency_change", (-0.3, -0.4, -0.12), "reproduced"),  # an end of the interval is not beyond
        ("latency_change", (-0.3, -0.4, -0.2), "beaten"),
        ("latency_change", (-0.1, -0.15, -0.05), "reproduced"),
        ("latency_change", (-0.1, -0.3, 0.05), "not reproduced"),  # no change cannot be excluded
        ("latency_change", (-0.05, -0.06, -0.04), "not reproduced"),
        ("usmle", (0.95, 0.91, 0.97), "reproduced"),
        ("usmle", (0.90, 0.85, 0.92), "not reproduced"),
        ("usmle", (0.985, 0.97, 0.99), "beaten"),
        ("student_rate", (28.0, 20.0, 40.0), "reproduced"),
        ("student_rate", (60.0, 55.0, 65.0), "not reproduced"),  # a starting point is not to be beaten
        ("method_rate", (60.0, 55.0, 65.0), "beaten"),
        ("method_latency", (0.5, 0.4, 0.6), "beaten"),
    ],
)
def test_verdicts_follow_the_stated_criteria(claim, ours, verdict):
    assert paper_claims.judge(CLAIM[claim], *ours) == verdict


def test_a_quotient_of_intervals_is_wide():
    value, low, high = paper_claims.quotient((4.0, 3.0, 5.0), (8.0, 6.0, 10.0))
    assert (value, low, high) == pytest.approx((-0.5, 3 / 10 - 1, 5 / 6 - 1))


# --- what stands beside them ---------------------------------------------------------------------------------------


def test_ratios_of_the_run_are_those_over_the_unquantised_student(tmp_path):
    found = rows_of(table_of(tmp_path), "memory_change", "`toy`")
    assert found.ours_value.tolist() == [-0.5, -0.75]
    assert found.verdict.tolist() == ["not reproduced", "beaten"]
    (latency,) = rows_of(table_of(tmp_path), "latency_change", "`toy`").itertuples()
    assert (latency.ours_value, latency.ci_low, latency.ci_high) == pytest.approx(
        (0.04 / 0.05 - 1, 0.039 / 0.052 - 1, 0.0401 / 0.048 - 1)
    )
    assert latency.verdict == "beaten"


def test_benchmarks_are_compared_inside_one_file(tmp_path):
    bench(tmp_path, "shape7b", bf16_eager=(100, [0.04] * 3), paper_mix=(40, [0.08] * 3))
    bench(tmp_path, "shape7b_int4", bf16_eager=(200, [0.02] * 3), int4_lean_graph=(20, [0.001] * 3))
    table = table_of(tmp_path)
    memory = rows_of(table, "memory_change", "Toy GPU")
    assert memory.ours_value.tolist() == pytest.approx([40 / 100 - 1, 20 / 200 - 1])
    assert memory.verdict.tolist() == ["not reproduced", "beaten"]
    assert rows_of(table, "latency_change", "Toy GPU").ours_value.tolist() == pytest.approx([1.0, -0.95])
    assert rows_of(table, "method_rate").ours_value.tolist() == pytest.approx([12.5, 1000])
    (seconds,) = rows_of(table, "student_latency").itertuples()
    assert seconds.ours_value == pytest.approx(0.1 + (1.45 * 28.13 - 1) * 0.04)


def test_without_benchmarks_their_claims_are_not_measured(tmp_path):
    table = table_of(tmp_path)
    assert set(rows_of(table, "method_rate").verdict) == {"not measured"}
    assert set(table.id) == set(CLAIM)


def test_what_arithmetic_contradicts_cannot_hold(tmp_path):
    table = table_of(tmp_path)
    assert set(table[table.verdict == "cannot hold"].id) == {"teacher_memory", "latency_change"}
    (teacher,) = rows_of(table, "teacher_memory").itertuples()
    assert f"{paper_claims.weight_bytes(paper_claims.TEACHER) / 2**30:.1f} GiB" == teacher.ours
    bits = 8 * 78.6 * 2**30 / (paper_claims.weight_bytes(paper_claims.TEACHER) / 2)
    assert f"{bits:.1f} bits" in teacher.why


def test_the_exam_of_a_small_model_measures_nothing_of_a_large_one(tmp_path):
    (small,) = rows_of(table_of(tmp_path), "usmle").itertuples()
    assert (small.verdict, small.ours_value, small.ours) == ("not measured", 0.25, "25.0% [20.0%, 30.0%]")
    assert "n = 250" in small.why
    large = CLAIMS.assign(value=CLAIMS.value.where(CLAIMS.claim != "memory_bytes/weights", 15e9))
    (large,) = rows_of(table_of(tmp_path, large), "usmle").itertuples()
    assert large.verdict == "not reproduced"
    (other,) = rows_of(table_of(tmp_path, CLAIMS[CLAIMS.variant != "nf4"]), "usmle").itertuples()
    assert other.ours_value == 0.95  # the last variant stands in


def test_accuracy_is_kept_where_a_test_says_so(tmp_path):
    found = rows_of(table_of(tmp_path), "accuracy_kept")
    assert found.verdict.tolist() == ["reproduced", "not reproduced"]
    assert found.ours.tolist() == ["-0.010 [-0.020, +0.003]", "-0.100 [-0.200, -0.050]"]


# --- the table -----------------------------------------------------------------------------------------------------


def test_the_markdown_holds_every_row_and_no_number_of_its_own(tmp_path):
    bench(tmp_path, bf16_eager=(1.5e10, [0.04, 0.05, 0.06]), paper_mix=(5e9, [0.08] * 3))
    table, text = table_of(tmp_path), paper_claims.paper_table(CLAIMS, FACTS, tmp_path)
    body, _, note = text.partition("\n\n")
    header, rule, *lines = body.splitlines()
    assert len(lines) == len(table)
    assert {line.count("|") for line in (header, rule, *lines)} == {7}
    for line, row in zip(lines, table.itertuples(), strict=True):
        assert [cell.strip() for cell in line.strip("|").split(" | ")] == [
            row.claim, row.paper, row.ours, row.scale, row.verdict, row.why,
        ]  # fmt: skip
    assert not re.search(r"\b(nan|None|inf)\b", text)
    assert {"reproduced", "beaten", "cannot hold"} <= set(re.findall("reproduced|beaten|cannot hold", note))
    assert f"{paper_claims.weight_bytes(paper_claims.STUDENT) / 1e9:.2f} · 10⁹" in note


def test_numbers_shown_are_the_numbers_held(tmp_path):
    for row in table_of(bench(tmp_path, bf16_eager=(1.5e10, [0.04, 0.05, 0.06]))).itertuples():
        shown = [float(x) for x in re.findall(r"[-+]?\d+\.?\d*", row.ours)]
        scale = 100 if "%" in row.ours else 1
        held = [] if math.isnan(row.ours_value) else [row.ours_value, row.ci_low, row.ci_high][: len(shown)]
        assert shown == pytest.approx([scale * x for x in held], abs=0.06), row


def test_the_committed_benchmarks_are_found():
    table = table_of(ROOT / "benchmarks" / "results")
    for claim in ("memory_change", "latency_change", "student_memory", "method_rate"):
        assert len(rows_of(table, claim, "random weights")), claim
