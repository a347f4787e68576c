# SPDX-License-Identifier: Apache-2.0
"""What a config.json must not say: another model, two values of one thing, unknown positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import CONFIG_FILE, QUANT_METHODS
from ..fields import Fields, check_same, same, show
from .config_keys import fixed_problems, unknown_keys

ARCHITECTURES = ("Ernie4_5_MoeForCausalLM", "Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM")
MODEL_TYPES = ("ernie4_5_moe", "ernie4_5", "ernie")
# What a rope object may hold beside its type and rope_theta, and the value that changes nothing;
# None: any value, since only other types of scaling look at it.
ROPE_NEUTRAL = {
    "factor": 1,
    "attention_factor": 1,
    "partial_rotary_factor": 1,
    "original_max_position_embeddings": None,
}


def model_type(fields: Fields, experts: bool) -> str:
    """The model_type, or the one of transformers' class where it is absent.

    Raises:
        CcqError: for one of another family, and where it or the architecture is that of a model
            without experts though `experts` says that there are some.
    """
    value = fields.get("model_type", "ernie4_5_moe" if experts else "ernie4_5")
    if not isinstance(value, str):
        raise fields.fail("model_type", f"{show(value)} is not a name")
    if value not in MODEL_TYPES:
        raise fields.fail(
            "model_type", f"{show(value)} is not supported; supported are {', '.join(MODEL_TYPES)}"
        )
    if experts:
        # Both of these build a model without experts in transformers.
        dense = fields.get("architectures")[0]
        for key, stated in (("model_type", value), ("architectures", dense)):
            if stated in ("ernie4_5", *ARCHITECTURES[1:]):
                raise fields.fail(
                    key,
                    f"{show(stated)} is a model without experts, but moe_num_experts says"
                    f" {fields.get('moe_num_experts')}",
                )
    return value


def refuse_unsupported(fields: Fields, experts: bool, problems: list[str] | None) -> None:
    """Refuse variants that would load and then compute something else.

    With a list of `problems`, what leaves the tensors as they are is added to it instead.
    """
    if fields.boolean("use_bias", False):
        raise fields.fail("use_bias", "true; models with bias terms are not supported")
    for key, problem in fixed_problems(fields.values, experts):
        if problems is None:
            raise fields.fail(key, problem)
        problems.append(f"{CONFIG_FILE}: {key}: {problem}")
    use_moe = fields.boolean("use_moe", experts)
    if use_moe != experts:
        stated = fields.get("moe_num_experts", 0)
        raise fields.fail("use_moe", f"{show(use_moe)}, but moe_num_experts says {stated}")
    window = fields.get("sliding_window", 0)
    # With use_sliding_window false (anything else is refused above) the window is not used.
    if window not in (0, -1) and fields.get("use_sliding_window", None) is None:
        raise fields.fail("sliding_window", f"{show(window)} is not supported; only null")
    kinds = fields.get("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise fields.fail("layer_types", f"{show(kinds)} is not supported, only 'full_attention'")
    if fields.get("compression_config", None) is not None:
        raise fields.fail("compression_config", "a quantized checkpoint of an unknown format")
    quantization = fields.get("quantization_config", {})
    if not isinstance(quantization, dict):
        raise fields.fail("quantization_config", f"{show(quantization)} is not an object")
    if "quantization" not in quantization:
        method = quantization.get("quant_method")
        if method is not None and method not in QUANT_METHODS:
            raise fields.fail(
                "quantization_config",
                f"quant_method {show(method)} is not a format that is read here; use the float"
                " checkpoint",
            )


def rope_theta(fields: Fields) -> float:
    """The base of the rotary angles, from all the places that may state it."""
    stated = [("rope_theta", fields.get("rope_theta", None))]
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.get(key, {})
        if not isinstance(rope, dict):
            raise fields.fail(key, f"{show(rope)} is not an object")
        _check_rope(fields, key, rope)
        stated.append((f"{key}.rope_theta", rope.get("rope_theta")))
    stated = [(label, value) for label, value in stated if value is not None]
    for label, value in stated:
        Fields({label: value}, fields.where).positive(label)
        check_same(*stated[0], label, value, fields.fail)
    return float(stated[0][1]) if stated else 500000.0


def _check_rope(fields: Fields, key: str, rope: dict[str, Any]) -> None:
    """Refuse every form of rotary positions but the plain one."""
    for name in ("rope_type", "type"):
        if rope.get(name) not in (None, "default"):
            raise fields.fail(
                key,
                f"{name.removeprefix('rope_')} {show(rope[name])} is not supported, only 'default'",
            )
    for name, value in rope.items():
        if value is None or name in ("rope_type", "type", "rope_theta"):
            continue
        neutral = ROPE_NEUTRAL.get(name, value)
        if name not in ROPE_NEUTRAL or not (neutral is None or same(value, neutral)):
            only = f", only {neutral}" if name in ROPE_NEUTRAL else " with the default type"
            raise fields.fail(f"{key}.{name}", f"{show(value)} is not supported{only}")


def check_derived(fields: Fields, head_dim: int, shared_size: int) -> None:
    """Keys that state what follows from others."""
    rotary = fields.get("rotary_dim", head_dim)
    check_same("rotary_dim", rotary, "head_dim", head_dim, fields.fail)
    for key in ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"):
        check_same(
            key,
            fields.get(key, shared_size),
            "moe_num_shared_experts times moe_intermediate_size",
            shared_size,
            fields.fail,
        )


def check_layers(fields: Fields, moe: Sequence[bool]) -> None:
    """Lists with an entry for each layer; `moe` says which layers have experts."""
    for key, expected in (
        ("layer_types", ["full_attention"] * len(moe)),
        ("mlp_layer_types", ["sparse" if sparse else "dense" for sparse in moe]),
    ):
        stated = fields.get(key, None)
        if stated in (None, []):
            continue
        if not isinstance(stated, list):
            raise fields.fail(key, f"{show(stated)} is not a list")
        if len(stated) != len(expected):
            raise fields.fail(
                key, f"has {len(stated)} entries, but num_hidden_layers says {len(expected)}"
            )
        for layer, (found, wanted) in enumerate(zip(stated, expected, strict=True)):
            if found != wanted:
                raise fields.fail(
                    key, f"{show(found)} for layer {layer}, which is {wanted!r} by the other keys"
                )


def notes(fields: Fields) -> list[str]:
    """What config.json leaves open, and what of it is not understood."""
    notes = []
    # Loaders have other defaults than these where the key is absent.
    nested = [fields.get(key, {}).get("rope_theta") for key in ("rope_scaling", "rope_parameters")]
    if fields.get("rope_theta", None) is None and nested == [None, None]:
        notes.append(f"{CONFIG_FILE} has no rope_theta: taken as 500000")
    if fields.get("rms_norm_eps", None) is None:
        notes.append(f"{CONFIG_FILE} has no rms_norm_eps: taken as 1e-05")
    unknown = unknown_keys(fields.values)
    if unknown:
        shown = ", ".join(f"{show(key)[1:-1]} ({show(fields.values[key])})" for key in unknown)
        notes.append(
            f"{CONFIG_FILE}: unknown keys are taken to change nothing that is computed: {shown}"
        )
    return notes
