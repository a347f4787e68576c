# SPDX-License-Identifier: Apache-2.0
"""wint4 by a list of layers, where FastDeploy itself knows only the last layer of a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CcqError

KEY = "wint4_layers"


def layer_list(config: Mapping[str, Any]) -> frozenset[int] | None:
    """moe_quant_config.wint4_layers of a quantization_config; None where it is not there."""
    node = config.get("moe_quant_config", {})
    value = node.get(KEY) if isinstance(node, Mapping) else None
    if value is None:
        return None
    good = isinstance(value, list) and all(
        isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in value
    )
    if not good:
        raise CcqError(f"config.json: moe_quant_config.{KEY}: must be a list of layer numbers")
    return frozenset(value)


def make_config(base: type) -> type:
    """A subclass of FastDeploy's WINT2Config that obeys the list."""

    class CcqWint2Config(base):  # type: ignore[misc, valid-type]
        ccq_base = base
        ccq_wint4_layers: frozenset[int] | None = None

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            made = super().from_config(config)
            made.ccq_wint4_layers = layer_list(config)
            return made

        def get_quant_method(self, layer: Any) -> Any:
            index = getattr(layer, "layer_idx", None)
            if self.ccq_wint4_layers is None or index is None:
                return super().get_quant_method(layer)
            # FastDeploy compares the index with this one number; for this layer alone it says
            # what the list says.
            kept = self.moe_w4_quant_end_layer
            self.moe_w4_quant_end_layer = index if index in self.ccq_wint4_layers else index - 1
            try:
                return super().get_quant_method(layer)
            finally:
                self.moe_w4_quant_end_layer = kept

    return CcqWint2Config
