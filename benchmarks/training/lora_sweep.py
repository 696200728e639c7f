"""A second form from about a hundred examples: which adapter, on which layers, and how is the record written?

A finished run's distilled student, its labelled rows of the second form, and the settings of its params; a contender
differs from `lora` in what CONTENDERS says and in nothing else; `--epochs` holds for all. Each is trained, merged, and
asked for the validation records by greedy generation, in a process of its own. Differences are of the share of correct
fields, paired with `lora` field by field; intervals resample groups of records. A record is written as JSON, as a call
in Python, or as plain lines; all are read back into the same form before they are judged. One seed; no learning rate
was tuned for its contender. What `--contender` does not name keeps what an earlier run with the same settings measured.
Units: shares, tokens, bytes, seconds of processor time.
"""

import argparse
import ast
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from benchmarks.record import RESULTS, raw_path, versions, write
from medkit.data import splits
from medkit.evaluation import records
from medkit.inference import predictions
from medkit.lora import adapters
from medkit.modeling import batches, loading, trainer
from medkit.params import Params, load_params
from medkit.stage import ROOT, sha256_of

FFN = ("gate_proj", "up_proj", "down_proj")
SUMMARY = ("field_f1", "field_accuracy", "exact", "valid", "invented", "missing", "tokens")


@dataclass(frozen=True)
class Contender:
    """How it differs from the run's own adapter."""

    adapter: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    more_targets: tuple[str, ...] = ()
    form: str = "json"


def ranked(rank: int, **more) -> Contender:
    return Contender({"rank": rank, "alpha": 2.0 * rank}, **more)


CONTENDERS = {
    "lora": Contender(),
    **{f"attention_r{rank}": ranked(rank) for rank in (4, 64)},
    **{f"all_linear_r{rank}": ranked(rank, more_targets=FFN) for rank in (4, 16, 64)},
    **{name: Contender({"variant": name}) for name in ("rslora", "dora")},
    "epochs_7.5": Contender(train={"epochs": 7.5}),
    **{name: Contender(form=name) for name in ("code", "plain")},
}


# --- a record in three ways of writing -----------------------------------------------------------------------------


def write_record(text: str, form: str) -> str:
    """A JSON record as a call in Python, or as lines."""
    record = json.loads(text)
    if form == "code":
        return f"Record({', '.join(f'{name}={value!r}' for name, value in record.items())})"
    lines = (f"{name}: {'-' if value is None else value}" for name, value in record.items())
    return text if form == "json" else "\n".join(lines)


def read_record(text: str, form: str) -> str:
    """The JSON of what a model wrote; empty if it cannot be read."""
    try:
        if form == "code":
            call = ast.parse(text.strip(), mode="eval").body
            return json.dumps({keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords})
        pairs = (line.split(": ", 1) for line in text.strip().splitlines())
        return text if form == "json" else json.dumps({name: _value(value.strip()) for name, value in pairs})
    except (ValueError, SyntaxError, AttributeError, TypeError):
        return ""


def _value(text: str) -> str | float | None:
    try:
        return None if text == "-" else json.loads(text)
    except ValueError:
        return text


# --- one contender -------------------------------------------------------------------------------------------------


def measure(name: str, run: Path, params: Params, limit: int | None, threads: int) -> dict:
    """Train, merge and judge one contender in this process."""
    torch.set_num_threads(threads)
    contender = CONTENDERS[name]
    folder = run / "02_distillation" / "student_kd"
    model, tokenizer = loading.load_model(folder, params.models), loading.load_tokenizer(folder)
    questions = pd.read_parquet(run / "01_data" / "questions.parquet")
    rows = splits.training_rows(questions, "labelled", second_form=True).head(limit or len(questions))
    written = rows.assign(options=[[write_record(options[0], contender.form)] for options in rows.options])
    model, training = adapt(model, batches.encode_questions(tokenizer, written), params, contender)
    valid = splits.training_rows(questions, "valid", second_form=True)
    asked = valid.head(limit or len(questions)).assign(scoring="generated")
    sizes = params.inference.batch_tokens, params.inference.max_new_tokens
    answers = predictions.predict(model, tokenizer, asked, *sizes).assign(variant=name)
    answers["text"] = [read_record(text, contender.form) for text in answers.text]
    scores = records.score_records(answers, questions)
    return training | {"scores": scores.to_dict("list"), "loadavg": os.getloadavg()}


def adapt(model, examples: list[batches.Example], params: Params, contender: Contender) -> tuple[torch.nn.Module, dict]:
    """The student with a trained adapter merged, and what training took."""
    targets = [*params.lora.adapter.target_modules, *contender.more_targets]
    section = params.lora.adapter.model_copy(update={"target_modules": targets, **contender.adapter})
    model = adapters.attach(model, section, params.seed)
    trainable, _ = model.get_nb_trainable_parameters()
    with tempfile.TemporaryDirectory() as checkpoints:
        cpu = time.process_time()
        loss, folder = trainer.cross_entropy, Path(checkpoints)
        train = params.lora.train.model_copy(update=contender.train)
        log = trainer.train(model, examples, train, loss, folder, params.seed)
        cpu = time.process_time() - cpu
    training = {"trainable": trainable, "steps": len(log), "cpu_seconds": cpu, "last_train_nll": log.ce.iloc[-1]}
    return adapters.merge(model), training


def summarise(measured: dict[str, dict], params: Params) -> dict[str, dict]:
    """Every contender's rates with intervals, and its difference to `lora`."""
    judging, table = params.evaluation, {}
    scores = pd.concat([pd.DataFrame(one["scores"]) for one in measured.values()])
    rates = records.measure_records(scores, judging.confidence).set_index(["variant", "metric"])
    for name, one in measured.items():
        f1 = rates.loc[(name, "field_f1")]
        table[name] = {metric: rates.loc[(name, metric), "value"] for metric in SUMMARY}
        table[name] |= {key: one[key] for key in ("trainable", "steps", "cpu_seconds", "last_train_nll")}
        table[name] |= {"n": f1.n, "field_f1_interval": f1[["ci_low", "ci_high"]].tolist()}
        if name != "lora" and "lora" in measured:
            steps = [(name, "lora", "")]
            row = records.compare_records(scores, judging.confidence, judging.power, judging.margin, steps).iloc[0]
            table[name] |= {"minus_lora": row[["difference", "ci_low", "ci_high"]].tolist()}
    return json.loads(json.dumps(table, default=float))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "tiny", help="a finished run's folder")
    parser.add_argument("--params", type=Path, default=ROOT / "params" / "tiny.yaml")
    parser.add_argument("--contender", choices=CONTENDERS, action="append", help="default: those not measured yet")
    parser.add_argument("--epochs", type=float, default=2.5, help="over the labelled rows; fewer than in tiny")
    parser.add_argument("--limit", type=int, help="training and validation rows; default all")
    parser.add_argument("--threads", type=int, default=1, help="more only on an idle machine")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    params = load_params(args.params, {"lora.train.epochs": args.epochs})
    setup = {
        "student": sha256_of(args.run / "02_distillation" / "student_kd" / "model.safetensors"),
        "questions": sha256_of(args.run / "01_data" / "questions.parquet"),
        "lora": params.lora.model_dump(mode="json"), "limit": args.limit, "threads": args.threads, "seed": params.seed,
        "contenders": json.loads(json.dumps({name: asdict(c) for name, c in CONTENDERS.items()})),
        "versions": versions("torch", "transformers", "peft", "accelerate"),
    }  # fmt: skip
    path = raw_path("lora_sweep", args.output)
    earlier = json.loads(path.read_text()) if path.is_file() else {"setup": {}}
    measured = earlier["raw"]["measured"] if all(earlier["setup"].get(key) == setup[key] for key in setup) else {}
    for name in args.contender or [name for name in CONTENDERS if name not in measured]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            measured[name] = process.submit(measure, name, args.run, params, args.limit, args.threads).result()
        measured = {key: measured[key] for key in CONTENDERS if key in measured}
        table = summarise(measured, params)
        write("lora_sweep", setup, {}, {"table": table, "measured": measured}, args.output, {"table": table})
        print(name, json.dumps(table[name]), flush=True)


if __name__ == "__main__":
    main()
