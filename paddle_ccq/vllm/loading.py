# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint's tensors to the layers of vLLM's ERNIE classes.

Packed tensors go straight to the layers that hold them, cut for this rank; floats are handed on
under vLLM's names, as its own loading cuts and stacks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import CcqError
from . import names
from .config import CcqConfig
from .names import DenseTensor, ExpertTensor
from .read_ahead import ahead

Weights = Iterable[tuple[str, torch.Tensor]]


def load(model: Any, quantization: CcqConfig, weights: Weights, base: Callable[..., Any]) -> Any:
    """Load everything; `base` is load_weights of the model's own class.

    Raises:
        CcqError: naming a tensor that does not fit, or that never came.
    """
    config = quantization.model
    if config is None:
        raise CcqError("the model's config.json was never read; is this vLLM release supported?")
    heads = (config.q_size, config.kv_size, config.kv_size)
    if quantization.ranks > 1:
        weights = _rank_folders(quantization)
    else:
        weights = ahead(quantization.folder, weights)
    modules = dict(model.named_modules())
    loaded = base(_place(modules, weights, heads))
    check_all_there(modules)
    return loaded


def _place(
    modules: dict[str, Any], weights: Weights, heads: tuple[int, int, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        if names.is_skipped(name):
            continue
        found = names.parse(name)
        if isinstance(found, ExpertTensor):
            layer = _experts(modules, found.layer)
            if layer is not None:
                arguments = (found.expert, found.projection, found.suffix, tensor, name)
                layer.quant_method.place(layer, *arguments)
        elif isinstance(found, DenseTensor) and _packed(found, tensor):
            _place_dense(modules, found, tensor, name)
        else:
            yield from _floats(name, tensor, heads)


def _packed(found: DenseTensor, tensor: torch.Tensor) -> bool:
    """A layer that stays bfloat16 keeps the packed name, with floats in it."""
    return found.suffix == "weight_scale" or not tensor.is_floating_point()


def _experts(modules: dict[str, Any], layer: int) -> Any:
    """The module that holds a layer's routed experts; None where another card has the layer."""
    stem = f"model.layers.{layer}.mlp.experts"
    for name in (f"{stem}.routed_experts", stem):
        module = modules.get(name)
        if module is not None and hasattr(getattr(module, "quant_method", None), "place"):
            return module
    if f"model.layers.{layer}.mlp" in modules:
        raise CcqError(f"{stem}: vLLM's model has no such experts in a format of this package")
    return None


def _place_dense(
    modules: dict[str, Any], found: DenseTensor, tensor: torch.Tensor, name: str
) -> None:
    module = modules.get(f"model.layers.{found.layer}.{found.vllm_module}")
    if module is None:
        if f"model.layers.{found.layer}.input_layernorm" in modules:
            raise CcqError(f"{name}: config.json calls for no such layer")
        return  # of another pipeline stage
    place = getattr(module.quant_method, "place", None)
    if place is None:
        raise CcqError(f"{name}: packed, but modules_to_not_convert says that it is not")
    place(module, found.suffix, tensor, name)


def _floats(
    name: str, tensor: torch.Tensor, heads: tuple[int, int, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    if not name.startswith("ernie.") and name != "lm_head.weight":
        yield name, tensor
        return
    parts, turned = names.float_parts(name, heads)
    for part, first, width in parts:
        value = tensor
        if width == -1:
            half = tensor.shape[1] // 2
            value = tensor[:, half:] if first else tensor[:, :half]
        elif width:
            value = tensor[:, first : first + width]
        yield part, value.t() if turned else value


def check_all_there(modules: dict[str, Any]) -> None:
    """Refuse layers of which parts never came.

    Raises:
        CcqError: naming the first.
    """
    for name, module in modules.items():
        missing = getattr(getattr(module, "quant_method", None), "missing", None)
        if missing is None:
            continue
        absent = missing(module)
        if absent:
            raise CcqError(
                f"{name}: {len(absent)} parts are not in the checkpoint, the first {absent[0]}; the"
                " download is not complete or config.json belongs to another model"
            )


def _rank_folders(quantization: CcqConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's packed tensors as they are; floats joined again, which vLLM cuts itself."""
    from vllm.distributed import get_tensor_model_parallel_rank

    own, ranks = get_tensor_model_parallel_rank(), quantization.ranks
    folders = [Path(quantization.folder) / f"rank{i}" for i in range(ranks)]
    config = quantization.model
    files = [sorted(folder.glob("*.safetensors")) for folder in folders]
    if not files[own]:
        raise CcqError(f"{folders[own]}: no safetensors files")
    for index, path in enumerate(files[own]):
        with safe_open(path, "pt") as mine:
            others = [safe_open(f[index], "pt") for f in files]
            for name in mine.keys():  # noqa: SIM118 (not a dictionary)
                tensor = mine.get_tensor(name)
                canonical = name.replace("_proj.quant_weight", "_proj.weight")
                spec = config.tensors.get(canonical)
                cut = None if spec is None else spec.cut
                found = names.parse(name)
                packed = isinstance(found, DenseTensor) and _packed(found, tensor)
                if cut is None or packed or isinstance(found, ExpertTensor):
                    yield name, tensor
                    continue
                parts = [other.get_tensor(name) for other in others]
                yield name, _joined(parts, cut)


def _joined(parts: list[torch.Tensor], cut: Any) -> torch.Tensor:
    """The whole of what checkpoint.tensor_parallel.take has cut."""
    pieces, start = [], 0
    for width in (part // len(parts) for part in cut.parts):
        pieces += [part.narrow(cut.axis, start, width) for part in parts]
        start += width
    return torch.cat(pieces, dim=cut.axis)
