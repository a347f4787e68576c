# SPDX-License-Identifier: Apache-2.0
"""wint4 by a list of layers, where FastDeploy itself knows only the last layer of a prefix."""

from __future__ import annotations

from typing import Any

from ..targets.fastdeploy.config import wint4_layers_of


def make_config(base: type) -> type:
    """A subclass of FastDeploy's WINT2Config that obeys the list."""

    class CcqWint2Config(base):  # type: ignore[misc, valid-type]
        ccq_base = base
        ccq_wint4_layers: frozenset[int] | None = None

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            made = super().from_config(config)
            made.ccq_wint4_layers = wint4_layers_of(config)
            return made

        def get_quant_method(self, layer: Any) -> Any:
            index = getattr(layer, "layer_idx", None)
            if self.ccq_wint4_layers is None or index is None:
                return super().get_quant_method(layer)
            # FastDeploy compares the layer's index with this one number; it is set so that
            # the comparison gives this layer the format that the list has for it.
            kept = self.moe_w4_quant_end_layer
            self.moe_w4_quant_end_layer = index if index in self.ccq_wint4_layers else index - 1
            try:
                return super().get_quant_method(layer)
            finally:
                self.moe_w4_quant_end_layer = kept

    return CcqWint2Config
