# SPDX-License-Identifier: Apache-2.0
"""The experts of one layer on the GPU, over NumPy activations in host memory.

Activations cross to the device and back in each call, as bfloat16: some kilobytes a token. Unlike
the CPU's product the GPU's rounds its middle and each expert's output to bfloat16, 5e-3 of the
output's norm in all, and may add in another order for another number of tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..codec.floats import BFLOAT16
from ..codec.row_order import FASTDEPLOY_2_1
from . import checks, gpu_abi, gpu_library
from .gpu_memory import Device, Memory

ROW_MULTIPLE = 128  # of hidden size and expert width
TRELLIS = "ccq-2t"
# Formats whose experts run here.
FORMATS = ("wint2", TRELLIS)


class _Side:
    """One projection of all experts in the kernels' layout."""

    def __init__(
        self, library: Any, device: Device, format: str, experts: Sequence[Mapping[str, np.ndarray]]
    ) -> None:
        found = [checks.stored(format, tensors) for tensors in experts]
        self.count, (self.k, self.n) = len(found), found[0][1:]
        if any((k, n) != (self.k, self.n) for _, k, n in found):
            raise ValueError("experts of one layer must all have one shape")
        staged = {
            suffix: device.upload(np.stack([tensors[suffix] for tensors, _, _ in found]))
            for suffix in found[0][0]
        }
        if format == TRELLIS:
            self.memory, pairs = self._trellis(library, device, staged)
        else:
            self.memory, pairs = self._wint2(library, device, staged)
        addresses = [m and m.address for m in self.memory]
        self.structure = gpu_abi.Projection(*addresses, pairs)

    def _wint2(
        self, library: Any, device: Device, staged: Mapping[str, Memory]
    ) -> tuple[list[Memory | None], int]:
        codes = self.count * self.n * self.k
        memory = [Memory(device, size) for size in (codes // 4, codes // 128)]
        memory.append(Memory(device, self.count * self.n * 16))
        kind = device.upload(np.array([-1], np.int32))
        status = library.ccq_repack_wint2(
            staged["quant_weight"].address, staged["weight_scale"].address,
            staged["super_scales"].address, gpu_abi.BFLOAT16,
            staged["code_scale"].address, staged["code_zp"].address,
            self.count, self.k, self.n, *(m.address for m in memory), kind.address, None,
        )  # fmt: skip
        gpu_library.check(library, status, "repacking")
        pairs = np.empty(1, np.int32)
        kind.read(pairs)
        return [*memory], int(pairs[0])

    def _trellis(
        self, library: Any, device: Device, staged: Mapping[str, Memory]
    ) -> tuple[list[Memory | None], int]:
        units = Memory(device, library.ccq_trellis_units_bytes(self.count, self.k, self.n))
        columns = Memory(device, library.ccq_trellis_columns_bytes(self.count, self.n))
        status = library.ccq_repack_trellis(
            staged["quant_weight"].address, staged["weight_scale"].address,
            staged["super_scales"].address, gpu_abi.BFLOAT16, None,
            self.count, self.k, self.n, units.address, columns.address, None,
        )  # fmt: skip
        gpu_library.check(library, status, "repacking")
        # What was staged is freed after this call returns: the kernels must have read it.
        columns.read(np.empty(1, np.float32))
        return [units, None, columns], gpu_abi.PAIRS_TRELLIS

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in self.memory if m)


class GpuExperts:
    """The routed experts of one layer in device memory, as ops.moe multiplies with them.

    Args:
        up_gate, down: stored tensors of each expert, as repack_experts takes them.
        row_order: of the stored rows.
        format: of FORMATS, the same for all.

    Raises:
        ValueError: naming the tensor or shape that does not fit.
        CcqError: without the library, a GPU, or memory on it.
    """

    def __init__(
        self,
        up_gate: Sequence[Mapping[str, np.ndarray]],
        down: Sequence[Mapping[str, np.ndarray]],
        row_order: str,
        device: Device,
        format: str = "wint2",
    ) -> None:
        checks.row_order_of(format, row_order)
        self.device, self.library = device, gpu_library.load_products()
        self.up_gate = _Side(self.library, device, format, up_gate)
        self.down = _Side(self.library, device, format, down)
        self.hidden, self.experts = self.up_gate.k, len(up_gate)
        width = self.down.k
        if self.hidden % ROW_MULTIPLE or width % ROW_MULTIPLE or len(down) != self.experts:
            raise ValueError(
                f"hidden size {self.hidden} and width {width} must be multiples of {ROW_MULTIPLE}"
            )
        up, lower = self.up_gate, self.down
        checks.projections((up.k, up.n), (lower.k, lower.n))
        self.shape = gpu_abi.Shape(
            self.hidden, width, self.experts, gpu_abi.BFLOAT16, int(row_order == FASTDEPLOY_2_1)
        )

    @property
    def nbytes(self) -> int:
        """Of device memory."""
        return self.up_gate.nbytes + self.down.nbytes

    def __call__(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Sum over j of weights[t, j] * expert ids[t, j] of x[t]: float32 [tokens, hidden]."""
        tokens, top_k = ids.shape
        if x.shape != (tokens, self.hidden) or weights.shape != ids.shape:
            raise ValueError(f"x {list(x.shape)}, ids {list(ids.shape)}, weights do not fit")
        if not tokens:
            return np.zeros((0, self.hidden), np.float32)
        rows = np.ascontiguousarray(x).astype(BFLOAT16)
        device, sent = self.device, []
        for name, array in (
            ("x", rows),
            ("ids", np.ascontiguousarray(ids, np.int64)),
            ("weights", np.ascontiguousarray(weights, np.float32)),
        ):
            memory = device.scratch(name, array.nbytes)
            memory.write(array)
            sent.append(memory.address)
        shape = ctypes.byref(self.shape)
        size = self.library.ccq_moe_workspace(tokens, top_k, shape)
        workspace = device.scratch("workspace", size)
        out = device.scratch("out", rows.nbytes)
        status = self.library.ccq_moe(
            *sent, tokens, top_k, shape,
            ctypes.byref(self.up_gate.structure), ctypes.byref(self.down.structure),
            out.address, workspace.address, None,
        )  # fmt: skip
        gpu_library.check(self.library, status, "the experts")
        result = np.empty_like(rows)
        out.read(result)
        return result.astype(np.float32)
