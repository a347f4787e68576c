# SPDX-License-Identifier: Apache-2.0
"""The entry point that FastDeploy calls when FD_PLUGINS names paddle_ccq.

It puts subclasses in the place of two of FastDeploy's classes, in the memory of the process that
loads it, and changes no file. A release that it was not made for is left as it is.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import Any

from ..errors import CcqError
from .layer_list import make_config
from .moe_method import make_method
from .releases import DEVELOP, find_release

logger = logging.getLogger("paddle_ccq")

GROUP = "fastdeploy.model_register_plugins"
NAME = "paddle_ccq"
# Releases whose sources were read. In 2.3 and before, a layer's method also sums over the ranks.
SUPPORTED = ("2.4", "2.5", "2.6", DEVELOP)
BACKEND = "fastdeploy.model_executor.layers.moe.fused_moe_wint2_backend"
CONFIG = "fastdeploy.model_executor.layers.quantization.wint2"
# Module -> attribute -> the attributes that it must have.
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    BACKEND: {
        "CutlassWint2FusedMoeMethod": ("create_weights", "process_prequanted_weights", "apply"),
        "moe_expert_dispatch": (),
        "moe_expert_reduce": (),
    },
    CONFIG: {"WINT2Config": ("from_config", "get_quant_method")},
}


def register() -> None:
    """Install the subclasses, or log in one line why they are not; never raises."""
    try:
        modules = _modules()
    except CcqError as error:
        logger.warning("paddle_ccq: nothing changed: %s", error)
        return
    backend, config = modules[BACKEND], modules[CONFIG]
    method = backend.CutlassWint2FusedMoeMethod
    if not hasattr(method, "ccq_base"):
        backend.CutlassWint2FusedMoeMethod = make_method(
            method, backend.moe_expert_dispatch, backend.moe_expert_reduce
        )
    if not hasattr(config.WINT2Config, "ccq_base"):
        config.WINT2Config = make_config(config.WINT2Config)


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
