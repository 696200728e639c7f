"""GPTQ (arXiv 2210.17323): weights rounded to given levels and scales with the least error for calibration inputs.

Columns are rounded one after the other. The error of a column is compensated in the columns that are not yet rounded,
as far as their inputs are correlated. Format and bytes are those of plain rounding. No weight is trained.
`rowwise` rounds to NF4 this way, `gguf_blocks` to llama.cpp's formats.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn
from tqdm.auto import tqdm

from medkit.modeling import batches as batching
from medkit.modeling.batches import Example
from medkit.quantization.plans import layer_of

DAMPING = 0.1  # share of its mean that is added to the Hessian's diagonal: more is nearer to plain rounding
COLUMNS = 64  # columns that are rounded before their errors are applied to all later columns
Rounding = Callable[[str, torch.Tensor, torch.Tensor | None], tuple[object, torch.Tensor]]
"""Module, weight, Hessian Σ x xᵀ of its inputs (None: it multiplies with nothing) → what is stored, decoded weight."""


def round_columns(
    weight: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """Numbers of the `levels` (rows, columns) uint8 that `weight` is rounded to; `scales` has the shape of `weight`.

    Columns with the largest inputs come first. The error of a column is compensated in the later ones.
    """
    columns = len(hessian)
    order = hessian.diagonal().argsort(descending=True, stable=True)  # columns with the largest inputs come first
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
def calibrate(model: nn.Module, modules: Iterable[str], examples: Sequence[Example], round_weight: Rounding) -> dict:
    """Module → what `round_weight` stores for it. The model does not change.

    Works layer by layer: the calibration inputs of a layer come through the already quantized embeddings and layers
    before it. The head, with embeddings tied to it, comes first, for the hidden states of the unquantized model.
    Embeddings that are not tied multiply with nothing, so they have no Hessian.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    exact = {name: model.get_submodule(name).weight.data for name in modules}
    stored = {}

    def replace_weight(name: str, hessian: torch.Tensor | None) -> None:
        """Later layers are calibrated with the quantized weight."""
        weight = model.get_submodule(name).weight
        stored[name], weight.data = round_weight(name, weight.data, hessian)

    try:
        inputs = [batching.model_inputs(model, batch) for _, batch in batching.iterate_packed(model, examples)]
        calls = [_record_call(decoder, batch) for batch in inputs]
        for name in [name for name in exact if layer_of(name) is None]:
            is_head = model.get_submodule(name).weight is head.weight
            replace_weight(name, sum(x.T @ x for x, _ in calls) if is_head else None)
        hidden = [model.get_input_embeddings()(batch["input_ids"]) for batch in inputs]
        for number, layer in enumerate(tqdm(decoder.layers, desc="calibration", unit="layer", delay=2, mininterval=10)):
            inside = {name: model.get_submodule(name) for name in exact if layer_of(name) == number}
            arguments = [kwargs[number] for _, kwargs in calls]
            hessians = _hessians(layer, inside, hidden, arguments)
            for name in inside:
                replace_weight(name, hessians[name])
            hidden = [layer(states, **kwargs) for states, kwargs in zip(hidden, arguments, strict=True)]
    finally:
        for name, weight in exact.items():
            model.get_submodule(name).weight.data = weight
    return stored


def _record_call(decoder: nn.Module, batch: dict) -> tuple[torch.Tensor, list[dict]]:
    """Final hidden states (tokens, hidden) in float32, and the keyword arguments of every decoder layer."""
    arguments = []
    with ExitStack() as hooks:
        for layer in decoder.layers:
            record = layer.register_forward_pre_hook(lambda _, args, kwargs: arguments.append(kwargs), with_kwargs=True)
            hooks.callback(record.remove)
        states = decoder(**batch)[0]
    return states.flatten(0, 1).float(), arguments


def _hessians(
    layer: nn.Module, modules: Mapping[str, nn.Module], hidden: Sequence[torch.Tensor], arguments: Sequence[dict]
) -> dict[str, torch.Tensor]:
    """Module → Σ x xᵀ (columns, columns) of its inputs, when the layer reads `hidden`. Modules share an input's sum."""
    sums: dict[str, torch.Tensor] = {}
    last: tuple[torch.Tensor | None, str] = None, ""  # the input that was counted last, and for which module

    def add(name: str, module: nn.Module, args: tuple[torch.Tensor]) -> None:
        nonlocal last
        if args[0] is last[0]:  # queries, keys and values read one input; so do gate and up
            sums[name] = sums[last[1]]
            return
        x, last = args[0].flatten(0, -2).float(), (args[0], name)
        sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(partial(add, name)).remove)
        for states, kwargs in zip(hidden, arguments, strict=True):
            layer(states, **kwargs)
    return sums
