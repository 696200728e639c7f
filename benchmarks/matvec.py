"""Triton kernels for the product of a quantised matrix with one bf16 vector: decoding at batch 1.

That product is bound by the bytes of the matrix, so each kernel reads them once, in 16-byte loads,
and dequantises in registers. K is the input width, N the output width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 128  # int4 levels that share one scale
WORDS = GROUP // 8  # int32 words per group; word j holds the levels of inputs j, j + 16, ... j + 112
FLOAT_2_23: tl.constexpr = tl.constexpr(0x4B000000)  # the bits of 2.0**23: or-ing in an integer below 2**23 adds it


@triton.jit
def _int8(x, levels, scale, y, N, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = (row < N)[:, None] & (column < K)[None, :]
        level = tl.load(levels + row[:, None] * K + column[None, :], mask=mask, other=0)
        total += level.to(tl.float32) * tl.load(x + column, mask=column < K, other=0).to(tl.float32)[None, :]
    result = tl.sum(total, 1) * tl.load(scale + row, mask=row < N, other=0)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=row < N)


@triton.jit
def _int4(
    x, words, scale, zero, y, N,
    groups: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WORDS)
    total = tl.zeros((ROWS, GROUPS), tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        inside = group < groups
        mask = (row < N)[:, None] & inside[None, :]
        at = row[:, None] * groups + group[None, :]
        word = tl.load(words + at[:, :, None] * WORDS + j[None, None, :], mask=mask[:, :, None], other=0)
        product = tl.zeros((ROWS, GROUPS, WORDS), tl.float32)
        x_sum = tl.zeros((GROUPS, WORDS), tl.float32)
        for i in tl.static_range(8):
            offset = group[:, None] * (8 * WORDS) + i * WORDS + j[None, :]
            x_i = tl.load(x + offset, mask=inside[:, None], other=0).to(tl.float32)
            bit = 4 * i if i < 5 else 4 * i - 20  # a level must lie below bit 23
            shifted = word if i < 5 else word >> 20
            level = ((shifted & (15 << bit)) | FLOAT_2_23).to(tl.float32, bitcast=True) - 8388608.0
            product += level * (x_i * (1.0 / (1 << bit)))[None, :, :]
            x_sum += x_i
        s = tl.load(scale + at, mask=mask, other=0).to(tl.float32)
        z = tl.load(zero + at, mask=mask, other=0).to(tl.float32) - 8 * s
        total += tl.sum(product, 2) * s + tl.sum(x_sum, 1)[None, :] * z
    tl.store(y + row, tl.sum(total, 1).to(y.dtype.element_ty), mask=row < N)


def int8_matvec(x: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """y[n] = scale[n] * sum_k levels[n, k] * x[k]."""
    rows, columns = levels.shape
    y = torch.empty(rows, dtype=x.dtype, device=x.device)
    _int8[(triton.cdiv(rows, 8),)](x, levels, scale, y, rows, K=columns, ROWS=8, COLUMNS=512, num_warps=8)
    return y


def int4_matvec(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """y[n] = sum_k ((level[n, k] - 8) * scale[n, k // GROUP] + zero[n, k // GROUP]) * x[k].

    words: int32 (N, groups, WORDS); scale and zero: bf16 (N, groups).
    """
    rows, groups, _ = words.shape
    y = torch.empty(rows, dtype=x.dtype, device=x.device)
    _int4[(triton.cdiv(rows, 4),)](
        x, words, scale, zero, y, rows, groups=groups, WORDS=WORDS, ROWS=4, GROUPS=32, num_warps=4
    )  # fmt: skip
    return y


def pack_words(levels: Tensor) -> Tensor:
    """Levels 0..15, (N, K) int32, to (N, groups, WORDS) int32."""
    lanes = levels.unflatten(-1, (-1, 8, WORDS)).long()
    words = (lanes << (4 * torch.arange(8, device=levels.device))[:, None]).sum(-2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack_words(words: Tensor) -> Tensor:
    """The inverse of `pack_words`: (N, groups, 8, WORDS) int32 levels."""
    return words[:, :, None, :] >> (4 * torch.arange(8, device=words.device))[:, None] & 15
