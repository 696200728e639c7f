"""A number in a table for people is a number of `results.json`, rounded; what was not measured is a dash."""

import json
import re

import pandas as pd
import pytest

from medkit.quantization import memory_budget
from medkit.reporting import results as claims
from medkit.reporting import tables as report
from medkit.stage import DISCLAIMER, StageError
from medkit.variants import VARIANTS

FACTS = {"run": "toy", "headline_source": "icd_chapter", "headline_scoring": "option_text", "chance": 0.25}
ACCURACY = pd.DataFrame(
    [
        ("teacher_base", "icd_chapter", "option_text", 0.31, 0.265, 0.358, 400, 0.0),
        ("lora", "icd_chapter", "option_text", 0.7275, 0.682, 0.769, 400, 0.0),
        ("lora", "icd_chapter", "generated", 0.5, 0.377, 0.623, 60, 0.15),
        ("nf4", "icd_chapter", "option_text", 0.7, 0.653, 0.743, 400, 0.0),
        ("nf4", "medqa", "option_text", 0.2, 0.105, 0.348, 40, 0.0),
    ],
    columns=["variant", "source", "scoring", "accuracy", "ci_low", "ci_high", "n", "unparsed_rate"],
)
STEPS = pd.DataFrame(
    [
        (
            "nf4",
            "lora",
            "icd_chapter",
            "option_text",
            -0.0275,
            -0.054,
            0.0004,
            400,
            8,
            19,
            0.0523,
            0.0401,
            "not detectable",
        ),
        ("nf4", "teacher_base", "icd_chapter", "option_text", 0.39, 0.331, 0.447, 400, 181, 25, 3.1e-29, 0.1, "better"),
        ("nf4", "lora", "medqa", "option_text", 0.0, -0.1, 0.1, 40, 1, 1, 1.0, 0.15, "not detectable"),
    ],
    columns=[
        "variant",
        "baseline",
        "source",
        "scoring",
        "difference",
        "ci_low",
        "ci_high",
        "n",
        "gained",
        "lost",
        "p_holm",
        "mde",
        "verdict",
    ],
)
LEDGER = pd.DataFrame(
    [
        ("lora", "embeddings", 113_246_208),
        ("lora", "linear", 325_000_000),
        ("nf4", "embeddings", 113_246_208),
        ("nf4", "linear", 55_000_000),
    ],
    columns=["variant", "component", "bytes"],
)
BENCH = pd.DataFrame(
    [
        ("lora", "single", "sequential", ttft, latency, 30.0, 40, 32, 8)
        for ttft, latency in ((0.11, 0.031), (0.12, 0.033), (0.13, 0.032))
    ]
    + [("nf4", "single", "sequential", 0.31, 0.048, 20.0, 40, 32, 8)] * 2,
    columns=[
        "variant",
        "workload",
        "engine",
        "ttft_s",
        "latency_s_per_token",
        "throughput_tokens_per_s",
        "prompt_tokens",
        "output_tokens",
        "requests",
    ],
)


@pytest.fixture
def rows() -> list[dict]:
    made = [*claims.from_accuracy(ACCURACY), *claims.from_steps(STEPS), *claims.from_ledger(LEDGER)]
    made += claims.from_bench(BENCH, 0.95)
    return [*made, *claims.ratios(made)]


@pytest.fixture
def results(rows, tmp_path):
    return report.write_results(tmp_path, rows, FACTS)


def cells(table: str) -> list[list[str]]:
    """A markdown table, up to the first blank line, as rows of cells; every row must be as long as the headings."""
    lines = table.partition("\n\n")[0].splitlines()
    assert re.fullmatch(r"\|(-+\|)+", lines[1])
    split = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in (lines[0], *lines[2:])]
    assert {len(row) for row in split} == {len(split[0])}
    assert len(split[0]) == lines[1].count("|") - 1
    return split


def numbers(cell: str) -> list[float]:
    return [
        float(number.replace(",", "").replace("−", "-"))
        for number in re.findall(r"[-+−]?\d[\d,]*\.?\d*(?:e-?\d+)?", cell)
    ]


# --- the file ------------------------------------------------------------------------------------------------------


def test_results_come_back_as_they_were_written(results, rows):
    table, facts = report.load_results(results)
    back = json.loads(results.read_text())["claims"]
    assert back == rows
    assert len(table) == len(rows)
    assert set(claims.COLUMNS) <= set(table.columns)
    assert FACTS.items() <= facts.items()
    assert facts["disclaimer"] == DISCLAIMER
    assert {"date", "device", "git_commit", "versions"} <= set(facts)
    assert "claims" not in facts


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: "{}"], ids=["cut", "empty"])
def test_a_damaged_file_is_named(results, damage):
    results.write_text(damage(results.read_text()))
    with pytest.raises(StageError, match="not a whole results file") as error:
        report.load_results(results)
    assert str(results) in str(error.value)


def test_missing_results_say_what_makes_them(tmp_path):
    with pytest.raises(StageError, match="medkit run") as error:
        report.load_results(tmp_path / "results.json")
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["value", "ci_low", "p_holm"])
def test_what_is_no_number_is_refused_and_the_old_results_stay(results, rows, value, key):
    before = results.read_text()
    with pytest.raises(ValueError, match="JSON"):
        report.write_results(results.parent, [*rows, {**rows[0], key: value}], FACTS)
    assert results.read_text() == before
    assert [path.name for path in results.parent.iterdir()] == ["results.json"]


def test_results_of_a_run_stand_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path))
    assert report.results_of("toy") == tmp_path / "toy" / "results.json"
    with pytest.raises(StageError):
        report.results_of("../toy")


# --- the tables ----------------------------------------------------------------------------------------------------


def test_accuracy_table_holds_every_claim_rounded(results):
    table, _ = report.load_results(results)
    header, *body = cells(report.accuracy_table(table, "option_text"))
    assert [h.split("<br>")[0] for h in header] == ["variant", "icd_chapter", "medqa"]
    assert numbers(header[1]) == [400]
    assert numbers(header[2]) == [40]
    assert [row[0] for row in body] == [VARIANTS[v].label for v in ("teacher_base", "lora", "nf4")]
    wanted = ACCURACY[ACCURACY.scoring == "option_text"].set_index(["variant", "source"])
    for label, *found in body:
        (variant,) = (v for v in VARIANTS if VARIANTS[v].label == label)
        for source, cell in zip(("icd_chapter", "medqa"), found, strict=True):
            if (variant, source) in wanted.index:
                claim = wanted.loc[(variant, source)]
                assert numbers(cell) == pytest.approx([claim.accuracy, claim.ci_low, claim.ci_high], abs=0.00501)
            else:
                assert cell == "–"


def test_a_scoring_nobody_used_gives_no_rows(results):
    table, _ = report.load_results(results)
    assert len(cells(report.accuracy_table(table, "letter"))) == 1
    assert len(cells(report.accuracy_table(table, "generated"))) == 2


def test_steps_table_tells_the_whole_comparison(results):
    table, _ = report.load_results(results)
    _, *body = cells(report.steps_table(table, "icd_chapter", "option_text"))
    wanted = STEPS[STEPS.source == "icd_chapter"]
    assert len(body) == len(wanted)
    for row, claim in zip(body, wanted.itertuples(), strict=True):
        step, difference, n, p, verdict, mde = row
        assert step == f"{VARIANTS[claim.baseline].label} → {VARIANTS[claim.variant].label}"
        assert numbers(difference) == pytest.approx([claim.difference, claim.ci_low, claim.ci_high], abs=0.000501)
        assert difference[0] in "+-"  # a difference has a sign
        assert (int(n), verdict) == (claim.n, claim.verdict)
        assert float(p) == pytest.approx(claim.p_holm, rel=0.05)
        assert float(mde) == pytest.approx(claim.mde, abs=0.000501)


def test_cost_table_has_units_and_dashes(rows, tmp_path):
    kept = [r for r in rows if not (r["claim"] == "ttft_s" and r["variant"] == "nf4")]
    table, _ = report.load_results(report.write_results(tmp_path, kept, FACTS))
    header, *body = cells(report.cost_table(table))
    found = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in body}
    assert set(found) == {VARIANTS["lora"].label, VARIANTS["nf4"].label}
    lora, nf4 = found[VARIANTS["lora"].label], found[VARIANTS["nf4"].label]
    assert numbers(lora["weights, MB"]) == [pytest.approx(438.246, abs=0.51)]
    assert numbers(nf4["weights, MB"]) == [pytest.approx(168.246, abs=0.51)]
    assert numbers(lora["first token, ms"]) == [pytest.approx(120, abs=0.51)]
    assert numbers(nf4["per further token, ms"]) == [pytest.approx(48, abs=0.51)]
    assert nf4["first token, ms"] == "–"


def test_an_engine_that_differs_is_named(rows, tmp_path):
    def told(engines):
        timed = [r | {"metric": engines.get(r["variant"], r["metric"])} for r in rows]
        return report.cost_table(report.load_results(report.write_results(tmp_path, timed, FACTS))[0])

    assert " by " not in told({"lora": "transformers", "nf4": "transformers"}).splitlines()[-1]
    mixed = told({"lora": "transformers", "nf4": "openvino"}).splitlines()[-1]
    assert mixed.endswith(f"repeats, by transformers, {VARIANTS['nf4'].label} by openvino.")


def test_tables_show_no_hole_of_pandas(results):
    table, facts = report.load_results(results)
    source, scoring = facts["headline_source"], facts["headline_scoring"]
    tables = [
        report.accuracy_table(table, scoring),
        report.steps_table(table, source, scoring),
        report.cost_table(table),
    ]
    for text in [*tables, report.provenance_line(facts)]:
        assert not re.search(r"\b(nan|None|NaT|inf)\b", text), text


def test_every_variant_has_one_name_and_one_colour():
    assert len({v.label for v in VARIANTS.values()}) == len(VARIANTS) == len({v.colour for v in VARIANTS.values()})


def test_provenance_line_is_one_line(results):
    _, facts = report.load_results(results)
    line = report.provenance_line(facts)
    assert all(part in line for part in ("`toy`", facts["device"], facts["date"], DISCLAIMER))
    assert "\n" not in line


@pytest.mark.parametrize(
    ("better", "value", "goal", "told"),
    [
        ("higher", 2.5, 2, "yes"),
        ("higher", 2, 2, "yes"),
        ("higher", 1.9, 2, "no"),
        ("lower", 0.4, 0.5, "yes"),
        ("lower", 0.5, 0.5, "yes"),
        ("lower", 0.6, 0.5, "no"),
    ],
)
def test_benchmarks_say_whether_the_goal_was_met(tmp_path, better, value, goal, told):
    ratio = {"value": value, "goal": goal, "better": better, "repeats": 5}
    (tmp_path / "toy.cpu.json").write_text(json.dumps({"name": "toy", "device": "cpu", "ratios": {"what": ratio}}))
    _, row = cells(report.benchmarks_table(tmp_path))
    assert row[-1] == told
    assert row[-2] == f"{'≥' if better == 'higher' else '≤'} {goal}"
    assert numbers(row[-3]) == [value]


def test_ratios_without_a_goal_can_be_left_out(tmp_path):
    ratio = {"value": 1.0, "better": "lower", "repeats": 5}
    ratios = {"aimed": {**ratio, "goal": 2.0}, "seen": {**ratio, "goal": None}}
    (tmp_path / "toy.cpu.json").write_text(json.dumps({"name": "toy", "device": "cpu", "ratios": ratios}))
    assert [row[2] for row in cells(report.benchmarks_table(tmp_path))[1:]] == ["`aimed`", "`seen`"]
    assert [row[2] for row in cells(report.benchmarks_table(tmp_path, goals_only=True))[1:]] == ["`aimed`"]


def test_no_benchmarks_make_an_empty_table(tmp_path):
    assert len(cells(report.benchmarks_table(tmp_path))) == 1


def test_an_ablation_says_what_the_whole_has_over_each_part(tmp_path):
    shared = {"n": 105, "seeds": 3, "std_over_seeds": 0.01}
    table = [
        {
            **shared,
            "row": row,
            "metric": metric,
            "mean": mean,
            "full_minus_row": gap,
            "ci_low": gap - 1,
            "ci_high": gap + 1,
        }
        for row, metric, mean, gap in (
            ("CE only", "accuracy", 0.75, -0.25),
            ("full", "accuracy", 0.5, 0.0),
            ("CE only", "valid_nll", 1.5, 1.5),
            ("full", "valid_nll", 2.0, 0.0),
        )
    ]
    (tmp_path / "ablation.json").write_text(json.dumps({"raw": {"table": table}}))
    found, below = report.ablation_table(tmp_path / "ablation.json").split("\n\n")
    _, alone, whole = cells(found)
    assert [numbers(cell) for cell in alone[1:]] == [[1.5, 0.01], [1.5, 0.5, 2.5], [0.75, 0.01], [-0.25, -1.25, 0.75]]
    assert alone[2].endswith(" harms") and alone[4].endswith(" not detectable")
    assert whole[2] == whole[4] == "–"
    assert "n = 105 and 105 questions, 3 seeds" in below


def test_recipes_of_the_papers_models_have_their_bytes_and_their_distance_from_bf16():
    names = ("DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Llama-70B")
    estimates = {name: memory_budget.estimate_presets(memory_budget.read_config(name), 1, 4096) for name in names}
    header, *rows = cells(report.recipes_table(estimates))
    assert header[1::3] == [f"{name}:<br>stored, GiB" for name in names]
    found = {row[0].strip("`"): row[1:] for row in rows}
    assert found["bf16"][0] == "14.19" and found["nf4"][0] == "5.17"
    assert [found["bf16"][i] for i in (2, 5)] == ["–", "–"]
    below = {recipe: (numbers(row[2])[0], numbers(row[5])[0]) for recipe, row in found.items() if recipe != "bf16"}
    assert {recipe for recipe, (student, _) in below.items() if student >= 70} == {"nf4_all"}
    assert {recipe for recipe, (_, teacher) in below.items() if teacher >= 70} == {"nf4", "nf4_int8_embed", "nf4_all"}
    assert below["nf4_all"][0] == pytest.approx(70.4, abs=0.05)
