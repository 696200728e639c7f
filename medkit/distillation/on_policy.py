"""On-policy distillation: the student answers, and learns its teacher's distribution along its own answers.

The loss is a generalised Jensen–Shannon divergence (arXiv 2306.13649) at every token that the student wrote. No cache
can hold it, so the teacher is in memory. TRL's DistillationTrainer does all of it (extra `onpolicy`).
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pandas as pd
from accelerate import PartialState
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from medkit.modeling.trainer import TrainingError
from medkit.params import OnPolicyParams
from medkit.prompts import templates


def train_on_policy(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer,
    rows: pd.DataFrame,
    section: OnPolicyParams,
    checkpoints: Path,
    seed: int,
    optimizer,
) -> pd.DataFrame:
    """Train the student (or its adapter) along its own answers, in place; returns TRL's log.

    `checkpoints` is a folder of this training alone, in which a killed one goes on. Raises TrainingError for what TRL
    refuses, e.g. two sizes of vocabulary.
    """
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports each training otherwise
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    train, records = section.train, rows.to_dict("records")
    prompts = [templates.render(r, templates.pick_template(r["kind"], "option_text")) for r in records]
    longest = max(len(templates.encode(tokenizer, prompt)[0]) for prompt in prompts) + section.max_new_tokens
    share = max(1, train.batch_size // PartialState().num_processes)  # of a batch, for a process; cut into equal slices
    size = max(n for n in range(1, share + 1) if share % n == 0 and (n == 1 or n * longest <= train.slice_tokens))
    settings = {"num_train_epochs": train.epochs, "per_device_train_batch_size": size, "seed": seed}
    settings |= {"gradient_accumulation_steps": share // size, "learning_rate": train.learning_rate}
    settings |= {"warmup_steps": train.warmup_fraction, "lr_scheduler_type": "cosine", "logging_steps": 1}
    settings |= {"save_steps": train.save_every_steps, "save_total_limit": 1, "report_to": "none"}
    settings |= {"beta": section.beta, "max_completion_length": section.max_new_tokens}
    settings |= {"use_cpu": next(student.parameters()).device.type != "cuda"}
    settings |= {name: getattr(train, name) for name in ("bf16", "gradient_checkpointing")}
    try:
        arguments = DistillationConfig(output_dir=str(checkpoints), **settings)
        dataset = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
        options = {"processing_class": tokenizer, "optimizers": (optimizer, None)}
        trainer = DistillationTrainer(student, teacher, arguments, dataset, **options)
    except ValueError as error:
        raise TrainingError(f"distillation.on_policy: {error}; correct this, or set on_policy to null") from error
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    return pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
