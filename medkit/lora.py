"""Adapters: attach, save, merge, and what merging changed. PEFT does the work.

LoRA (arXiv 2106.09685): W' = W + (alpha / rank) · B·A, with A (rank, in) drawn at random and B (out, rank) zero, so an
untrained adapter changes nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from medkit.outputs import atomic_path
from medkit.params import AdapterParams


class AdapterError(ValueError):
    """An adapter that does not fit its model; the message names the module."""


def attach(model: nn.Module, section: AdapterParams, seed: int) -> PeftModel:
    """The model with a fresh adapter; only the adapter's weights require gradients.

    Raises AdapterError if a target module is no linear layer of the model.
    """
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = sorted(set(section.target_modules) - linear)
    if unknown:
        raise AdapterError(f"target_modules {unknown} are no linear layers of this model; it has {sorted(linear)}")
    shared = model.get_input_embeddings().weight
    tied = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight is shared]
    if {name.rsplit(".", 1)[-1] for name in tied} & set(section.target_modules):
        raise AdapterError(f"target_modules {tied}: tied to the embeddings, which merging would change as well")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=list(section.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and total numbers of weights; tied weights count once."""
    sizes = {p.data_ptr(): (p.numel(), p.requires_grad) for p in model.parameters()}
    return sum(n for n, trains in sizes.values() if trains), sum(n for n, _ in sizes.values())


def save_adapter(model: PeftModel, folder: Path) -> Path:
    """Write the adapter alone (safetensors and its config), whole or not at all."""
    with atomic_path(folder) as scratch:
        model.save_pretrained(scratch)
    return folder


def merge(model: PeftModel) -> nn.Module:
    """The plain model with W' = W + (alpha / rank)·B·A; raises ValueError if a merged weight is not finite."""
    return model.merge_and_unload(safe_merge=True).eval()


def load_merged(model: nn.Module, folder: Path) -> nn.Module:
    """A base model with the adapter in `folder` merged into it."""
    return merge(PeftModel.from_pretrained(model, folder))
