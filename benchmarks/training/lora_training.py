"""LoRA on short medical questions: the package's training against the plain padded loop of most tutorials.

Same model, adapter, rows, batch size and optimiser, in float32. `medkit` is `training.train`: what the rows of a slice
begin with is read once, nothing is padding, logits at the answers' tokens alone. `padded` draws batches at random, pads
each to its longest row and asks the model for its loss, which computes logits over the whole vocabulary at every
position; it is timed from batch to optimiser step like the other. `bucketed` is that loop on batches of like length, to
see what padding costs. Each in a process of its own, taking turns step by step, over whole epochs of the same rows; the
first step is dropped. Tokens per second count each row's tokens, whether or not they were read for another row too, and
no padding.
"""

import os
import random
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import torch

from benchmarks.record import Ratio, versions, write
from benchmarks.training.step_clock import Racer, StepClock, racing_parser
from medkit.lora import adapters
from medkit.modeling import batches, loading, samplers, trainer
from medkit.params import load_params

MODULE = "benchmarks.training.lora_training"
SPEED = 1.5  # goal


def read(args) -> tuple:
    """Tokenizer, params, examples, and the model with a fresh adapter."""
    params = load_params(args.params)
    folder = loading.local_folder(params.models.teacher)
    tokenizer = loading.load_tokenizer(folder)
    questions = pd.read_parquet(args.run / "01_data" / "questions.parquet")
    rows = questions[(questions.source == args.source) & (questions.split == "labelled")]
    examples = batches.encode_questions(tokenizer, rows.head(args.batch * args.batches))
    model = adapters.attach(loading.load_model(folder, params.models), params.lora.adapter, seed=0)
    return tokenizer, params, examples, model


def medkit(args) -> None:
    _, params, examples, model = read(args)
    clock = StepClock(model)
    section = params.lora.train.model_copy(
        update={"epochs": 99.0, "batch_size": args.batch, "slice_tokens": args.slice_tokens, "save_every_steps": 10**6}
    )

    def loss(predicted, extras):
        total, terms = trainer.cross_entropy(predicted, extras)
        clock.losses.append(total.item())
        return total, terms

    with tempfile.TemporaryDirectory() as scratch:
        trainer.train(model, examples, section, loss, Path(scratch), 0)


def padded(args, bucketed: bool = False) -> None:
    tokenizer, params, examples, model = read(args)
    clock, draw = StepClock(model), random.Random(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=params.lora.train.learning_rate)
    sampler = samplers.EpochSampler(args.batch, lengths=[len(e.input_ids) for e in examples], seed=0)
    model.train()
    while True:
        order = list(sampler) if bucketed else draw.sample(range(len(examples)), len(examples))
        for first in range(0, len(order), args.batch):
            rows = [examples[i] for i in order[first : first + args.batch]]
            width = max(len(e.input_ids) for e in rows)
            ids = torch.full((len(rows), width), tokenizer.pad_token_id)
            mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
            for row, e in enumerate(rows):
                ids[row, : len(e.input_ids)] = torch.tensor(e.input_ids)
                mask[row, : len(e.input_ids)] = 1
                labels[row, e.loss_start : len(e.input_ids)] = torch.tensor(e.input_ids[e.loss_start :])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            clock.losses.append(loss.item() * int((labels != -100).sum()))
            optimizer.step()
            optimizer.zero_grad()


def bucketed(args) -> None:
    padded(args, bucketed=True)


CONTENDERS = {f.__name__: f for f in (medkit, padded, bucketed)}


def measure(args, options: list[str]) -> dict:
    """After the warm-up's epoch is over, `repeats` whole epochs of each, in turns."""
    raw = {"loadavg_before": os.getloadavg(), "contenders": {}}
    with ExitStack() as stack:
        racers = [stack.enter_context(Racer(MODULE, name, options)) for name in CONTENDERS]
        for _ in range(args.batches * args.repeats - 1):
            for racer in racers:
                racer.step()
        for racer in racers:
            raw["contenders"][racer.name] = racer.steps
    raw["loadavg_after"] = os.getloadavg()
    totals = {name: sum(s["tokens"] for s in steps[: args.batches]) for name, steps in raw["contenders"].items()}
    if len(set(totals.values())) > 1:
        sys.exit(f"the contenders did not read the same rows in an epoch: {totals}")
    return raw


def main() -> None:
    parser = racing_parser(__doc__, CONTENDERS, repeats=3)
    parser.add_argument("--batches", type=int, default=4, help="optimiser steps of an epoch")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    if args.contender:
        return CONTENDERS[args.contender](args)
    names = ("run", "params", "source", "batch", "batches", "slice_tokens", "threads")
    raw = measure(args, [text for n in names for text in (f"--{n.replace('_', '-')}", str(getattr(args, n)))])
    speeds, peaks, fed = {}, {}, {}
    for name, steps in raw["contenders"].items():
        epochs = [steps[first : first + args.batches] for first in range(0, len(steps), args.batches)]
        epochs[0] = epochs[0][1:]
        speeds[name] = statistics.median(sum(s["tokens"] for s in e) / sum(s["step_s"] for s in e) for e in epochs)
        peaks[name] = steps[-1]["rss_peak"]
        fed[name] = sum(s["fed_tokens"] for s in steps) / sum(s["tokens"] for s in steps)
    ratios = {
        "tokens_per_s_over_padded": Ratio(speeds["medkit"] / speeds["padded"], SPEED, "higher", args.repeats),
        "tokens_per_s_over_bucketed": Ratio(speeds["medkit"] / speeds["bucketed"], None, "higher", args.repeats),
        "peak_memory_over_padded": Ratio(peaks["medkit"] / peaks["padded"], None, "lower", 1),
    }
    setup = {
        "model": "SmolLM2-135M-Instruct, float32, LoRA on the attention projections as in the tiny profile",
        "rows": f"{args.batch * args.batches} training questions of {args.source}, batches of {args.batch}",
        "slice_tokens": args.slice_tokens,
        "tokens_per_s": speeds,
        "peak_rss_bytes": peaks,
        "fed_over_tokens": fed,
        "threads": args.threads,
        "statistic": "median over epochs",
        "versions": versions("torch", "transformers", "peft"),
    }  # fmt: skip
    write("lora_training", setup, ratios, raw, args.output)
    print(raw["loadavg_before"], raw["loadavg_after"])


if __name__ == "__main__":
    main()
