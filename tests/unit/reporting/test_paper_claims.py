"""The paper's numbers beside ours: arithmetic checked by hand, verdicts by their stated rule."""

import pandas as pd
import pytest

from medkit.reporting import paper_claims

CLAIMS = paper_claims.CLAIMS
FACTS = {"run": "toy", "device": "Toy GPU", "headline_source": "exam", "headline_scoring": "letter"}
COLUMNS = ["result", "variant", "metric", "value", "ci_low", "ci_high", "n", "unit", "baseline", "verdict"]


def results(edge_engine="sequential") -> pd.DataFrame:
    """A run's results; the student is of the paper's size."""
    rows = [
        ("memory_bytes/weights", "student_kd", "as stored", 15.2e9, None, None, None, "bytes", None, None),
        ("memory_ratio", "nf4", "ratio", 0.5, None, None, None, "bytes of weights", "student_kd", None),
        ("memory_ratio", "edge", "ratio", 0.25, None, None, None, "bytes of weights", "student_kd", None),
        ("memory_ratio", "nf4", "ratio", 0.1, None, None, None, "bytes of weights", "teacher_base", None),
        ("latency_s_per_token", "student_kd", "sequential", 0.050, 0.048, 0.052, 3, "s", None, None),
        ("latency_s_per_token", "edge", edge_engine, 0.040, 0.039, 0.0401, 3, "s", None, None),
        ("latency_ratio", "edge", "ratio", 0.8, None, None, None, "time per token at equal length", "student_kd", None),
        ("accuracy/medqa", "nf4", "letter", 0.25, 0.2, 0.3, 250, "fraction", None, None),
        ("accuracy/medqa", "nf4", "generated", 0.99, 0.9, 1.0, 250, "fraction", None, None),
        ("accuracy_delta/exam", "nf4", "letter", -0.01, -0.02, 0.003, 900, "fraction", "student_kd", "equivalent"),
        ("accuracy_delta/exam", "edge", "letter", -0.1, -0.2, -0.05, 900, "fraction", "student_kd", "worse"),
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def bench(name="shape7b", **contenders) -> dict:
    """A benchmark's content: contender → (peak bytes, seconds per token of each run)."""
    measured = {
        one: {"generation_peak_bytes": peak, "time_to_first_token_s": 0.1, "latency_s_per_token_runs": runs}
        for one, (peak, runs) in contenders.items()
    }
    return {"name": name, "device": "Toy GPU", "raw": {"contenders": {"other": {"error": "not run"}, **measured}}}


def rows_of(claim, measured_on="", table=None, benchmarks=(), **facts) -> pd.DataFrame:
    table = paper_claims.compare_with_paper(results() if table is None else table, FACTS | facts, benchmarks)
    return table[(table.id == claim) & table.measured_on.str.contains(measured_on, regex=False)]


@pytest.mark.parametrize(
    ("claim", "ours", "verdict"),
    [
        ("memory_change", (-0.6466, -0.6466, -0.6466), "reproduced"),  # the same when printed
        ("memory_change", (-0.6464, -0.6464, -0.6464), "not reproduced"),
        ("latency_change", (-0.3, -0.4, -0.12), "reproduced"),  # one end of the interval is not beyond
        ("latency_change", (-0.1, -0.3, 0.05), "not reproduced"),  # no change cannot be excluded
        ("usmle", (0.985, 0.97, 0.99), "beaten"),
        ("student_rate", (60.0, 55.0, 65.0), "not reproduced"),  # a starting point is not to be beaten
    ],
)
def test_verdicts_follow_the_stated_rule(claim, ours, verdict):
    assert paper_claims.judge(CLAIMS[claim], *ours[1:]) == verdict


def test_ratios_of_a_run_of_the_papers_size_are_judged():
    memory = rows_of("memory_change", "`toy`")
    assert memory.ours_value.tolist() == [-0.5, -0.75]
    assert memory.verdict.tolist() == ["not reproduced", "beaten"]
    (latency,) = rows_of("latency_change", "`toy`").itertuples()
    numbers = (0.04 / 0.05 - 1, 0.039 / 0.052 - 1, 0.0401 / 0.048 - 1)
    assert (latency.ours_value, latency.ci_low, latency.ci_high) == pytest.approx(numbers)
    assert latency.verdict == "beaten"
    assert rows_of("accuracy_kept").verdict.tolist() == ["reproduced", "not reproduced"]
    assert rows_of("usmle").ours.tolist() == ["25.0% [20.0%, 30.0%]"]


def test_a_cpu_or_another_engine_is_never_held_against_the_papers_times():
    assert rows_of("latency_change", "`toy`", device="AMD EPYC, 2 cores").verdict.tolist() == ["not comparable"]
    other = rows_of("latency_change", "`toy`", results(edge_engine="llama.cpp"))
    assert other.verdict.tolist() == ["not comparable"]


def test_benchmarks_are_compared_inside_one_file():
    files = [bench(bf16_eager=(200, [0.02] * 3)), bench(bf16_eager=(100, [0.04] * 3), paper_mix=(40, [0.08] * 3))]
    memory = rows_of("memory_change", "7B shapes", benchmarks=files)
    assert memory.ours_value.tolist() == pytest.approx([40 / 100 - 1])
    assert rows_of("latency_change", "7B shapes", benchmarks=files).ours_value.tolist() == pytest.approx([1.0])
    (seconds,) = rows_of("student_latency", benchmarks=files).itertuples()
    assert seconds.ours_value == pytest.approx(0.1 + (1.45 * 28.13 - 1) * 0.02)
    assert set(rows_of("method_rate", benchmarks=files[:1]).verdict) == {"not measured"}
