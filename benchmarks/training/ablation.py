"""What distillation gives, when, and by which of its parts: on a finished run, with one or more seeds.

When, on the headline task alone: does what the teacher adds shrink with more labels, and is it gone if the teacher
learned the student's labels alone, in as many steps as the run's teacher? Parts, on all tasks of the run: soft or hard
answers, KL without CE, hidden states, whole entities, and the order from easy to hard. All students of a setup start
from the same layers and see as many examples in as many steps. A student is scored on rows that no student learns from:
the validation rows, and some groups of the teacher's private rows, set aside before any setup takes labels from the
others. The score is right options, with the four of a question and with all that the task has, and the field F1 of
records. A seed draws the order of the rows, nothing else. Each cell (setup, student, seed) is kept in outputs/<name>: a
killed ablation goes on.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.inputs import make_parser
from benchmarks.record import versions, write
from medkit import distillation, evaluation, inference, modeling
from medkit.data import splits
from medkit.modeling.train_once import find_record, key_of, recorded
from medkit.params import Params, digest, load_params
from medkit.stage import MANIFEST, Stage, atomic_path, run_dir, sha256_of
from medkit.statistics import mean_intervals

SETUPS = {  # name → labelled and private rows of the headline task; None: the run's own rows of all tasks
    "all tasks": None,
    "32 labels": (32, None),
    "128 labels": (128, None),
    "512 labels": (512, None),
    "128 labels, teacher of the same labels": (128, 0),
}
ALL_LAYERS = "last layer of the student and of the teacher"
PARTS = {  # student → its name in the package, and what it changes in the section `distillation`
    "labels alone": ("student_ce", {}),
    "distilled": ("student_kd", {}),
    "hard answers": ("student_hard", {}),
    "KL alone": ("student_kd", {"ce_weight": 0.0, "kl_weight": 1.0}),
    "with hidden states": ("student_kd", {"hidden_weight": 0.5, "hidden_layers": ALL_LAYERS}),
    "with entities": ("student_kd", {"entity_weight": 1.0}),
    "easy first": ("student_kd", {"order": "progressive"}),
}
DIALS = ("labels alone", "distilled")
HELD = {"icd_chapter": 400, "record": 64}  # private rows of a kind that are set aside to score students


def take_rows(questions: pd.DataFrame, headline: str, counts: tuple | None, seed: int) -> pd.DataFrame:
    """The rows of a setup. Labels beyond those of the run are taken from the private rows, which the teacher knows."""
    if counts is None:
        return questions
    (labelled, private), table = counts, questions[questions.source == headline]
    known = table[table.split.isin(["labelled", "private"])]
    known = known.sample(frac=1, random_state=seed).sort_values("split", kind="stable")  # the labelled ones first
    few, rest = known.head(labelled).assign(split="labelled"), known.iloc[labelled:].assign(split="private")
    others = table[table.split.isin(["transfer", "valid", "held"])]
    return pd.concat([few, rest if private is None else rest.head(private), others], ignore_index=True)


def open_setup(name: str, setup: str, params: Params, questions: pd.DataFrame, run: Path) -> Stage:
    """A folder for the setup's models, with the run's base, and its teacher or one that learned this setup's labels."""
    stage = Stage(f"{name}_{setup.replace(' ', '_').replace(',', '')}", "02_distillation")
    for part in ("base", "teacher"):
        if part == "teacher" and "same labels" in setup:
            rows = distillation.teacher_rows(questions)
            taught = pd.read_parquet(run / "01_data" / "questions.parquet")
            train = params.distillation.correction_train
            epochs = train.epochs * len(distillation.teacher_rows(taught)) / len(rows)
            train = train.model_copy(update={"epochs": epochs})
            distillation.correct_teacher(stage, with_changes(params, {"correction_train": train}), rows)
        elif find_record(stage.dir / part, run_key(run)) is None:
            with recorded(stage.dir / part, run_key(run)), atomic_path(stage.dir / part) as scratch:
                shutil.copytree(run / "02_distillation" / part, scratch)
    return stage


def run_key(run: Path) -> str:
    """Digest of the rows and the models of a run."""
    return digest([sha256_of(run / stage / MANIFEST) for stage in ("01_data", "02_distillation")])


def with_changes(params: Params, changes: dict) -> Params:
    """The params with other settings of distillation; the last layers' numbers are put in where they are named."""
    if changes.get("hidden_layers") == ALL_LAYERS:
        teacher = modeling.local_folder(params.models.teacher) / "config.json"
        depth = len(params.models.teacher.keep_layers) or json.loads(teacher.read_text())["num_hidden_layers"]
        changes = changes | {"hidden_layers": [[params.distillation.num_layers, depth]]}
    section = params.distillation.model_copy(update={"students": ["student_hard"], **changes})
    return params.model_copy(update={"distillation": section})


def with_all_options(questions: pd.DataFrame, source: str) -> pd.DataFrame:
    """The rows of a source, each with every option that the source has, as another source."""
    rows = questions[questions.source == source]
    options = sorted(set(rows.options.explode().dropna()))
    right = [options.index(row.options[row.answer]) for row in rows.itertuples()]
    return rows.assign(
        id=rows.id + "/all", source=f"{source}, {len(options)} options", options=[options] * len(rows), answer=right
    )


def train_and_score(part: str, stage: Stage, params: Params, questions: pd.DataFrame, teacher_params: Params) -> dict:
    """Train one student and score it on the validation rows: score by question id, with seconds and steps."""
    name, changes = PARTS[part]
    params, began = with_changes(params, changes), time.perf_counter()
    if name == "student_kd":
        rows = distillation.student_rows(name, stage, teacher_params, questions, inference.TorchEngine)
        tokenizer, _ = distillation.load_tokenizers(params)
        section, load = params.distillation, partial(modeling.load_model, stage.dir / "teacher", params.models)
        layers = distillation.DistillationLoss.from_params(section).teacher_layers
        distillation.capture_teacher(
            load, modeling.encode_questions(tokenizer, rows), stage.path("teacher_cache"), section.top_k,
            section.shard_examples, distillation.teacher_key(stage, params, tokenizer), layers,
        )  # fmt: skip
    model, log = distillation.train_student(name, stage, params, questions, inference.TorchEngine)
    trained_s = time.perf_counter() - began
    valid = splits.training_rows(questions, "valid")
    all_options = with_all_options(valid, params.evaluation.headline_source)
    valid = pd.concat([valid, all_options, questions[questions.split == "held"]], ignore_index=True)
    asked = valid.assign(scoring=np.where(valid.kind.str.startswith("record"), "generated", "option_text"))
    tokenizer = modeling.load_tokenizer(stage.dir / "base")
    sizes = params.inference.batch_tokens, params.inference.max_new_tokens
    predictions = inference.predict(model, tokenizer, asked, *sizes).assign(variant=part)
    scores = evaluation.score_questions(predictions, valid)
    return {
        "steps": len(log), "train_s": trained_s, "load": os.getloadavg()[0], "last_loss": log.loss.tail(5).mean(),
        "scores": scores[["source", "id", "group", "score"]].to_dict("records"),
    }  # fmt: skip


def compare(cells: list[dict], confidence: float) -> Iterator[dict]:
    """Per setup, student and task the mean over seeds, and the difference to the setup's baseline, paired by question.

    The baseline of `distilled` is `labels alone`, that of a part is `distilled`. A question's seeds are averaged first,
    so the interval is for these seeds.
    """
    table = pd.DataFrame([{**cell, **score} for cell in cells for score in cell["scores"]]).drop(columns="scores")
    for (setup, task), part in table.groupby(["setup", "source"], sort=False):
        means = part.pivot_table(index=["id", "group"], columns="student", values="score")
        groups = means.index.get_level_values("group")
        for student in [name for name in PARTS if name in means]:
            mine = part[part.student == student]
            baseline = None if student == "labels alone" else "labels alone" if student == "distilled" else "distilled"
            change = {"difference": None, "ci_low": None, "ci_high": None}
            if baseline in means:
                difference = (means[student] - means[baseline]).to_numpy()[:, None]
                low, high = mean_intervals(difference, groups, confidence, imagined=(-1, 1))
                change = {"difference": difference.mean(), "ci_low": low[0], "ci_high": high[0]}
            by_seed = mine.groupby("seed").score.mean()
            yield {
                "setup": setup, "student": student, "task": task, "n": len(means), "seeds": len(by_seed),
                "mean": by_seed.mean(), "std_over_seeds": by_seed.std(ddof=1) if len(by_seed) > 1 else None,
                "baseline": baseline, **change,
            }  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--setup", action="append", choices=SETUPS, help="default all; the other cells are kept")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--name", default="ablation", help="of the folders in outputs/ where models and cells are kept")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    params = load_params(args.params)
    cells_folder = run_dir(args.name)
    cells_folder.mkdir(parents=True, exist_ok=True)
    questions = pd.read_parquet(args.run / "01_data" / "questions.parquet")
    questions = questions[questions.split != "test"]
    for kind, count in HELD.items():  # whole groups: no label may share a category with a question that is asked
        private = questions[(questions.kind == kind) & (questions.split == "private")]
        groups = private.groupby("group").size().sample(frac=1, random_state=params.seed)
        held = groups.index[groups.cumsum() <= count]
        questions.loc[private.index[private.group.isin(held)], "split"] = "held"
    code = distillation.train_student, distillation.student_rows, evaluation.score_questions, inference.predict
    settings = params.model_dump(mode="json"), run_key(args.run)
    cells = []
    for setup in args.setup or SETUPS:
        rows = take_rows(questions, params.evaluation.headline_source, SETUPS[setup], params.seed)
        stage = open_setup(args.name, setup, params, rows, args.run)
        for seed in args.seeds:
            for part in PARTS if SETUPS[setup] is None else DIALS:
                path = cells_folder / f"{key_of(settings, [setup, PARTS[part], seed], *code)}.json"
                if not path.is_file():
                    seeded = params.model_copy(update={"seed": seed})
                    cell = train_and_score(part, stage, seeded, rows, params)
                    with atomic_path(path) as scratch:
                        scratch.write_text(json.dumps({"setup": setup, "student": part, "seed": seed, **cell}))
                cells.append(json.loads(path.read_text()))
                mean = pd.DataFrame(cells[-1]["scores"]).groupby("source").score.mean().round(3).to_dict()
                print(f"{setup}, {part}, seed {seed}: {cells[-1]['train_s']:.0f} s, {mean}", flush=True)
        shutil.rmtree(stage.path("checkpoints"), ignore_errors=True)
    setup = {
        "run": args.run.name, "seeds": args.seeds, "parts": {name: part[1] for name, part in PARTS.items()},
        "setups": SETUPS, "train": params.distillation.student_train.model_dump(), "threads": args.threads,
        "interval": "bootstrap over groups of questions, each averaged over seeds: for these seeds, not for any",
        "versions": versions("torch", "transformers"),
    }  # fmt: skip
    for result, is_dial in (("ablation", False), ("ablation_dials", True)):  # one does not replace the other
        of_result = [cell for cell in cells if (SETUPS[cell["setup"]] is not None) == is_dial]
        if not of_result:
            continue
        table = list(compare(of_result, params.evaluation.confidence))
        print(pd.DataFrame(table).to_string(float_format="{:.3f}".format))
        costs = [{key: value for key, value in cell.items() if key != "scores"} for cell in of_result]
        raw = {"table": table, "cells": costs}
        print(write(result, setup, {}, raw, args.output, summary={"table": table}))


if __name__ == "__main__":
    main()
