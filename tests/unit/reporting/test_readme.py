"""What README and docs read of a run: a small selection that gives the same tables and figure as the whole."""

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
    assert "not shown to be equivalent to it within 0.02 (that needs about 1,234 questions)" in sentences["edge file"]
    assert "does not beat TF-IDF" in sentences["edge file"] and "28% of the bytes" in sentences["edge file"]
    assert "66% [56%, 76%] of the gap" in sentences[tables.label("student_kd")]
    shown = results.assign(within_margin=True, verdict="better")
    (edge,) = [text for text in story.tell_story(shown, facts) if text.startswith("**edge file**")]
    assert "equivalent to it within 0.02:" in edge and "It beats TF-IDF" in edge
