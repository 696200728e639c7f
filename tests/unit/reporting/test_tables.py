"""A number in a table is a number of `results.json`, rounded; what was not measured is a dash."""

import re

import matplotlib as mpl

from medkit.distillation import plot_thinking
from medkit.reporting import model_card, story, tables
from medkit.stage import DISCLAIMER
from medkit.variants import VARIANTS

mpl.use("Agg")


def cells(table: str) -> list[list[str]]:
    """A markdown table, up to the first blank line, as rows of cells; every row must be as long as the headings."""
    lines = table.partition("\n\n")[0].splitlines()
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    assert {len(row) for row in split} == {len(split[0])} == {lines[1].count("|") - 1}
    return split


def accuracy(results, scoring="option_text") -> str:
    table = results[(results.metric == scoring) & (results.variant != "tfidf")]
    return tables.variants_table(table, [("{}", "accuracy/*", ".2f", 1)])


def test_accuracy_has_a_row_per_variant_and_a_column_per_source(toy_results):
    results, _ = toy_results
    header, *body = cells(accuracy(results))
    assert header == ["variant", "icd_chapter<br>n = 240", "medqa<br>n = 16"]
    wanted = results[(results.result == "accuracy/icd_chapter") & (results.metric == "option_text")]
    wanted = wanted[wanted.variant != "tfidf"].set_index("variant")
    assert [row[0] for row in body] == [VARIANTS[v].label for v in wanted.index]
    for name, cell, exam in body:
        one = wanted.loc[next(v for v in wanted.index if VARIANTS[v].label == name)]
        assert cell == f"{one.value:.2f} [{one.ci_low:.2f}, {one.ci_high:.2f}]"
        assert exam == ("0.20 [0.10, 0.30], at chance" if name == VARIANTS["student_kd"].label else "–")
    low = cells(accuracy(results.assign(chance=0.95, at_chance=False)))
    assert any("below chance" in row[1] for row in low) and not any("chance" in row[1] for row in body)
    assert accuracy(results, "never") == ""
    fewer = accuracy(results.assign(n=results.n.where(results.variant != "base", 100)))
    assert [row[0] for row in cells(fewer) if row[1].endswith(", n = 100")] == [VARIANTS["base"].label]


def test_a_table_whose_answers_were_taught_says_so_beside_its_accuracy(toy_results):
    """Wherever the accuracy is shown: the report's and the card's tables, and the run's own sentences."""
    results, facts = toy_results
    noted = {**facts, "seen": {"icd_chapter": "taught, one", "medqa": "taught, two"}}
    usual, shown = tables.run_tables(results, facts), tables.run_tables(results, noted)
    notes = {"Accuracy on icd_chapter": "taught, one", "Published exams": "taught, two"}
    assert shown == usual | {title: f"{usual[title]}\n\n{note}" for title, note in notes.items()}
    assert story.tell_story(results, noted) == [*story.tell_story(results, facts), "taught, one"]
    assert "taught, one" in str(model_card.build_card(results, noted))


def test_a_certificate_says_what_was_shown_and_what_it_would_take(toy_results):
    results, _ = toy_results
    (_, row) = cells(tables.certificates_table(results))
    assert row[1:6] == ["-0.008 [-0.038, +0.022]", "240", "3 / 5", "0.02", "0.2"]
    assert row[6:] == ["not shown; about 1,234 needed", "0.0123", "–"]
    shown = cells(tables.certificates_table(results.assign(within_margin=True)))[1]
    assert shown[6] == "equivalent"


def test_runs_of_other_seeds_stand_side_by_side_and_a_missing_claim_is_a_dash(toy_results):
    results, facts = toy_results
    other = results[~results.result.str.startswith("certificate/")], facts | {"run": "seed 7"}
    header, *rows = cells(tables.seeds_table([(results, facts), other]))
    assert header == ["task", "what", f"`{facts['run']}`", "`seed 7`"]
    certificate = next(row for row in rows if "equivalent" in row[2])
    assert certificate[2:] == ["-0.008 [-0.038, +0.022], n = 240, not shown equivalent within 0.02", "–"]
    assert all(row[2] == row[3] for row in rows if row is not certificate)


def test_tables_without_rows_are_left_out_and_none_shows_a_hole(toy_results):
    results, facts = toy_results
    found = tables.run_tables(results, facts)
    assert not [title for title in found if title.startswith(("Robustness", "Energy"))]
    assert [title for title in found if title.startswith(("Accuracy", "Calibration", "Safety"))]
    for text in [*found.values(), tables.provenance_line(facts)]:
        assert text and not re.search(r"\b(nan|None|NaT|inf)\b", text)
    assert DISCLAIMER in tables.provenance_line(facts)


def test_benchmarks_say_whether_the_goal_was_met():
    ratios = {"rises": (2, 2, "higher"), "falls": (0.6, 0.5, "lower"), "measured": (1.0, None, "lower")}
    ratios = {name: dict(zip(("value", "goal", "better"), values, strict=True)) for name, values in ratios.items()}
    benchmarks = [{"name": "toy", "device": "cpu", "ratios": ratios}]
    rises, falls = cells(tables.goals_table(benchmarks, {"toy falls": "too slow"}))[1:]
    assert rises[2:] == ["`rises`", "2.00", "≥ 2", "yes"] and falls[2:] == ["`falls`", "0.60", "≤ 0.5", "no: too slow"]
    assert cells(tables.ratios_table(benchmarks))[1:] == [["toy", "cpu", "`measured`", "1.00"]]


def test_thinking_is_said_to_help_or_harm_only_where_the_test_says_so():
    measured = next(content["raw"] for content in tables.load_benchmarks("thinking"))
    header, *body = cells(tables.thinking_table(measured))
    assert len(body) == len(measured["accuracy"]) and header[-1] == "n"
    for row, shown in zip(measured["accuracy"], body, strict=True):
        assert shown[4].startswith(f"{row['accuracy']:.2f} [") and shown[5] == str(row["n"])
    legend = plot_thinking(measured)[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.texts] == list(dict.fromkeys(row[0] for row in body)), "one set of names"
    for verdict, word in {"better": "helps", "worse": "harms", "equivalent": "no effect"}.items():
        first, *others = measured["steps"]
        sentence, step, *_ = tables.thinking_findings(measured | {"steps": [first | {"verdict": verdict}, *others]})
        assert word in sentence and step.endswith(f", {verdict}.") and f"{first['difference']:+.2f} [" in step
