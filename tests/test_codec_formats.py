# SPDX-License-Identifier: Apache-2.0
"""The registry of formats: a record that promises what encoder, decoder or reader does not do."""

from __future__ import annotations

import numpy as np
import pytest

from paddle_ccq.codec import formats, trellis
from paddle_ccq.codec.row_order import FASTDEPLOY_2_1, PLAIN, ROW_ORDERS, unpermute_rows
from paddle_ccq.encoder.base import PRESETS
from paddle_ccq.encoder.factory import make_encoder, make_encoders
from paddle_ccq.encoder.layouts import LAYOUTS
from paddle_ccq.encoder.ldlq import LdlqEncoder
from paddle_ccq.encoder.recipes import RECIPES, TRELLIS_RECIPES

QUANTIZED = [name for name, f in formats.FORMATS.items() if f.kind is not formats.Kind.FLOAT]


def a_matrix(k: int = 256, n: int = 32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((k, n)).astype(np.float32)


def test_every_code_has_a_search_with_all_presets() -> None:
    assert set(LAYOUTS) == set(RECIPES)
    assert set(formats.CCQ_FORMATS) == {*RECIPES, trellis.NAME}
    assert all(tuple(recipes) == PRESETS for recipes in (*RECIPES.values(), TRELLIS_RECIPES))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("row_order", ROW_ORDERS)
def test_what_an_encoder_makes_is_what_the_record_says(name: str, row_order: str) -> None:
    f, weight = formats.get(name), a_matrix()
    k, n = weight.shape
    stored = formats.order_rows(weight, name, row_order)
    tensors = make_encoder(name, "fast", threads=1).encode(np.ascontiguousarray(stored.T)).tensors
    specs = f.specs(k, n)
    assert tensors.keys() == specs.keys()
    for suffix, (shape, dtype) in specs.items():
        assert tensors[suffix].shape == shape
        assert tensors[suffix].dtype == formats.SAFETENSORS_DTYPES[dtype]
    assert f.column_scale in specs and specs[f.column_scale][0] == (n,)
    decoded = formats.decode(name, tensors, "float32", row_order)
    error = np.square(decoded - weight).sum() / np.square(weight).sum()
    assert error < f.largest_error / 3
    # The record's rule about row orders is the only one: no other order comes as close.
    permuted = formats.decode(name, tensors, "float32", PLAIN)
    assert np.array_equal(permuted, decoded) == (not f.row_ordered or row_order == PLAIN)
    if f.row_ordered and row_order == FASTDEPLOY_2_1:
        np.testing.assert_array_equal(unpermute_rows(permuted), decoded)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_column_scale_scales_the_column(name: str) -> None:
    f, weight = formats.get(name), a_matrix()
    tensors = dict(make_encoder(name, "fast", threads=1).encode(weight.T.copy()).tensors)
    before = formats.decode(name, tensors, "float32")
    tensors[f.column_scale] = (tensors[f.column_scale] * 2).astype(tensors[f.column_scale].dtype)
    np.testing.assert_array_equal(formats.decode(name, tensors, "float32"), 2 * before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_are_rounded_to_what_an_engine_computes_in(dtype: str) -> None:
    tensors = make_encoder("wint2", "fast", threads=1).encode(a_matrix().T.copy()).tensors
    exact = formats.decode("wint2", tensors, "float32")
    rounded = formats.decode("wint2", tensors, dtype)
    assert rounded.dtype == np.float32 and not np.array_equal(rounded, exact)
    np.testing.assert_allclose(rounded, exact, rtol=2**-7)


def test_statistics_reach_the_formats_that_can_be_calibrated_and_no_other() -> None:
    made = make_encoders(QUANTIZED, "fast", threads=1, hessians=lambda name: None)
    assert set(made) == set(QUANTIZED)
    for name, encoder in made.items():
        assert isinstance(encoder, LdlqEncoder) == formats.get(name).calibrated


def test_uses_and_kinds_select() -> None:
    assert formats.named(use=formats.Use.EXPERTS) == ("wint2", "ccq-2t", "ccq-2.5", "ccq-2.75")
    assert formats.named(use=formats.Use.DENSE) == ("wint8", "bf16")
    assert formats.named(formats.Kind.INTEGER, formats.Use.DENSE) == ("wint8",)
    assert formats.DEFAULT_EXPERTS in formats.EXPERT_FORMATS
    with pytest.raises(ValueError, match="unknown format 'int3'; known: wint8"):
        formats.get("int3")
