"""One call over the transformers Trainer with a given loss; batches, checkpoints and resume.

The Trainer (and accelerate under it) owns the loop, gradient accumulation, distribution, checkpoints and resume. Ours
is only what it lacks: batches aligned to the right, so that logits are computed at answer positions alone, and a loss
that reports its terms. What the loss is, is decided by who calls.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from medkit import prompts
from medkit.params import TrainParams, digest

IGNORE = -100


class TrainingError(RuntimeError):
    """Training that cannot go on; the message names the step and the cure."""


@dataclass(frozen=True)
class Example:
    """One training sequence; positions from `loss_start` on are predicted, the rest is given."""

    input_ids: list[int]
    loss_start: int

    @property
    def num_predicted(self) -> int:
        return len(self.input_ids) - self.loss_start


# logits (N, vocab_size) and targets (N,) at the predicted positions of a batch, and what the collator added about them;
# returns the summed loss and its summed terms
Loss = Callable[[torch.Tensor, torch.Tensor, dict], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def encode_questions(tokenizer, questions: pd.DataFrame) -> list[Example]:
    """One example per question row. The loss covers the answer and its end token, nothing else.

    A row without an answer (split `transfer`) is learned as text: the loss covers the question itself.
    """
    return [_encode(tokenizer, question) for question in questions.to_dict("records")]


def _encode(tokenizer, question: dict) -> Example:
    template = prompts.pick_template(question["kind"], "option_text")
    messages = prompts.render(question, template)
    if question["answer"] >= 0:
        answer = prompts.answers(question, template)[question["answer"]]
        prompt_ids, answer_ids = prompts.encode(tokenizer, messages, answer)
        return Example([*prompt_ids, *answer_ids], len(prompt_ids))
    text_ids, _ = prompts.encode(tokenizer, messages)
    frame_ids, _ = prompts.encode(tokenizer, [messages[0], {"role": "user", "content": ""}])
    same = next(i for i, pair in enumerate(zip(text_ids, frame_ids, strict=False)) if pair[0] != pair[1])
    return Example(text_ids, same)


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch padded on the left, so that answers stand at the right edge and `labels` (B, K) needs only K columns."""
    length = max(len(e.input_ids) for e in examples)
    num_labels = max(e.num_predicted for e in examples)
    input_ids = torch.full((len(examples), length), pad_token_id)
    attention_mask = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), num_labels), IGNORE)
    for row, example in enumerate(examples):
        answer = example.input_ids[example.loss_start :]
        input_ids[row, length - len(example.input_ids) :] = torch.tensor(example.input_ids)
        attention_mask[row, length - len(example.input_ids) :] = 1
        labels[row, num_labels - len(answer) :] = torch.tensor(answer)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}


def predicted_logits(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, vocab_size) and targets (N,) at the N labelled positions; the head sees no other position.

    Goes through `model(...)`, so that DDP and FSDP hooks run.
    """
    labels = batch["labels"]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**inputs, use_cache=False, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
    mask = labels != IGNORE
    return logits[mask].float(), labels[mask]


@torch.inference_mode()
def iterate_predictions(
    model: nn.Module, examples: Sequence[Example], pad_token_id: int, batch_size: int = 16
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Batches of examples of like length: their numbers, and logits (N, vocab_size) and targets (N,) in that order."""
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    for first in range(0, len(examples), batch_size):
        rows = by_length[first : first + batch_size]
        batch = collate([examples[i] for i in rows], pad_token_id)
        yield rows, *predicted_logits(model, {name: tensor.to(model.device) for name, tensor in batch.items()})


def collect_logits(model: nn.Module, examples: Sequence[Example], pad_token_id: int) -> torch.Tensor:
    """Logits (N, vocab_size) of all predicted positions on the CPU; the same order for every model."""
    return torch.cat([logits.cpu() for _, logits, _ in iterate_predictions(model, examples, pad_token_id)])


def collect_nll(model: nn.Module, examples: Sequence[Example], pad_token_id: int) -> list[float]:
    """Mean −log p of each example's predicted tokens, in nats: one number per example, for paired comparisons."""
    model.eval()
    found = [0.0] * len(examples)
    for rows, logits, targets in iterate_predictions(model, examples, pad_token_id):
        nll = nn.functional.cross_entropy(logits, targets, reduction="none")
        for row, part in zip(rows, nll.split([examples[i].num_predicted for i in rows]), strict=True):
            found[row] = part.mean().item()
    return found


def measure_drift(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """What a transformation did to logits (N, V): mean KL(before ‖ after) in nats, largest change, changed top tokens."""
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return {
        "positions": len(before),
        "kl_nats": (p.exp() * (p - q)).sum(-1).mean().item(),
        "max_abs_logit": (before - after).abs().max().item(),
        "top1_changed": (before.argmax(-1) != after.argmax(-1)).float().mean().item(),
    }


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, extras: dict) -> tuple[torch.Tensor, dict]:
    """Summed −log p(target) in nats: plain supervised fine-tuning."""
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return loss, {"ce": loss.detach()}


class _GivenLossTrainer(Trainer):
    """Trainer whose loss is a `Loss`; its terms, per predicted token, join the log."""

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
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        return total / count * self.accelerator.num_processes

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
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="training", mininterval=2)

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


def train(
    model: nn.Module,
    examples: Sequence[Example],
    section: TrainParams,
    loss: Loss,
    checkpoints: Path,
    pad_token_id: int,
    seed: int,
    add_extras: Callable[[list[int], int], dict] = lambda rows, num_labels: {},
) -> pd.DataFrame:
    """Train in place and return the log: step, epoch, loss and its terms (nats per predicted token), learning_rate.

    `add_extras` maps the row numbers of a batch and its label width to more tensors for the loss, e.g. teacher
    signals. A killed run goes on from its last checkpoint to the weights an uninterrupted one would have had;
    checkpoints of other settings or other examples in the same folder are thrown away.
    Raises TrainingError for no examples and for a loss that is not finite.
    """
    if not examples:
        raise TrainingError("no training examples; raise the numbers of `train` in data.datasets")
    if section.batch_size % section.micro_batch_size:
        raise TrainingError(
            f"micro_batch_size {section.micro_batch_size} does not divide batch_size {section.batch_size}"
        )
    rows = [{"input_ids": e.input_ids, "row": number} for number, e in enumerate(examples)]

    def collator(features: list[dict]) -> dict:
        numbers = [f["row"] for f in features]
        batch = collate([examples[n] for n in numbers], pad_token_id)
        # the Trainer counts `shift_labels` as they are, and would drop a column of `labels`
        return {**batch, "shift_labels": batch["labels"], **add_extras(numbers, batch["labels"].shape[1])}

    folder = checkpoints / digest([section.model_dump(), seed, [asdict(e) for e in examples]])
    if checkpoints.is_dir():
        for other in checkpoints.iterdir():
            if other != folder:
                shutil.rmtree(other)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=section.epochs,
        per_device_train_batch_size=section.micro_batch_size,
        gradient_accumulation_steps=section.batch_size // section.micro_batch_size,
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
