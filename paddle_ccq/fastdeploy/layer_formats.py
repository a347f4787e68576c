# SPDX-License-Identifier: Apache-2.0
"""FastDeploy's WINT2 configuration, which chooses a layer's format, with lists and our formats.

FastDeploy itself knows only the last wint4 layer of a prefix, and only its own formats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..targets.fastdeploy.config import wint4_layers_of
from ..targets.fastdeploy.layout import OWN_FORMATS


def make_config(base: type, wint2_method: type, own_method: Callable[..., Any]) -> type:
    """A subclass of FastDeploy's WINT2Config that obeys the list and the format.

    Its name() stays "wint2": FastDeploy then takes the loader that hands a layer its stored
    tensors.

    Args:
        wint2_method: FastDeploy's own method for WINT2 layers.
        own_method: made with (config, format) for layers in one of OWN_FORMATS.
    """

    class CcqWint2Config(base):  # type: ignore[misc, valid-type]
        ccq_base = base
        ccq_format = "wint2"
        ccq_wint4_layers: frozenset[int] | None = None

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            made = super().from_config(config)
            made.ccq_wint4_layers = wint4_layers_of(config)
            if config.get("quantization") in OWN_FORMATS:
                made.ccq_format = config["quantization"]
            return made

        def get_quant_method(self, layer: Any) -> Any:
            method = self._listed_method(layer)
            if self.ccq_format == "wint2" or not isinstance(method, wint2_method):
                return method
            return own_method(self, self.ccq_format)

        def _listed_method(self, layer: Any) -> Any:
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


def make_lookup(lookup: Callable[[str], type], config: type) -> Callable[[str], type]:
    """FastDeploy's get_quantization_config with the names of OWN_FORMATS, all for `config`."""

    def get_quantization_config(quantization: str) -> type:
        return config if quantization in OWN_FORMATS else lookup(quantization)

    return get_quantization_config
