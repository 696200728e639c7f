"""Weights stored by rows: 8-bit integers with a scale per row, and NF4 tables.

An embedding decodes the rows it looks up, a linear layer or a head a few megabytes of rows at a time, and one storage
can serve both ends of a model. This is what bitsandbytes does not have: its `Linear8bitLt` rounds the activations as
well, its 4-bit embedding cannot be saved, and no head shares with either. Activations are left alone here, so what
runs is the weight that `fake_quantize` returns. For inference only; modules stay on the device where they were made.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import nn

from medkit.quantization.memory_ledger import DECODED_BYTES, NESTED_BLOCK, NF4_BLOCK
from medkit.quantization.plans import Scheme


class Int8Rows(nn.Module):
    """A matrix as int8 `codes` (rows, columns) and a float32 `scale` (rows, 1): weight = codes · scale.

    The scale is the row's largest magnitude / 127, so no weight is off by more than half of it.
    """

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)
        self.shape, self.dtype = codes.shape, dtype

    @classmethod
    def quantize(cls, weight: torch.Tensor, double_quant: bool) -> Int8Rows:
        """`double_quant` means nothing here: a row's one scale is no burden."""
        exact = weight.detach().float()
        scale = (exact.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return cls((exact / scale).round().clamp(-127, 127).to(torch.int8), scale, weight.dtype)

    @classmethod
    def restore(cls, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Int8Rows:
        return cls(tensors["rows.codes"], tensors["rows.scale"], dtype)

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Decoded rows (*ids.shape, columns); no other row is decoded."""
        return (self.codes[ids] * self.scale[ids]).to(self.dtype)

    def project(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """x (…, columns) times rows start…stop: (…, stop − start). A code is exact in bf16, so the scale comes last."""
        product, scale = x @ self.codes[start:stop].to(x.dtype).T, self.scale[start:stop, 0]
        # in place: CPUs scale 16 bits by way of float32, so by few enough tokens for copies no larger than the codes
        for tokens in product.view(-1, stop - start).split(max(1, x.shape[-1] // 4)):
            tokens.mul_(scale)
        return product


class Nf4Rows(nn.Module):
    """A matrix in bitsandbytes' NF4 format whose rows are whole blocks, so that any of them can be decoded alone."""

    def __init__(self, weight: bnb.nn.Params4bit, dtype: torch.dtype):
        super().__init__()
        self.weight = weight
        self.shape, self.dtype = weight.quant_state.shape, dtype

    @classmethod
    def quantize(cls, weight: torch.Tensor, double_quant: bool) -> Nf4Rows:
        return cls(quantize_nf4(weight, double_quant), weight.dtype)

    @classmethod
    def restore(cls, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Nf4Rows:
        return cls(restore_nf4(tensors, "rows.weight"), dtype)

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Decoded rows (*ids.shape, columns); no other row is decoded."""
        rows, columns = self.shape
        packed = self.weight.data.view(rows, columns // 2)[ids].reshape(-1, 1)
        state = bnb.functional.QuantState(
            absmax=self._block_scales(ids).flatten(),
            shape=torch.Size([*ids.shape, columns]),
            code=self.weight.quant_state.code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
        )
        return bnb.functional.dequantize_4bit(packed, state)

    def project(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """x (…, columns) times rows start…stop: (…, stop − start)."""
        return x @ self.gather(torch.arange(start, stop, device=x.device)).to(x.dtype).T

    def _block_scales(self, ids: torch.Tensor) -> torch.Tensor:
        """Largest magnitudes of the rows' blocks, (*ids.shape, blocks per row)."""
        state, blocks = self.weight.quant_state, self.shape[1] // NF4_BLOCK
        numbers = ids[..., None] * blocks + torch.arange(blocks, device=ids.device)
        if not state.nested:
            return state.absmax[numbers]
        outer = state.state2.absmax[numbers // NESTED_BLOCK]
        return state.state2.code[state.absmax[numbers].int()] * outer + state.offset

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in self.weight.quant_state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{key}"] = tensor


def factor_of(embedding: nn.Module) -> torch.Tensor | None:
    """What an embedding multiplies the rows it looks up with, as Gemma's do; a head tied to it does not."""
    factor = getattr(embedding, "embed_scale", None)
    return factor if torch.is_tensor(factor) else None


class QuantizedEmbedding(nn.Module):
    """Looks token ids up in a table stored by rows, and multiplies what it finds with a factor if there is one."""

    def __init__(self, rows: Int8Rows | Nf4Rows, factor: torch.Tensor | None = None):
        super().__init__()
        self.rows = rows
        self.register_buffer("embed_scale", factor, persistent=False)  # the config tells it, as transformers has it

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.rows.gather(ids)
        return found if self.embed_scale is None else found * self.embed_scale.to(found.dtype)


class QuantizedLinear(nn.Module):
    """x @ weightᵀ + bias with a weight stored by rows, of which it never decodes more than `DECODED_BYTES` at once."""

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


ROWS = {"int8": Int8Rows, "nf4": Nf4Rows}


def quantize_nf4(weight: torch.Tensor, double_quant: bool) -> bnb.nn.Params4bit:
    fresh = bnb.nn.Params4bit(
        weight.detach(), requires_grad=False, blocksize=NF4_BLOCK, compress_statistics=double_quant, quant_type="nf4"
    )
    quantised = fresh.to(weight.device)
    if double_quant:  # the library shares this table within a process; a copy each, as on disk, makes bytes add up
        quantised.quant_state.state2.code = quantised.quant_state.state2.code.clone()
    return quantised


def restore_nf4(tensors: dict[str, torch.Tensor], key: str) -> bnb.nn.Params4bit:
    state = {name.removeprefix(f"{key}."): t for name, t in tensors.items() if name.startswith(f"{key}.")}
    return bnb.nn.Params4bit.from_prequantized(tensors[key], state, device=tensors[key].device)


def dequantize_nf4(stored: bnb.nn.Params4bit) -> torch.Tensor:
    """The whole weight, in the dtype that it had."""
    return bnb.functional.dequantize_4bit(stored.data, stored.quant_state)


def fake_quantize(weight: torch.Tensor, scheme: Scheme, double_quant: bool) -> torch.Tensor:
    """The weight that a scheme keeps of this one, decoded: what the quantised module multiplies with."""
    match scheme:
        case "unquantized":
            return weight
        case "int8":
            rows = Int8Rows.quantize(weight, double_quant)
            return (rows.codes * rows.scale).to(rows.dtype)
        case "nf4":
            return dequantize_nf4(quantize_nf4(weight, double_quant))
