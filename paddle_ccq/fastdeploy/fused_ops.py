# SPDX-License-Identifier: Apache-2.0
"""The compiled Paddle ops (custom_ops/setup.py), as the FastDeploy plugin uses them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from ..codec.row_order import FASTDEPLOY_2_1
from ..errors import CcqError

# The extension that custom_ops/setup.py builds; its functions carry the ops' names.
MODULE = "paddle_ccq_ops"
OLDEST_CAPABILITY = (8, 0)
# Both sizes are the inputs of one projection (K, custom_ops/gpu/moe/repack.h) and the outputs of
# the other, which only need 16.
SIZE_MULTIPLE = 128


@dataclass(frozen=True)
class Repacked:
    """One projection of all experts in the layout that ccq_moe_ffn reads."""

    quant: Any
    scales: Any
    columns: Any
    integer_pairs: bool


class FusedOps:
    """ccq_repack and ccq_moe_ffn of a loaded extension."""

    def __init__(self, module: Any) -> None:
        self._repack = module.ccq_repack
        self._moe_ffn = module.ccq_moe_ffn

    def repack(
        self, quant_weight: Any, weight_scale: Any, super_scales: Any, code_scale: Any, code_zp: Any
    ) -> Repacked:
        """Stacked checkpoint tensors [E, ...] of one projection; waits for the GPU once."""
        quant, scales, columns, kind = self._repack(
            quant_weight, weight_scale, super_scales, code_scale, code_zp
        )
        return Repacked(quant, scales, columns, integer_pairs=int(kind.item()) == 0)

    def moe_ffn(self, x: Any, ends: Any, up_gate: Repacked, down: Repacked) -> Any:
        """Rows of x sorted by expert, `ends` their running counts (int64) -> rows of x's type."""
        return self._moe_ffn(
            x,
            ends,
            up_gate.quant,
            up_gate.scales,
            up_gate.columns,
            down.quant,
            down.scales,
            down.columns,
            up_gate.integer_pairs,
            down.integer_pairs,
            FASTDEPLOY_2_1,
        )


def load_ops() -> FusedOps:
    """The ops for the GPU in use.

    Raises:
        CcqError: if they are not built, don't load, or the GPU is too old for them.
    """
    import paddle

    try:
        module = importlib.import_module(MODULE)
    except (ImportError, OSError, RuntimeError) as error:  # also a library that does not fit
        raise CcqError(
            f"the compiled ops do not load ({error}); pip install --no-build-isolation ./custom_ops"
        ) from None
    if not paddle.is_compiled_with_cuda():
        raise CcqError("this Paddle is built without CUDA")
    capability = tuple(paddle.device.cuda.get_device_capability())
    if capability < OLDEST_CAPABILITY:
        raise CcqError(f"compute capability {capability[0]}.{capability[1]}, 8.0 is needed")
    try:
        return FusedOps(module)
    except AttributeError as error:
        raise CcqError(f"the compiled ops are of another version: {error}") from None


def shape_refusal(hidden: int, width: int) -> str | None:
    """Why the ops can't take experts of this size; None if they can."""
    for name, size in (("hidden size", hidden), ("expert width", width)):
        if size % SIZE_MULTIPLE:
            return f"{name} {size} is no multiple of {SIZE_MULTIPLE}"
    return None
