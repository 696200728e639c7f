"""What each part of distillation gives: the rows of the paper's Table 3 in our terms, at an equal number of tokens.

`full` has every part: a corrected teacher, CE, KL, hidden states, entities and the progressive order. Each other row
lacks what it names; `CE only` has the answers alone, and `sequence` learns answers with reasons that its teacher wrote
and that were found right. Every student has the same layers of the teacher that it learns from, and sees as many
predicted tokens. A seed draws the order of the rows, nothing else. Every cell (row, seed) is kept in `--folder`: a
killed ablation goes on. The weights of the parts are a first choice; none was tuned. Units: nats per token, fractions.
"""

import argparse
import json
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.record import RESULTS, Ratio, result_path, versions, write
from medkit.data import splits as data
from medkit.distillation import entities, losses, rationales, teacher_cache
from medkit.distillation.pruning import order_by_difficulty
from medkit.evaluation import accuracy
from medkit.inference import predictions as inference
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling import batches, loading, trainer
from medkit.params import Params, RationaleParams, digest, load_params
from medkit.prompts import templates
from medkit.stage import ROOT, atomic_path
from medkit.statistics import mean_intervals

FULL = {"ce_weight": 0.5, "kl_weight": 0.5, "hidden_weight": 0.5, "entity_weight": 1.0}
CE_ONLY = {"ce_weight": 1.0, "kl_weight": 0.0, "hidden_weight": 0.0, "entity_weight": 0.0}
ROWS = {
    "full": {},
    "without KL": {"kl_weight": 0.0},
    "without hidden": {"hidden_weight": 0.0},
    "without entity": {"entity_weight": 0.0},
    "without progressive": {},
    "without correction": {},
    "CE only": CE_ONLY,
    "sequence": CE_ONLY,
}
ANY_ORDER = ("without progressive", "CE only", "sequence")
RATIONALES = RationaleParams(questions="all", samples=2, max_new_tokens=40, temperature=0.7, too_easy=2.0)


@dataclass
class Lesson:
    """All that one teacher gives a student: where it starts, what it reads, and what is said of that."""

    params: Params
    run: Path
    folder: Path
    corrected: bool
    limit: int | None

    @cached_property
    def tokenizer(self):
        return loading.load_tokenizer(self.run / "02_distillation" / "base")

    @cached_property
    def kept(self) -> list[int]:
        manifest = json.loads((self.run / "02_distillation" / "manifest.json").read_text())
        return manifest["facts"]["kept_layers"]

    @cached_property
    def questions(self) -> pd.DataFrame:
        return pd.read_parquet(self.run / "01_data" / "questions.parquet")

    def rows(self, *splits: str) -> pd.DataFrame:
        present = [split for split in splits if (self.questions.split == split).any()]
        found = pd.concat([data.training_rows(self.questions, split) for split in present])
        return found.sample(frac=1, random_state=0).head(self.limit or len(found))

    @cached_property
    def examples(self) -> list[batches.Example]:
        return batches.encode_questions(self.tokenizer, self.rows("labelled", "transfer"))

    def teacher(self) -> torch.nn.Module:
        if self.corrected:
            return loading.load_model(self.run / "02_distillation" / "teacher", self.params.models)
        source = self.params.models.teacher
        return loading.load_model(loading.local_folder(source), self.params.models, keep=source.keep_layers)

    def student(self) -> torch.nn.Module:
        return loading.keep_layers(self.teacher(), self.kept)

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """The student's middle and last layer beside the teacher's that they were; 0 is the embedding."""
        own = (len(self.kept) // 2, len(self.kept))
        return tuple((layer, self.kept[layer - 1] + 1) for layer in own)

    @cached_property
    def cache(self) -> teacher_cache.TeacherCache:
        section, folder = self.params.distillation, self.folder / f"teacher_cache_{self.corrected}"
        key = digest([self.corrected, templates.TEXT.hash, self.tokenizer.get_vocab()])
        wanted = [theirs for _, theirs in self.layers]
        return teacher_cache.capture_teacher(
            self.teacher(), self.examples, folder, section.top_k, section.shard_examples, key, wanted
        )

    @cached_property
    def entities(self) -> entities.Entities:
        return entities.mark_entities(self.tokenizer, self.examples)

    @cached_property
    def difficulty(self) -> list[float]:
        return order_by_difficulty(self.cache.mean_nll(), self.entities.densities())

    @cached_property
    def written(self) -> tuple[list[batches.Example], dict]:
        """The teacher's own answers that were found right, again and again until they have as many tokens."""
        rows, wanted = self.rows("labelled"), sum(e.num_predicted for e in self.examples)

        def make_engine() -> TorchEngine:
            torch.manual_seed(0)
            settings = {"batch_tokens": self.params.inference.batch_tokens, "temperature": RATIONALES.temperature}
            return TorchEngine(self.teacher(), self.tokenizer.pad_token_id, scheduler="continuous", **settings)

        path, speaker = self.folder / "sampled.parquet", f"{self.run} {self.corrected}"
        sampled = rationales.collect_samples(path, speaker, make_engine, self.tokenizer, rows, RATIONALES, 0)
        verified, found = rationales.keep_verified(sampled, RATIONALES.too_easy)
        encoded = rationales.encode_rationales(self.tokenizer, rows, verified)
        chosen = rationales.repeat_to_length(encoded, wanted)
        return chosen, {"yield": found.to_dict("records"), "verified": int(found.kept.sum()), "learned": len(chosen)}

    def add_extras(self, numbers: list[int]) -> dict:
        return self.cache.batch(numbers) | self.entities.batch(numbers)


def teach(name: str, seed: int, lesson: Lesson) -> dict:
    """Train one student and ask it: its log, validation NLL per row, and whether each headline question was right."""
    params = lesson.params
    began, student = time.perf_counter(), lesson.student()
    loss = losses.DistillationLoss(**(FULL | ROWS[name]), layers=lesson.layers)
    alone = not (loss.kl_weight or loss.hidden_weight or loss.entity_weight)
    around = losses.hidden_projections(student, dict(loss.layers), student.config.hidden_size, seed)
    with around if loss.hidden_weight else nullcontext():
        log = trainer.train(
            student,
            lesson.written[0] if name == "sequence" else lesson.examples,
            params.distillation.student_train,
            loss,
            lesson.folder / "checkpoints",
            seed,
            **({} if alone else {"add_extras": lesson.add_extras}),
            difficulty=None if name in ANY_ORDER else lesson.difficulty,
        )
    trained_s = time.perf_counter() - began
    valid = lesson.rows("valid")
    asked = headline(lesson)
    predictions = inference.predict(student, lesson.tokenizer, asked, params.inference.batch_tokens, 1)
    judged = accuracy.judge(predictions.assign(variant=name), lesson.questions)
    judged = judged[judged.scoring == params.evaluation.headline_scoring].set_index("id")
    valid_nll = batches.collect_nll(student, batches.encode_questions(lesson.tokenizer, valid))
    terms = [column for column in ("loss", "ce", loss.divergence, "hidden", "entity") if column in log]
    return {
        "row": name, "seed": seed, "steps": len(log), "tokens": int(log.loss_tokens.sum()), "train_s": trained_s,
        "load": os.getloadavg()[0],
        "terms_first": log[terms].head(3).mean().to_dict(), "terms_last": log[terms].tail(3).mean().to_dict(),
        "nll": dict(zip(valid.id, valid_nll, strict=True)),
        "correct": {id: bool(right) for id, right in judged.correct.items()},
    }  # fmt: skip


def headline(lesson: Lesson) -> pd.DataFrame:
    source = lesson.params.evaluation.headline_source
    count = lesson.params.inference.questions["option_text"][source]
    wanted = {"option_text": {source: min(count, lesson.limit or count)}}
    return inference.choose_questions(lesson.questions, wanted, lesson.params.seed)


def compare(cells: list[dict], confidence: float) -> pd.DataFrame:
    """Per row its means over seeds, and `full` minus it: paired by question, whose seeds are averaged first."""
    found = []
    for column in ("nll", "correct"):
        table = pd.DataFrame(
            [(c["row"], c["seed"], id, float(v)) for c in cells for id, v in c[column].items()],
            columns=["row", "seed", "id", "value"],
        )
        means = table.pivot_table(index="id", columns="row", values="value")
        means = means[[row for row in ROWS if row in means]]
        spread = table.groupby(["row", "seed"]).value.mean().groupby("row").std(ddof=1)
        differences = means[["full"]].to_numpy() - means.to_numpy()
        low, high = mean_intervals(
            differences, means.index, confidence, imagined=(-1, 1) if column == "correct" else ()
        )
        for place, row in enumerate(means.columns):
            found.append(
                {
                    "metric": "accuracy" if column == "correct" else "valid_nll", "row": row, "n": len(means),
                    "seeds": int(table[table.row == row].seed.nunique()),
                    "mean": means[row].mean(), "std_over_seeds": spread[row],
                    "full_minus_row": differences[:, place].mean(), "ci_low": low[place], "ci_high": high[place],
                }
            )  # fmt: skip
    return pd.DataFrame(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "tiny", help="a finished run's folder")
    parser.add_argument("--params", type=Path, default=ROOT / "params" / "tiny.yaml")
    parser.add_argument("--row", action="append", choices=ROWS, help="default all; the other cells are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="rows to learn from and questions to ask; default all")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "ablation", help="where cells are kept")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    params = load_params(args.params)
    args.folder.mkdir(parents=True, exist_ok=True)
    settings = args.folder / "settings.json"
    wanted = json.dumps([params.model_dump(mode="json"), str(args.run.resolve()), args.limit])
    if settings.exists() and settings.read_text() != wanted:
        parser.error(f"{args.folder} holds an ablation of other settings: remove it, or name another --folder")
    settings.write_text(wanted)
    corrected = Lesson(params, args.run, args.folder, True, args.limit)
    uncorrected = replace(corrected, corrected=False)
    for seed in range(args.seeds):  # a seed at a time: what is there when it ends early is a whole table
        for name in args.row or ROWS:
            path = args.folder / f"{name.replace(' ', '_')}.{seed}.json"
            if name == "sequence" and not corrected.written[0]:
                print(f"sequence: none of the teacher's own answers was right, {corrected.written[1]}")
            elif not path.is_file():
                cell = teach(name, seed, uncorrected if name == "without correction" else corrected)
                with atomic_path(path) as scratch:
                    scratch.write_text(json.dumps(cell))
                print(f"{name}, seed {seed}: {cell['train_s']:.0f} s, nll {np.mean(list(cell['nll'].values())):.3f}, "
                      f"accuracy {np.mean(list(cell['correct'].values())):.3f}", flush=True)  # fmt: skip
    trainer.remove_checkpoints(args.folder / "checkpoints")
    cells = [json.loads(path.read_text()) for path in sorted(args.folder.glob("*.[0-9].json"))]
    table = compare(cells, params.evaluation.confidence)
    print(table.to_string(float_format="{:.3f}".format))
    ratios = {
        f"{name}/full_minus_it/{metric}": Ratio(
            found.full_minus_row, None, "higher" if metric == "accuracy" else "lower", int(found.seeds)
        )
        for (metric, name), found in table.set_index(["metric", "row"]).iterrows()
        if name != "full"
    }
    setup = {
        "run": "a tiny run's rows, teacher and kept layers", "rows_to_learn_from": len(corrected.examples),
        "predicted_tokens": sum(e.num_predicted for e in corrected.examples), "seeds": args.seeds,
        "weights": FULL, "layers": corrected.layers, "divergence": losses.DistillationLoss.divergence,
        "train": params.distillation.student_train.model_dump(), "threads": args.threads,
        "headline": params.evaluation.headline_source, "scoring": params.evaluation.headline_scoring,
        "interval": "bootstrap over questions, each averaged over seeds: for these seeds, not for any",
        "versions": versions("torch", "transformers"),
    }  # fmt: skip
    raw = {
        "table": table.to_dict("records"),
        "cells": [{key: cell[key] for key in cell.keys() - {"nll", "correct"}} for cell in cells],
        "sequence": corrected.written[1] if "sequence" in (args.row or ROWS) else None,
    }
    write("ablation", setup, ratios, raw, args.output, summary={"table": raw["table"]})
    print(result_path("ablation", args.output))


if __name__ == "__main__":
    main()
