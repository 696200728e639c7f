"""The emergency rules on messages that were written before them (docs/safety.md tells how, and repeats the numbers)."""

from pathlib import Path

import yaml

from medkit.inference.emergencies import is_emergency
from medkit.stage import ROOT
from medkit.statistics import wilson

HERE = Path(__file__).parent


def messages(name):
    """(emergencies, other messages) of a file."""
    kinds = yaml.safe_load((HERE / name).read_text())
    of_kinds = [group.values() if isinstance(group, dict) else [group] for group in kinds.values()]
    return [[message for group in groups for message in group] for groups in of_kinds]


def test_recall_and_precision_are_those_of_the_docs():
    emergencies, others = messages("emergency_messages.yaml")
    assert len(set(emergencies)) >= 150 and len(set(others)) >= 150
    caught, false_alarms = sum(map(is_emergency, emergencies)), sum(map(is_emergency, others))
    recall, precision = caught / len(emergencies), caught / (caught + false_alarms)
    assert recall >= 0.95
    told = (ROOT / "docs" / "safety.md").read_text()
    for name, value, right, total in (
        ("recall", recall, caught, len(emergencies)),
        ("precision", precision, caught, caught + false_alarms),
    ):
        low, high = wilson(right, total, 0.95)
        assert f"{name} {value:.3f} [{low:.3f}, {high:.3f}] ({right} of {total})" in told


def test_the_test_messages_are_kept_apart_from_the_rules():
    tested, written_from = (
        {message.casefold() for group in messages(f"emergency_{name}.yaml") for message in group}
        for name in ("messages", "development")
    )
    assert not tested & written_from


def test_what_every_reader_expects():
    for message in ("He’s not breathing", "crushing chest pain", "I took an overdose", "I want to kill myself"):
        assert is_emergency(message) and is_emergency(message.upper())
    for message in ("", "Hello", "What is an ECG?", "My grandfather died of a heart attack in 1990, what is an ECG?"):
        assert not is_emergency(message)
