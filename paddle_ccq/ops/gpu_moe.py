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
_SUFFIXES = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")


class _Side:
    """One projection of all experts in the kernels' layout."""

    def __init__(
        self, library: Any, device: Device, experts: Sequence[Mapping[str, np.ndarray]]
    ) -> None:
        found = [checks.stored("wint2", tensors) for tensors in experts]
        self.k, self.n = found[0][1:]
        if any((k, n) != (self.k, self.n) for _, k, n in found):
            raise ValueError("experts of one layer must all have one shape")
        count = len(found)
        stacked = {s: np.stack([tensors[s] for tensors, _, _ in found]) for s in _SUFFIXES}
        staged = {suffix: device.upload(array) for suffix, array in stacked.items()}
        codes = count * self.n * self.k
        self.quant = Memory(device, codes // 4)
        self.scales = Memory(device, codes // 128)
        self.columns = Memory(device, count * self.n * 16)
        kind = device.upload(np.array([-1], np.int32))
        status = library.ccq_repack_wint2(
            staged["quant_weight"].address, staged["weight_scale"].address,
            staged["super_scales"].address, gpu_abi.BFLOAT16,
            staged["code_scale"].address, staged["code_zp"].address,
            count, self.k, self.n,
            self.quant.address, self.scales.address, self.columns.address, kind.address, None,
        )  # fmt: skip
        gpu_library.check(library, status, "repacking")
        pairs = np.empty(1, np.int32)
        kind.read(pairs)
        addresses = [m.address for m in (self.quant, self.scales, self.columns)]
        self.structure = gpu_abi.Projection(*addresses, int(pairs[0]))

    @property
    def nbytes(self) -> int:
        return self.quant.nbytes + self.scales.nbytes + self.columns.nbytes


class GpuExperts:
    """The routed experts of one layer in device memory, as ops.moe multiplies with them.

    Args:
        up_gate, down: stored WINT2 tensors of each expert, as repack_experts takes them.
        row_order: of the stored rows.

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
        library: Any = None,
    ) -> None:
        checks.row_order(row_order)
        self.device, self.library = device, library or gpu_library.load_products()
        self.up_gate = _Side(self.library, device, up_gate)
        self.down = _Side(self.library, device, down)
        self.hidden, self.experts = self.up_gate.k, len(up_gate)
        width = self.down.k
        if self.hidden % ROW_MULTIPLE or width % ROW_MULTIPLE or len(down) != self.experts:
            raise ValueError(
                f"hidden size {self.hidden} and width {width} must be multiples of {ROW_MULTIPLE}"
            )
        if (self.up_gate.n, self.down.n) != (2 * width, self.hidden):
            raise ValueError(
                f"up_gate [{self.hidden}, {self.up_gate.n}] and down [{width}, {self.down.n}] do"
                " not belong together"
            )
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
