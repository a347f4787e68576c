# SPDX-License-Identifier: Apache-2.0
"""A tensor of a model: what it is, its shape, where it lies on disk, how it may be cut.

A family's file makes these records once, from config.json; nobody else reads a tensor's name to
learn what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

# The projections of a SwiGLU MLP, gate and up fused, by their canonical names.
UP_GATE, DOWN = "up_gate_proj", "down_proj"
PROJECTIONS = (UP_GATE, DOWN)
# Those of attention, with queries, keys and values fused.
QKV, OUT = "qkv_proj", "o_proj"


class Role(Enum):
    """What a tensor does in the model; the value is how messages call it."""

    EXPERT = "a routed expert"
    SHARED_EXPERT = "a shared expert"
    ATTENTION = "attention"
    MLP = "a dense MLP"
    ROUTER = "a router"
    CORRECTION_BIAS = "a router's correction bias"
    NORM = "a norm"
    EMBEDDING = "the embedding"
    HEAD = "the output head"
    OTHER = "another tensor"


DENSE_ROLES = frozenset({Role.SHARED_EXPERT, Role.ATTENTION, Role.MLP})
# They decide discretely which experts run, so that no rounding is taken lightly.
EXACT_ROLES = frozenset({Role.ROUTER, Role.CORRECTION_BIAS})


@dataclass(frozen=True)
class Cut:
    """How a matrix [in, out] is cut: along `axis`, each of the fused `parts` in equal pieces.

    `unit` is what may not be torn apart: the head size for attention, otherwise 1.
    """

    axis: int
    parts: tuple[int, ...]
    unit: int = 1

    def fits(self, size: int) -> bool:
        """Whether every part can be cut into `size` pieces."""
        return all(part % (size * self.unit) == 0 for part in self.parts)

    def blocks(self, rank: int, size: int) -> list[tuple[int, int]]:
        """(begin, end) along the axis of what belongs to a rank, in order."""
        result = []
        start = 0
        for part in self.parts:
            width = part // size
            result.append((start + rank * width, start + (rank + 1) * width))
            start += part
        return result

    def rank_shape(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        """Shape of one rank's part of a matrix [in, out]."""
        return tuple(n // size if axis == self.axis else n for axis, n in enumerate(shape))


@dataclass(frozen=True)
class Stacked:
    """A place in a tensor of three dimensions that holds a matrix of every expert.

    Attributes:
        shape: of the whole stored tensor: [experts, out, in].
        index: the expert's place along the first axis.
        rows: of the expert's matrix, with a beginning and an end; None: all of them.
    """

    name: str
    shape: tuple[int, int, int]
    index: int
    rows: slice | None = None


@dataclass(frozen=True)
class Source:
    """One tensor on disk: its name, its shape, and the canonical columns that it holds.

    Attributes:
        columns: None for tensors that are stored whole.
        aliases: names under which other programs store the same tensor.
        stacked: where the same values lie in checkpoints that stack the matrices of all experts.
    """

    name: str
    shape: tuple[int, ...]
    columns: slice | None = None
    aliases: tuple[str, ...] = ()
    stacked: Stacked | None = None


@dataclass(frozen=True)
class Storage:
    """How a canonical tensor lies on disk: its parts, and whether they are stored transposed.

    Attributes:
        packed: what the names of a packed matrix' tensors begin with, before `.quant_weight` and
            the other suffixes.
        packed_here: the same in checkpoints that keep the naming for everything else too; "" where
            it is no other.
    """

    parts: tuple[Source, ...]
    transposed: bool
    packed: str
    packed_here: str = ""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model.

    Attributes:
        name: the canonical name.
        template: the name with {layer} and {expert} for their numbers, and * for numbers of other
            parts; tensors that differ in these alone share it.
        shape: canonical; matrices are [in, out].
        layer, expert: their numbers, None outside of layers and experts.
        projection: which one of its role it is in its place: a projection, or which norm.
        cut: how it is cut for tensor parallelism; None for what every rank holds whole.
        sources: on disk, by naming (Family.namings).
        optional: a checkpoint may lack it, such as a layer's copy of the embedding.
        kept: (name, safetensors dtype, shape) of the tensors that hold it as the source has it, in
            the naming "pt"; and source_bytes: what it takes there. The source's files, or
            config.json, say so (checkpoint/source_tensors.py).
    """

    name: str
    template: str
    role: Role
    shape: tuple[int, ...]
    projection: str
    layer: int | None = None
    expert: int | None = None
    cut: Cut | None = None
    sources: Mapping[str, Storage] = field(default_factory=dict, repr=False, compare=False)
    optional: bool = False
    kept: tuple[tuple[str, str, tuple[int, ...]], ...] = field(
        default=(), repr=False, compare=False
    )
    source_bytes: int = field(default=0, repr=False, compare=False)

    @property
    def is_expert(self) -> bool:
        """A matrix of a routed expert."""
        return self.role is Role.EXPERT

    @property
    def is_dense(self) -> bool:
        """A linear layer outside of the routed experts."""
        return self.role in DENSE_ROLES

    @property
    def is_linear(self) -> bool:
        """A matrix of a linear layer, the kind that can be quantized."""
        return self.is_expert or self.is_dense

    @property
    def stem(self) -> str:
        """The canonical name of the layer that the tensor is the weight of."""
        return self.name.removesuffix(".weight")


def starred(name: str) -> str:
    """A template for a tensor outside of layers: * for every number, braces doubled."""
    parts = ("*" if part.isdigit() else part for part in name.split("."))
    return ".".join(parts).replace("{", "{{").replace("}", "}}")


class Tensors(Mapping[str, TensorSpec]):
    """All tensors of a model by canonical name, in model order."""

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self._by_name = {spec.name: spec for spec in specs}
        self._by_place = {
            (spec.role, spec.layer, spec.expert, spec.projection): spec
            for spec in self._by_name.values()
        }

    def __getitem__(self, name: str) -> TensorSpec:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def find(
        self, role: Role, projection: str, layer: int | None = None, expert: int | None = None
    ) -> TensorSpec:
        """The tensor at a place of the model.

        Raises:
            KeyError: if there is none.
        """
        return self._by_place[role, layer, expert, projection]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape."""
        return {name: spec.shape for name, spec in self._by_name.items()}
