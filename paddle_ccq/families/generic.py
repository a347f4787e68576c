# SPDX-License-Identifier: Apache-2.0
"""Models of no known family, on request alone: routed experts that are found by the usual names.

Experts are the modules `...experts.0.gate_proj`, `up_proj` and `down_proj`, or `w1`, `w3` and `w2`,
or stacks `...experts.gate_up_proj` [E, 2I, H] and `...experts.down_proj` [E, H, I]. Everything else
is kept as it is. What is found is printed, recorded in the output, and nothing of it is guessed: a
module of experts that is not whole, or holds anything else, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import CcqError
from .common import FUSED, FUSED_DOWN, NAMING, Layout, expert_tensors
from .config import MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH, is_packed_entry
from .family import Family, Naming
from .fields import Fields, show
from .moe_config import MoeConfig, read_dtype
from .tensor import TensorSpec

NAME = "generic"
# The entry of an output's quantization_config that records what was found.
FOUND = "found"
# Gate, up and down.
PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_EXPERT = re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<expert>\d{1,5})\.(?P<rest>.+)")
_STACK = re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<rest>gate_up_proj|down_proj)")
# Whatever is neither lies in the module without being understood: biases of stacks, for instance.
_INSIDE = re.compile(r"(?P<module>(?:.*\.)?experts)\.(?!\d{1,5}\.)(?P<rest>.+)")
_STACK_PART = re.compile(r"(gate_up_proj|down_proj)(_scale_inv|_scale)?")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,4})\.")
# Of an expert's matrix: itself, or its values in INT4 groups, of which a word holds eight.
_MATRIX = re.compile(r"(?P<projection>\w+)\.(?P<what>weight|weight_packed)")
_BESIDE = re.compile(r"\w+\.(weight_(scale|scale_inv|shape|zero_point|g_idx)|input_scale)")
_PER_WORD = 8
# What every packed matrix of this package and of FastDeploy has.
_PACKED = ".quant_weight"


@dataclass(frozen=True)
class Experts:
    """A module of routed experts: how many, their sizes, and their parts' names."""

    layer: int
    experts: int
    hidden: int
    width: int
    projections: tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class GenericConfig(MoeConfig):
    """What config.json says at all, and the modules that were found."""

    modules: Mapping[str, Experts] = field(default_factory=dict)

    @property
    def recorded(self) -> dict[str, Any]:
        return {FOUND: {name: asdict(experts) for name, experts in self.modules.items()}}


def parse(fields: Fields, family: Family, _: list[str] | None) -> GenericConfig:
    """The config; of a packed checkpoint, with the modules that it records."""
    raw = fields.values
    nested = raw.get("text_config")
    values = {**raw, **nested} if isinstance(nested, Mapping) else raw
    inner = Fields(dict(values), fields.where)
    quantization = raw.get("quantization_config")
    recorded = quantization.get(FOUND) if isinstance(quantization, Mapping) else None
    if recorded is None and is_packed_entry(quantization, fields.where):
        assert isinstance(quantization, Mapping)
        if quantization.get("family") == NAME:
            raise fields.fail(f"quantization_config.{FOUND}", "missing")
    config = GenericConfig(
        family=family,
        architectures=tuple(fields.get("architectures", [])),
        model_type=str(fields.get("model_type", "")),
        vocab_size=inner.integer("vocab_size", 1, MAX_WIDTH, 1),
        hidden_size=inner.integer("hidden_size", 1, MAX_WIDTH, 1),
        intermediate_size=inner.integer("intermediate_size", 1, MAX_WIDTH, 1),
        num_hidden_layers=inner.integer("num_hidden_layers", 1, MAX_LAYERS, 1),
        num_attention_heads=inner.integer("num_attention_heads", 1, 1 << 16, 1),
        num_key_value_heads=inner.integer("num_key_value_heads", 1, 1 << 16, 1),
        head_dim=1,
        tie_word_embeddings=True,
        moe_num_experts=0,
        moe_k=1,
        moe_intermediate_size=1,
        num_nextn_predict_layers=0,
        dtype=read_dtype(inner),
        raw=raw,
        values=inner.values,
        sizes={},
        sparse=frozenset(),
    )
    return config if recorded is None else _with(config, _recorded(fields, recorded))


def _with(config: GenericConfig, modules: Mapping[str, Experts]) -> GenericConfig:
    layers = frozenset(experts.layer for experts in modules.values())
    first = next(iter(modules.values()))
    return replace(
        config,
        modules=modules,
        sparse=layers,
        num_hidden_layers=max(config.num_hidden_layers, max(layers) + 1),
        hidden_size=first.hidden,
        moe_num_experts=first.experts,
        moe_intermediate_size=first.width,
    )


def _recorded(fields: Fields, entry: Any) -> dict[str, Experts]:
    where = f"quantization_config.{FOUND}"
    if not isinstance(entry, Mapping) or not entry:
        raise fields.fail(where, f"{show(entry)} is not an object of modules")
    modules = {}
    for name, stated in entry.items():
        if not isinstance(stated, Mapping):
            raise fields.fail(f"{where}.{name}", f"{show(stated)} is not an object")
        inner = Fields(dict(stated), f"{fields.where}: {where}.{name}")
        projections = inner.get("projections")
        if not isinstance(projections, list) or tuple(projections) not in PROJECTIONS:
            raise inner.fail("projections", f"{show(projections)} is not known")
        modules[name] = Experts(
            inner.integer("layer", 0, MAX_LAYERS - 1),
            inner.integer("experts", 1, MAX_EXPERTS),
            inner.integer("hidden", 1, MAX_WIDTH),
            inner.integer("width", 1, MAX_WIDTH),
            (projections[0], projections[1], projections[2]),
        )
    return modules


def tensors(config: GenericConfig) -> Iterator[TensorSpec]:
    """The experts' matrices; all else is not named here, and kept."""
    for name, experts in config.modules.items():
        sized = replace(
            config,
            hidden_size=experts.hidden,
            moe_num_experts=experts.experts,
            moe_intermediate_size=experts.width,
        )
        place, _, last = name.rpartition(".")
        layout = Layout(
            lambda *_: (), lambda _: (), experts=last, stacked=last, projections=experts.projections
        )
        for expert in range(experts.experts):
            yield from expert_tensors(
                sized, layout, f"{place}." if place else "", experts.layer, expert
            )


def discover(config: GenericConfig, shapes: Mapping[str, tuple[int, ...]]) -> GenericConfig:
    """The config with the modules of experts among stored tensors, by name and shape.

    Raises:
        CcqError: if there is none, or one that is not understood as a whole, or packed matrices.
    """
    if config.modules:
        return config
    packed = next((name for name in shapes if name.endswith(_PACKED)), None)
    if packed is not None:
        raise CcqError(
            f"--family generic: {packed} is packed, so the model is quantized already; quantize the"
            " original float checkpoint instead"
        )
    parts: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    stacks: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        single, stack = _EXPERT.fullmatch(name), _STACK.fullmatch(name)
        if single:
            experts = parts.setdefault(single["module"], {})
            _take(experts.setdefault(int(single["expert"]), {}), name, single["rest"], shape)
        elif stack:
            stacks.setdefault(stack["module"], {})[stack["rest"]] = shape
    _refuse_others(shapes, {*parts, *stacks})
    sizes = {module: _single(module, found) for module, found in parts.items()}
    sizes |= {module: _stacked(module, found) for module, found in stacks.items()}
    if not sizes:
        raise CcqError(
            "--family generic: no stored tensor is named like a routed expert"
            " (...experts.0.gate_proj.weight, ...experts.0.w1.weight or ...experts.gate_up_proj)"
        )
    order = sorted(sizes, key=_natural)
    numbers = [int(found[1]) for module in order if (found := _LAYER.search(module))]
    unique = len(set(numbers)) == len(order)
    layers = numbers if unique else range(len(order))
    placed = zip(order, layers, strict=True)
    return _with(config, {module: Experts(layer, *sizes[module]) for module, layer in placed})


_Sizes = tuple[int, int, int, tuple[str, str, str]]


def _take(found: dict[str, tuple[int, ...]], name: str, rest: str, shape: tuple[int, ...]) -> None:
    matrix = _MATRIX.fullmatch(rest)
    if matrix and len(shape) == 2:
        rows, columns = shape
        packed = matrix["what"] == "weight_packed"
        found[matrix["projection"]] = (rows, columns * _PER_WORD if packed else columns)
    elif not _BESIDE.fullmatch(rest):
        raise CcqError(
            f"--family generic: {name!r} lies in a module of experts and is none of their matrices;"
            " such experts are not known here"
        )


def _refuse_others(names: Iterable[str], modules: set[str]) -> None:
    """Refuse what lies in a module of experts beside numbered experts, stacks and their scales."""
    for name in names:
        inside = _INSIDE.fullmatch(name)
        if inside and inside["module"] in modules and not _STACK_PART.fullmatch(inside["rest"]):
            raise CcqError(
                f"--family generic: {name!r} lies in a module of experts and is none of their"
                " matrices; such experts are not known here"
            )


def _single(module: str, found: dict[int, dict[str, tuple[int, ...]]]) -> _Sizes:
    first = found.get(0, {})
    projections = next((names for names in PROJECTIONS if set(names) == set(first)), None)
    if projections is None:
        raise CcqError(
            f"--family generic: {module}.0 has {', '.join(sorted(first)) or 'no matrix'}; known are"
            f" {' or '.join(', '.join(names) for names in PROJECTIONS)}"
        )
    width, hidden = first[projections[0]]
    wanted = dict(zip(projections, ((width, hidden),) * 2 + ((hidden, width),), strict=True))
    for expert in range(len(found)):
        if found.get(expert) != wanted:
            raise CcqError(
                f"--family generic: {module}.{expert} is not like the others: {found.get(expert)},"
                f" not {wanted}"
            )
    return len(found), hidden, width, projections


def _stacked(module: str, found: dict[str, tuple[int, ...]]) -> _Sizes:
    both, down = found.get(FUSED, ()), found.get(FUSED_DOWN, ())
    if len(both) == len(down) == 3:
        (experts, double, hidden), (count, out, width) = both, down
        if (count, out, 2 * width) == (experts, hidden, double):
            return experts, hidden, width, PROJECTIONS[0]
    raise CcqError(
        f"--family generic: {module}: {FUSED} {list(both)} and {FUSED_DOWN} {list(down)} are not"
        " [experts, 2 width, hidden] and [experts, hidden, width]"
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


GENERIC = Family(
    NAME,
    (),
    (Naming(NAMING, "", "Hugging Face names", format_tag="pt", dtype_key="torch_dtype"),),
    parse=parse,
    tensors=tensors,
    embedding=lambda _: "",
    head="",
    examples="...experts.0.gate_proj.weight",
    keeps_others=True,
    discover=discover,
)
