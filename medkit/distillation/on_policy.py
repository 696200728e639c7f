"""On-policy distillation: the student answers, and learns at its own words what its teacher would have said there.

Generalised knowledge distillation (arXiv 2306.13649): with chance λ the answers of a slice are drawn from the student,
else they are those of the data, and the loss is a Jensen–Shannon divergence to the teacher, which is resident: nobody
knows beforehand what the student will say, so no cached signals can serve. TRL's GKDTrainer does the work (extra
`onpolicy`). Ours is what it would do otherwise: examples are trained on as they are, without a second chat template;
the heads see the answers alone; a loss is a mean over the tokens that were drawn, where TRL divides by the number of
tokens in the data's answers; a killed run goes on; nothing is reported over the network.

Nothing here loads or saves a model, and nothing is sharded: every process draws from the whole student.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from medkit.modeling import sharding
from medkit.modeling import trainer as training
from medkit.modeling.batches import Example, collate, predict
from medkit.modeling.samplers import EpochLoader, EpochSampler
from medkit.modeling.train_once import key_of as digest_key
from medkit.modeling.train_once import training_key
from medkit.modeling.trainer import TrainingError
from medkit.params import OnPolicyParams

IGNORE = -100  # TRL's label of a token that is not learned


def check_installed() -> None:
    """Raise TrainingError where TRL is missing, before hours are spent on what comes first."""
    if importlib.util.find_spec("trl") is None:
        raise TrainingError("distillation.on_policy needs TRL: pip install 'medkit[onpolicy]', or set it to null")


@cache
def _import_trl() -> tuple[type, type]:
    """TRL's settings, and its trainer with our changes; only where they are needed, since TRL is an extra."""
    check_installed()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*importing from 'trl.experimental'")
        from trl.experimental.gkd import GKDConfig, GKDTrainer

    class OnPolicyTrainer(GKDTrainer):
        def get_train_dataloader(self):
            return self.accelerator.prepare(self.loader)

        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs)  # without a number that was counted before anything was drawn

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            mask, following = inputs["attention_mask"], inputs["labels"][:, 1:]
            rows, columns = (following != IGNORE).nonzero(as_tuple=True)
            answers = {
                "input_ids": inputs["input_ids"],
                "attention_mask": mask,
                "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
                "predicted_at": rows * mask.shape[1] + columns,
                "labels": following[rows, columns],
            }
            with torch.no_grad():
                wanted = predict(self.teacher_model, answers).logits
            said = predict(model, answers).logits
            loss = self.generalized_jsd_loss(said, wanted, beta=self.beta)
            if not torch.isfinite(loss):
                step = self.state.global_step + 1
                raise TrainingError(f"loss is {loss.item()} at step {step}; lower learning_rate, or look at the rows")
            self._metrics["train"]["answer_tokens"].append(len(said) / len(mask))
            return loss

        def _send_telemetry(self):
            pass

        def create_model_card(self, *args, **kwargs):
            pass

    return GKDConfig, OnPolicyTrainer


def key_of(
    student: nn.Module, teacher: nn.Module, examples: Sequence[Example], section: OnPolicyParams, seed: int
) -> str:
    """What a training's outcome depends on, as a short hash; but on several devices others are the answers drawn."""
    both = [training_key(m, examples, section.train, training.cross_entropy, seed) for m in (student, teacher)]
    return digest_key(section.model_dump(exclude={"train"}), both, train)


def count_slices(section: OnPolicyParams, examples: Sequence[Example], processes: int) -> int:
    """Into how many equal slices a process cuts its rows of a batch: as few as `slice_tokens` (with padding) allows.

    Raises TrainingError for a batch that cannot be dealt out evenly.
    """
    size = section.train.batch_size
    if size % processes:
        raise TrainingError(f"on_policy.train.batch_size is {size}, which {processes} processes cannot share evenly")
    rows = size // processes
    longest = max(e.loss_start + max(e.num_predicted, section.max_new_tokens) for e in examples)
    fits = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n * longest <= section.train.slice_tokens]
    return min(fits, default=rows)


def train(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer,
    examples: Sequence[Example],
    section: OnPolicyParams,
    checkpoints: Path,
    seed: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> pd.DataFrame:
    """Train the student in place and return the log: step, epoch, loss (nats per token), answer_tokens, learning_rate.

    The teacher has the student's vocabulary, and stays as it is. Of an example the answer is learned with chance 1 − λ;
    with λ = 1 it may have none. The student may be an adapter model (attaching it is not done here); dropout is off. A
    slice's loss is its mean per token, a step's the mean of its slices; `answer_tokens` is the mean length of what the
    main process learned. A killed run goes on from its last checkpoint to the weights an uninterrupted one would have
    had; checkpoints of other settings in the same folder are thrown away.
    Raises TrainingError for no examples, answers that are needed and missing, shards, a loss that is not finite, and
    where TRL is not installed; ValueError for vocabularies of two sizes.
    """
    if not examples:
        raise TrainingError("no training examples; raise the numbers of `train` in data.datasets")
    if section.lmbda < 1 and not all(e.num_predicted for e in examples):
        raise TrainingError(f"on_policy.lmbda is {section.lmbda}, and some examples have no answer: set it to 1.0")
    if sharding.is_sharded(section.train):
        raise TrainingError("nothing is drawn from a student in shards: set on_policy.train.scale.sharding to null")
    GKDConfig, OnPolicyTrainer = _import_trl()
    given = training._arguments(section.train, next(student.parameters()).device.type != "cuda", seed, checkpoints)
    state, slices = given.distributed_state, count_slices(section, examples, given.world_size)
    arguments = GKDConfig(
        **{field.name: getattr(given, field.name) for field in fields(given) if field.init},
        **section.model_dump(include={"lmbda", "beta", "temperature", "max_new_tokens"}),
    )
    arguments.gradient_accumulation_steps = slices
    arguments.per_device_train_batch_size = section.train.batch_size // (slices * given.world_size)
    arguments._n_gpu = given.n_gpu

    def collator(numbers: list[int]) -> dict:
        rows = [examples[n] for n in numbers]
        batch = collate(rows, tokenizer.pad_token_id)
        asked = collate([Example(e.input_ids[: e.loss_start], e.loss_start) for e in rows], tokenizer.pad_token_id)
        labels = torch.full_like(batch["input_ids"], IGNORE)
        labels.view(-1)[batch["predicted_at"] + 1] = batch["labels"]
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
            "prompts": asked["input_ids"],
            "prompt_attention_mask": asked["attention_mask"],
        }

    folder = checkpoints / f"{given.world_size} processes"
    if state.is_main_process:
        training._remove_half_checkpoints(folder)
    state.wait_for_everyone()
    arguments.output_dir = str(folder)

    from datasets import Dataset  # what TRL asks for; it is not read

    numbered = Dataset.from_dict({"number": range(len(examples))})
    more = {"processing_class": tokenizer, "callbacks": [training._Progress()], "optimizers": (optimizer, None)}
    trainer = OnPolicyTrainer(student, teacher, arguments, collator, numbered, **more)
    trainer.remove_callback(PrinterCallback)
    trainer.generation_config.eos_token_id = tokenizer.eos_token_id  # what ends the data's answers
    trainer.generation_config.use_cache = True
    trainer.generation_config.remove_invalid_values = True  # a broken student says something, of which the loss tells
    lengths = [len(e.input_ids) for e in examples]
    sampler = EpochSampler(arguments.per_device_train_batch_size, lengths=lengths, seed=seed)
    trainer.loader = EpochLoader(sampler, collator)
    teacher.eval()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    for model in (student, teacher, *([student.get_base_model()] if isinstance(student, PeftModel) else [])):
        vars(model).pop("forward", None)  # TRL's other head, and autocast, end with the training
        vars(model).pop("_original_forward", None)
    student.eval()
    return pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
