"""Weight formats that shape7b.py compares: each turns a bf16 layer into a quantised one.

`FORMATS` maps a format's name to the constructor. `dequantised` gives the bf16 weight a quantised
layer stands for, from which the reference model of the correctness check is made.
"""

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from matvec import GROUP, int4_matvec, int8_matvec, pack_words, unpack_words
from torch import Tensor, nn

from medkit.quantization import rowwise

PART = 2**26  # weights handled at a time, to bound temporary memory
INNER_K_TILES = 8  # layout parameter of PyTorch's int4 kernel


def in_parts(width: int, *tensors: Tensor) -> zip:
    """Split tensors along their rows into parts that stand for at most PART weights; a row is `width` weights."""
    count = -(-tensors[0].shape[0] * width // PART)
    return zip(*(tensor.chunk(count) for tensor in tensors), strict=True)


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one fp32 scale per row: weight ~ levels * scale."""
    scale = weight.abs().amax(-1, keepdim=True).float() / 127
    levels = torch.empty_like(weight, dtype=torch.int8)
    for part, out, part_scale in in_parts(weight.shape[1], weight, levels, scale):
        out.copy_((part / part_scale).round())
    return levels, scale


def int4_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric int4 over groups of GROUP inputs: weight ~ (levels - 8) * scale + zero.

    Levels are int32 shaped like `weight`; scale and zero are bf16, (rows, groups).
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    levels = ((groups - zero.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
    return levels.flatten(-2).int(), scale, zero


def pack_nibbles(levels: Tensor) -> Tensor:
    """Two 4-bit levels per byte, the even column in the high half."""
    return (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8)


class Int8Embedding(nn.Module):
    """Embedding table in row-wise int8; a look-up dequantises only the rows it reads."""

    def __init__(self, source: nn.Embedding):
        super().__init__()
        levels, scale = int8_rows(source.weight.data)
        self.register_buffer("levels", levels)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.levels[ids].float() * self.scale[ids]).bfloat16()


class Int4Embedding(nn.Module):
    """Embedding table in group-wise int4, two levels per byte."""

    def __init__(self, source: nn.Embedding):
        super().__init__()
        parts = [int4_groups(part) for (part,) in in_parts(source.embedding_dim, source.weight.data)]
        self.register_buffer("packed", torch.cat([pack_nibbles(levels) for levels, _, _ in parts]))
        self.register_buffer("scale", torch.cat([scale for _, scale, _ in parts]))
        self.register_buffer("zero", torch.cat([zero for _, _, zero in parts]))

    def forward(self, ids: Tensor) -> Tensor:
        packed = self.packed[ids]
        levels = torch.stack([packed >> 4, packed & 15], -1).flatten(-2).unflatten(-1, (-1, GROUP))
        scale, zero = self.scale[ids][..., None].float(), self.zero[ids][..., None].float()
        return ((levels.float() - 8) * scale + zero).flatten(-2).bfloat16()


class Int8Head(nn.Module):
    """Output projection in row-wise int8, weights only; activations stay bf16."""

    def __init__(self, source: nn.Linear):
        super().__init__()
        levels, scale = int8_rows(source.weight.data)
        self.register_buffer("levels", levels)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            return int8_matvec(x.reshape(-1), self.levels, self.scale).view(*x.shape[:-1], -1)
        parts = in_parts(x.shape[-1], self.levels, self.scale)
        return torch.cat([F.linear(x, (levels.float() * scale).to(x.dtype)) for levels, scale in parts], -1)


@torch.compile(dynamic=False)
def int4_dequantise(words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    levels = (unpack_words(words).flatten(-2) - 8).float()
    return (levels * scale.float()[..., None] + zero.float()[..., None]).bfloat16().flatten(-2)


class Int4MatvecLinear(nn.Module):
    """Group-wise int4 linear: one fused kernel for a single row, dequantised to bf16 by parts for more."""

    def __init__(self, source: nn.Linear):
        super().__init__()
        levels, scale, zero = int4_groups(source.weight.data)
        self.register_buffer("words", pack_words(levels))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            y = int4_matvec(x.reshape(-1), self.words, self.scale, self.zero).view(*x.shape[:-1], -1)
        else:
            parts = in_parts(x.shape[-1], self.words, self.scale, self.zero)
            y = torch.cat([F.linear(x, int4_dequantise(*part)) for part in parts], -1)
        return y if self.bias is None else y + self.bias


class Int4Linear(nn.Module):
    """Group-wise int4 linear on PyTorch's own tensor-core int4 kernel (CUDA only)."""

    def __init__(self, source: nn.Linear):
        super().__init__()
        levels, scale, zero = int4_groups(source.weight.data)
        packed = torch.ops.aten._convert_weight_to_int4pack(pack_nibbles(levels), INNER_K_TILES)
        self.register_buffer("packed", packed)
        self.register_buffer("scale_zero", torch.stack([scale, zero], -1).transpose(0, 1).contiguous())
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm(flat, self.packed, GROUP, self.scale_zero)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def nf4_linear(source: nn.Linear) -> bnb.nn.Linear4bit:
    """bitsandbytes NF4 with double quantisation and bf16 arithmetic."""
    options = dict(compress_statistics=True, quant_type="nf4")
    layer = bnb.nn.Linear4bit(
        source.in_features, source.out_features, source.bias is not None,
        compute_dtype=torch.bfloat16, device="meta", **options,
    )  # fmt: skip
    weight = source.weight.data
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **options).to(weight.device)
    layer.bias = source.bias
    return layer


def llm_int8_linear(source: nn.Linear) -> bnb.nn.Linear8bitLt:
    """bitsandbytes LLM.int8(): int8 weights and activations, outlier columns (|x| > 6) in 16 bits."""
    layer = bnb.nn.Linear8bitLt(
        source.in_features, source.out_features, source.bias is not None,
        has_fp16_weights=False, threshold=6.0, device="meta",
    )  # fmt: skip
    weight = source.weight.data
    layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    layer.bias = source.bias
    return layer


def nf4_rows(weight: torch.Tensor) -> rowwise.Nf4Rows:
    return rowwise.Nf4Rows(rowwise.quantize_nf4(weight, double_quant=True), weight.dtype)


def nf4_rows_embedding(source: nn.Embedding) -> rowwise.QuantizedEmbedding:
    """The package's own: rows of bitsandbytes' NF4, of which a look-up decodes those it reads."""
    return rowwise.QuantizedEmbedding(nf4_rows(source.weight.data))


def nf4_rows_head(source: nn.Linear) -> rowwise.QuantizedLinear:
    """The package's own: the same storage as an output projection, decoded a few megabytes at a time."""
    return rowwise.QuantizedLinear(nf4_rows(source.weight.data), source.bias)


FORMATS = {
    "nf4": nf4_linear,
    "nf4_rows_embedding": nf4_rows_embedding,
    "nf4_rows_head": nf4_rows_head,
    "llm_int8": llm_int8_linear,
    "int4": Int4Linear,
    "int4_matvec": Int4MatvecLinear,
    "int8_embedding": Int8Embedding,
    "int4_embedding": Int4Embedding,
    "int8_head": Int8Head,
}


def dequantised(layer: nn.Module, original: Tensor) -> Tensor:
    """The weight `layer` stands for, in fp32. `original` serves only where the stored layout is opaque."""
    match layer:
        case bnb.nn.Linear4bit():
            return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        case bnb.nn.Linear8bitLt():
            scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
            return layer.weight.data.float() * scale[:, None] / 127
        case Int4Linear() | Int4MatvecLinear() | Int4Embedding():
            levels, scale, zero = int4_groups(original)
            groups = (levels - 8).float().unflatten(-1, (-1, GROUP))
            return (groups * scale[..., None] + zero[..., None]).flatten(-2)
        case rowwise.QuantizedEmbedding() | rowwise.QuantizedLinear():
            return rowwise.dequantize_nf4(layer.rows.weight).float()
        case Int8Embedding() | Int8Head():
            return layer.levels.float() * layer.scale
    return layer.weight.data.float()
