"""An adapter merged into a base that exists in 4 bits alone: dequantize, merge, requantise; and what merging did.

A QLoRA adapter (arXiv 2305.14314) was trained beside D(q), the decoded codes. Merged it is Q(D(q) + ΔW), rounded to
NF4 again. D(q) lies on the levels, so an update of less than half a step falls back to where it started, and its effect
with it: measure what is left. Codes of a weight that nothing was added to come back as they were. So do its scales,
unless they are in 8 bits themselves (double quantization): their mean is taken anew, which moves decoded weights by up
to some 10⁻³ of themselves, each time.

Rounding here is to the nearest level. Where the dense base is at hand, merge into that and quantise by a plan instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import torch
from peft import PeftConfig
from torch import nn

from medkit.lora import adapters
from medkit.lora.adapters import AdapterError
from medkit.modeling import batches
from medkit.modeling.batches import Example
from medkit.quantization.rowwise import dequantize_nf4, quantize_nf4
from medkit.statistics import mean_intervals


def dequantize(model: nn.Module, targets: Collection[str] | None = None) -> dict[str, bnb.nn.Linear4bit]:
    """Put dense layers in place of the NF4 layers with last names among `targets`, or of all. Returns those layers.

    Raises AdapterError for a layer that has run: on CPUs with AVX512-BF16 its scales may have been rounded to bf16.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit) and (targets is None or name.rsplit(".", 1)[-1] in targets)
    }
    for name, layer in found.items():
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise AdapterError(f"{name!r} was repacked by its first forward pass; load the quantised model again")
        weight = dequantize_nf4(layer.weight)
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        model.set_submodule(name, dense.train(layer.training))
    return found


def merge_into_quantized(base: nn.Module, folder: Path) -> nn.Module:
    """A quantised base that has not run, with the adapter in `folder` merged into it; formats and bytes as before.

    Modules without an adapter keep their codes and scales. NF4 targets are requantised as they were stored; dense ones
    stay dense.
    """
    targets = PeftConfig.from_pretrained(folder).target_modules
    stored = dequantize(base, targets)
    merged = adapters.load_merged(base, folder)
    for name, layer in stored.items():
        weight = quantize_nf4(merged.get_submodule(name).weight, layer.weight.quant_state.nested)
        layer.weight, layer.quant_state, weight.module = weight, weight.quant_state, layer
        merged.set_submodule(name, layer)
    return merged.eval()


def surviving_share(before: torch.Tensor, update: torch.Tensor, after: torch.Tensor) -> float:
    """How much of an update ΔW a requantised weight holds: ⟨after − before, ΔW⟩ / ‖ΔW‖². 1 is all of it, 0 nothing."""
    update = update.double()
    return (((after - before).double() * update).sum() / update.square().sum()).item()


@dataclass(frozen=True)
class Predictions:
    """What a model says at the predicted positions of some examples."""

    logits: torch.Tensor
    """(N, vocab_size), on the CPU."""
    nll: np.ndarray
    """(examples,) mean −log p of each example's tokens, in nats."""


def predict_examples(model: nn.Module, examples: Sequence[Example]) -> Predictions:
    """One pass over the examples; the same order for every model."""
    model.eval()
    logits, nll = [], np.empty(len(examples))
    for rows, found in batches.iterate_predicted(model, examples):
        nll[rows] = batches.mean_nll(found, [examples[i] for i in rows])
        logits.append(found.logits.cpu())
    return Predictions(torch.cat(logits), nll)


def compare_predictions(
    before: Predictions, after: Predictions, groups: Sequence, confidence: float
) -> dict[str, float]:
    """`batching.measure_drift`, and the mean change of the examples' nll with its paired interval by groups:
    `nll_change`, `ci_low`, `ci_high` in nats."""
    change = after.nll - before.nll
    low, high = mean_intervals(change[:, None], groups, confidence)
    drift = batches.measure_drift(before.logits, after.logits)
    return {**drift, "nll_change": change.mean(), "ci_low": low[0], "ci_high": high[0]}
