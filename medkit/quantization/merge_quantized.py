"""Merge an adapter into a base that exists in NF4 only, and measure what the merge changed.

A QLoRA adapter (arXiv 2305.14314) is trained on top of decoded NF4 weights D(q). The merged weight is Q(D(q) + ΔW),
rounded to NF4 again. D(q) lies on the levels, so an update of less than half a step is rounded away: measure how much
survives. Weights without an update get the same codes. Their scales stay the same too, unless they are in 8 bits
(double quantization): then decoded weights move by about 10⁻³ of their size per merge.

Rounding is to the nearest level. If the dense base exists, merge into that and quantize the result by a plan.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftConfig
from torch import nn

from medkit.lora import adapters
from medkit.modeling.batches import Predictions, measure_drift
from medkit.quantization.quantize import is_repacked
from medkit.quantization.rowwise import dequantize_nf4, quantize_nf4
from medkit.stage import MedkitError
from medkit.statistics import mean_intervals


def dequantize(model: nn.Module, targets: Collection[str] | None = None) -> dict[str, bnb.nn.Linear4bit]:
    """Replace NF4 layers by dense layers in place, and return the NF4 layers by name.

    `targets` are the last parts of the names (None: all NF4 layers). Raises MedkitError for a layer that has run,
    because a forward pass may have rounded its scales.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit) and (targets is None or name.rsplit(".", 1)[-1] in targets)
    }
    for name, layer in layers.items():
        if is_repacked(layer.weight):
            raise MedkitError(f"{name!r} was repacked by its first forward pass; load the quantized model again")
        weight = dequantize_nf4(layer.weight)
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        model.set_submodule(name, dense.train(layer.training))
    return layers


def merge_into_quantized(base: nn.Module, folder: Path) -> nn.Module:
    """The quantized base, which has not run yet, with the adapter in `folder` merged into it.

    NF4 targets of the adapter are quantized again in the same format; dense targets stay dense. Other modules keep
    their codes and scales.
    """
    layers = dequantize(base, PeftConfig.from_pretrained(folder).target_modules)
    merged = adapters.load_merged(base, folder)
    for name, layer in layers.items():
        weight = quantize_nf4(merged.get_submodule(name).weight, layer.weight.quant_state.nested)
        layer.weight, layer.quant_state, weight.module = weight, weight.quant_state, layer
        merged.set_submodule(name, layer)
    return merged.eval()


def surviving_share(before: torch.Tensor, update: torch.Tensor, after: torch.Tensor) -> float:
    """Share of an update ΔW in a requantized weight: ⟨after − before, ΔW⟩ / ‖ΔW‖². 1 is all of it, 0 is nothing."""
    update = update.double()
    return (((after - before).double() * update).sum() / update.square().sum()).item()


def compare_predictions(
    before: Predictions, after: Predictions, groups: Sequence, confidence: float
) -> dict[str, float]:
    """`measure_drift` of the logits, and the mean change of the loss: `nll_change`, `ci_low`, `ci_high` in nats.

    The interval is paired by example and resamples `groups`.
    """
    change = after.nll - before.nll
    low, high = mean_intervals(change[:, None], groups, confidence)
    drift = measure_drift(before.logits, after.logits)
    return {**drift, "nll_change": change.mean(), "ci_low": low[0], "ci_high": high[0]}
