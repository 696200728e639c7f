"""llama.cpp's block formats Q4_0, Q5_0 and Q8_0: 32 weights with one float16 scale d and whole codes q, weight = d·q.

A weight of shape (rows, columns) is rounded here, and its codes and scales go into the GGUF file as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from medkit.modeling import batches
from medkit.modeling.batches import Example
from medkit.quantization import gptq
from medkit.quantization.plans import layer_of
from medkit.quantization.quantize import weight_shapes

BLOCK = 32
BITS = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}  # of a code; a scale adds half a bit per weight
SEARCHED = torch.linspace(0.7, 1.2, 21)  # scales that are tried, as multiples of the one that clips nothing
RIDGE = 0.01  # of `fit_scales`, as a share of the mean diagonal
CHUNK = 1 << 22  # weights whose scales are searched at once


@dataclass
class Blocks:
    """A matrix in one of the formats in `BITS`."""

    kind: str
    codes: torch.Tensor  # (rows, columns) int8, from −2ᵇ⁻¹ to 2ᵇ⁻¹ − 1 for b bits; −128 is not used
    scales: torch.Tensor  # (rows, columns / 32) float16
    squares: torch.Tensor | None = None  # (columns,) float32, Σ x² of the calibration inputs; None if it has none
    tokens: int = 0  # over which that is the sum

    def decode(self) -> torch.Tensor:
        """The weight (rows, columns) in float32."""
        return (self.codes.float().unflatten(1, (-1, BLOCK)) * self.scales.float()[..., None]).flatten(1)

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

    Scales have the least error weighted by the mean squares of the inputs, as with llama.cpp's importance matrix; GPTQ
    chooses the codes; then the scales are fitted to the codes. Without `hessian` all inputs are alike. Rows must be
    whole blocks.
    """
    weight = weight.detach().float()
    hessian = torch.eye(weight.shape[1], device=weight.device) if hessian is None else hessian.float()
    half = 1 << BITS[kind] - 1
    levels = torch.arange(max(-half, -127), half, device=weight.device).float()
    importance = hessian.diagonal() + 1e-3 * hessian.diagonal().mean() + 1e-30
    step = max(1, CHUNK // weight.shape[1])
    scales = torch.cat([search_scales(rows, levels, importance) for rows in weight.split(step)]).half()
    codes = gptq.round_columns(weight, scales.float().repeat_interleave(BLOCK, 1), levels, hessian)
    codes = (codes.int() + int(levels[0])).to(torch.int8)
    parts = zip(weight.split(step), codes.split(step), scales.split(step), strict=True)
    return Blocks(kind, codes, torch.cat([fit_scales(*rows, hessian) for rows in parts]))


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


def fit_scales(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Scales (rows, blocks) float16 with the least squared error of the outputs for these codes.

    Linear least squares per row: the output is a sum over blocks of scale · (codes · inputs). A small ridge holds
    scales that the inputs do not determine at their old value.
    """
    blocks = codes.float().unflatten(1, (-1, BLOCK))
    products = ((blocks[:, i] @ part).unflatten(1, (-1, BLOCK)) for i, part in enumerate(hessian.split(BLOCK)))
    gram = torch.stack([(product * blocks).sum(-1) for product in products], 1)  # (rows, blocks, blocks)
    target = ((weight @ hessian).unflatten(1, (-1, BLOCK)) * blocks).sum(-1)
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-20
    gram.diagonal(dim1=1, dim2=2).add_(ridge)
    return torch.linalg.solve(gram, target + ridge * scales.float()).half()


def quantize_blocks(model: nn.Module, examples: Sequence[Example], layers: str, embeddings: str) -> dict[str, Blocks]:
    """Module → its weight in the format `layers` or, outside the decoder layers, `embeddings`, fitted to `examples`.

    The model does not change. Weights whose rows are not whole blocks are left out.
    """
    kinds = {
        name: embeddings if layer_of(name) is None else layers
        for name, shape in weight_shapes(model).items()
        if shape[1] % BLOCK == 0
    }
    tokens = sum(batch["input_ids"].numel() for _, batch in batches.iterate_packed(model, examples))

    def round_weight(name: str, weight: torch.Tensor, hessian: torch.Tensor | None) -> tuple[Blocks, torch.Tensor]:
        blocks = round_to_blocks(weight, kinds[name], hessian)
        if hessian is not None:
            blocks.squares, blocks.tokens = hessian.diagonal().float().clone(), tokens
        return blocks, blocks.decode().to(weight.dtype)

    return gptq.calibrate(model, kinds, examples, round_weight)
