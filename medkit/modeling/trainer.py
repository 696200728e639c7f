"""Training with the transformers Trainer: our batches and our loss, its loop, checkpoints, resume and distribution.

What the Trainer lacks is here: batches that are cut into slices of so many tokens, which bounds memory for any lengths;
the same batches for any number of processes; and a loss that reports its terms.
"""

import json
import os
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

from medkit.modeling import loading
from medkit.modeling.batches import Example, Predicted, cut, pack, predict
from medkit.modeling.prefix_tree import takes_branches
from medkit.modeling.samplers import EpochBatches, EpochLoader, share
from medkit.params import TrainParams
from medkit.stage import MedkitError, write_errors

# A loss gets the model's output at the predicted positions of a slice, and the tensors that `add_extras` gave for it.
# It returns the summed loss and its summed terms, among them `tokens` if it counts others than all predicted tokens.
# An attribute `hidden_layers` names the layers whose hidden states it needs. A loss with settings is a dataclass.
Loss = Callable[[Predicted, dict], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def cross_entropy(predicted: Predicted, extras: dict) -> tuple[torch.Tensor, dict]:
    """Summed −log p(target) in nats: plain supervised fine-tuning."""
    loss = nn.functional.cross_entropy(predicted.logits, predicted.targets, reduction="sum")
    return loss, {"ce": loss.detach()}


@loading.quiet_transformers()
def train(
    model: nn.Module,
    examples: Sequence[Example],
    section: TrainParams,
    loss: Loss,
    checkpoints: Path,
    seed: int,
    add_extras: Callable[[list[int]], dict] | None = None,
    difficulty: Sequence[float] | None = None,
) -> pd.DataFrame:
    """Train in place and return the log: step, epoch, loss and its terms (nats per predicted token), learning_rate.

    checkpoints: the folder of this training alone. A killed training continues from its last checkpoint there and ends
        with the weights of an uninterrupted one.
    add_extras: maps the row numbers of a slice to more tensors for the loss, e.g. the teacher's log-probabilities.
    difficulty: one number per example; then the first epoch goes from easy to hard, and later ones are shuffled.

    Under `accelerate launch` every process calls this with the same arguments and gets the same log. If the weights are
    sharded, the main process ends with whole weights on the CPU, and the others with their shards.
    Raises MedkitError for no examples, for trainable weights that are not float32, and for a loss that is not finite.
    """
    if not examples:
        raise MedkitError("there are no training examples: raise `labelled` or `transfer` in data.datasets")
    if low := [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]:
        raise MedkitError(
            f"{low[0]} learns but is not float32, so small updates would be lost: load the model with "
            f"load_for_training, and set `bf16` for arithmetic in bfloat16"
        )
    arguments = make_arguments(section, training_device(model), seed, checkpoints)
    state, lengths, branches = arguments.distributed_state, [len(e.input_ids) for e in examples], takes_branches(model)

    def collate_slices(numbers: list[int]) -> dict:
        """This process's slices of a batch. Every process gets as many, because shards are exchanged in each."""
        slices_by_process = []
        for rows in share(numbers, lengths, state.num_processes):
            parts = cut([examples[n] for n in rows], section.slice_tokens, branches)
            slices_by_process.append([[rows[place] for place in part] for part in parts])
        mine, most = slices_by_process[state.process_index], max(map(len, slices_by_process))
        idle = [[min(numbers, key=lambda n: lengths[n])]] * (most - len(mine))
        slices = []
        for i, part in enumerate([*mine, *idle]):
            extras = add_extras(part) if add_extras else {}
            slices.append({**pack([examples[n] for n in part], branches), **extras, "counts": float(i < len(mine))})
        predicted = torch.zeros(sum(examples[n].num_predicted for part in mine for n in part))
        # the Trainer only counts these, to divide by the number of predicted tokens; it takes `shift_labels` unchanged
        return {"slices": slices, "labels": predicted, "shift_labels": predicted}

    if state.is_main_process:
        remove_incomplete_checkpoints(checkpoints)
    state.wait_for_everyone()
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    trainer = _SliceTrainer(model, arguments, compute_loss_func=loss, callbacks=[Progress()])
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if is_sharded() and not sharded:
        raise MedkitError("accelerate shards on GPUs only: use `accelerate launch` without the config file on CPUs")
    trainer.remove_callback(PrinterCallback)  # prints a line per step
    batches = EpochBatches(len(examples), section.batch_size, seed, difficulty)
    trainer.loader, trainer.terms = EpochLoader(batches, collate_slices), {}
    model.train()
    with write_errors(checkpoints, checkpoints):
        trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    if sharded:
        _gather_weights(trainer, model, dtypes)
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)  # remove the Trainer's autocast
    vars(model).pop("forward", None)  # left by that: a model that holds itself would keep its memory after `del`
    model.eval()
    return pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])


def training_device(model: nn.Module) -> torch.device:
    """Where the model will be trained: weights that are to be sharded wait on the CPU for their GPU."""
    on_gpu = next(model.parameters()).is_cuda or (is_sharded() and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def is_sharded() -> bool:
    """Whether `accelerate launch` was asked to shard the weights (params/accelerate/)."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def remove_incomplete_checkpoints(checkpoints: Path) -> None:
    """Remove checkpoints whose writing was interrupted: the Trainer writes `trainer_state.json` last."""
    for checkpoint in checkpoints.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(checkpoint)


class _Arguments(TrainingArguments):
    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)  # the Trainer would use DataParallel; several GPUs need a process each


def make_arguments(section: TrainParams, device: torch.device, seed: int, checkpoints: Path) -> TrainingArguments:
    """The Trainer's arguments for a section of the profile."""
    return _Arguments(
        output_dir=str(checkpoints),
        num_train_epochs=section.epochs,
        learning_rate=section.learning_rate,
        warmup_steps=section.warmup_fraction,
        lr_scheduler_type="cosine",
        save_steps=section.save_every_steps,
        logging_steps=1,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        bf16=loading.pick_bf16(section.bf16, device),
        activation_checkpointing=section.gradient_checkpointing,
        seed=seed,
    )


class _SliceTrainer(Trainer):
    """A Trainer whose batch is a list of slices and whose loss is a `Loss`; the terms per predicted token join the log.

    A slice's loss is its sum over the predicted tokens of the whole batch, so the slices add up to the batch's mean.
    """

    def get_train_dataloader(self):
        return self.loader  # not prepared by accelerate, which would deal out whole batches to the processes

    def training_step(self, model, inputs, num_items_in_batch=None):
        total = torch.zeros((), device=self.args.device)
        *first, last = inputs["slices"]
        for part in [*first, last]:
            self.accelerator.sync_gradients = part is last  # DeepSpeed makes its step where this is set
            # FSDP adds up shards of gradients; without synchronisation it would keep whole gradients
            sync = part is last or self.is_fsdp_enabled
            with nullcontext() if sync else self.accelerator.no_sync(model):
                total += super().training_step(model, part, num_items_in_batch)
        mean = self.accelerator.reduce(total, "mean")
        if not torch.isfinite(mean):  # in all processes or in none, so that none waits for ever
            step = self.state.global_step + 1
            raise MedkitError(f"the loss is {mean.item()} at step {step}: lower learning_rate, or check the rows")
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


class Progress(TrainerCallback):
    """One tqdm bar with the current loss, and the last checkpoint alone, in the main process."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", desc="training", mininterval=10,
            disable=not state.is_world_process_zero,
        )  # fmt: skip

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.n = state.global_step
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_save(self, args, state, control, **kwargs):
        # the Trainer's own limit goes by times of files: a clock that was set back would cost the newest checkpoint
        for checkpoint in Path(args.output_dir).glob("checkpoint-*") if state.is_world_process_zero else ():
            if checkpoint.name != f"checkpoint-{state.global_step}":
                shutil.rmtree(checkpoint)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def _gather_weights(trainer: Trainer, model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Put whole weights on the CPU back into a sharded model, in the main process: to save them, not to run them."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        for name, tensor in weights.items():  # one by one: load_state_dict would shard them again
            owner, _, leaf = name.rpartition(".")
            module, tensor = model.get_submodule(owner), tensor.to(dtypes.get(name, tensor.dtype))
            is_parameter = leaf in dict(module.named_parameters(recurse=False))
            setattr(module, leaf, nn.Parameter(tensor) if is_parameter else tensor)
        model.tie_weights()
