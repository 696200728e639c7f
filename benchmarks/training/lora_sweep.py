"""Which adapter gives most for its cost? Variants of LoRA and their targets, at equal steps and tokens.

A finished run's distilled student, its training rows, and the adapter and training settings of its params; a contender
differs from `lora` in what CONTENDERS says and in nothing else. Each is trained, merged, and judged on the validation
rows (nll) and on the run's headline questions (option text), paired with `lora` question by question, in a process of
its own. What `--variant` does not name keeps what an earlier run with the same settings found. One seed; no learning
rate was tuned for its contender, `lora_twice_rate` shows what a rate alone does. Units: nats per token, fractions,
seconds by the clock and of the process's processor time (`cpu`), bytes.
"""

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.record import RESULTS, Ratio, raw_path, versions, write
from medkit import sources
from medkit.data import splits
from medkit.evaluation import accuracy
from medkit.inference import predictions
from medkit.lora import adapters
from medkit.modeling import batches, loading, trainer
from medkit.params import digest, load_params
from medkit.quantization import activation_memory
from medkit.stage import ROOT
from medkit.statistics import mean_intervals, paired_difference

FFN = ("gate_proj", "up_proj", "down_proj")
PACKAGES = ("torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Contender:
    """How it differs from the run's own adapter."""

    adapter: dict = field(default_factory=dict)
    more_targets: tuple[str, ...] = ()
    rate: float = 1.0
    """Factor on the run's learning rate."""
    why: str = ""


CONTENDERS = {
    "lora": Contender(),
    "rslora": Contender({"variant": "rslora"}, why="the update is scaled by alpha / √rank: four times that of lora"),
    "rslora_r64": Contender({"variant": "rslora", "rank": 64}, why="the rank that PEFT's own comparison favours"),
    "dora": Contender({"variant": "dora"}),
    "pissa": Contender({"variant": "pissa"}),
    "lora_plus": Contender(
        {"variant": "lora_plus"}, rate=1 / adapters.LORA_PLUS_RATIO**0.5, why="A's rate is a quarter, B's four times"
    ),
    "lora_ffn": Contender(more_targets=FFN),
    "lora_twice_rate": Contender(rate=2.0, why="a control: the learning rate alone"),
}
START = "student"  # before any adapter


def measure(name: str, run: Path, profile: Path, limit: int | None, threads: int) -> dict:
    """Train, merge and judge one contender (or judge the student as it is) in this process."""
    torch.set_num_threads(threads)
    params, before = load_params(profile), os.getloadavg()
    folder = run / "02_distillation" / "student_kd"
    model, tokenizer = loading.load_model(folder, params.models), loading.load_tokenizer(folder)
    questions = pd.read_parquet(run / "01_data" / "questions.parquet")
    result = {"date": datetime.now(UTC).date().isoformat(), "loadavg_before": before}
    if name != START:
        rows = splits.training_rows(questions, "labelled").head(limit or len(questions))
        examples = batches.encode_questions(tokenizer, rows)
        model, found = adapt(model, examples, params, CONTENDERS[name])
        result |= found
    valid = splits.training_rows(questions, "valid").head(limit or len(questions))
    nll = batches.collect_nll(model, batches.encode_questions(tokenizer, valid))
    source = params.evaluation.headline_source
    wanted = {"option_text": {source: params.inference.questions["option_text"][source]}}
    asked = predictions.choose_questions(questions, wanted, params.seed).head(limit or len(questions))
    said = predictions.predict(model, tokenizer, asked, params.inference.batch_tokens, 1).assign(variant=name)
    judged = accuracy.judge(said, questions)
    judged = judged[judged.scoring == params.evaluation.headline_scoring].sort_values("id")
    return result | {
        "nll": dict(zip(valid.id, nll, strict=True)),
        "correct": dict(zip(judged.id, judged.correct.astype(int).tolist(), strict=True)),
        "groups": {"valid": valid.group.tolist(), "test": judged.group.tolist()},
        "loadavg_after": os.getloadavg(),
    }


def adapt(model, examples: list[batches.Example], params, contender: Contender) -> tuple[torch.nn.Module, dict]:
    """The student with a trained adapter merged, and what training took."""
    targets = [*params.lora.adapter.target_modules, *contender.more_targets]
    section = params.lora.adapter.model_copy(update={"target_modules": targets, **contender.adapter})
    train = params.lora.train
    train = train.model_copy(update={"learning_rate": contender.rate * train.learning_rate})
    seen = {"tokens": 0}

    def count(module, args, batch: dict) -> None:
        seen["tokens"] += batch["input_ids"].numel()

    model = adapters.attach(model, section, params.seed)
    counting = model.register_forward_pre_hook(count, with_kwargs=True)
    trainable, total = adapters.count_parameters(model)
    optimizer = adapters.make_optimizer(model, section, train.learning_rate)
    activation_memory.reset_peak(model.device)
    at_rest = activation_memory.read_peak(model.device)
    with tempfile.TemporaryDirectory() as checkpoints:
        clock, cpu = time.perf_counter(), time.process_time()
        log = trainer.train(
            model, examples, train, trainer.cross_entropy, Path(checkpoints), params.seed,
            optimizer=optimizer,
        )  # fmt: skip
        seconds = {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
    highest = activation_memory.read_peak(model.device)
    counting.remove()
    return adapters.merge(model), {
        "trainable": trainable, "total": total, "steps": len(log), "tokens": seen["tokens"],
        "predicted_tokens": int(log.loss_tokens.sum()), "train_seconds": seconds, "last_train_nll": log.ce.iloc[-1],
        "peak_bytes": highest, "peak_bytes_over_rest": highest - at_rest,
    }  # fmt: skip


def summarise(found: dict[str, dict], confidence: float, power: float) -> tuple[dict, dict[str, Ratio]]:
    """Every contender against `lora`, and the student before it, on the same questions."""
    table, ratios = {}, {}
    for name, one in found.items():
        right, nll = pd.Series(one["correct"]), pd.Series(one["nll"])
        row = {"accuracy": right.mean(), "valid_nll": nll.mean()}
        if name != START:
            row |= {key: one[key] for key in ("trainable", "steps", "tokens", "peak_bytes", "peak_bytes_over_rest")}
            row["seconds_per_token"] = {kind: s / one["tokens"] for kind, s in one["train_seconds"].items()}
        table[name] = row
        if "lora" not in found or name == "lora":
            continue
        base = found["lora"]
        groups = one["groups"]
        row["accuracy_minus_lora"] = paired_difference(
            right, pd.Series(base["correct"])[right.index], confidence, power, groups["test"]
        )
        change = (nll - pd.Series(base["nll"])[nll.index]).to_numpy()
        low, high = mean_intervals(change[:, None], groups["valid"], confidence)
        row["nll_minus_lora"] = {
            "difference": change.mean(), "ci_low": low[0], "ci_high": high[0], "n": len(change)
        }  # fmt: skip
        ratios[f"{name}_minus_lora/accuracy"] = Ratio(
            row["accuracy_minus_lora"]["difference"], None, "higher", len(right)
        )
        ratios[f"{name}_minus_lora/valid_nll"] = Ratio(float(change.mean()), None, "lower", len(change))
        if name != START:
            times = [o["train_seconds"]["cpu"] / o["tokens"] for o in (one, base)]
            ratios[f"{name}_over_lora/cpu_seconds_per_token"] = Ratio(times[0] / times[1], None, "lower", 1)
            ratios[f"{name}_over_lora/trainable"] = Ratio(one["trainable"] / base["trainable"], None, "lower", 1)
    return json.loads(json.dumps(table, default=float)), ratios


def earlier(setup: dict, directory: Path) -> dict[str, dict]:
    """What an earlier run with the same settings found per contender."""
    path = raw_path("lora_sweep", directory)
    if not path.is_file():
        return {}
    record = json.loads(path.read_text())
    return record["raw"]["found"] if all(record["setup"].get(key) == value for key, value in setup.items()) else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "tiny", help="a finished run's folder")
    parser.add_argument("--params", type=Path, default=ROOT / "params" / "tiny.yaml")
    parser.add_argument("--variant", choices=[START, *CONTENDERS], action="append", help="default those not kept yet")
    parser.add_argument("--limit", type=int, help="training, validation and test rows; default all")
    parser.add_argument("--threads", type=int, default=1, help="more only on an idle machine")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    params = load_params(args.params)
    student = args.run / "02_distillation" / "student_kd" / "model.safetensors"
    setup = {
        "student": sources.sha256_of(student), "lora": params.lora.model_dump(mode="json"),
        "questions": digest(pd.read_parquet(args.run / "01_data" / "questions.parquet").id.tolist()),
        "source": params.evaluation.headline_source, "scoring": params.evaluation.headline_scoring,
        "limit": args.limit, "threads": args.threads, "dtype": params.models.dtype, "seed": params.seed,
        "contenders": json.loads(json.dumps({name: asdict(c) for name, c in CONTENDERS.items()})),
        "repeats": "accuracy and nll: questions, paired; times and memory: one training",
        "versions": versions(*PACKAGES),
    }  # fmt: skip
    found = earlier(setup, args.output)
    wanted = args.variant or [name for name in (START, *CONTENDERS) if name not in found]
    for name in wanted:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # a peak of its own
            result = process.submit(measure, name, args.run, args.params, args.limit, args.threads).result()
        found[name] = result
        found = {key: found[key] for key in (START, *CONTENDERS) if key in found}
        table, ratios = summarise(found, params.evaluation.confidence, params.evaluation.power)
        write("lora_sweep", setup, ratios, {"table": table, "found": found}, args.output)
        print(name, json.dumps(table[name]), f"load {np.round(os.getloadavg()[0], 1)}", flush=True)


if __name__ == "__main__":
    main()
