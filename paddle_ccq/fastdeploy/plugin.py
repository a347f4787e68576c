# SPDX-License-Identifier: Apache-2.0
"""The entry point that FastDeploy calls when FD_PLUGINS names paddle_ccq.

It puts subclasses in the place of two of FastDeploy's classes and adds our formats to those that
FastDeploy finds by name, in the memory of the process that loads it, and changes no file. A release
that it was not made for is left as it is.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import Any

from ..errors import CcqError
from ..targets.fastdeploy.layout import PLUGIN_RELEASES
from .layer_formats import make_config, make_lookup
from .moe_method import make_method
from .own_formats import make_own_method
from .releases import find_release

logger = logging.getLogger("paddle_ccq")

GROUP = "fastdeploy.model_register_plugins"
NAME = "paddle_ccq"
# Releases whose sources were read. In 2.3 and before, a layer's method also sums over the ranks.
SUPPORTED = PLUGIN_RELEASES
BACKEND = "fastdeploy.model_executor.layers.moe.fused_moe_wint2_backend"
QUANTIZATION = "fastdeploy.model_executor.layers.quantization"
CONFIG = f"{QUANTIZATION}.wint2"
# Module -> attribute -> the attributes that it must have.
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    BACKEND: {
        "CutlassWint2FusedMoeMethod": ("create_weights", "process_prequanted_weights", "apply"),
        "moe_expert_dispatch": (),
        "moe_expert_reduce": (),
        "get_tensor": (),
    },
    QUANTIZATION: {"get_quantization_config": ()},
    CONFIG: {"WINT2Config": ("from_config", "get_quant_method")},
}


def register() -> None:
    """Install the subclasses, or log in one line why they are not; never raises."""
    try:
        modules = _modules()
    except CcqError as error:
        logger.warning("paddle_ccq: nothing changed: %s", error)
        return
    backend, config, quantization = (modules[name] for name in (BACKEND, CONFIG, QUANTIZATION))
    wint2 = backend.CutlassWint2FusedMoeMethod
    if hasattr(wint2, "ccq_base"):
        return  # registered already
    dispatch, reduce = backend.moe_expert_dispatch, backend.moe_expert_reduce
    own = make_own_method(wint2, dispatch, reduce, backend.get_tensor)
    backend.CutlassWint2FusedMoeMethod = make_method(wint2, dispatch, reduce)
    config.WINT2Config = make_config(config.WINT2Config, wint2, own)
    # parse_quant_config looks the function up in its module each time, and only after the models
    # and with them the plugins are imported (config.py, ModelConfig).
    lookup = quantization.get_quantization_config
    quantization.get_quantization_config = make_lookup(lookup, config.WINT2Config)


def _modules() -> dict[str, ModuleType]:
    try:
        fastdeploy: Any = importlib.import_module("fastdeploy")
        version = str(getattr(fastdeploy, "__version__", "Unknown"))
        modules = {name: importlib.import_module(name) for name in NAMES}
    except ImportError as error:
        raise CcqError(f"FastDeploy does not import as expected: {error}") from None
    try:
        release = find_release(version).name
    except CcqError:
        release = version
    if release not in SUPPORTED:
        raise CcqError(f"FastDeploy {version} is not one of {', '.join(SUPPORTED)}")
    for module, attributes in NAMES.items():
        for attribute, members in attributes.items():
            found = getattr(modules[module], attribute, None)
            for member in ("__call__", *members):
                if not hasattr(found, member):
                    raise CcqError(f"FastDeploy {version} has no {attribute}.{member}")
    return modules
