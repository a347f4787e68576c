# SPDX-License-Identifier: Apache-2.0
"""Plain tile-loop grouped GEMMs in Triton for WINT2, W4A16 and W8A16: peers of the CUDA kernel.

One program multiplies up to BLOCK_M rows of one expert by BLOCK_N columns and walks through K. Rows
are sorted by expert; `blocks` lists (expert, first row, end) of every row block, made on the host
once a routing. States are whole numbers that bfloat16 holds exactly; scales go onto float32 sums.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _tile(blocks, n_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Expert, rows, columns and their masks of this program."""
    block = tl.program_id(1)
    expert = tl.load(blocks + 3 * block).to(tl.int64)
    rows = tl.load(blocks + 3 * block + 1) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(blocks + 3 * block + 2)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    return expert, rows.to(tl.int64), live, columns, columns < n_size


@triton.jit
def _store(out, rows, live, columns, inside, n_size, value):
    at = rows[:, None] * n_size + columns[None, :]
    tl.store(out + at, value.to(tl.bfloat16), mask=live[:, None] & inside[None, :])


@triton.jit
def wint2_kernel(
    x, quant, scales, supers, code_scale, code_zp, out, blocks, k_size, n_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Checkpoint layout: quant u8 [E, K/4, N], scales u8 [E, K/128, N], the rest [E, N]."""
    expert, rows, live, columns, inside = _tile(blocks, n_size, BLOCK_M, BLOCK_N)
    column = expert * n_size + columns
    alpha = tl.load(code_scale + column, mask=inside, other=0.0)[None, :]
    beta = tl.load(code_zp + column, mask=inside, other=0.0)[None, :] + 0.5
    unit = tl.arange(0, 16)
    q_row = quant + expert * (k_size // 4) * n_size + unit[:, None] * n_size + columns[None, :]
    s_row = scales + expert * (k_size // 128) * n_size + columns
    x_row = x + rows[:, None] * k_size + 4 * unit[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(0, k_size // 64):
        q = tl.load(q_row + group * 16 * n_size, mask=inside[None, :], other=0)
        code = tl.floor(q.to(tl.float32) * alpha + beta).to(tl.int32)
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for j in tl.static_range(4):  # the four states of a code multiply neighbouring rows
            state = (((code >> (9 - 3 * j)) & 63) - 32).to(tl.bfloat16)
            a = tl.load(x_row + group * 64 + j, mask=live[:, None], other=0.0)
            part = tl.dot(a, state, part)
        both = tl.load(s_row + (group // 2) * n_size, mask=inside, other=0).to(tl.int32)
        nibble = (both >> (4 - 4 * (group % 2))) & 15
        acc += part * nibble.to(tl.float32)[None, :]
    acc *= tl.load(supers + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    _store(out, rows, live, columns, inside, n_size, acc)


@triton.jit
def w4_kernel(
    x, quant, scales, out, blocks, k_size, n_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """quant u8 [E, K/2, N], the even row in the low nibble, minus 8; scales bf16 [E, K/128, N]."""
    expert, rows, live, columns, inside = _tile(blocks, n_size, BLOCK_M, BLOCK_N)
    unit = tl.arange(0, 64)
    q_row = quant + expert * (k_size // 2) * n_size + unit[:, None] * n_size + columns[None, :]
    s_row = scales + expert * (k_size // 128) * n_size + columns
    x_row = x + rows[:, None] * k_size + 2 * unit[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(0, k_size // 128):
        q = tl.load(q_row + group * 64 * n_size, mask=inside[None, :], other=0).to(tl.int32)
        even = tl.load(x_row + group * 128, mask=live[:, None], other=0.0)
        odd = tl.load(x_row + group * 128 + 1, mask=live[:, None], other=0.0)
        part = tl.dot(even, ((q & 15) - 8).to(tl.bfloat16))
        part = tl.dot(odd, ((q >> 4) - 8).to(tl.bfloat16), part)
        scale = tl.load(s_row + group * n_size, mask=inside, other=0.0)
        acc += part * scale.to(tl.float32)[None, :]
    _store(out, rows, live, columns, inside, n_size, acc)


@triton.jit
def w8_kernel(
    x, quant, scales, out, blocks, k_size, n_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """quant i8 [E, K, N]; scales bf16 [E, N]."""
    expert, rows, live, columns, inside = _tile(blocks, n_size, BLOCK_M, BLOCK_N)
    unit = tl.arange(0, 64)
    q_row = quant + expert * k_size * n_size + unit[:, None] * n_size + columns[None, :]
    x_row = x + rows[:, None] * k_size + unit[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, k_size // 64):
        q = tl.load(q_row + step * 64 * n_size, mask=inside[None, :], other=0)
        a = tl.load(x_row + step * 64, mask=live[:, None], other=0.0)
        acc = tl.dot(a, q.to(tl.bfloat16), acc)
    column = expert * n_size + columns
    acc *= tl.load(scales + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    _store(out, rows, live, columns, inside, n_size, acc)


KERNELS = {"triton-wint2": wint2_kernel, "triton-w4": w4_kernel, "triton-w8": w8_kernel}
# (BLOCK_N, warps): every case is timed with each and keeps the faster one.
CONFIGURATIONS = ((64, 4), (128, 8))


def row_block(rows: int, experts: int) -> int:
    """Rows a program takes, by the mean number of an expert."""
    return 16 if rows <= 16 * experts else 64


def row_blocks(torch: Any, offsets: Any, size: int) -> Any:
    """int32 [blocks, 3]: expert, first row, end of its rows."""
    found, begin = [], 0
    for expert, end in enumerate(offsets.tolist()):
        found += [(expert, first, end) for first in range(begin, end, size)]
        begin = end
    return torch.tensor(found, dtype=torch.int32, device=offsets.device)


def run(who: str, x: Any, weights: tuple, out: Any, blocks: Any, block_m: int, block_n: int,
        warps: int) -> None:  # fmt: skip
    """out[r] = x[r] W[expert(r)] for the rows that `blocks` lists."""
    k, n = x.shape[1], out.shape[1]
    grid = (triton.cdiv(n, block_n), len(blocks))
    KERNELS[who][grid](
        x, *weights, out, blocks, k, n, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps
    )


def random_weights(torch: Any, who: str, experts: int, k: int, n: int, device: str) -> tuple:
    """Random words and scales in the kernel's layout (for WINT2: ccqlib.random_weights)."""
    if who == "triton-w4":
        words = torch.randint(0, 256, (experts, k // 2, n), dtype=torch.uint8, device=device)
        scales = torch.rand(experts, k // 128, n, device=device) / 64 + 1 / 64
    else:
        words = torch.randint(-128, 128, (experts, k, n), dtype=torch.int8, device=device)
        scales = torch.rand(experts, n, device=device) / 1024 + 1 / 1024
    return words, scales.bfloat16()


def decode(torch: Any, who: str, weights: tuple, expert: int) -> Any:
    """float64 [K, N] of one expert of random_weights."""
    words, scales = weights[0][expert], weights[1][expert].double()
    if who == "triton-w8":
        return words.double() * scales
    pairs = torch.stack([words & 15, words >> 4], 1).reshape(-1, words.shape[1])
    return (pairs.double() - 8) * scales.repeat_interleave(128, 0)
