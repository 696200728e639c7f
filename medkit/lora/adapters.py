"""Low-rank adapters with PEFT: attach, train, merge, and measure the learned update.

LoRA (arXiv 2106.09685): W' = W + s·B·A with s = alpha / rank. A (rank, in) starts at random and B (out, rank) at zero,
so an untrained adapter changes nothing. Variants:

- `rslora` (arXiv 2312.03732): s = alpha / √rank; a step of gradient descent is the same at every rank.
- `dora` (arXiv 2402.09353): W' = m · (W + s·B·A) / ‖W + s·B·A‖, norms by row; m (out) is learned and starts as ‖W‖.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from medkit.data import splits
from medkit.modeling import batches, loading, trainer
from medkit.modeling.batches import Example
from medkit.modeling.train_once import load_for_training, open_stage, train_once
from medkit.params import AdapterParams, Params
from medkit.stage import MedkitError, Stage


@loading.quiet_transformers()
def attach(model: nn.Module, section: AdapterParams, seed: int) -> PeftModel:
    """The model with a fresh adapter; only the adapter's weights require gradients. Raises as `check_targets`."""
    check_targets(model, section)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=list(section.target_modules),
        task_type="CAUSAL_LM",
        use_rslora=section.variant == "rslora",
        use_dora=section.variant == "dora",
    )
    return get_peft_model(model, config)


def check_targets(model: nn.Module, section: AdapterParams) -> None:
    """Raise MedkitError if a target is no linear layer, or tied to the embeddings, which merging would change too."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = {_last(name) for name in linear}
    if unknown := sorted(set(section.target_modules) - known):
        raise MedkitError(f"target_modules {unknown} are no linear layers of this model; it has {sorted(known)}")
    shared = getattr(model.get_input_embeddings(), "weight", None)
    tied = [name for name, module in linear.items() if module.weight is shared]
    if {_last(name) for name in tied} & set(section.target_modules):
        raise MedkitError(f"target_modules {tied}: tied to the embeddings, which merging would change as well")


def adapter_rows(questions: pd.DataFrame, split: str) -> pd.DataFrame:
    """The rows of a split that the adapter learns or is tried on: of the second form, or all where no row has it."""
    return splits.training_rows(questions, split, (questions.kind == splits.SECOND_FORM).any())


def train_adapter(stage: Stage, params: Params, examples: Sequence[Example]) -> tuple[PeftModel, pd.DataFrame]:
    """The distilled student with a trained adapter beside its weights, not merged, and the log. Writes `adapter/`."""
    folder, section = stage.require("02_distillation", "student_kd"), params.lora
    tokenizer = loading.load_tokenizer(folder)
    model = attach(load_for_training(folder, params.models, adapter=True), section.adapter, params.seed)
    loss, seed = trainer.cross_entropy, params.seed
    return model, train_once(stage, "adapter", model, tokenizer, examples, section.train, loss, seed, half=True)


def train_stage(run: str, params: Params) -> pd.DataFrame:
    """Train and merge the adapter of a run, as notebook 03 does; returns the log. For `medkit train --stage lora`."""
    with open_stage(run, "03_lora", params) as stage:
        questions = pd.read_parquet(stage.require("01_data", "questions.parquet"))
        tokenizer = loading.load_tokenizer(stage.require("02_distillation", "student_kd"))
        rows = adapter_rows(questions, "labelled")
        model, log = train_adapter(stage, params, batches.encode_questions(tokenizer, rows))
        if PartialState().is_main_process:
            loading.save_model(merge(model), tokenizer, stage.path("merged"))
    return log


@loading.quiet_transformers()
def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """A base model with the adapter in `folder` beside its weights, for inference."""
    return PeftModel.from_pretrained(model, folder).eval()


def merge(model: PeftModel) -> nn.Module:
    """The model with W' in place of W, without an adapter. Raises ValueError if a merged weight is not finite."""
    return model.merge_and_unload(safe_merge=True).eval()


def load_merged(model: nn.Module, folder: Path) -> nn.Module:
    """A base model with the adapter in `folder` merged into it."""
    return merge(load_adapter(model, folder))


@torch.no_grad()
def singular_values(model: PeftModel) -> dict[str, torch.Tensor]:
    """Module → the singular values (≤ rank) of its update s·B·A, largest first; no (out, in) matrix is formed.

    With B = Q_B·R_B and Aᵀ = Q_A·R_A they are those of the small s·R_B·R_Aᵀ. For DoRA: before the rescaling by row.
    """
    values = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        r_b = torch.linalg.qr(layer.lora_B["default"].weight.float()).R
        r_a = torch.linalg.qr(layer.lora_A["default"].weight.float().T).R
        values[name.removeprefix("base_model.model.")] = layer.scaling["default"] * torch.linalg.svdvals(r_b @ r_a.T)
    return values


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
