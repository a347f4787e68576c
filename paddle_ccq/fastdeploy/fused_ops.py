# SPDX-License-Identifier: Apache-2.0
"""The compiled Paddle ops (custom_ops/setup.py), as the FastDeploy plugin uses them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..codec import trellis
from ..codec.row_order import FASTDEPLOY_2_1, PLAIN
from ..errors import CcqError

# The extension that custom_ops/setup.py builds; its functions carry the ops' names.
MODULE = "paddle_ccq_ops"
OLDEST_CAPABILITY = (8, 0)
# Both sizes are the inputs of one projection (K, custom_ops/gpu/moe/repack.h) and the outputs of
# the other, which only need 16.
SIZE_MULTIPLE = 128
# Of the outputs of a projection, for the products of every format.
COLUMN_MULTIPLE = 16


@dataclass(frozen=True)
class Repacked:
    """One projection of all experts in the layout that ccq_moe_ffn reads."""

    quant: Any
    scales: Any
    columns: Any
    integer_pairs: bool
    row_order: str = FASTDEPLOY_2_1


@dataclass(frozen=True)
class Stored:
    """One projection of all experts as it is stored, which ccq_moe_ffn_stored reads."""

    format: str
    quant_weight: Any
    super_scales: Any


class FusedOps:
    """The ops of a loaded extension that the plugin calls."""

    def __init__(self, module: Any) -> None:
        self._repack = module.ccq_repack
        self._repack_trellis = module.ccq_repack_trellis
        self._moe_ffn = module.ccq_moe_ffn
        self._moe_ffn_stored = module.ccq_moe_ffn_stored

    def repack(
        self, quant_weight: Any, weight_scale: Any, super_scales: Any, code_scale: Any, code_zp: Any
    ) -> Repacked:
        """Stacked checkpoint tensors [E, ...] of one projection; waits for the GPU once."""
        quant, scales, columns, kind = self._repack(
            quant_weight, weight_scale, super_scales, code_scale, code_zp
        )
        return Repacked(quant, scales, columns, integer_pairs=int(kind.item()) == 0)

    def prepare(self, format: str, tensors: Mapping[str, Any]) -> Repacked | Stored:
        """Stacked tensors [E, ...] of one projection in a format that FastDeploy has not.

        Args:
            tensors: by suffix (codec.formats.tensor_specs); rows in plain order.
        """
        if format == trellis.NAME:
            quant, scales, columns = self._repack_trellis(
                tensors["quant_weight"], tensors["weight_scale"], tensors["super_scales"]
            )
            return Repacked(quant, scales, columns, integer_pairs=False, row_order=PLAIN)
        return Stored(format, tensors["quant_weight"], tensors["super_scales"])

    def moe_ffn(
        self, x: Any, ends: Any, up_gate: Repacked | Stored, down: Repacked | Stored
    ) -> Any:
        """Rows of x sorted by expert, `ends` their running counts (int64) -> rows of x's type.

        Both projections are of one format.
        """
        if isinstance(up_gate, Stored) and isinstance(down, Stored):
            return self._moe_ffn_stored(
                x,
                ends,
                up_gate.quant_weight,
                up_gate.super_scales,
                down.quant_weight,
                down.super_scales,
                up_gate.format,
                PLAIN,
            )
        assert isinstance(up_gate, Repacked) and isinstance(down, Repacked)
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
            up_gate.row_order,
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
