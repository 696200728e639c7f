"""Weights stored by rows: int8 with one scale per row, and NF4 in which every row can be decoded alone.

An embedding decodes the rows that it looks up. A linear layer decodes a few megabytes of rows at a time. A tied head
shares the storage of the embeddings. bitsandbytes has none of this: its `Linear8bitLt` rounds the activations as well,
its 4-bit embedding cannot be saved, and its head cannot be tied to it. Activations are not rounded here, so a module
multiplies with exactly the weight that `fake_quantize` returns. For inference only.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import bitsandbytes as bnb
import torch
from torch import nn

from medkit.modeling.batches import Example
from medkit.quantization import gptq
from medkit.quantization.memory_ledger import DECODED_BYTES, NESTED_BLOCK, NF4_BLOCK
from medkit.quantization.plans import Scheme


class Int8Rows(nn.Module):
    """A matrix as int8 `codes` (rows, columns) and a float32 `scale` (rows, 1): weight = codes · scale.

    The scale is the row's largest magnitude / 127, so the error of a weight is at most half of it.
    """

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)
        self.shape, self.dtype = codes.shape, dtype

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> Self:
        exact = weight.detach().float()
        scale = (exact.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return cls((exact / scale).round().clamp(-127, 127).to(torch.int8), scale, weight.dtype)

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Decoded rows (*ids.shape, columns)."""
        return (self.codes[ids] * self.scale[ids]).to(self.dtype)

    def project(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """x (…, columns) times rows start…stop: (…, stop − start). Codes are exact in bf16, so the scale comes last."""
        product, scale = x @ self.codes[start:stop].to(x.dtype).T, self.scale[start:stop, 0]
        # CPUs multiply 16-bit numbers by a float32 copy: in place and a few tokens at a time the copy stays small
        for tokens in product.view(-1, stop - start).split(max(1, x.shape[-1] // 4)):
            tokens.mul_(scale)
        return product


class Nf4Rows(nn.Module):
    """A matrix in bitsandbytes' NF4 format. Its rows are whole blocks, so each row can be decoded alone."""

    def __init__(self, weight: bnb.nn.Params4bit, dtype: torch.dtype):
        super().__init__()
        self.weight = weight
        self.shape, self.dtype = weight.quant_state.shape, dtype
        self.register_state_dict_post_hook(_add_quant_state)

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Decoded rows (*ids.shape, columns)."""
        rows, columns = self.shape
        packed = self.weight.data.view(rows, columns // 2)[ids].reshape(-1, 1)
        state = bnb.functional.QuantState(
            absmax=self._block_scales(ids).flatten(), shape=torch.Size([*ids.shape, columns]),
            code=self.weight.quant_state.code, blocksize=NF4_BLOCK, quant_type="nf4", dtype=self.dtype,
        )  # fmt: skip
        return bnb.functional.dequantize_4bit(packed, state)

    def project(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """x (…, columns) times rows start…stop: (…, stop − start)."""
        return x @ self.gather(torch.arange(start, stop, device=x.device)).to(x.dtype).T

    def _block_scales(self, ids: torch.Tensor) -> torch.Tensor:
        """Scales of the rows' blocks, (*ids.shape, blocks per row)."""
        state, blocks = self.weight.quant_state, self.shape[1] // NF4_BLOCK
        numbers = ids[..., None] * blocks + torch.arange(blocks, device=ids.device)
        if not state.nested:
            return state.absmax[numbers]
        outer = state.state2.absmax[numbers // NESTED_BLOCK]
        return state.state2.code[state.absmax[numbers].int()] * outer + state.offset


def _add_quant_state(module: Nf4Rows, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for key, tensor in module.weight.quant_state.as_dict(packed=True).items():
        state_dict[f"{prefix}weight.{key}"] = tensor


class QuantizedEmbedding(nn.Module):
    """Looks up token ids in a table stored by rows."""

    def __init__(self, rows: Int8Rows | Nf4Rows):
        super().__init__()
        self.rows = rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rows.gather(ids)


class QuantizedLinear(nn.Module):
    """x @ weightᵀ + bias for a weight stored by rows; it decodes at most `DECODED_BYTES` at once."""

    def __init__(self, rows: Int8Rows | Nf4Rows, bias: torch.Tensor | None):
        super().__init__()
        self.rows = rows
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self.rows.shape
        step = max(1, DECODED_BYTES // (columns * x.element_size()))
        if rows <= step:
            out = self.rows.project(x, 0, rows)
        else:
            out = x.new_empty(*x.shape[:-1], rows)
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                out[..., start:stop] = self.rows.project(x, start, stop)
        return out if self.bias is None else out + self.bias


def quantize_nf4(weight: torch.Tensor, double_quant: bool) -> bnb.nn.Params4bit:
    """The weight in NF4, rounded to the nearest level, on its device."""
    stored = bnb.nn.Params4bit(
        weight.detach(), requires_grad=False, blocksize=NF4_BLOCK, compress_statistics=double_quant, quant_type="nf4"
    ).to(weight.device)
    if double_quant:  # bitsandbytes shares this table between weights; with a copy each, memory and file agree
        stored.quant_state.state2.code = stored.quant_state.state2.code.clone()
    return stored


def round_nf4(weight: torch.Tensor, hessian: torch.Tensor, double_quant: bool) -> bnb.nn.Params4bit:
    """`weight` (rows, columns) in NF4, rounded for inputs with `hessian` = Σ x xᵀ (columns, columns).

    Scales are those of plain NF4. Rows must be whole blocks.
    """
    stored = quantize_nf4(weight, double_quant)
    state = stored.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    scales = absmax.float().view(len(weight), -1).repeat_interleave(NF4_BLOCK, 1)
    codes = gptq.round_columns(weight.detach().float(), scales, state.code, hessian.float()).flatten()
    stored.data.copy_((codes[::2] << 4 | codes[1::2]).view_as(stored.data))  # two codes in a byte, the first in front
    return stored


def calibrate_nf4(
    model: nn.Module, schemes: Mapping[str, Scheme], examples: Sequence[Example], double_quant: bool
) -> dict[str, bnb.nn.Params4bit]:
    """Module → weight rounded by GPTQ, for every NF4 linear layer and head among `schemes`. The model stays as it is.

    The other schemes round to the nearest, so that later layers are fitted to inputs that have passed through them.
    """

    def round_weight(name: str, weight: torch.Tensor, hessian: torch.Tensor | None) -> tuple:
        if schemes[name] != "nf4" or hessian is None:
            return None, fake_quantize(weight, schemes[name], double_quant)
        stored = round_nf4(weight, hessian, double_quant)
        return stored, dequantize_nf4(stored)

    stored = gptq.calibrate(model, schemes, examples, round_weight)
    return {name: nf4 for name, nf4 in stored.items() if nf4 is not None}


def restore_nf4(tensors: dict[str, torch.Tensor], key: str) -> bnb.nn.Params4bit:
    """The NF4 weight `key` from the tensors of a state dict."""
    state = {name.removeprefix(f"{key}."): t for name, t in tensors.items() if name.startswith(f"{key}.")}
    return bnb.nn.Params4bit.from_prequantized(tensors[key], state, device=tensors[key].device)


def dequantize_nf4(stored: bnb.nn.Params4bit) -> torch.Tensor:
    """The whole weight in its original dtype."""
    return bnb.functional.dequantize_4bit(stored.data, stored.quant_state)


def fake_quantize(weight: torch.Tensor, scheme: Scheme, double_quant: bool) -> torch.Tensor:
    """The weight quantized by a scheme and decoded again: what the quantized module multiplies with."""
    match scheme:
        case "int8":
            rows = Int8Rows.quantize(weight)
            return (rows.codes * rows.scale).to(rows.dtype)
        case "nf4":
            return dequantize_nf4(quantize_nf4(weight, double_quant))
        case _:
            return weight
