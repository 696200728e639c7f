"""Notes and words beside the numbers; the tables themselves are held by docs/ (contract/test_repository.py)."""

from medkit.reporting import model_card, story, tables


def test_a_table_whose_answers_were_taught_says_so_beside_its_accuracy(toy_results):
    """Wherever the accuracy is shown: the report's and the card's tables, and the run's own sentences."""
    results, facts = toy_results
    noted = {**facts, "seen": {"icd_chapter": "taught, one", "medqa": "taught, two"}}
    usual, shown = tables.run_tables(results, facts), tables.run_tables(results, noted)
    notes = {"Accuracy on icd_chapter": "taught, one", "Published exams": "taught, two"}
    assert shown == usual | {title: f"{usual[title]}\n\n{note}" for title, note in notes.items()}
    assert story.tell_story(results, noted) == [*story.tell_story(results, facts), "taught, one"]
    assert "taught, one" in str(model_card.build_card(results, noted))
