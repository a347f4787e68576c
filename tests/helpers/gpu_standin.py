# SPDX-License-Identifier: Apache-2.0
"""Stands in for the CUDA driver and the GPU library on machines without a GPU.

"Device memory" is host memory that is checked on each access; the expert block is computed with
the CPU's decoder and NumPy. Written from custom_ops/gpu/*/*.h and CUDA's driver API.
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

from paddle_ccq.codec import formats, row_order

OUT_OF_MEMORY = 2


class Driver:
    """Memory and the one thing that threads must do: make the context current."""

    CONTEXT = 77

    def __init__(self, capacity: int = 1 << 30) -> None:
        self.capacity, self.blocks, self.current = capacity, {}, None

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, number: Any, index: int) -> int:
        return 0 if index == 0 else 101

    def cuDevicePrimaryCtxRetain(self, context: Any, number: Any) -> int:
        context._obj.value = self.CONTEXT
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.current = context.value
        return 0

    def cuMemAlloc_v2(self, address: Any, size: int) -> int:
        assert self.current == self.CONTEXT
        if sum(len(b) for b in self.blocks.values()) + size > self.capacity:
            return OUT_OF_MEMORY
        block = ctypes.create_string_buffer(b"\xff" * size, size)
        address._obj.value = ctypes.addressof(block)
        self.blocks[address._obj.value] = block
        return 0

    def cuMemFree_v2(self, address: int) -> int:
        del self.blocks[address]
        return 0

    def cuMemcpyHtoD_v2(self, target: int, source: int, size: int) -> int:
        assert self.current == self.CONTEXT and size <= len(self.blocks[target])
        ctypes.memmove(target, source, size)
        return 0

    def cuMemcpyDtoH_v2(self, target: int, source: int, size: int) -> int:
        assert self.current == self.CONTEXT and size <= len(self.blocks[source])
        ctypes.memmove(target, source, size)
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"out of memory"
        return 0

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A view of a block's beginning, which must be large enough."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape))
        assert count * dtype.itemsize <= len(self.blocks[address])
        return np.frombuffer(self.blocks[address], dtype, count).reshape(shape)


class Library:
    """Repacking, ccq_moe_workspace and ccq_moe; "repacked" tensors are kept aside."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.repacked, self.calls = driver, {}, 0

    def ccq_error_text(self, code: int) -> bytes:
        return b"invalid argument"

    def ccq_repack_wint2(
        self, quant, scale, supers, dtype, code_scale, zero, experts, k, n,
        out_quant, out_scales, out_columns, kind, stream,
    ) -> int:  # fmt: skip
        at, bf16 = self.driver.array, ml_dtypes.bfloat16
        assert dtype == 0 and stream is None
        if k % 128 or n % 16:
            return 1
        tensors = {
            "quant_weight": at(quant, (experts, k // 4, n), np.uint8).copy(),
            "weight_scale": at(scale, (experts, k // 128, n), np.uint8).copy(),
            "super_scales": at(supers, (experts, n), bf16).copy(),
            "code_scale": at(code_scale, (experts, n), np.float32).copy(),
            "code_zp": at(zero, (experts, n), np.float32).copy(),
        }
        for address, size in ((out_quant, k // 4), (out_scales, k // 128), (out_columns, 12)):
            at(address, (experts, n, size), np.uint8)
        at(kind, (1,), np.int32)[:] = 1
        self.repacked[out_quant, out_scales, out_columns] = tensors
        return 0

    def ccq_trellis_units_bytes(self, experts: int, k: int, n: int) -> int:
        return experts * -(-n // 64) * (k // 128) * 2176

    def ccq_trellis_columns_bytes(self, experts: int, n: int) -> int:
        return experts * -(-n // 64) * 256

    def ccq_repack_trellis(
        self, quant, scale, supers, dtype, before, experts, k, n, units, columns, stream
    ) -> int:
        at, bf16 = self.driver.array, ml_dtypes.bfloat16
        assert (dtype, before, stream) == (0, None, None)
        if k % 128 or n % 16:
            return 1
        tensors = {
            "quant_weight": at(quant, (experts, k // 4, n), np.uint8).copy(),
            "weight_scale": at(scale, (experts, k // 128, n), np.uint8).copy(),
            "super_scales": at(supers, (experts, n), bf16).copy(),
        }
        at(units, (self.ccq_trellis_units_bytes(experts, k, n),), np.uint8)
        at(columns, (self.ccq_trellis_columns_bytes(experts, n),), np.uint8)
        self.repacked[units, None, columns] = tensors
        return 0

    def ccq_moe_workspace(self, tokens: int, top_k: int, shape: Any) -> int:
        return 64 * tokens * top_k

    def ccq_moe(
        self, x, ids, weights, tokens, top_k, shape, up_gate, down, out, workspace, stream
    ) -> int:
        self.calls += 1
        s, at = shape._obj, self.driver.array
        assert (s.dtype, stream) == (0, None)
        at(workspace, (64 * tokens * top_k,), np.uint8)
        x = at(x, (tokens, s.hidden), ml_dtypes.bfloat16).astype(np.float32)
        ids = at(ids, (tokens, top_k), np.int64)
        weights = at(weights, (tokens, top_k), np.float32)

        def matrix(side: Any, expert: int) -> np.ndarray:
            side = side._obj
            assert side.pairs in (1, 2)
            tensors = self.repacked[side.quant, side.scales, side.columns]
            one = {suffix: value[expert] for suffix, value in tensors.items()}
            weight = formats.decode("ccq-2t" if side.pairs == 2 else "wint2", one, "float32")
            return row_order.unpermute_rows(weight) if s.row_order == 1 else weight

        result = np.zeros((tokens, s.hidden), np.float32)
        for t in range(tokens):
            for j in range(top_k):
                gate, up = np.split(x[t] @ matrix(up_gate, ids[t, j]), 2)
                middle = gate / (1 + np.exp(-gate)) * up
                assert middle.shape == (s.width,) and 0 <= ids[t, j] < s.experts
                result[t] += weights[t, j] * (middle @ matrix(down, ids[t, j]))
        at(out, (tokens, s.hidden), ml_dtypes.bfloat16)[:] = result.astype(ml_dtypes.bfloat16)
        return 0
