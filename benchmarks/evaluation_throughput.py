"""How long a whole evaluation takes: one 135M variant on all five test sets, and the statistics of ten variants.

`--part model`: every question by letter, through `inference.predict` and our prompts. With `--limit` a random part of
each set is asked and the time of all is computed from it, by tokens. `--part statistics`: judging, accuracies, steps,
flips, calibration, results and `report.html` of ten variants × all questions, on invented log-probabilities. Units:
seconds by the clock, and of this process's processor time.
"""

import argparse
import json
import os
import tempfile
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from exams import EXAMS, read_questions
from record import RESULTS, Ratio, raw_path, result_path, versions, write

from medkit import reporting
from medkit.evaluation import accuracy as evaluation
from medkit.evaluation import calibration
from medkit.inference import predictions as inference
from medkit.modeling import loading
from medkit.params import load_params
from medkit.prompts import templates
from medkit.stage import ROOT
from medkit.variants import STEPS

PARAMS = load_params(ROOT / "params" / "tiny.yaml")
MODEL_GOAL_S, STATISTICS_GOAL_S = 40 * 60, 60
VARIANTS = 10
ICD_QUESTIONS = 240  # of the fifth set, which has as many as one makes


def all_questions() -> pd.DataFrame:
    tables = read_questions((*EXAMS, "icd_chapter"))
    tables["icd_chapter"] = tables["icd_chapter"].head(ICD_QUESTIONS)
    return pd.concat(tables.values(), ignore_index=True)


@contextmanager
def timed(name: str, found: dict[str, dict]):
    """Adds the time of a `with` block to `found` under its name."""
    clock, cpu = time.perf_counter(), time.process_time()
    yield
    seconds = {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
    found[name] = seconds | {"load": os.getloadavg()[0], "date": datetime.now(UTC).date().isoformat()}
    print(name, found[name], flush=True)


def time_model(
    folder: Path, limit: int | None, threads: int, sources: list[str] | None, output: Path
) -> tuple[dict, dict[str, Ratio], dict]:
    """`sources`: measured anew; the others keep what an earlier run with the same settings wrote to `output`."""
    torch.set_num_threads(threads)
    model, tokenizer = loading.load_model(folder, PARAMS.models), loading.load_tokenizer(folder)
    questions = all_questions()
    tokens = [
        len(templates.encode(tokenizer, templates.render(q, templates.LETTER))[0]) for q in questions.to_dict("records")
    ]
    questions = questions.assign(scoring="letter", tokens=tokens)
    asked = questions
    if limit:
        asked = questions.groupby("source", group_keys=False)[list(questions)].apply(
            lambda table: table.sample(min(limit, len(table)), random_state=0)
        )
    setup = {
        "model": folder.name, "device": str(model.device), "threads": threads, "scoring": "letter",
        "batch_tokens": PARAMS.inference.batch_tokens, "limit_per_set": limit, "asked": len(asked),
    }  # fmt: skip
    seconds = earlier(setup, output) if sources else {}
    for source, table in asked.groupby("source"):
        if sources and source not in sources:
            continue
        with timed(source, seconds):
            inference.predict(model, tokenizer, table, PARAMS.inference.batch_tokens, 1)
    sizes = questions.groupby("source").tokens.agg(["size", "sum"])
    share = sizes["sum"] / asked.groupby("source").tokens.sum()
    whole = {name: sum(seconds[s][name] * share[s] for s in seconds) for name in ("clock", "cpu")}
    setup |= {
        "questions": sizes["size"].to_dict(), "prompt_tokens": sizes["sum"].to_dict(),
        "whole_sets": "measured" if not limit else "computed from the part that was asked, by prompt tokens",
        "goal_seconds": MODEL_GOAL_S, "versions": versions("torch", "transformers"),
    }  # fmt: skip
    raw = {"seconds": seconds, "whole_seconds": whole}
    raw["prompt_tokens_per_s"] = sizes["sum"].sum() / whole["clock"]
    return setup, {"all_sets/seconds": Ratio(whole["clock"], MODEL_GOAL_S, "lower", 1)}, raw


def earlier(setup: dict, output: Path) -> dict[str, dict]:
    """Seconds per set of an earlier run with the same settings."""
    path = raw_path("evaluation_throughput_model", output)
    if not path.is_file():
        return {}
    record = json.loads(path.read_text())
    same = all(record["setup"][name] == value for name, value in setup.items())
    return record["raw"]["seconds"] if same else {}


def invented_predictions(questions: pd.DataFrame, variants: list[str]) -> pd.DataFrame:
    """Log-probabilities of letters and of texts: what the variants share, what is their own, and some knowledge."""
    rng, tables = np.random.default_rng(0), []
    options = questions.options.map(len).to_numpy()
    width = options.max()
    answers = np.arange(width) == questions.answer.to_numpy()[:, None]
    for scoring in ("letter", "option_text"):
        shared = rng.normal(size=(len(questions), width)) + 0.5 * answers
        for number, variant in enumerate(variants):
            scores = shared + 0.5 * rng.normal(size=shared.shape) + 0.05 * number * answers
            rows = [list(row[:n] - 5) for row, n in zip(scores, options, strict=True)]
            template = templates.LETTER.name if scoring == "letter" else templates.TEXT.name
            tables.append(
                pd.DataFrame({"variant": variant, "id": questions.id, "scoring": scoring, "template": template})
                .assign(logprobs=rows, answer_tokens=[[3] * n for n in options], text="")
            )  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def time_statistics(repeats: int) -> tuple[dict, dict[str, Ratio], dict]:
    questions = all_questions().drop_duplicates("id").assign(clean=True)
    questions["group"] = questions.group.fillna(questions.id)
    variants = [v for v in VARIANTS if any(v in step[:2] for step in STEPS)][:VARIANTS]
    predictions, settings = invented_predictions(questions, variants), PARAMS.evaluation
    runs, load_before = [], os.getloadavg()
    for _ in range(repeats):
        runs.append({})
        with tempfile.TemporaryDirectory() as scratch:
            run_statistics(Path(scratch), predictions, questions, settings, runs[-1])
    totals = {name: [sum(part[name] for part in run.values()) for run in runs] for name in ("clock", "cpu")}
    setup = {
        "variants": variants, "questions": len(questions), "scorings": sorted(set(predictions.scoring)),
        "rows": len(predictions), "goal_seconds": STATISTICS_GOAL_S, "repeats": repeats, "statistic": "median",
        "data": "the sets' questions, invented log-probabilities", "versions": versions("numpy", "pandas", "scipy"),
    }  # fmt: skip
    raw = {"seconds": runs, "totals": totals, "loadavg_before": load_before, "loadavg_after": os.getloadavg()}
    middle = float(np.median(totals["clock"]))
    return setup, {"ten_variants/seconds": Ratio(middle, STATISTICS_GOAL_S, "lower", repeats)}, raw


def run_statistics(folder: Path, predictions: pd.DataFrame, questions: pd.DataFrame, settings, found: dict) -> None:
    """What notebook 06 does with predictions, each part timed."""
    with timed("judge", found):
        judged = evaluation.judge(predictions, questions)
    with timed("accuracy", found):
        accuracy = evaluation.measure_accuracy(judged, settings.confidence)
    with timed("compare_steps", found):
        steps = evaluation.compare_steps(judged, settings.confidence, settings.power, settings.margin)
    with timed("find_flips", found):
        flips = evaluation.find_flips(judged)
    with timed("calibration", found):
        measured = calibration.measure_calibration(judged, settings.confidence)
    with timed("report", found):
        rows = [*reporting.from_accuracy(accuracy), *reporting.from_steps(steps)]
        rows += reporting.from_table(measured, "{metric}/{source}", "calibration.parquet")
        facts = {"run": "invented", "headline_source": "medqa", "headline_scoring": "letter"}
        facts["chance"] = evaluation.chance(questions[questions.source == "medqa"])
        reporting.write_results(folder, rows, facts)
        for stage, name, table in (("01_data", "questions", questions), ("06_evaluation", "flips", flips)):
            (folder / stage).mkdir()
            table.to_parquet(folder / stage / f"{name}.parquet")
        reporting.write_report(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["model", "statistics"], action="append", help="default both")
    parser.add_argument("--folder", type=Path, help="a model on this machine; default the tiny profile's")
    parser.add_argument("--limit", type=int, help="questions per set; default all")
    parser.add_argument("--source", action="append", help="a set to time anew; others keep their earlier times")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="of the statistics")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    for part in args.part or ["model", "statistics"]:
        if part == "model":
            folder = args.folder or loading.local_folder(PARAMS.models.teacher)
            measured = time_model(folder, args.limit, args.threads, args.source, args.output)
        else:
            measured = time_statistics(args.repeats)
        name = f"evaluation_throughput_{part}"
        write(name, *measured, args.output)
        print(result_path(name, args.output).read_text())


if __name__ == "__main__":
    main()
