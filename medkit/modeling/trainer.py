"""One call over the transformers Trainer with a given loss; batches, checkpoints and resume.

The Trainer (and accelerate under it) owns the loop, distribution, checkpoints and resume. Ours is only what it lacks:
batches cut into slices of so many tokens, which bounds memory whatever the lengths; the same batches however many
processes share them; and a loss that reports its terms. What the loss is, is decided by who calls.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from medkit.modeling import sharding
from medkit.modeling.batches import Example, Predicted, cut, pack, predict
from medkit.modeling.prefix_tree import takes_branches
from medkit.modeling.samplers import EpochLoader, EpochSampler, share
from medkit.params import TrainParams
from medkit.stage import MedkitError


class TrainingError(MedkitError):
    """Training that cannot go on; the message names the step and the cure."""


# what the model says at the predicted positions of a batch, and what the collator added about them; returns the summed
# loss and its summed terms, among them `tokens` where others than all predicted ones are to be counted. An attribute
# `hidden_layers` names the layers whose hidden states it wants; without, none.
# A loss with settings is a dataclass: they tell its checkpoints from another's.
Loss = Callable[[Predicted, dict], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def cross_entropy(predicted: Predicted, extras: dict) -> tuple[torch.Tensor, dict]:
    """Summed −log p(target) in nats: plain supervised fine-tuning."""
    loss = nn.functional.cross_entropy(predicted.logits, predicted.targets, reduction="sum")
    return loss, {"ce": loss.detach()}


class _GivenLossTrainer(Trainer):
    """Trainer whose loss is a `Loss` and whose batch is a list of slices; the terms, per predicted token, join the log.

    A slice's loss is its sum over the predicted tokens of the whole batch, so that slices add up to the batch's mean.
    """

    def get_train_dataloader(self):
        return self.loader  # as it is: accelerate would deal out batches by turns, and fill up the last ones

    def training_step(self, model, inputs, num_items_in_batch=None):
        total = torch.zeros((), device=self.args.device)
        *first, last = inputs["slices"]
        for part in [*first, last]:
            self.accelerator.gradient_state._set_sync_gradients(part is last)  # DeepSpeed steps where this is set
            # FSDP adds up shards of gradients; held back, it would keep whole ones
            sync = part is last or self.is_fsdp_enabled
            with nullcontext() if sync else self.accelerator.no_sync(model):
                total += super().training_step(model, part, num_items_in_batch)
        mean = self.accelerator.reduce(total, "mean")
        if not torch.isfinite(mean):  # in all processes or in none, so that no one waits for the dead
            raise TrainingError(
                f"loss is {mean.item()} at step {self.state.global_step + 1}; lower learning_rate, or look at the rows"
            )
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        predicted = predict(model, inputs, getattr(self.compute_loss_func, "hidden_layers", ()))
        total, terms = self.compute_loss_func(predicted, inputs)
        counts, tokens = inputs["counts"], torch.tensor(float(len(predicted.targets)))
        for name, value in {"tokens": tokens, **terms}.items():
            self.terms[name] = self.terms.get(name, 0.0) + value.detach().double() * counts
        return total * counts / num_items_in_batch * self.accelerator.num_processes

    def log(self, logs, start_time=None):
        if self.terms and "loss" in logs:
            names = sorted(self.terms)
            sums = torch.stack([self.terms[name].to(self.args.device) for name in names])
            sums = dict(zip(names, self.accelerator.reduce(sums, "sum").tolist(), strict=True))
            tokens = sums.pop("tokens")
            logs = {**logs, **{name: value / tokens for name, value in sums.items()}, "loss_tokens": int(tokens)}
            self.terms.clear()
        super().log(logs, start_time)


def forget_checkpoints(checkpoints: Path) -> None:
    """Remove what only a killed run would have needed."""
    shutil.rmtree(checkpoints, ignore_errors=True)


class _Progress(TrainerCallback):
    """One tqdm bar with the current loss, on a terminal as in a notebook; of several processes the main one has it."""

    def on_train_begin(self, args, state, control, **kwargs):
        shown = {"unit": "step", "desc": "training", "mininterval": 10, "disable": not state.is_world_process_zero}
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, **shown)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.n = state.global_step
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def _remove_half_checkpoints(folder: Path) -> None:
    """The Trainer writes a checkpoint's state last: where a killed save left none, or a part, the rest is no good."""
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(checkpoint)


def _arguments(section: TrainParams, on_cpu: bool, seed: int, checkpoints: Path) -> TrainingArguments:
    """The Trainer's settings. What is for large models (`scale`) holds where there is something to share."""
    scale = section.scale
    if scale and scale.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise TrainingError("scale.tensorboard is set, but the package is absent: pip install tensorboard")
    given = dict(
        output_dir=str(checkpoints),
        num_train_epochs=section.epochs,
        learning_rate=section.learning_rate,
        warmup_steps=section.warmup_fraction,
        lr_scheduler_type="cosine",
        save_steps=section.save_every_steps,
        save_total_limit=1,
        logging_steps=1,
        remove_unused_columns=False,
        report_to="tensorboard" if scale and scale.tensorboard else "none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        bf16=bool(scale and scale.bf16),
        activation_checkpointing=bool(scale and scale.gradient_checkpointing),
        seed=seed,
    )
    arguments = TrainingArguments(**given | sharding.arguments(section))
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs want a process each, not the Trainer's DataParallel
    return arguments


def train(
    model: nn.Module,
    examples: Sequence[Example],
    section: TrainParams,
    loss: Loss,
    checkpoints: Path,
    seed: int,
    add_extras: Callable[[list[int]], dict] | None = None,
    difficulty: Sequence[float] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> pd.DataFrame:
    """Train in place and return the log: step, epoch, loss and its terms (nats per predicted token), learning_rate.

    `add_extras` maps the row numbers of a slice to more tensors for the loss, e.g. teacher signals; what it calls
    `examples` is read in place of the slice's own. `difficulty`, one number per example, makes the first epoch go from
    easy to hard; later ones are drawn. `optimizer` stands in for the Trainer's AdamW; the schedule scales its learning
    rates. `checkpoints` is a folder of this training alone: a killed one goes on from its last checkpoint there, to the
    weights an uninterrupted one would have had.
    Under `accelerate launch` every process calls it with the same arguments and gets the same log; sharded, the main
    process has whole weights on the CPU, the others their shards.
    Raises TrainingError for no examples and for a loss that is not finite.
    """
    if not examples:
        raise TrainingError("no training examples; raise the numbers of `train` in data.datasets")
    sharded = sharding.is_sharded(section)
    on_cpu = next(model.parameters()).device.type != "cuda" and not (sharded and torch.cuda.is_available())
    arguments = _arguments(section, on_cpu, seed, checkpoints)
    state, lengths, branches = arguments.distributed_state, [len(e.input_ids) for e in examples], takes_branches(model)

    def collator(numbers: list[int]) -> dict:
        """This process's slices of a batch: as many in each process, since shards meet in every one."""
        shares = []
        for rows in share(numbers, lengths, state.num_processes):
            parts = cut([examples[n] for n in rows], section.slice_tokens, branches)
            shares.append([[rows[place] for place in part] for part in parts])
        own, most = shares[state.process_index], max(map(len, shares))
        idle = [[min(numbers, key=lambda n: lengths[n])]] * (most - len(own))
        slices = []
        for i, part in enumerate([*own, *idle]):
            extras = add_extras(part) if add_extras else {}
            read = extras.pop("examples", [examples[n] for n in part])
            slices.append({**pack(read, branches), **extras, "counts": float(i < len(own))})
        counted = torch.zeros(sum(examples[n].num_predicted for part in own for n in part))
        # all that the Trainer does with them is to count; it takes `shift_labels` as they are
        return {"slices": slices, "labels": counted, "shift_labels": counted}

    if sharded:  # each library's checkpoints are its own
        checkpoints = checkpoints / section.scale.sharding
        arguments.output_dir = str(checkpoints)
    if state.is_main_process:
        _remove_half_checkpoints(checkpoints)
    state.wait_for_everyone()
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    given = {"compute_loss_func": loss, "optimizers": (optimizer, None), "callbacks": [_Progress()]}
    trainer = _GivenLossTrainer(model, arguments, **given)
    if sharded and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise TrainingError("scale.sharding is set, but accelerate shards on GPUs alone; set it to null for CPUs")
    trainer.remove_callback(PrinterCallback)  # a printed line per step would bury the notebook
    sampler = EpochSampler(section.batch_size, lengths=lengths, seed=seed, difficulty=difficulty)
    trainer.loader, trainer.terms = EpochLoader(sampler, collator), {}
    model.train()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    if sharded:
        sharding.gather(trainer, model, dtypes)
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)  # autocast ends with the training
    model.eval()
    return pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
