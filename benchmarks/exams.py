"""The exams' own questions, whole sets: what several benchmarks ask. Nothing is measured here."""

import pandas as pd

from medkit import sources
from medkit.data import splits
from medkit.params import load_params
from medkit.stage import ROOT

EXAMS = ("medqa", "medmcqa", "pubmedqa", "mmlu")


def read_questions(names: tuple[str, ...] = EXAMS) -> dict[str, pd.DataFrame]:
    """Per source every usable question that has an answer and may be tested on, from the tiny profile's files."""
    params = load_params(ROOT / "params" / "tiny.yaml")
    datasets = {name: params.data.datasets[name] for name in names}
    paths = {name: sources.fetch(dataset.origin) for name, dataset in datasets.items()}
    table, _ = splits.load_questions(datasets, paths, params.seed)
    table = table[(table.answer >= 0) & ~table.pool.isin(["train", "transfer"])]
    return {name: table[table.source == name].reset_index(drop=True) for name in names}
