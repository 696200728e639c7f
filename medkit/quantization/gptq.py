"""NF4 rounding whose errors cancel on real inputs: GPTQ (arXiv 2210.17323) onto bitsandbytes' own grid.

Scales, format, bytes and kernels are those of plain NF4; only which level a weight goes to is another. Columns are
rounded one after the other, and what one loses is made up for in the columns that are still exact, as far as their
inputs move together. What comes out depends on the examples: it fits inputs like theirs. No weight is trained, no
scale moved, and no plan chosen here.
"""

from __future__ import annotations

import itertools
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

DAMPING = 0.1  # share of their mean that is added to the diagonal of the moments: more stays nearer to plain rounding
COLUMNS = 64  # rounded before what they lost is passed on to all columns after them


class _Reached(Exception):
    """The part of a forward pass that was wanted has run."""

    def __init__(self, output: torch.Tensor):
        self.output = output


def round_calibrated(weight: torch.Tensor, moments: torch.Tensor, double_quant: bool) -> bnb.nn.Params4bit:
    """`weight` (rows, columns) in NF4, rounded for inputs whose summed outer products are `moments` (columns, columns).

    Lowers the summed squared error of the outputs, greedily, columns with the largest inputs first. With moments that
    are a multiple of the identity it rounds to the nearest level. Rows must be whole blocks.
    """
    stored = quantize_nf4(weight, double_quant)
    state = stored.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    scales = absmax.float().view(len(weight), -1).repeat_interleave(NF4_BLOCK, 1)
    codes = _round_columns(weight.detach().float(), scales, state.code, moments.float()).flatten()
    stored.data.copy_((codes[::2] << 4 | codes[1::2]).view_as(stored.data))  # the first of two in the upper half
    return stored


def _round_columns(
    weight: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, moments: torch.Tensor
) -> torch.Tensor:
    """Codes (rows, columns) of levels; `scales` has the shape of `weight`."""
    columns = len(moments)
    order = moments.diagonal().argsort(descending=True, stable=True)
    ordered = moments[order][:, order]
    mean = ordered.diagonal().mean()
    ordered.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    passing_on = torch.linalg.cholesky(inverse, upper=True)
    between = (levels[1:] + levels[:-1]) / 2
    left = weight.T[order].contiguous()  # a column of the weight is a row here, side by side in memory
    scales = scales.T[order].contiguous()
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        lost = torch.empty_like(left[start:stop])
        for j in range(start, stop):
            codes[j] = torch.bucketize(left[j] / scales[j], between)
            lost[j - start] = (left[j] - levels[codes[j].int()] * scales[j]) / passing_on[j, j]
            left[j + 1 : stop].addr_(passing_on[j, j + 1 : stop], lost[j - start], alpha=-1)
        left[stop:].addmm_(passing_on[start:stop, stop:].T, lost, alpha=-1)
    return codes[order.argsort()].T.contiguous()


@torch.no_grad()
def calibrate(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    examples: Sequence[Example],
    double_quant: bool,
    batch_tokens: int = 1024,
) -> dict[str, bnb.nn.Params4bit]:
    """Module → its calibrated NF4 weight, for every nf4 layer or head among `schemes`; the model is left as it was.

    Layer by layer: the inputs a layer is rounded for come through the ends and layers before it as their schemes leave
    them, so it knows what was lost there. The head, with embeddings that are tied to it, comes first, for the hidden
    states of the model as it is. Embeddings with a table of their own multiply with nothing, and are not calibrated.
    """
    batches = list(_batches(model, examples, batch_tokens))
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    exact = {name: model.get_submodule(name).weight.data for name in schemes}
    stored: dict[str, bnb.nn.Params4bit] = {}

    def put(name: str, moments: torch.Tensor | None) -> None:
        """What the scheme leaves of the weight is what the layers after it are fed with."""
        weight = model.get_submodule(name).weight
        if moments is None:
            weight.data = fake_quantize(weight.data, schemes[name], double_quant)
        else:
            stored[name] = round_calibrated(weight.data, moments, double_quant)
            weight.data = dequantize_nf4(stored[name])

    try:
        ends = [name for name in schemes if layer_of(name) is None]
        as_head = [name for name in ends if head is not None and model.get_submodule(name).weight is head.weight]
        if [schemes[name] for name in as_head] == ["nf4"]:
            hidden = ({as_head[0]: decoder(**batch, use_cache=False)[0]} for batch in batches)
            put(as_head[0], _moments(hidden, batches)[as_head[0]])
        for name in ends:
            if name not in stored:
                put(name, None)
        entering: list[torch.Tensor] = []
        for number, layer in enumerate(tqdm(decoder.layers, desc="calibration", unit="layer", delay=2, mininterval=10)):
            inside = [name for name in schemes if layer_of(name) == number]
            fitted = {name: model.get_submodule(name) for name in inside if schemes[name] == "nf4"}
            moments = {}
            if fitted:
                reads = (seen for _, seen in _run_to(layer, decoder, batches, entering, fitted))
                moments = _moments(reads, batches)
            for name in inside:
                put(name, moments.get(name))
            entering = [output for output, _ in _run_to(layer, decoder, batches, entering, {})]
    finally:
        for name, weight in exact.items():
            model.get_submodule(name).weight.data = weight
    return stored


def _batches(model: nn.Module, examples: Sequence[Example], batch_tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of the decoder. Which token pads does not matter: nothing attends to it, and no moment counts it."""
    for rows in batching.bucket_by_length([len(e.input_ids) for e in examples], batch_tokens):
        batch = batching.collate([examples[i] for i in rows], pad_token_id=0)
        yield {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "position_ids")}


def _moments(
    inputs: Iterator[dict[str, torch.Tensor]], batches: Sequence[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Module → Σ x xᵀ (columns, columns) over real positions of all batches; those that read one tensor share a sum."""
    sums: dict[str, torch.Tensor] = {}
    first: dict[str, str] = {}
    for seen, batch in zip(inputs, batches, strict=True):
        first = {name: next(n for n in seen if seen[n] is x) for name, x in seen.items()}
        for name in set(first.values()):
            x = seen[name][batch["attention_mask"].bool()].float()
            sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x
    return {name: sums[shared] for name, shared in first.items()}


def _run_to(
    layer: nn.Module,
    decoder: nn.Module,
    batches: Sequence[dict[str, torch.Tensor]],
    entering: Sequence[torch.Tensor],
    watched: Mapping[str, nn.Module],
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Per batch what leaves `layer`, and what the watched modules in it read.

    Runs that layer alone, through the decoder's own forward pass, which knows its masks and positions: the layers
    before it give what entered (`entering`, per batch; nothing for the first layer), those after it are not reached.
    """
    before = list(itertools.takewhile(lambda other: other is not layer, decoder.layers))
    for number, batch in enumerate(batches):
        seen: dict[str, torch.Tensor] = {}

        def note(module: nn.Module, args: tuple, seen: dict = seen) -> None:
            seen.update({name: args[0] for name, other in watched.items() if other is module})

        with ExitStack() as undo:
            for module in watched.values():
                undo.callback(module.register_forward_pre_hook(note).remove)
            undo.callback(layer.register_forward_hook(_stop).remove)
            for skipped in before:
                skipped.forward = lambda *args, number=number, **kwargs: entering[number]
                undo.callback(vars(skipped).pop, "forward")
            try:
                decoder(**batch, use_cache=False)
            except _Reached as reached:
                output = reached.output
        yield output, seen


def _stop(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    raise _Reached(output)
