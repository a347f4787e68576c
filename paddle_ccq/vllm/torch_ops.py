# SPDX-License-Identifier: Apache-2.0
"""The GPU library's products as torch operators: seen by torch.compile, captured in CUDA graphs.

Each runs on the current stream, takes its memory from torch, and neither synchronizes nor keeps
state of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ..ops import gpu_abi, gpu_library
from .memory import DECODED_BYTES, MOE_TOKENS, W4_DECODED_TOKENS

# Up to this many rows weights are multiplied as stored; above, they are decoded and cuBLAS runs.
LINEAR_ROWS = 128
# Up to this many tokens of a step the product for few rows runs 4-bit experts; from
# W4_DECODED_TOKENS on they are decoded one by one and cuBLAS runs; between them, vLLM's own.
W4_TOKENS = 128


@cache
def library() -> Any:
    """The GPU library with its types declared.

    Raises:
        CcqError: where there is none, or one of another version.
    """
    return gpu_library.load_products()


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _check(status: int, what: str) -> None:
    gpu_library.check(library(), status, what)


def _bytes(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def repack_wint2(
    tensors: dict[str, torch.Tensor], quant: torch.Tensor, scales: torch.Tensor, kind: torch.Tensor
) -> torch.Tensor:
    """One expert's stored tensors [K/4, N] etc. into its places in the kernel's layout.

    Args:
        quant, scales: its parts of the layer's tensors, uint8, contiguous.
        kind: int32 [1]; receives what its (code_scale, code_zp) pairs are.

    Returns:
        int32 [2, 2 * N]: the two planes of its columns.
    """
    rows, n = tensors["quant_weight"].shape
    columns = torch.empty((2, 2 * n), dtype=torch.int32, device=quant.device)
    status = library().ccq_repack_wint2(
        tensors["quant_weight"].data_ptr(), tensors["weight_scale"].data_ptr(),
        tensors["super_scales"].data_ptr(), gpu_abi.BFLOAT16,
        tensors["code_scale"].data_ptr(), tensors["code_zp"].data_ptr(),
        1, rows * 4, n,
        quant.data_ptr(), scales.data_ptr(), columns.data_ptr(), kind.data_ptr(), _stream(),
    )  # fmt: skip
    _check(status, "repacking")
    return columns


def repack_trellis(
    tensors: dict[str, torch.Tensor], units: torch.Tensor, columns: torch.Tensor
) -> None:
    """One CCQ-2T expert's stored tensors into its places in the kernel's layout.

    Args:
        tensors: as stored, and `before` uint8 [N]: the code bytes before the first ones.
        units, columns: its parts of the layer's tensors, uint8 and float32, contiguous.
    """
    rows, n = tensors["quant_weight"].shape
    status = library().ccq_repack_trellis(
        tensors["quant_weight"].data_ptr(), tensors["weight_scale"].data_ptr(),
        tensors["super_scales"].data_ptr(), gpu_abi.BFLOAT16, tensors["before"].data_ptr(),
        1, rows * 4, n, units.data_ptr(), columns.data_ptr(), _stream(),
    )  # fmt: skip
    _check(status, "repacking")


def _projection(tensors: list[torch.Tensor], pairs: int) -> gpu_abi.Projection:
    """Of quant, scales, columns; CCQ-2T's units and columns are without scales."""
    first, *scales, columns = (t.data_ptr() for t in tensors)
    return gpu_abi.Projection(first, scales[0] if scales else None, columns, pairs)


def _experts_packed(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    up_gate: list[torch.Tensor],
    down: list[torch.Tensor],
    width: int,
    pairs: list[int],
    row_order: int,
) -> torch.Tensor:
    lib, (tokens, hidden), top_k = library(), x.shape, ids.shape[1]
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    out = torch.empty_like(x)
    shape = gpu_abi.Shape(hidden, width, up_gate[0].shape[0], gpu_abi.BFLOAT16, row_order)
    first, second = _projection(up_gate, pairs[0]), _projection(down, pairs[1])
    size = lib.ccq_moe_workspace(min(tokens, MOE_TOKENS), top_k, ctypes.byref(shape))
    workspace = _bytes(size, x.device)
    for begin in range(0, tokens, MOE_TOKENS):
        part = slice(begin, begin + MOE_TOKENS)
        rows = x[part]
        status = lib.ccq_moe(
            rows.data_ptr(), ids[part].data_ptr(), weights[part].data_ptr(), len(rows), top_k,
            ctypes.byref(shape), ctypes.byref(first), ctypes.byref(second),
            out[part].data_ptr(), workspace.data_ptr(), _stream(),
        )  # fmt: skip
        _check(status, "the experts")
    return out


def _spare(
    x: torch.Tensor, offsets: torch.Tensor, matrix: list[torch.Tensor], format: int
) -> torch.Tensor:
    words, supers = matrix
    experts, n = supers.shape
    out = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
    arguments = gpu_abi.SpareArgs(
        x.data_ptr(), offsets.data_ptr(), words.data_ptr(), supers.data_ptr(), None, out.data_ptr(),
        len(x), x.shape[1], n, experts, format, gpu_abi.BFLOAT16, gpu_abi.ROWS_PLAIN,
    )  # fmt: skip
    _check(library().ccq_spare_gemm(ctypes.byref(arguments), _stream()), "the experts")
    return out


def _sorted_by_expert(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: int, part: slice
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor, torch.Tensor], None]]:
    """A part's rows sorted by expert, where each expert's end, and what adds up their results.

    Rows of choices that belong to no expert here are never written and never read.
    """
    lib, hidden, rows, choices = library(), x.shape[1], x[part], ids[part]
    offsets = torch.empty(experts, dtype=torch.int64, device=x.device)
    place = torch.empty(choices.numel(), dtype=torch.int32, device=x.device)
    sorted_rows = torch.empty((choices.numel(), hidden), dtype=x.dtype, device=x.device)
    status = lib.ccq_moe_dispatch(
        choices.data_ptr(), rows.data_ptr(), len(rows), ids.shape[1], experts, hidden,
        offsets.data_ptr(), place.data_ptr(), sorted_rows.data_ptr(), _stream(),
    )  # fmt: skip
    _check(status, "dispatch")

    def combine(result: torch.Tensor, out: torch.Tensor) -> None:
        status = lib.ccq_moe_combine(
            result.data_ptr(), place.data_ptr(), weights[part].data_ptr(), len(rows), ids.shape[1],
            hidden, gpu_abi.BFLOAT16, out.data_ptr(), _stream(),
        )  # fmt: skip
        _check(status, "combine")

    return sorted_rows, offsets, combine


def _swiglu(both: torch.Tensor) -> torch.Tensor:
    count, width = len(both), both.shape[1] // 2
    middle = torch.empty((count, width), dtype=both.dtype, device=both.device)
    status = library().ccq_swiglu(
        both.data_ptr(), middle.data_ptr(), count, width, gpu_abi.BFLOAT16, _stream()
    )
    _check(status, "SwiGLU")
    return middle


def _experts_spare(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    up_gate: list[torch.Tensor],
    down: list[torch.Tensor],
    format: int,
) -> torch.Tensor:
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    out, experts = torch.empty_like(x), up_gate[1].shape[0]
    for begin in range(0, len(x), MOE_TOKENS):
        part = slice(begin, begin + MOE_TOKENS)
        rows, offsets, combine = _sorted_by_expert(x, weights, ids, experts, part)
        middle = _swiglu(_spare(rows, offsets, up_gate, format))
        combine(_spare(middle, offsets, down, format), out[part])
    return out


def _w4(
    x: torch.Tensor, offsets: torch.Tensor, matrix: list[torch.Tensor], tokens: int
) -> torch.Tensor:
    weight, scale = matrix
    experts, n, groups = scale.shape
    out = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
    arguments = gpu_abi.W4Args(
        x.data_ptr(), offsets.data_ptr(), weight.data_ptr(), scale.data_ptr(), out.data_ptr(),
        len(x), x.shape[1], n, experts, groups, tokens,
    )  # fmt: skip
    _check(library().ccq_w4_gemm(ctypes.byref(arguments), _stream()), "the experts")
    return out


def serves_w4(tokens: int) -> bool:
    """Whether experts_w4 is for so many tokens; decoding takes counts of rows from the card."""
    if tokens <= W4_TOKENS:
        return True
    return tokens >= W4_DECODED_TOKENS and not torch.cuda.is_current_stream_capturing()


def _w4_decoded(x: torch.Tensor, ends: list[int], matrix: list[torch.Tensor]) -> torch.Tensor:
    """Rows of expert after expert by cuBLAS, on one expert's decoded weights at a time."""
    weight, scale = matrix
    n, k, begin = scale.shape[1], x.shape[1], 0
    out = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
    decoded = torch.empty((n, k), dtype=x.dtype, device=x.device)
    for expert, end in enumerate(ends):
        if end > begin:
            status = library().ccq_dequant_w4(
                weight[expert].data_ptr(), scale[expert].data_ptr(), scale.shape[2], k, n,
                decoded.data_ptr(), _stream(),
            )  # fmt: skip
            _check(status, "decoding an expert")
            torch.mm(x[begin:end], decoded.t(), out=out[begin:end])
        begin = end
    return out


def _experts_w4(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    up_gate: list[torch.Tensor],
    down: list[torch.Tensor],
) -> torch.Tensor:
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    out, experts = torch.empty_like(x), up_gate[0].shape[0]
    for begin in range(0, len(x), MOE_TOKENS):
        part = slice(begin, begin + MOE_TOKENS)
        rows, offsets, combine = _sorted_by_expert(x, weights, ids, experts, part)
        if len(x) <= W4_TOKENS:
            middle = _swiglu(_w4(rows, offsets, up_gate, len(x)))
            combine(_w4(middle, offsets, down, len(x)), out)
            continue
        ends = offsets.tolist()
        middle = _swiglu(_w4_decoded(rows, ends, up_gate))
        combine(_w4_decoded(middle, ends, down), out[part])
    return out


def _linear_w8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, counters: torch.Tensor
) -> torch.Tensor:
    lib, k, n = library(), x.shape[-1], scale.shape[0]
    rows = x.reshape(-1, k).contiguous()
    out = torch.empty((len(rows), n), dtype=x.dtype, device=x.device)
    if len(rows) > LINEAR_ROWS:
        _decoded(rows, weight, scale, out)
        return out.view(*x.shape[:-1], n)
    most = gpu_abi.LINEAR_W8_MAX_ROWS
    size = lib.ccq_linear_w8_workspace(min(len(rows), most), k, n)
    workspace = _bytes(size, x.device)
    for begin in range(0, len(rows), most):
        part = rows[begin : begin + most]
        arguments = gpu_abi.LinearW8Args(
            part.data_ptr(), weight.data_ptr(), scale.data_ptr(), out[begin:].data_ptr(),
            workspace.data_ptr(), counters.data_ptr(), len(part), k, n,
        )  # fmt: skip
        _check(lib.ccq_linear_w8(ctypes.byref(arguments), _stream()), "a linear layer")
    return out.view(*x.shape[:-1], n)


def _decoded(
    rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor
) -> None:
    k, n = rows.shape[1], scale.shape[0]
    step = min(n, max(16, DECODED_BYTES // (2 * k) // 256 * 256))
    decoded = torch.empty((step, k), dtype=rows.dtype, device=rows.device)
    for first in range(0, n, step):
        count = min(step, n - first)
        status = library().ccq_dequant_w8(
            weight.data_ptr(), scale.data_ptr(), k, first, count, decoded.data_ptr(), _stream()
        )
        _check(status, "decoding a linear layer")
        torch.mm(rows, decoded[:count].t(), out=out[:, first : first + count])


def _router(x: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x, (experts, k) = x.contiguous(), weight.shape
    if len(x) > gpu_abi.ROUTER_MAX_ROWS:
        # Exact products of bfloat16 numbers, added up in float32 by the tensor cores.
        sums = torch.mm(x, parts.view(-1, k).t(), out_dtype=torch.float32)
        return sums.view(len(x), -1, experts).sum(dim=1)
    out = torch.empty((len(x), experts), dtype=torch.float32, device=x.device)
    arguments = gpu_abi.RouterArgs(
        x.data_ptr(), parts.data_ptr(), out.data_ptr(), len(x), k, experts
    )
    _check(library().ccq_router(ctypes.byref(arguments), _stream()), "a router")
    return out


def counters_of(n: int) -> int:
    """Counters that a layer of n columns must own."""
    return library().ccq_linear_w8_counters(n)


def _like_x(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _scores(x: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


def _columns_of_scale(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *_: Any) -> Any:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


_LIBRARY = torch.library.Library("paddle_ccq", "DEF")
_MOE = "Tensor x, Tensor weights, Tensor ids, Tensor[] up_gate, Tensor[] down"
for _name, _schema, _function, _fake in (
    (
        "experts_packed",
        f"({_MOE}, int width, int[] pairs, int row_order) -> Tensor",
        _experts_packed,
        _like_x,
    ),
    ("experts_spare", f"({_MOE}, int format) -> Tensor", _experts_spare, _like_x),
    ("experts_w4", f"({_MOE}) -> Tensor", _experts_w4, _like_x),
    # The counters are zero again at its end: for everybody else nothing changes.
    (
        "linear_w8",
        "(Tensor x, Tensor weight, Tensor scale, Tensor counters) -> Tensor",
        _linear_w8,
        _columns_of_scale,
    ),
    ("router", "(Tensor x, Tensor parts, Tensor weight) -> Tensor", _router, _scores),
):
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _function, "CUDA")
    _LIBRARY._register_fake(_name, _fake)

experts_packed = torch.ops.paddle_ccq.experts_packed
experts_spare = torch.ops.paddle_ccq.experts_spare
experts_w4 = torch.ops.paddle_ccq.experts_w4
linear_w8 = torch.ops.paddle_ccq.linear_w8
router = torch.ops.paddle_ccq.router
