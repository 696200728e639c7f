"""What benchmarks read: their common options, and the student and the questions of a finished run."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from benchmarks.record import RESULTS
from medkit.data import splits
from medkit.modeling import loading
from medkit.params import Params, load_params
from medkit.stage import ROOT, count_cores

STUDENT = Path("02_distillation") / "student_kd"


def make_parser(description: str, repeats: int = 5) -> ArgumentParser:
    """The options that every benchmark on a finished run has."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "tiny", help="a finished run's folder")
    parser.add_argument("--params", type=Path, default=ROOT / "params" / "tiny.yaml")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed passes of each contender, after a warm-up")
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def load_student(args: Namespace) -> tuple[object, nn.Module, Params]:
    """The distilled student of a run: its tokenizer, the model on the params' device, and the params."""
    torch.set_num_threads(args.threads)
    params, folder = load_params(args.params), args.run / STUDENT
    return loading.load_tokenizer(folder), loading.load_model(folder, params.models), params


def read_rows(args: Namespace, params: Params, *names: str, number: int | None = None) -> pd.DataFrame:
    """Rows of the headline task in these splits, in an order that depends on the seed alone; the first `number`."""
    table = pd.read_parquet(args.run / "01_data" / "questions.parquet")
    table = table[table.source == params.evaluation.headline_source]
    if "test" not in names:
        table = pd.concat([splits.training_rows(table, name) for name in names])
    return table[table.split.isin(names)].sample(frac=1, random_state=params.seed).head(number or len(table))
