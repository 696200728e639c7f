"""What README and docs read of a run: a small selection that gives the same tables and figure as the whole."""

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")

from medkit import reporting
from medkit.reporting import readme


def test_the_selection_gives_the_same_tables(toy_results):
    results, facts = toy_results
    content = readme.select_results(results, facts)
    rows = pd.DataFrame(content.pop("results"))
    assert 0 < len(rows) < len(results) and "params" not in content and "stage" not in rows
    assert reporting.run_tables(rows, content) == reporting.run_tables(results, facts)
    assert reporting.paper_table(rows, content) == reporting.paper_table(results, facts)


def test_the_figure_shows_every_variant_with_its_interval(toy_results):
    results, facts = toy_results
    (ax,) = readme.plot_accuracy_against_size(results, facts).axes
    labels = {text.get_text() for text in ax.texts}
    shown = results[(results.result == "accuracy/icd_chapter") & (results.metric == "option_text")]
    nf4 = "nf4"  # its bytes were not counted, so it stands with the student
    assert labels == {reporting.tables.label(v) for v in {*shown.variant, nf4}} | {"chance 0.25"}
    spans = {tuple(round(y, 6) for y in segment[:, 1]) for c in ax.collections for segment in c.get_segments()}
    assert spans == {(round(row.ci_low, 6), round(row.ci_high, 6)) for row in shown.itertuples()}
