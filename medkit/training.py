"""One call over the transformers Trainer with a given loss; batches, checkpoints and resume.

The Trainer (and accelerate under it) owns the loop, distribution, checkpoints and resume. Ours is only what it lacks:
batches cut into slices of so many tokens, which bounds memory whatever the lengths, and a loss that reports its terms.
What the loss is, is decided by who calls.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from transformers.trainer_utils import get_last_checkpoint

from medkit.batching import Example, bucket_by_length, collate, predicted_logits
from medkit.params import TrainParams, digest


class TrainingError(RuntimeError):
    """Training that cannot go on; the message names the step and the cure."""


# logits (N, vocab_size) and targets (N,) at the predicted positions of a batch, and what the collator added about them;
# returns the summed loss and its summed terms
Loss = Callable[[torch.Tensor, torch.Tensor, dict], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, extras: dict) -> tuple[torch.Tensor, dict]:
    """Summed −log p(target) in nats: plain supervised fine-tuning."""
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return loss, {"ce": loss.detach()}


class _EpochSampler(LengthGroupedSampler):
    """Batches of like length in an order that depends on seed and epoch alone: a resumed epoch is the killed one.

    transformers' own draws from the global generator, whose state at the start of an epoch a checkpoint does not hold.
    """

    def __init__(self, *args, seed: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class _GivenLossTrainer(Trainer):
    """Trainer whose loss is a `Loss` and whose batch is a list of slices; the terms, per predicted token, join the log.

    A slice's loss is its sum over the predicted tokens of the whole batch, so that slices add up to the batch's mean.
    """

    def _get_train_sampler(self, train_dataset=None):
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        return _EpochSampler(self.args.train_batch_size, lengths=lengths, seed=self.args.seed)

    def training_step(self, model, inputs, num_items_in_batch=None):
        *first, last = inputs["slices"]
        total = torch.zeros((), device=self.args.device)
        for part in [*first, last]:
            with nullcontext() if part is last else self.accelerator.no_sync(model):
                total += super().training_step(model, part, num_items_in_batch)
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, targets = predicted_logits(model, inputs)
        total, terms = self.compute_loss_func(logits, targets, inputs)
        if not torch.isfinite(total):
            raise TrainingError(
                f"loss is {total.item()} at step {self.state.global_step + 1}; lower learning_rate, or look at the rows"
            )
        for name, value in terms.items():
            self.terms[name] += value.item()
        self.terms["tokens"] += len(targets)
        return total / num_items_in_batch * self.accelerator.num_processes

    def log(self, logs, start_time=None):
        tokens = self.terms.pop("tokens", 0)
        if tokens and "loss" in logs:
            logs = {**logs, **{name: value / tokens for name, value in self.terms.items()}, "loss_tokens": tokens}
            self.terms.clear()
        super().log(logs, start_time)


def forget_checkpoints(checkpoints: Path) -> None:
    """Remove what only a killed run would have needed."""
    shutil.rmtree(checkpoints, ignore_errors=True)


class _Progress(TrainerCallback):
    """One tqdm bar with the current loss, on a terminal as in a notebook."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="training", mininterval=10)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.n = state.global_step
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose state file is there: the Trainer writes it last, a killed save lacks it."""
    if not folder.is_dir():
        return None
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / "trainer_state.json").is_file():
            shutil.rmtree(checkpoint)
    return get_last_checkpoint(folder)


def _bits(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bytes: exact whatever the order, so it tells one start of a training from another."""
    return tensor.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64).item()


def train(
    model: nn.Module,
    examples: Sequence[Example],
    section: TrainParams,
    loss: Loss,
    checkpoints: Path,
    pad_token_id: int,
    seed: int,
    add_extras: Callable[[list[int]], dict] = lambda rows: {},
) -> pd.DataFrame:
    """Train in place and return the log: step, epoch, loss and its terms (nats per predicted token), learning_rate.

    `add_extras` maps the row numbers of a slice to more tensors for the loss, e.g. teacher signals. A killed run goes
    on from its last checkpoint to the weights an uninterrupted one would have had; checkpoints of other settings or
    other examples in the same folder are thrown away.
    Raises TrainingError for no examples and for a loss that is not finite.
    """
    if not examples:
        raise TrainingError("no training examples; raise the numbers of `train` in data.datasets")
    rows = [{"input_ids": e.input_ids, "row": number} for number, e in enumerate(examples)]

    def collator(features: list[dict]) -> dict:
        numbers = [f["row"] for f in features]
        slices = []
        for places in bucket_by_length([len(f["input_ids"]) for f in features], section.slice_tokens):
            part = [numbers[place] for place in places]
            slices.append({**collate([examples[n] for n in part], pad_token_id), **add_extras(part)})
        labels = torch.cat([part["labels"].flatten() for part in slices])
        # the Trainer counts `shift_labels` as they are, and would drop the first of `labels`
        return {"slices": slices, "labels": labels, "shift_labels": labels}

    start = [(name, _bits(p)) for name, p in model.named_parameters()]
    folder = checkpoints / digest([section.model_dump(), seed, loss.__qualname__, start, [asdict(e) for e in examples]])
    if checkpoints.is_dir():
        for other in checkpoints.iterdir():
            if other != folder:
                shutil.rmtree(other)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=section.epochs,
        per_device_train_batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        warmup_steps=section.warmup_fraction,
        lr_scheduler_type="cosine",
        train_sampling_strategy="group_by_length",
        save_steps=section.save_every_steps,
        save_total_limit=1,
        logging_steps=1,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
        seed=seed,
    )
    trainer = _GivenLossTrainer(model, arguments, collator, rows, compute_loss_func=loss, callbacks=[_Progress()])
    trainer.remove_callback(PrinterCallback)  # a printed line per step would bury the notebook
    trainer.terms = defaultdict(float)
    model.train()
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(folder))
    model.eval()
    return pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
