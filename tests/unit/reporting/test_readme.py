"""What README and docs read of a run: a small selection that gives the same tables and figure as the whole."""

import json

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")

from medkit import reporting
from medkit.reporting import readme, story, tables


def test_the_selection_gives_the_same_tables(toy_results):
    results, facts = toy_results
    content = readme.select_results(results, facts)
    rows = pd.DataFrame(content.pop("results"))
    assert 0 < len(rows) < len(results) and "params" not in content and "stage" not in rows
    assert reporting.run_tables(rows, content) == reporting.run_tables(results, facts)
    assert reporting.paper_table(rows, content) == reporting.paper_table(results, facts)


def test_the_figure_shows_both_tasks_with_intervals_and_the_baselines(toy_results):
    results, facts = toy_results
    icd, records = story.plot_story(results, facts).axes
    scorings = {"accuracy/icd_chapter": "option_text", "field_f1/records": "generated"}
    for ax, (result, scoring) in zip((icd, records), scorings.items(), strict=True):
        rows = story.rows_of(results, result, facts)
        shown = rows[rows.index.isin({*story.SHOWN} - {*story.LINES}) & rows.index.isin(story.megabytes(results))]
        spans = {tuple(round(y, 6) for y in segment[:, 1]) for c in ax.collections for segment in c.get_segments()}
        assert spans == {(round(row.ci_low, 6), round(row.ci_high, 6)) for row in shown.itertuples()}
        assert set(rows.metric) == {scoring}
        assert ax.get_xscale() == "log"
        named = {text.get_text().rpartition(", ")[0] for text in ax.get_legend().texts}
        assert named == {tables.label(v) for v in (*shown.index, *rows.index[rows.index.isin(story.LINES)])}


def test_the_sentences_say_what_was_and_what_was_not_shown(toy_results):
    results, facts = toy_results
    sentences = {text.split("**")[1]: text for text in story.tell_story(results, facts)}
    edge, student = sentences["edge file"], sentences[tables.label("student_kd")]
    missed = "within 0.02: not shown (that needs n = 1,234 or more) on icd_chapter, -0.008"
    assert missed in edge and "28% of the bytes of distilled student" in edge
    assert "is not shown to beat TF-IDF" in student and "TF-IDF" not in edge
    assert "Of the gap to the teacher it closes 66% [56%, 76%] on " in student
    for verdict, word in {"better": "beats", "worse": "is worse than"}.items():
        changed = results.assign(within_margin=True, verdict=verdict)
        student, edge = story.tell_story(changed, facts, ["student_kd", "edge"])
        assert f"It {word} TF-IDF" in student and "within 0.02: shown on icd_chapter" in edge


def test_the_text_before_long_code_says_how_long_it_took(tmp_path):
    """By the times that papermill writes into an executed copy; told again they change nothing, others replace them."""
    text = ["# 1\n", "\n", "| **Time** | some time; it resumes |\n", "| **Next** | two |"]
    source = [("markdown", text, 0), ("code", ["a"], 59), ("markdown", ["Long."], 0)]
    source += [("code", ["b"], 61), ("code", ["c"], 299)]
    cells = [{"cell_type": k, "id": f"c{i}", "metadata": {}, "source": s} for i, (k, s, _) in enumerate(source)]
    clocks = [{"metadata": {"papermill": {"duration": seconds or None}}} for *_, seconds in source]
    executed = [cell | clock for cell, clock in zip(cells, clocks, strict=True)]
    (tmp_path / "01_data.ipynb").write_text(json.dumps({"cells": executed}))
    facts, durations = {"run": "mine", "device": "a laptop"}, [{"result": "duration_s/01_data", "value": 660.0}]
    rows = pd.DataFrame([*durations, *readme.cell_times(tmp_path)])
    assert rows.result.tolist()[1:] == ["cell_s/01_data/c3", "cell_s/01_data/c4"]
    told = readme.tell_times("01_data", {"cells": cells}, rows, facts)
    texts = ["".join(cell["source"]) for cell in told["cells"]]
    assert texts[0].endswith("| **Time** | 11 min with `mine` on a laptop; it resumes |\n| **Next** | two |")
    assert texts[2] == "Long.\n\n*The code below took 6 min of the 11 min of this notebook (`mine`, a laptop).*"
    assert readme.tell_times("01_data", told, rows, facts) == told
    again = readme.tell_times("01_data", told, rows.head(1), facts)
    assert again["cells"][1:] == cells[1:] and again["cells"][0] == told["cells"][0]
    assert readme.tell_times("02_distillation", {"cells": cells}, rows, facts) == {"cells": cells}
