# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the few FastDeploy interfaces that the plugin touches, on the CPU.

Written from the facts in docs/reference/serving-fastdeploy.md: names, arguments, shapes, and the
order in which things happen. The arithmetic is this package's decoder.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import paddle

from paddle_ccq.codec import formats
from paddle_ccq.codec.floats import BFLOAT16
from paddle_ccq.codec.row_order import unpermute_rows
from paddle_ccq.fastdeploy.plugin import BACKEND, CONFIG, QUANTIZATION

SUFFIXES = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
ATTRIBUTES = ("weight", "weight_scale", "super_scales", "code_scale", "code_zp")
TYPES = ("uint8", "uint8", "bfloat16", "float32", "float32")
UNIT = 2176  # bytes, custom_ops/gpu/moe/trellis_repack.h


def numpy_of(tensor: paddle.Tensor) -> np.ndarray:
    """Paddle shows bfloat16 as uint16."""
    values = tensor.numpy()
    return values.view(BFLOAT16) if tensor.dtype == paddle.bfloat16 else values


def decode(tensors: list[np.ndarray]) -> np.ndarray:
    """float32 [K, N] with the input rows in plain order."""
    named = dict(zip(SUFFIXES, tensors, strict=True))
    return unpermute_rows(formats.decode("wint2", named, "float32"))


def expert_block(
    x: np.ndarray, ends: np.ndarray, up_gate: list[np.ndarray], down: list[np.ndarray]
) -> np.ndarray:
    out = np.zeros((len(x), down[0].shape[1]), np.float32)
    start = 0
    for expert, end in enumerate(ends):
        gate, up = np.split(x[start:end] @ up_gate[expert], 2, axis=1)
        out[start:end] = (gate / (1 + np.exp(-gate)) * up) @ down[expert]
        start = end
    return out


class Layer(paddle.nn.Layer):
    """FusedMoE, as far as a method sees it."""

    expert_id_offset = 0
    weight_key_map = {  # noqa: RUF012
        f"{projection}_expert_{attribute}_key": f"{{}}.{projection}.{suffix}"
        for projection in ("up_gate_proj", "down_proj")
        for attribute, suffix in zip(ATTRIBUTES, SUFFIXES, strict=True)
    }

    def __init__(self, config: Any, layer_idx: int, hidden: int, width: int, experts: int) -> None:
        super().__init__(dtype="bfloat16")
        self.layer_idx = layer_idx
        self.hidden_size, self.moe_intermediate_size = hidden, width
        self.num_experts = self.num_local_experts = experts
        self.top_k, self.ep_size = 2, 1
        self.activation, self.with_bias = "swiglu", False
        self.gate_correction_bias = None
        self.fd_config = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            model_config=SimpleNamespace(model="no folder"),
            graph_opt_config=SimpleNamespace(use_cudagraph=True),
        )
        assert config.get_quant_method(self)  # FastDeploy asks twice
        self.quant_method = config.get_quant_method(self)

    def create(self) -> None:
        self.quant_method.create_weights(self, weight_loader=None)


class Wint2Method:
    """CutlassWint2FusedMoeMethod."""

    def __init__(self, config: Any) -> None:
        self.moe_quant_type = config.moe_quant_type

    def create_weights(self, layer: Layer, **attributes: Any) -> None:
        hidden, width = layer.hidden_size, layer.moe_intermediate_size
        for projection, k, n in (("up_gate_proj", hidden, 2 * width), ("down_proj", width, hidden)):
            shapes = ([k // 4, n], [k // 128, n], [n], [n], [n])
            for name, shape, dtype in zip(ATTRIBUTES, shapes, TYPES, strict=True):
                parameter = layer.create_parameter(
                    [layer.num_experts, *shape],
                    dtype=dtype,
                    default_initializer=paddle.nn.initializer.Constant(0),
                )
                setattr(layer, f"{projection}_{name}", parameter)

    def process_prequanted_weights(
        self, layer: Layer, state: dict[str, paddle.Tensor], is_rearrange: bool = False
    ) -> None:
        for projection in ("up_gate_proj", "down_proj"):
            for name, suffix in zip(ATTRIBUTES, SUFFIXES, strict=True):
                experts = range(layer.num_experts)
                stacked = paddle.stack([state[f"{e}.{projection}.{suffix}"] for e in experts])
                if name == "weight":
                    e, rows, n = stacked.shape
                    tiles = stacked.reshape([e, rows // 16, 16, n // 8, 8])
                    stacked = tiles.transpose([0, 3, 1, 4, 2]).reshape([e, rows, n])
                getattr(layer, f"{projection}_{name}").set_value(stacked)

    def apply(
        self, layer: Layer, x: paddle.Tensor, gate: Any, topk_ids_hookfunc: Any = None
    ) -> paddle.Tensor:
        # The least that any release takes.
        rows, ends, places, weights, ids, *_ = dispatch(
            x,
            gate(x.cast("float32")),
            layer.gate_correction_bias,
            None,
            layer.top_k,
            False,
            self.moe_quant_type,
            topk_only_mode=False,
        )
        if topk_ids_hookfunc is not None:
            topk_ids_hookfunc(topk_ids=ids)
        decoded = []
        for projection in ("up_gate_proj", "down_proj"):
            stored = [numpy_of(getattr(layer, f"{projection}_{name}")) for name in ATTRIBUTES]
            e, quant_rows, n = stored[0].shape
            tiles = stored[0].reshape(e, n // 8, quant_rows // 16, 8, 16)
            stored[0] = tiles.transpose(0, 2, 4, 1, 3).reshape(e, quant_rows, n)
            decoded.append([decode([part[i] for part in stored]) for i in range(e)])
        calls.append("own kernel")
        out = expert_block(rows.cast("float32").numpy(), ends.numpy(), *decoded)
        return reduce(
            paddle.to_tensor(out).cast(x.dtype), weights, places, ids, None, norm_topk_prob=True
        )


calls: list[str] = []
results_of_dispatch = 8


def dispatch(
    x: paddle.Tensor,
    scores: paddle.Tensor,
    bias: Any,
    in_scale: Any,
    top_k: int,
    group: bool,
    quant_type: str,
    topk_only_mode: bool,
) -> list[Any]:
    """moe_expert_dispatch: softmax, the best experts, rows sorted by expert, running counts."""
    assert (bias, in_scale, group, quant_type) == (None, None, False, "w4w2")
    weights, ids = paddle.topk(paddle.nn.functional.softmax(scores), top_k)
    flat = ids.numpy().reshape(-1)
    order = np.argsort(flat, kind="stable")
    ends = np.cumsum(np.bincount(flat, minlength=scores.shape[1])).astype(np.int64)
    rows = paddle.to_tensor(x.cast("float32").numpy()[order // top_k]).cast(x.dtype)
    found = [rows, paddle.to_tensor(ends), paddle.to_tensor(np.argsort(order)), weights, ids]
    return [*found, None, None, None][:results_of_dispatch]


def reduce(
    out: paddle.Tensor,
    weights: paddle.Tensor,
    places: paddle.Tensor,
    ids: paddle.Tensor,
    bias: Any,
    norm_topk_prob: bool,
    routed_scaling_factor: float = 1.0,
) -> paddle.Tensor:
    """moe_expert_reduce: a token's rows, weighted and summed."""
    assert bias is None and norm_topk_prob and routed_scaling_factor == 1.0
    share = (weights / weights.sum(axis=1, keepdim=True)).numpy()
    found = out.cast("float32").numpy()[places.numpy()].reshape([*share.shape, -1])
    return paddle.to_tensor((found * share[..., None]).sum(axis=1)).cast(out.dtype)


class Wint4Method:
    def __init__(self, config: Any) -> None:
        pass


class Config:
    """WINT2Config."""

    def __init__(self, end_layer: int) -> None:
        self.moe_quant_type = "w4w2"
        self.moe_w4_quant_end_layer = end_layer

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Config:
        w4 = config.get("moe_quant_config", {}).get("moe_w4_quant_config", {})
        return cls(w4.get("quant_end_layer", 6))

    def get_quant_method(self, layer: Any) -> Any:
        if not isinstance(layer, Layer):
            return "dense"
        if layer.layer_idx <= self.moe_w4_quant_end_layer:
            return Wint4Method(self)
        return sys.modules[BACKEND].CutlassWint2FusedMoeMethod(self)


def modules(version: str) -> dict[str, ModuleType]:
    """Entries for sys.modules."""
    made = {}
    for name in (BACKEND, CONFIG):  # QUANTIZATION is CONFIG's parent
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            made.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    made["fastdeploy"].__version__ = version
    made[BACKEND].CutlassWint2FusedMoeMethod = Wint2Method
    made[BACKEND].moe_expert_dispatch = dispatch
    made[BACKEND].moe_expert_reduce = reduce
    made[BACKEND].get_tensor = lambda value: value
    made[CONFIG].WINT2Config = Config
    made[QUANTIZATION].get_quantization_config = get_quantization_config
    return made


def get_quantization_config(quantization: str) -> type:
    if quantization != "wint2":
        raise ValueError(f"Invalid quantization method: {quantization}")
    return sys.modules[CONFIG].WINT2Config


class Ops:
    """The compiled extension: shapes and types as custom_ops/paddle has them, on the CPU."""

    @staticmethod
    def ccq_repack(*tensors: paddle.Tensor) -> list[paddle.Tensor]:
        assert [str(t.dtype) for t in tensors] == [f"paddle.{dtype}" for dtype in TYPES]
        quant, scales, supers, code_scale, code_zp = map(numpy_of, tensors)
        e, rows, n = quant.shape
        k = rows * 4
        tiles = quant.reshape(e, k // 128, 32, n // 16, 16).transpose(0, 3, 1, 2, 4)
        pairs = scales.reshape(e, k // 128, n // 16, 16).transpose(0, 2, 1, 3)
        columns = np.stack([code_scale, code_zp, supers.astype(np.float32)], axis=1)
        columns = columns.reshape(e, 3, n // 16, 16).transpose(0, 2, 1, 3)
        # The real op's shape; what stands where is its own affair.
        columns = np.concatenate([columns, columns[:, :, :1]], 2)
        general = np.any(code_scale % 1 != 0) or np.any(code_zp % 1 != 0)
        return [
            paddle.to_tensor(np.ascontiguousarray(tiles).reshape(e, n // 16, k // 128, 512)),
            paddle.to_tensor(np.ascontiguousarray(pairs)),
            paddle.to_tensor(columns.view(np.int32).reshape(2, e, n // 16, 32)),
            paddle.to_tensor(np.array([int(general)], np.int32)),
        ]

    @staticmethod
    def ccq_repack_trellis(*tensors: paddle.Tensor) -> list[paddle.Tensor]:
        assert [str(t.dtype) for t in tensors] == [f"paddle.{dtype}" for dtype in TYPES[:3]]
        codes, scales, supers = map(numpy_of, tensors)
        e, rows, n = codes.shape
        k, wide = rows * 4, -(-n // 64) * 64
        # 34 rows of 64 bytes a unit, as large as the real one; what stands where is its own affair.
        units = np.zeros((e, k // 128, 34, wide), np.uint8)
        units[:, :, :32, :n] = codes.reshape(e, k // 128, 32, n)
        units[:, :, 32, :n] = scales
        units = units.reshape(e, k // 128, 34, wide // 64, 64).transpose(0, 3, 1, 2, 4)
        columns = np.zeros((e, wide), np.float32)
        columns[:, :n] = supers.astype(np.float32)
        return [
            paddle.to_tensor(np.ascontiguousarray(units).reshape(e, wide // 64, k // 128, UNIT)),
            paddle.zeros([e, n // 16, 1, 1], "uint8"),
            paddle.to_tensor(columns),
        ]

    @staticmethod
    def ccq_moe_ffn_stored(x: paddle.Tensor, ends: paddle.Tensor, *rest: Any) -> paddle.Tensor:
        *stored, format, order = rest
        assert order == "plain" and ends.dtype == paddle.int64 and len(stored) == 4
        decoded = []
        for codes, supers in (stored[:2], stored[2:]):
            parts = zip(numpy_of(codes), numpy_of(supers), strict=True)
            named = [{"quant_weight": c, "super_scales": s} for c, s in parts]
            decoded.append([formats.decode(format, tensors, "float32") for tensors in named])
        calls.append("ccq_moe_ffn_stored")
        out = expert_block(x.cast("float32").numpy(), ends.numpy(), *decoded)
        return paddle.to_tensor(out).cast(x.dtype)

    @staticmethod
    def ccq_moe_ffn(x: paddle.Tensor, ends: paddle.Tensor, *rest: Any) -> paddle.Tensor:
        *packed, up_integer, down_integer, order = rest
        trellis = packed[0].shape[-1] == UNIT
        assert (type(up_integer), type(down_integer)) == (bool, bool)
        assert order == ("plain" if trellis else "fastdeploy-2.1")
        assert ends.dtype == paddle.int64 and len(packed) == 6
        one = Ops._decode_trellis if trellis else Ops._decode
        decoded = [one(*(t.numpy() for t in packed[i : i + 3])) for i in (0, 3)]
        calls.append("ccq_moe_ffn")
        out = expert_block(x.cast("float32").numpy(), ends.numpy(), *decoded)
        return paddle.to_tensor(out).cast(x.dtype)

    @staticmethod
    def _decode(quant: np.ndarray, scales: np.ndarray, columns: np.ndarray) -> list[np.ndarray]:
        e, n, k = quant.shape[0], quant.shape[1] * 16, quant.shape[2] * 128
        tiles = quant.reshape(e, n // 16, k // 128, 32, 16).transpose(0, 2, 3, 1, 4)
        weight = tiles.reshape(e, k // 4, n)
        scale = scales.transpose(0, 2, 1, 3).reshape(e, k // 128, n)
        values = columns.view(np.float32).reshape(e, n // 16, 4, 16).transpose(0, 2, 1, 3)
        code_scale, code_zp, supers, _ = values.reshape(e, 4, n).transpose(1, 0, 2)
        supers = supers.astype(BFLOAT16)
        parts = (weight, scale, supers, code_scale, code_zp)
        return [decode([np.ascontiguousarray(part[i]) for part in parts]) for i in range(e)]

    @staticmethod
    def _decode_trellis(
        units: np.ndarray, scales: np.ndarray, columns: np.ndarray
    ) -> list[np.ndarray]:
        e, fours, blocks, _ = units.shape
        n = scales.shape[1] * 16
        rows = units.reshape(e, fours, blocks, 34, 64).transpose(0, 2, 3, 1, 4)
        rows = rows.reshape(e, blocks, 34, fours * 64)[..., :n]
        found = []
        for i in range(e):
            tensors = {
                "quant_weight": np.ascontiguousarray(rows[i, :, :32]).reshape(blocks * 32, n),
                "weight_scale": np.ascontiguousarray(rows[i, :, 32]),
                "super_scales": columns[i, :n].astype(BFLOAT16),
            }
            found.append(formats.decode("ccq-2t", tensors, "float32"))
        return found
