"""Notes and words beside the numbers; the tables themselves are held by docs/ (contract/test_repository.py)."""

import matplotlib as mpl

from medkit.distillation import plot_thinking
from medkit.reporting import model_card, story, tables
from medkit.variants import THINKERS

mpl.use("Agg")


def test_a_table_whose_answers_were_taught_says_so_beside_its_accuracy(toy_results):
    """Wherever the accuracy is shown: the report's and the card's tables, and the run's own sentences."""
    results, facts = toy_results
    noted = {**facts, "seen": {"icd_chapter": "taught, one", "medqa": "taught, two"}}
    usual, shown = tables.run_tables(results, facts), tables.run_tables(results, noted)
    notes = {"Accuracy on icd_chapter": "taught, one", "Published exams": "taught, two"}
    assert shown == usual | {title: f"{usual[title]}\n\n{note}" for title, note in notes.items()}
    assert story.tell_story(results, noted) == [*story.tell_story(results, facts), "taught, one"]
    assert "taught, one" in str(model_card.build_card(results, noted))


def test_thinking_is_said_to_help_or_harm_only_where_the_test_says_so():
    measured = next(content["raw"] for content in tables.load_benchmarks("thinking"))
    legend = plot_thinking(measured)[0].axes[0].get_legend()
    names = dict.fromkeys(THINKERS[row["model"]].label for row in measured["accuracy"])
    assert [text.get_text() for text in legend.texts] == list(names)
    for verdict, word in {"better": "helps", "worse": "harms", "equivalent": "no effect"}.items():
        first, *others = measured["steps"]
        sentence, step, *_ = tables.thinking_findings(measured | {"steps": [first | {"verdict": verdict}, *others]})
        assert word in sentence and step.endswith(f", {verdict}.") and f"{first['difference']:+.2f} [" in step
