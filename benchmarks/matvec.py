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


INT4_CONFIGS = [
    triton.Config(dict(ROWS=rows, GROUPS=32, PROGRAMS=programs), num_warps=warps)
    for rows, warps, programs in [(1, 1, 2112), (1, 1, 3696), (1, 2, 2112), (4, 4, 528)]
]


@triton.autotune(INT4_CONFIGS, key=["N", "K_GROUPS"])
@triton.jit
def _int4(
    x, words, scale, zero, y, N,
    K_GROUPS: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th tile of ROWS rows and loads one step ahead of the arithmetic."""
    stride = tl.num_programs(0) * ROWS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group, j = tl.arange(0, GROUPS), tl.arange(0, WORDS)
    inside = group < K_GROUPS
    at = (row[:, None] * K_GROUPS + group[None, :])[:, :, None] * WORDS + j[None, None, :]
    word = tl.load(words + at, mask=((row < N)[:, None] & inside[None, :])[:, :, None], other=0)
    for _ in range(tl.program_id(0) * ROWS, N, stride):
        total = tl.zeros((ROWS, GROUPS), tl.float32)
        for start in tl.static_range(0, K_GROUPS, GROUPS):
            last = start + GROUPS >= K_GROUPS
            next_row = row + stride if last else row
            next_group = group if last else start + GROUPS + group
            at = (next_row[:, None] * K_GROUPS + next_group[None, :])[:, :, None] * WORDS + j[None, None, :]
            next_mask = (next_row < N)[:, None] & (next_group < K_GROUPS)[None, :]
            next_word = tl.load(words + at, mask=next_mask[:, :, None], other=0)

            now = start + group
            mask = (row < N)[:, None] & (now < K_GROUPS)[None, :]
            product = tl.zeros((ROWS, GROUPS, WORDS), tl.float32)
            x_sum = tl.zeros((GROUPS, WORDS), tl.float32)
            for i in tl.static_range(8):
                bit = 4 * i if i < 5 else 4 * i - 20  # a level must lie below bit 23
                offset = now[:, None] * (8 * WORDS) + i * WORDS + j[None, :]
                x_i = tl.load(x + offset, mask=(now < K_GROUPS)[:, None], other=0)  # x / 2**bit
                shifted = word if i < 5 else word >> 20
                level = ((shifted & (15 << bit)) | FLOAT_2_23).to(tl.float32, bitcast=True) - 8388608.0
                product += level * x_i[None, :, :]
                x_sum += x_i * (1 << bit)
            s = tl.load(scale + row[:, None] * K_GROUPS + now[None, :], mask=mask, other=0).to(tl.float32)
            z = tl.load(zero + row[:, None] * K_GROUPS + now[None, :], mask=mask, other=0).to(tl.float32) - 8 * s
            total += tl.sum(product, 2) * s + tl.sum(x_sum, 1)[None, :] * z
            word = next_word
        tl.store(y + row, tl.sum(total, 1).to(y.dtype.element_ty), mask=row < N)
        row += stride


@torch.library.custom_op("shape7b::int8_matvec", mutates_args=())
def int8_matvec(x: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """y[n] = scale[n] * sum_k levels[n, k] * x[k]."""
    rows, columns = levels.shape
    y = torch.empty(rows, dtype=x.dtype, device=x.device)
    _int8[(triton.cdiv(rows, 8),)](x, levels, scale, y, rows, K=columns, ROWS=8, COLUMNS=512, num_warps=8)
    return y


@int8_matvec.register_fake
def _(x: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(levels.shape[0])


@torch.library.custom_op("shape7b::int4_matvec", mutates_args=())
def _int4_matvec(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    rows, groups, _ = words.shape
    y = torch.empty(rows, dtype=scale.dtype, device=x.device)
    _int4[lambda tile: (min(triton.cdiv(rows, tile["ROWS"]), tile["PROGRAMS"]),)](
        x, words, scale, zero, y, rows, K_GROUPS=groups, WORDS=WORDS
    )
    return y


@_int4_matvec.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return scale.new_empty(words.shape[0])


def int4_matvec(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """y[n] = sum_k ((level[n, k] - 8) * scale[n, k // GROUP] + zero[n, k // GROUP]) * x[k].

    words: int32 (N, groups, WORDS); scale and zero: bf16 (N, groups). Inputs are divided here, where a
    compiler can fuse it with their producer, by the place value their level has in its word.
    """
    i = torch.arange(8, device=x.device)
    place = torch.exp2(-torch.where(i < 5, 4 * i, 4 * i - 20).float())
    return _int4_matvec(x.float().view(-1, 8, WORDS) * place[:, None], words, scale, zero)


def pack_words(levels: Tensor) -> Tensor:
    """Levels 0..15, (N, K) int32, to (N, groups, WORDS) int32."""
    lanes = levels.unflatten(-1, (-1, 8, WORDS)).long()
    words = (lanes << (4 * torch.arange(8, device=levels.device))[:, None]).sum(-2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack_words(words: Tensor) -> Tensor:
    """The inverse of `pack_words`: (N, groups, 8, WORDS) int32 levels."""
    return words[:, :, None, :] >> (4 * torch.arange(8, device=words.device))[:, None] & 15
