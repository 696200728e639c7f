"""A distillation step from cached log-probabilities against TRL's GKD step with the teacher in memory: time and memory.

Same student, teacher, rows, batches and objective (forward KL at the answers' tokens, temperature 1, float32, AdamW):
`cached` is `trainer.train` on top-k log-probabilities in slices of so many tokens, as the tiny profile sets it: a
shared beginning of rows is read once, and there is no padding. `gkd` is `trl.experimental.gkd` with lmbda=0 (no
sampling), the batch at once; `gkd_slices` the same by accumulation over quarters of the batch. Real ICD-10-CM
questions and the models of a finished run. Each in a process of its own, taking turns step by step; the first step is
dropped. GKD's KL is over the whole vocabulary, ours over the kept tokens and a bucket: equal up to what the bucket
merges, which the json shows.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.inputs import make_parser
from benchmarks.record import Ratio, versions, write
from medkit.distillation import teacher_cache
from medkit.distillation.losses import DistillationLoss
from medkit.modeling import batches, loading, samplers
from medkit.modeling import trainer as training
from medkit.params import load_params
from medkit.stage import ROOT

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # a TRL trainer reports to its maker otherwise
MODULE = "benchmarks.training.training_step"
SPEED, MEMORY = 1.8, 0.7  # goals
KEY = "benchmark"
MARK = "step: "


def rss(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class StepClock:
    """Says after each optimiser step: its time, the loss told to `losses`, and which token rows the model read.

    `tokens` counts each row whole but for its last token, `fed_tokens` what the model was given: padding too, and what
    several rows begin with once, if it was read once.
    """

    def __init__(self, model: nn.Module):
        self.rows: list[list[int]] = []
        self.losses: list[float] = []
        self.width = 0
        model.register_forward_pre_hook(self._read, with_kwargs=True)
        register_optimizer_step_post_hook(self._stop)
        self.began, self.began_cpu = time.perf_counter(), time.process_time()

    def _read(self, module, args, kwargs):
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        if mask.dim() == 4:  # sequences that branch: each is what a last token sees, and no other token sees that one
            sees = mask[0, 0] == 0
            keep = sees[sees.sum(0) == 1]
            ids = ids.expand(len(keep), -1)
        else:
            keep = mask.bool() & (mask.cumsum(1) < mask.sum(1, keepdim=True))  # last tokens predict nothing
        self.rows += [row[own].tolist() for row, own in zip(ids, keep, strict=True)]
        self.width += kwargs["input_ids"].numel()

    def _stop(self, *_):
        said = {
            "step_s": time.perf_counter() - self.began,
            "cpu_s": time.process_time() - self.began_cpu,
            "rss_peak": rss("VmHWM"),
            "rows": sha256(json.dumps(sorted(self.rows)).encode()).hexdigest()[:12],
            "tokens": sum(map(len, self.rows)),
            "fed_tokens": self.width,
            "loss": sum(self.losses),
        }
        print(MARK + json.dumps(said), flush=True)
        self.rows, self.losses, self.width = [], [], 0
        if not sys.stdin.readline():
            os._exit(0)  # no cleaning up in the middle of a training
        self.began, self.began_cpu = time.perf_counter(), time.process_time()


class Racer:
    """The parent's end: a child that has loaded and made its first step, which is the warm-up."""

    def __init__(self, module: str, name: str, arguments: list[str]):
        self.name = name
        command = [sys.executable, "-m", module, "--contender", name, *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self.steps = [self._listen()]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.stderr.close()
        self.process.wait()

    def _listen(self) -> dict:
        line = self.process.stdout.readline()
        while line and not line.startswith(MARK):  # a library that talks
            line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended:\n{self.process.stderr.read()[-3000:]}")
        return json.loads(line.removeprefix(MARK))

    def step(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.steps.append(self._listen())
        return self.steps[-1]


def read_rows(args) -> tuple:
    """Tokenizer, model settings, and examples in the order in which a training asks for them."""
    import pandas as pd

    params = load_params(args.params)
    tokenizer = loading.load_tokenizer(args.run / "02_distillation" / "teacher")
    questions = pd.read_parquet(args.run / "01_data" / "questions.parquet")
    rows = questions[(questions.source == args.source) & (questions.split == "labelled")]
    examples = batches.encode_questions(tokenizer, rows.head(args.batch * (args.repeats + 2)))
    return tokenizer, params, examples


def capture(args) -> None:
    """The teacher speaks, in a process of its own, and is gone."""
    _, params, examples = read_rows(args)
    load = partial(loading.load_model, args.run / "02_distillation" / "teacher", params.models)
    teacher_cache.capture_teacher(load, examples, args.cache, args.top_k, 64, KEY)


def cached(args) -> None:
    _, params, examples = read_rows(args)
    student = loading.load_model(args.run / "02_distillation" / "base", params.models)
    clock, learned = StepClock(student), DistillationLoss(kl_weight=1.0)
    section = params.distillation.student_train.model_copy(
        update={
            "epochs": 9.0,
            "batch_size": args.batch,
            "slice_tokens": args.slice_tokens,
            "save_every_steps": 10**6,
            "bf16": False,
        }
    )

    def loss(predicted, extras):
        total, terms = learned(predicted, extras)
        clock.losses.append(total.item())
        return total, terms

    add_extras = teacher_cache.TeacherCache(args.cache, KEY, examples).batch
    checkpoints = args.cache.with_name(args.contender)
    training.train(student, examples, section, loss, checkpoints, 0, add_extras)


def gkd(args, accumulate: int = 1) -> None:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer, params, examples = read_rows(args)
    folder = args.run / "02_distillation"
    student, teacher = (loading.load_model(folder / name, params.models) for name in ("base", "teacher"))
    student.train()
    clock = StepClock(student)
    order = chain.from_iterable(samplers.EpochBatches(len(examples), args.batch, seed=0))
    rows = Dataset.from_list([{"input_ids": examples[i].input_ids, "labels": examples[i].loss_start} for i in order])

    def collate(features: list[dict]) -> dict:
        """Padded on the left to the longest row, as TRL's own collator does, from the same tokens."""
        width = max(len(f["input_ids"]) for f in features)
        batch = {
            "input_ids": torch.full((len(features), width), tokenizer.pad_token_id),
            "attention_mask": torch.zeros(len(features), width, dtype=torch.long),
            "labels": torch.full((len(features), width), -100),
        }
        for row, feature in enumerate(features):
            ids, first = torch.tensor(feature["input_ids"]), feature["labels"]
            batch["input_ids"][row, -len(ids) :] = ids
            batch["attention_mask"][row, -len(ids) :] = 1
            batch["labels"][row, first - len(ids) :] = ids[first:]
        return {**batch, "prompts": batch["input_ids"], "prompt_attention_mask": batch["attention_mask"]}

    train = params.distillation.student_train
    settings = GKDConfig(
        output_dir=str(args.cache.with_name(args.contender)),
        lmbda=0.0, beta=0.0, temperature=1.0, num_train_epochs=9, learning_rate=train.learning_rate,
        warmup_steps=train.warmup_fraction, lr_scheduler_type="cosine", train_sampling_strategy="sequential",
        per_device_train_batch_size=args.batch // accumulate, gradient_accumulation_steps=accumulate,
        bf16=False, gradient_checkpointing=False, use_cpu=student.device.type == "cpu",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = GKDTrainer(
        student, teacher, settings, data_collator=collate, train_dataset=rows, processing_class=tokenizer
    )
    divergence = trainer.generalized_jsd_loss

    def told(*positional, num_items_in_batch=None, **named):
        found = divergence(*positional, num_items_in_batch=num_items_in_batch, **named)
        clock.losses.append(found.item() * float(num_items_in_batch))
        return found

    trainer.generalized_jsd_loss = told
    trainer.train()


def gkd_slices(args) -> None:
    gkd(args, accumulate=4)


CONTENDERS = {f.__name__: f for f in (cached, gkd, gkd_slices)}


def measure(args, options: list[str]) -> dict:
    raw = {"loadavg_before": os.getloadavg(), "contenders": {}}
    with ExitStack() as stack:
        racers = [stack.enter_context(Racer(MODULE, name, options)) for name in args.among]
        for _ in range(args.repeats):
            for racer in racers:
                racer.step()
        for racer in racers:
            raw["contenders"][racer.name] = racer.steps
    raw["loadavg_after"] = os.getloadavg()
    for number, each in enumerate(zip(*raw["contenders"].values(), strict=True)):
        if len({(said["rows"], said["tokens"]) for said in each}) > 1:
            sys.exit(f"step {number}: the contenders did not read the same rows: {each}")
    return raw


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--source", default="icd_chapter", help="whose training questions are learned")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--slice-tokens", type=int, default=512)
    parser.add_argument("--contender", choices=list(CONTENDERS), help="run as one of them, for a parent")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--among", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="who takes part")
    parser.add_argument("--cache", type=Path, help="where the teacher cache is, or goes")
    parser.add_argument("--capture", action="store_true", help="write the cache and end")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    if args.capture:
        return capture(args)
    if args.contender:
        return CONTENDERS[args.contender](args)
    with tempfile.TemporaryDirectory() as scratch:
        names = ("run", "params", "source", "batch", "slice_tokens", "top_k", "repeats", "threads")
        options = [text for n in names for text in (f"--{n.replace('_', '-')}", str(getattr(args, n)))]
        options += ["--cache", f"{scratch}/cache"]
        subprocess.run([sys.executable, "-m", MODULE, "--capture", *options], cwd=ROOT, check=True)
        raw = measure(args, options)
    timed = {name: statistics.median(s["step_s"] for s in steps[1:]) for name, steps in raw["contenders"].items()}
    peaks = {name: steps[-1]["rss_peak"] for name, steps in raw["contenders"].items()}
    ratios = {}
    for theirs in [name for name in ("gkd", "gkd_slices") if {"cached", name} <= timed.keys()]:
        goals = (SPEED, MEMORY) if theirs == "gkd" else (None, None)
        ratios[f"speed_over_{theirs}"] = Ratio(timed[theirs] / timed["cached"], goals[0], "higher", args.repeats)
        ratios[f"peak_memory_over_{theirs}"] = Ratio(peaks["cached"] / peaks[theirs], goals[1], "lower", 1)
    setup = {
        "models": "teacher and base student of a tiny run, float32; all of the student's weights train",
        "rows": f"training questions of {args.source}; {args.batch} a step, the same in every contender",
        "tokens_per_step": [s["tokens"] for s in next(iter(raw["contenders"].values()))],
        "objective": "forward KL at the answers' tokens, temperature 1; AdamW, gradient norm clipped",
        "cached": f"top {args.top_k} and a bucket; slices of {args.slice_tokens} tokens, common beginnings once",
        "gkd": "lmbda 0, beta 0, teacher resident; the batch at once, or in quarters that are accumulated",
        "memory": "peak resident set of a fresh process, libraries included",
        "threads": args.threads,
        "statistic": "median over steps",
        "versions": versions("torch", "transformers", "trl", "accelerate"),
    }  # fmt: skip
    write("training_step", setup, ratios, raw, args.output)
    print(timed, peaks, raw["loadavg_before"], raw["loadavg_after"])


if __name__ == "__main__":
    main()
