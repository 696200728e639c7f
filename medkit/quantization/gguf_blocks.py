"""llama.cpp's block formats Q4_0, Q5_0 and Q8_0: 32 weights with one float16 scale d and whole codes q, weight = d·q.

A weight of shape (rows, columns) is rounded here, and its codes and scales go into the GGUF file as they are.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from tqdm.auto import tqdm

from medkit.modeling.batches import Example
from medkit.quantization import gptq
from medkit.quantization.plans import layer_of
from medkit.quantization.quantize import weight_shapes

BLOCK = 32
BITS = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}  # of a code; a scale adds half a bit per weight
SEARCHED = torch.linspace(0.7, 1.2, 21)  # scales that are tried, as multiples of the one that clips nothing
CHUNK = 1 << 22  # weights whose scales are searched at once


@dataclass
class Blocks:
    """A matrix in one of the formats in `BITS`."""

    kind: str
    codes: torch.Tensor
    """(rows, columns) int8, from −2ᵇ⁻¹ to 2ᵇ⁻¹ − 1 for b bits; −128 is not used."""
    scales: torch.Tensor
    """(rows, columns / 32) float16."""

    def decode(self, scales: torch.Tensor | None = None) -> torch.Tensor:
        """The weight (rows, columns) in float32, with these `scales` in the place of its own."""
        scales = self.scales if scales is None else scales
        return (self.codes.float().unflatten(1, (-1, BLOCK)) * scales.float()[..., None]).flatten(1)

    def pack(self) -> np.ndarray:
        """(rows, bytes) uint8 in llama.cpp's layout: per block the scale, for Q5_0 the fifth bits, the codes."""
        codes = self.codes.unflatten(1, (-1, BLOCK)).cpu().numpy()
        parts = [self.scales.cpu().numpy()[..., None].view(np.uint8)]
        if self.kind == "Q8_0":
            parts.append(codes.view(np.uint8))
        else:
            codes = (codes + (1 << BITS[self.kind] - 1)).astype(np.uint8)
            if self.kind == "Q5_0":
                parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
            parts.append(codes[..., :16] & 15 | codes[..., 16:] << 4)  # weight j beside weight j + 16
        return np.concatenate(parts, -1).reshape(len(codes), -1)


def round_to_blocks(weight: torch.Tensor, kind: str, hessian: torch.Tensor | None = None) -> Blocks:
    """`weight` (rows, columns) in the format `kind`, rounded for inputs with `hessian` = Σ x xᵀ (columns, columns).

    Scales have the least error weighted by the mean squares of the inputs, as with llama.cpp's importance matrix; then
    GPTQ chooses the codes. Without `hessian` all inputs are alike. Rows must be whole blocks.
    """
    weight = weight.detach().float()
    hessian = torch.eye(weight.shape[1], device=weight.device) if hessian is None else hessian.float()
    half = 1 << BITS[kind] - 1
    levels = torch.arange(max(-half, -127), half, device=weight.device).float()
    importance = hessian.diagonal() + 1e-3 * hessian.diagonal().mean() + 1e-30
    rows = weight.split(max(1, CHUNK // weight.shape[1]))
    scales = torch.cat([search_scales(part, levels, importance) for part in rows]).half()
    codes = gptq.round_columns(weight, scales.float().repeat_interleave(BLOCK, 1), levels, hessian)
    return Blocks(kind, (codes.int() + int(levels[0])).to(torch.int8), scales)


def search_scales(weight: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Scales (rows, blocks) with the least Σ importance·error². The largest weight of a block sets the first guess.

    The levels go one further below zero than above, so a scale is negative where that weight is positive.
    """
    blocks, importance = weight.unflatten(1, (-1, BLOCK)), importance.view(-1, BLOCK)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for factor in SEARCHED:
        scale = largest * factor / levels[0]
        codes = (blocks / scale).nan_to_num().round().clamp(levels[0], levels[-1])
        fitted = (importance * blocks * codes).sum(-1, keepdim=True) / (importance * codes**2).sum(-1, keepdim=True)
        fitted = fitted.nan_to_num()
        error = (importance * (blocks - fitted * codes) ** 2).sum(-1, keepdim=True)
        best, least = torch.where(error < least, fitted, best), torch.minimum(error, least)
    return best[..., 0]


def quantize_blocks(model: nn.Module, examples: Sequence[Example], layers: str, embeddings: str) -> dict[str, Blocks]:
    """Module → its weight in the format `layers` or, outside the decoder layers, `embeddings`, fitted to `examples`.

    The model does not change. Weights whose rows are not whole blocks are left out.
    """
    kinds = {
        name: embeddings if layer_of(name) is None else layers
        for name, shape in weight_shapes(model).items()
        if shape[1] % BLOCK == 0
    }

    def round_weight(name: str, weight: torch.Tensor, hessian: torch.Tensor | None) -> tuple[Blocks, torch.Tensor]:
        blocks = round_to_blocks(weight, kinds[name], hessian)
        return blocks, blocks.decode().to(weight.dtype)

    return gptq.calibrate(model, kinds, examples, round_weight)


def learn_scales(
    model: nn.Module,
    blocks: dict[str, Blocks],
    examples: Sequence[Example],
    steps: int,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> dict[str, Blocks]:
    """The same codes with scales trained against KL(model ‖ blocks) at all positions of `examples`, in nats.

    A scale is d·exp(s), rounded to float16; the gradient passes the rounding. Adam, learning rate falling to zero.
    After DWQ of mlx-lm. The model itself is the teacher and does not change.
    """
    logs = {name: torch.zeros(b.scales.shape, device=model.device, requires_grad=True) for name, b in blocks.items()}
    optimizer = torch.optim.Adam(logs.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    batches = itertools.islice(_repeat(list(gptq.packed_inputs(model, examples)), seed), steps)
    for inputs in tqdm(batches, total=steps, desc="scales", unit="step", delay=2, mininterval=10):
        with torch.no_grad():
            target = model(**inputs).logits[0].float().log_softmax(-1)
        weights = {f"{n}.weight": b.decode(_scales(b, logs[n])).to(model.dtype) for n, b in blocks.items()}
        logprobs = functional_call(model, weights, (), inputs).logits[0].float().log_softmax(-1)
        loss = nn.functional.kl_div(logprobs, target, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: replace(b, scales=_scales(b, logs[name]).detach().half()) for name, b in blocks.items()}


def _scales(blocks: Blocks, logs: torch.Tensor) -> torch.Tensor:
    """Scales in float32 with values of float16, and the gradient of the unrounded ones."""
    exact = blocks.scales.float() * logs.exp()
    return exact + (exact.half().float() - exact).detach()


def _repeat(batches: list[dict], seed: int) -> Iterator[dict]:
    """The batches again and again, each time in another order."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(batches, len(batches))
