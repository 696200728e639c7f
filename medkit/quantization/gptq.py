"""Calibrated NF4 rounding: GPTQ (arXiv 2210.17323) onto the levels and scales of bitsandbytes' NF4.

Only the level that a weight is rounded to differs from plain NF4; scales, format, bytes and kernels are the same.
Columns are rounded one after the other. The error of a column is compensated in the columns that are not yet rounded,
as far as their inputs are correlated. The result fits inputs that are like the calibration examples. No weight is
trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import bitsandbytes as bnb
import torch
from torch import nn
from tqdm.auto import tqdm

from medkit.modeling import batches as batching
from medkit.modeling.batches import Example
from medkit.quantization.memory_ledger import NF4_BLOCK
from medkit.quantization.plans import Scheme, layer_of
from medkit.quantization.rowwise import dequantize_nf4, fake_quantize, quantize_nf4

DAMPING = 0.1  # share of its mean that is added to the Hessian's diagonal: more is nearer to plain rounding
COLUMNS = 64  # columns that are rounded before their errors are applied to all later columns


def round_calibrated(weight: torch.Tensor, hessian: torch.Tensor, double_quant: bool) -> bnb.nn.Params4bit:
    """`weight` (rows, columns) in NF4, rounded for inputs with `hessian` = Σ x xᵀ (columns, columns).

    Reduces the summed squared error of the outputs greedily, columns with the largest inputs first. If the Hessian is
    a multiple of the identity, every weight goes to its nearest level. Rows must be whole blocks.
    """
    stored = quantize_nf4(weight, double_quant)
    state = stored.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    scales = absmax.float().view(len(weight), -1).repeat_interleave(NF4_BLOCK, 1)
    codes = _round_columns(weight.detach().float(), scales, state.code, hessian.float()).flatten()
    stored.data.copy_((codes[::2] << 4 | codes[1::2]).view_as(stored.data))  # two codes in a byte, the first in front
    return stored


def _round_columns(
    weight: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """Codes (rows, columns) of levels; `scales` has the shape of `weight`."""
    columns = len(hessian)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    ordered = hessian[order][:, order]
    mean = ordered.diagonal().mean()
    ordered.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    compensation = torch.linalg.cholesky(inverse, upper=True)
    thresholds = (levels[1:] + levels[:-1]) / 2
    rest = weight.T[order].contiguous()  # a column of the weight is a row here, contiguous in memory
    scales = scales.T[order].contiguous()
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        errors = torch.empty_like(rest[start:stop])
        for j in range(start, stop):
            codes[j] = torch.bucketize(rest[j] / scales[j], thresholds)
            errors[j - start] = (rest[j] - levels[codes[j].int()] * scales[j]) / compensation[j, j]
            rest[j + 1 : stop].addr_(compensation[j, j + 1 : stop], errors[j - start], alpha=-1)
        rest[stop:].addmm_(compensation[start:stop, stop:].T, errors, alpha=-1)
    return codes[order.argsort()].T.contiguous()


@torch.no_grad()
def calibrate(
    model: nn.Module, schemes: Mapping[str, Scheme], examples: Sequence[Example], double_quant: bool
) -> dict[str, bnb.nn.Params4bit]:
    """Module → calibrated NF4 weight, for every NF4 linear layer and head among `schemes`. The model does not change.

    Works layer by layer: the calibration inputs of a layer come through the already quantized embeddings and layers
    before it. The head, with embeddings tied to it, comes first, for the hidden states of the unquantized model.
    Embeddings that are not tied multiply with nothing, so they are not calibrated.
    """
    batches = list(iterate_batches(model, examples))
    inputs = [{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")} for batch in batches]
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    exact = {name: model.get_submodule(name).weight.data for name in schemes}
    stored: dict[str, bnb.nn.Params4bit] = {}

    def replace_weight(name: str, hessian: torch.Tensor | None) -> None:
        """Later layers are calibrated with the quantized weight."""
        weight = model.get_submodule(name).weight
        if hessian is None:
            weight.data = fake_quantize(weight.data, schemes[name], double_quant)
        else:
            stored[name] = round_calibrated(weight.data, hessian, double_quant)
            weight.data = dequantize_nf4(stored[name])

    try:
        outside = [name for name in schemes if layer_of(name) is None]
        head_names = [name for name in outside if head is not None and model.get_submodule(name).weight is head.weight]
        if [schemes[name] for name in head_names] == ["nf4"]:
            head_inputs = ({head_names[0]: decoder(**batch, use_cache=False)[0]} for batch in inputs)
            replace_weight(head_names[0], _hessians(head_inputs, inputs)[head_names[0]])
        for name in outside:
            if name not in stored:
                replace_weight(name, None)
        hidden, arguments = _record_calls(decoder, inputs)
        for number, layer in enumerate(tqdm(decoder.layers, desc="calibration", unit="layer", delay=2, mininterval=10)):
            inside = [name for name in schemes if layer_of(name) == number]
            calibrated = {name: model.get_submodule(name) for name in inside if schemes[name] == "nf4"}
            calls = [(states, layers[number]) for states, layers in zip(hidden, arguments, strict=True)]
            hessians = _hessians(_module_inputs(layer, calls, calibrated), inputs) if calibrated else {}
            for name in inside:
                replace_weight(name, hessians.get(name))
            hidden = [layer(states, **kwargs) for states, kwargs in calls]
    finally:
        for name, weight in exact.items():
            model.get_submodule(name).weight.data = weight
    return stored


def iterate_batches(
    model: nn.Module, examples: Sequence[Example], batch_tokens: int = 1024
) -> Iterator[dict[str, torch.Tensor]]:
    """Collated batches on the model's device. The padding token does not matter: nothing attends to it."""
    for rows in batching.bucket_by_length([len(e.input_ids) for e in examples], batch_tokens):
        batch = batching.collate([examples[i] for i in rows], pad_token_id=0)
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}


def _hessians(
    inputs: Iterator[dict[str, torch.Tensor]], batches: Sequence[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Module → Σ x xᵀ (columns, columns) over the real positions of all batches. Modules with one input share a sum."""
    sums: dict[str, torch.Tensor] = {}
    first: dict[str, str] = {}
    for seen, batch in zip(inputs, batches, strict=True):
        first = {name: next(n for n in seen if seen[n] is x) for name, x in seen.items()}
        for name in set(first.values()):
            x = seen[name][batch["attention_mask"].bool()].float()
            sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x
    return {name: sums[shared] for name, shared in first.items()}


def _record_calls(
    decoder: nn.Module, batches: Sequence[dict[str, torch.Tensor]]
) -> tuple[list[torch.Tensor], list[list[dict]]]:
    """Per batch the embedded input, and the keyword arguments (mask, positions, …) of every decoder layer."""
    hidden, arguments = [], []
    for batch in batches:
        calls: list[tuple[tuple, dict]] = []

        def record(module: nn.Module, args: tuple, kwargs: dict, calls: list = calls) -> None:
            calls.append((args if not calls else (), kwargs))

        with ExitStack() as hooks:
            for layer in decoder.layers:
                hooks.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
            decoder(**batch, use_cache=False)
        hidden.append(calls[0][0][0])
        arguments.append([kwargs for _, kwargs in calls])
    return hidden, arguments


def _module_inputs(
    layer: nn.Module, calls: Sequence[tuple[torch.Tensor, dict]], modules: Mapping[str, nn.Module]
) -> Iterator[dict[str, torch.Tensor]]:
    """Per call of the layer the inputs of its modules."""
    for hidden, kwargs in calls:
        seen: dict[str, torch.Tensor] = {}
        with ExitStack() as hooks:
            for name, module in modules.items():
                note = lambda _, args, name=name, seen=seen: seen.update({name: args[0]})  # noqa: E731
                hooks.callback(module.register_forward_pre_hook(note).remove)
            layer(hidden, **kwargs)
        yield seen
