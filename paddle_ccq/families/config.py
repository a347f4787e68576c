# SPDX-License-Identifier: Apache-2.0
"""A model's description as every family states it: what plans, readers and writers rely on."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..errors import CcqError
from .family import Family
from .tensor import Tensors, TensorSpec

CONFIG_FILE = "config.json"
FLOAT_TYPES = ("bfloat16", "float16", "float32")

# quant_method of sources whose values are read (checkpoint/sources/scheme.py), and of checkpoints
# that this package writes for other loaders than FastDeploy.
FP8, COMPRESSED_TENSORS, CCQ = "fp8", "compressed-tensors", "ccq"
# Of the structure of the last one's quantization_config.
CCQ_VERSION = 1
QUANT_METHODS = (FP8, COMPRESSED_TENSORS, CCQ)

# Of quantization_config: FastDeploy's key of the experts' format, and the packed modules of Hugging
# Face's layout.
STRUCTURE_KEY, MODULES_KEY = "quantization", "experts"


def is_packed_entry(entry: object, where: str = CONFIG_FILE) -> bool:
    """Whether a quantization_config is that of Hugging Face's layout, with this package's method.

    FastDeploy's structure may name the method as well.

    Raises:
        CcqError: if it has keys of both, so that readers would go by different ones.
    """
    if not isinstance(entry, Mapping) or entry.get("quant_method") != CCQ:
        return False
    if STRUCTURE_KEY not in entry:
        return True
    if MODULES_KEY in entry:
        raise CcqError(
            f"{where}: quantization_config: {STRUCTURE_KEY} is of FastDeploy's structure and"
            f" {MODULES_KEY} of Hugging Face's layout; only one of them can be right"
        )
    return False


# Far above any published model; they bound the work that a hostile file can ask for.
MAX_LAYERS = 512
MAX_EXPERTS = 1024
MAX_WIDTH = 1 << 24


def _without(raw: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """config.json with 0 for these keys where they are stated, nested objects included."""
    changed = {}
    for key, value in raw.items():
        if key in keys and value is not None:
            changed[key] = 0
        else:
            changed[key] = _without(value, keys) if isinstance(value, dict) else value
    return changed


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The fields of a config.json that all families have; a family's own class adds its others.

    Attributes:
        family: whose file says what the tensors are.
        moe_num_experts: routed experts of a layer; 0: a dense model.
        dtype: of the weights, one of FLOAT_TYPES.
        raw: the whole config.json, every value under the name that is read.
        tie_stated: whether tie_word_embeddings is stated; if not, a head among the weights decides.
        notes: what was assumed, and which keys are unknown: a line each, for the user.
    """

    family: Family = field(repr=False, compare=False)
    architectures: tuple[str, ...]
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    moe_num_experts: int
    moe_k: int
    moe_intermediate_size: int
    num_nextn_predict_layers: int
    dtype: str
    raw: dict[str, Any] = field(repr=False, compare=False)
    tie_stated: bool = field(default=True, compare=False)
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)
    # What names of layers that without_mtp() took out begin with; None: nothing was taken out.
    dropped: tuple[str, ...] | None = field(default=None, repr=False, compare=False)
    # The family's tensors as a source has them; None: as config.json alone calls for them.
    of_source: Tensors | None = field(default=None, repr=False, compare=False)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer has routed experts."""
        raise NotImplementedError

    def moe_layers(self) -> list[int]:
        """Layers with routed experts, ascending.

        Those for multi-token prediction count too where they are numbered on from the others.
        """
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer)]

    def dense_layers(self) -> list[int]:
        """The layers below num_hidden_layers without routed experts, ascending."""
        return [layer for layer in range(self.num_hidden_layers) if not self.is_moe_layer(layer)]

    @property
    def prediction_layers(self) -> range:
        """Numbers of the layers for multi-token prediction that count on from the others."""
        return range(0)

    @property
    def recorded(self) -> dict[str, Any]:
        """What a packed checkpoint's quantization_config must hold to be read again."""
        return {}

    def spell_out(self, result: dict[str, Any]) -> None:
        """Add to an output's fields what they leave open, so that all loaders build this model."""

    def with_tie(self, tied: bool) -> ModelConfig:
        """The same model with its output tied to the embedding, or not; stated in `raw` too."""
        raw = {**self.raw, "tie_word_embeddings": tied}
        return replace(self, tie_word_embeddings=tied, tie_stated=True, raw=raw)

    def is_prediction(self, tensor: TensorSpec) -> bool:
        """Whether a tensor is part of the layers for multi-token prediction."""
        behind = tensor.layer is not None and tensor.layer >= self.num_hidden_layers
        return behind or self.family.is_mtp(tensor.name)

    def without_mtp(self) -> ModelConfig:
        """The same model without layers for multi-token prediction; stated in `raw` too."""
        found, layers = self.of_source, self.prediction_layers
        places = {
            tensor.template.partition("{layer}")[0] + f"{tensor.layer}."
            for tensor in (self.tensors.values() if layers else ())
            if tensor.layer in layers and "{layer}" in tensor.template
        }
        if found is not None:
            found = Tensors(spec for spec in found.values() if not self.is_prediction(spec))
        raw = _without(self.raw, self.family.mtp_keys)
        dropped = (*(self.dropped or ()), *sorted(places))
        return replace(self, num_nextn_predict_layers=0, raw=raw, of_source=found, dropped=dropped)

    def is_dropped(self, name: str) -> bool:
        """Whether an on-disk name belongs to layers that without_mtp() took out."""
        if self.dropped is None:
            return False
        return self.family.is_mtp(name) or name.startswith(self.dropped)

    def with_head_of(self, names: Container[str]) -> ModelConfig:
        """Where config.json doesn't say, tied unless a head is among the stored tensors."""
        return self if self.tie_stated else self.with_tie(self.family.head not in names)

    def unnamed(self) -> list[str]:
        """Names of tensors of a source that are kept though the family does not name them."""
        if self.of_source is None:
            return []
        named = {tensor.name for tensor in self.family.tensors(self)}
        return [name for name in self.tensors if name not in named]

    @cached_property
    def tensors(self) -> Tensors:
        """Every tensor of the model by canonical name, in model order."""
        return self.of_source or Tensors(self.family.tensors(self))
