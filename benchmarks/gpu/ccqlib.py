# SPDX-License-Identifier: Apache-2.0
"""The GPU library through ctypes and torch: a development harness, free of Paddle.

Build: `python benchmarks/gpu/ccqlib.py OUT.so [--arch 90a] [nvcc flags]`.
"""

from __future__ import annotations

import ctypes
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
# Both are read alone: where this runs the package need not be installed.
_RECIPE, abi = (
    SimpleNamespace(**runpy.run_path(str(ROOT / "paddle_ccq" / "ops" / f"{name}.py")))
    for name in ("gpu_build", "gpu_abi")
)
FOLDER = ROOT / "custom_ops" / "gpu"
BF16, FP16 = abi.BFLOAT16, abi.FLOAT16
# Number of the format and the words of a 64-group.
_WORDS = {"ccq-2.5": 10, "ccq-2.75": 22}
SPARE_FORMATS = {name: (abi.SPARE_FORMATS[name], words) for name, words in _WORDS.items()}
PLAIN, FASTDEPLOY = abi.ROWS_PLAIN, abi.ROWS_FASTDEPLOY
INTEGER, GENERAL, TRELLIS = abi.PAIRS_INTEGER, abi.PAIRS_GENERAL, abi.PAIRS_TRELLIS


def build(out: str, arch: str = "90a", flags: tuple[str, ...] = ()) -> None:
    """Compile the device code into one shared library, with line numbers for profilers."""
    architectures, more = [int(arch.rstrip("a"))], ("-lineinfo", *flags)
    command = _RECIPE.nvcc_command(FOLDER, Path(out), architectures, more)
    subprocess.run(command, check=True)


@dataclass
class Packed:
    """Weights in the kernel's layout."""

    quant: object
    scales: object
    columns: object
    pairs: int
    experts: int
    k: int
    n: int


class Library:
    """The C interface with torch tensors; every return code is checked."""

    def __init__(self, path: str) -> None:
        import torch

        self.torch = torch
        self.lib = ctypes.CDLL(path)
        # Older libraries, which are measured beside new ones, have fewer functions.
        for name, (arguments, result) in abi.FUNCTIONS.items():
            if hasattr(self.lib, name):
                function = getattr(self.lib, name)
                function.argtypes, function.restype = arguments, result

    def stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)

    def check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"CUDA error {code}")

    def force_variant(self, variant: int) -> None:
        """Only in builds with -DCCQ_TUNING; -1 returns to the automatic choice."""
        self.lib.ccq_moe_gemm_force_variant(variant)

    def repack(self, q, ws, ss, cs, zp) -> Packed:
        """Checkpoint tensors stacked over experts -> Packed."""
        torch = self.torch
        experts, k, n = q.shape[0], q.shape[1] * 4, q.shape[2]
        made = dict(device=q.device, dtype=torch.uint8)
        quant = torch.empty(experts * n * k // 4, **made)
        scales = torch.empty(experts * n * k // 128, **made)
        columns = torch.empty(experts * n * 4, device=q.device, dtype=torch.int32)
        kind = torch.full((1,), 77, device=q.device, dtype=torch.int32)
        dtype = BF16 if ss.dtype == torch.bfloat16 else FP16
        stored = [q.data_ptr(), ws.data_ptr(), ss.data_ptr(), dtype, cs.data_ptr(), zp.data_ptr()]
        made = [t.data_ptr() for t in (quant, scales, columns, kind)]
        self.check(self.lib.ccq_repack_wint2(*stored, experts, k, n, *made, self.stream()))
        return Packed(quant, scales, columns, int(kind.item()), experts, k, n)

    def unpack(self, p: Packed, super_dtype):
        """Packed -> checkpoint tensors."""
        torch, d = self.torch, p.quant.device
        q = torch.empty(p.experts, p.k // 4, p.n, device=d, dtype=torch.uint8)
        ws = torch.empty(p.experts, p.k // 128, p.n, device=d, dtype=torch.uint8)
        ss = torch.empty(p.experts, p.n, device=d, dtype=super_dtype)
        cs, zp = (torch.empty(p.experts, p.n, device=d) for _ in range(2))
        dtype = BF16 if super_dtype == torch.bfloat16 else FP16
        packed = [t.data_ptr() for t in (p.quant, p.scales, p.columns)]
        stored = [q.data_ptr(), ws.data_ptr(), ss.data_ptr(), dtype, cs.data_ptr(), zp.data_ptr()]
        self.check(self.lib.ccq_unpack_wint2(*packed, p.experts, p.k, p.n, *stored, self.stream()))
        return q, ws, ss, cs, zp

    def repack_trellis(self, q, ws, ss, before=None) -> Packed:
        """CCQ-2T's checkpoint tensors stacked over experts -> Packed, without scales.

        before: uint8 [experts, n], the bytes before the first ones; None at a column's beginning.
        """
        torch = self.torch
        experts, k, n = q.shape[0], q.shape[1] * 4, q.shape[2]
        sizes = (
            self.lib.ccq_trellis_units_bytes(experts, k, n),
            self.lib.ccq_trellis_columns_bytes(experts, n),
        )
        made = [torch.full((b,), 255, device=q.device, dtype=torch.uint8) for b in sizes]
        stored = [q.data_ptr(), ws.data_ptr(), ss.data_ptr()]
        stored.append(BF16 if ss.dtype == torch.bfloat16 else FP16)
        stored.append(None if before is None else before.data_ptr())
        pointers = [t.data_ptr() for t in made]
        code = self.lib.ccq_repack_trellis(*stored, experts, k, n, *pointers, self.stream())
        self.check(code)
        return Packed(made[0], None, made[1], TRELLIS, experts, k, n)

    def unpack_trellis(self, p: Packed, super_dtype):
        """Packed -> CCQ-2T's checkpoint tensors."""
        torch, d = self.torch, p.quant.device
        q = torch.empty(p.experts, p.k // 4, p.n, device=d, dtype=torch.uint8)
        ws = torch.empty(p.experts, p.k // 128, p.n, device=d, dtype=torch.uint8)
        ss = torch.empty(p.experts, p.n, device=d, dtype=super_dtype)
        packed = [p.quant.data_ptr(), p.columns.data_ptr(), p.experts, p.k, p.n]
        stored = [q.data_ptr(), ws.data_ptr(), ss.data_ptr()]
        stored.append(BF16 if super_dtype == torch.bfloat16 else FP16)
        self.check(self.lib.ccq_unpack_trellis(*packed, *stored, self.stream()))
        return q, ws, ss

    def workspace(self, rows: int, k: int, n: int, experts: int):
        size = self.lib.ccq_moe_gemm_workspace(rows, k, n, experts)
        made = self.torch.empty(size, device="cuda", dtype=self.torch.uint8)
        return made.fill_(255)  # NaN everywhere: nothing may depend on its contents

    def gemm(
        self, x, offsets, p: Packed, out, workspace, *, row_scale=None, order=PLAIN, pairs=None
    ) -> None:
        """out[r] = x[r] W[expert(r)] (* row_scale[r]); offsets int64 inclusive sums or None."""

        def pointer(t):
            return None if t is None else t.data_ptr()

        args = abi.GemmArgs(
            pointer(x), pointer(offsets), pointer(p.quant), pointer(p.scales), pointer(p.columns),
            pointer(row_scale), pointer(out), pointer(workspace),
            x.shape[0], p.k, p.n, p.experts,
            BF16 if x.dtype == self.torch.bfloat16 else FP16,
            p.pairs if pairs is None else pairs, order,
        )  # fmt: skip
        self.check(self.lib.ccq_moe_gemm(ctypes.byref(args), self.stream()))
        self.variant = self.lib.ccq_moe_gemm_variant(ctypes.byref(args))

    def spare_gemm(self, format, x, offsets, quant, supers, out, *, row_scale=None, order=PLAIN):
        """As gemm, weights as stored: quant [E, rows of words, N], supers bfloat16 [E, N]."""
        number, words = SPARE_FORMATS[format]
        tensors = (x, offsets, quant, supers, row_scale, out)
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        k, dtype = quant.shape[1] // words * 64, BF16 if x.dtype == self.torch.bfloat16 else FP16
        sizes = x.shape[0], k, quant.shape[2], quant.shape[0]
        args = abi.SpareArgs(*pointers, *sizes, number, dtype, order)
        self.check(self.lib.ccq_spare_gemm(ctypes.byref(args), self.stream()))

    def dispatch(self, ids, x, experts: int, offsets, place, rows) -> None:
        """rows[place] = x[token], sorted by expert; offsets int64 [experts], place int32."""
        tokens = [t.data_ptr() for t in (ids, x)]
        sizes = *ids.shape, experts, x.shape[1]
        out = [t.data_ptr() for t in (offsets, place, rows)]
        self.check(self.lib.ccq_moe_dispatch(*tokens, *sizes, *out, self.stream()))

    def combine(self, rows, place, weights, out) -> None:
        """out[t] = sum of weights[t, j] * rows[place[t, j]]."""
        tensors = [t.data_ptr() for t in (rows, place, weights)]
        dtype = BF16 if rows.dtype == self.torch.bfloat16 else FP16
        sizes = *place.shape, rows.shape[1], dtype
        self.check(self.lib.ccq_moe_combine(*tensors, *sizes, out.data_ptr(), self.stream()))

    def swiglu(self, x, out) -> None:
        """out = silu(x[:, :width]) * x[:, width:]."""
        dtype = BF16 if x.dtype == self.torch.bfloat16 else FP16
        pointers = [t.data_ptr() for t in (x, out)]
        sizes = *out.shape, dtype
        self.check(self.lib.ccq_swiglu(*pointers, *sizes, self.stream()))

    def _moe_shape(self, up: Packed, down: Packed, dtype: int = BF16, order: int = PLAIN):
        return abi.Shape(up.k, down.k, up.experts, dtype, order)

    def moe_workspace(self, tokens: int, top_k: int, up: Packed, down: Packed):
        shape = self._moe_shape(up, down)
        size = self.lib.ccq_moe_workspace(tokens, top_k, ctypes.byref(shape))
        return self.torch.empty(size, device="cuda", dtype=self.torch.uint8).fill_(255)

    def moe(self, x, ids, weights, up: Packed, down: Packed, out, workspace, order=PLAIN) -> None:
        """out[t] = sum of weights[t, j] * ffn of expert ids[t, j] on x[t]; ids int64."""
        dtype = BF16 if x.dtype == self.torch.bfloat16 else FP16
        shape = self._moe_shape(up, down, dtype, order)
        sides = [
            abi.Projection(
                p.quant.data_ptr(), None if p.scales is None else p.scales.data_ptr(),
                p.columns.data_ptr(), p.pairs,
            )
            for p in (up, down)
        ]  # fmt: skip
        tensors = [t.data_ptr() for t in (x, ids, weights)]
        structures = [ctypes.byref(s) for s in (shape, *sides)]
        places = [t.data_ptr() for t in (out, workspace)]
        self.check(self.lib.ccq_moe(*tensors, *ids.shape, *structures, *places, self.stream()))


def random_weights(torch, experts: int, k: int, n: int, pairs: str = "integer", seed: int = 0):
    """Random checkpoint tensors on the GPU; `pairs`: integer or general."""
    g = torch.Generator(device="cuda").manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, device="cuda")

    q = torch.randint(0, 256, (experts, k // 4, n), generator=g, device="cuda", dtype=torch.uint8)
    ws = torch.randint(0, 256, (experts, k // 128, n), generator=g, device="cuda",
                       dtype=torch.uint8)  # fmt: skip
    ss = ((0.5 + uniform(experts, n)) / 400).to(torch.bfloat16)
    if pairs == "integer":
        cs = torch.full((experts, n), 121.0, device="cuda")
        zp = torch.floor(uniform(experts, n) * 1900)
        flip = uniform(experts, n) < 0.1  # other steps and signs are integer pairs too
        cs = torch.where(flip, -127.0, cs)
        zp = torch.where(flip, zp + 32385 - 1900, zp)
        zp = torch.where(flip, zp.clamp(max=32767), zp)
        zp = torch.where(flip & (zp < 32385), torch.full_like(zp, 32385.0), zp)
    else:
        cs = 90 + uniform(experts, n) * 38
        zp = uniform(experts, n) * 100
        flip = uniform(experts, n) < 0.2
        cs, zp = torch.where(flip, -cs, cs), torch.where(flip, zp + 32600, zp)
    return q, ws, ss, cs, zp


def decode(torch, q, ws, ss, cs, zp, fastdeploy: bool = False):
    """float64 weights [K, N] of one expert, scale and product exact; input rows in plain order."""
    # float64 holds product and sum of the fma exactly, so one rounding to float32 is the fma.
    v = q.double() * cs.double() + (zp + 0.5).double()
    codes = torch.floor(v.float()).to(torch.int64) & 32767
    states = torch.stack([(codes >> s & 63) - 32 for s in (9, 6, 3, 0)], 1)
    states = states.reshape(-1, q.shape[-1])
    nibbles = torch.stack([ws >> 4, ws & 15], 1).reshape(-1, q.shape[-1])
    w = states.double() * nibbles.double().repeat_interleave(64, 0) * ss.double()
    if fastdeploy:  # stored row 16a + 2b + c is input row 8b + 2a + c
        w = w.reshape(-1, 4, 8, 2, w.shape[-1]).transpose(1, 2).reshape(-1, w.shape[-1])
    return w


def trellis_code() -> list[tuple[int, int]]:
    """Multiplier and addend of both hash words of CCQ-2T."""
    text = (ROOT / "custom_ops" / "gpu" / "common" / "trellis_code.h").read_text("utf-8")
    found = [
        [int(v) for v in re.findall(r"(\d+)u", line)]
        for line in re.findall(r"kTrellis(?:Multiplier|Addend)\[2\] = {(.*)};", text)
    ]
    return list(zip(*found, strict=True))


def random_trellis(torch, experts: int, k: int, n: int, seed: int = 0):
    """Random checkpoint tensors of CCQ-2T on the GPU: bytes, local scales, super scales."""
    g = torch.Generator(device="cuda").manual_seed(seed)

    def bytes_of(rows: int):
        return torch.randint(0, 256, (experts, rows, n), generator=g, device="cuda",
                             dtype=torch.uint8)  # fmt: skip

    supers = (0.5 + torch.rand(experts, n, generator=g, device="cuda")) / 1500
    return bytes_of(k // 4), bytes_of(k // 128), supers.to(torch.bfloat16)


def decode_trellis(torch, q, ws, ss):
    """float64 weights [K, N] of one CCQ-2T expert."""
    q = q.long()
    words = torch.cat([torch.zeros_like(q[:1]), q[:-1]]) * 256 + q
    values = []
    for multiplier, addend in trellis_code():
        x = words * multiplier + addend
        b = [x >> shift & 255 for shift in (0, 8, 16, 24)]
        values += [b[0] - b[1], b[2] - b[3]]
    w = torch.stack(values, 1).reshape(-1, q.shape[-1]).double()
    nibbles = torch.stack([ws >> 4, ws & 15], 1).reshape(-1, q.shape[-1])
    return w * nibbles.double().repeat_interleave(64, 0) * ss.double()


def random_offsets(torch, experts: int, rows: int, seed: int, skew: float = 0.0):
    """Inclusive int64 sums of a random routing of `rows` rows; many experts stay empty."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.rand(experts, generator=g) ** (1 + 4 * skew) + 1e-6
    ids = torch.multinomial(weight, rows, replacement=True, generator=g)
    return torch.bincount(ids, minlength=experts).cumsum(0).to(torch.int64)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    arch = "90a"
    if "--arch" in arguments:
        at = arguments.index("--arch")
        arch = arguments[at + 1]
        del arguments[at : at + 2]
    build(arguments[0], arch, tuple(arguments[1:]))
