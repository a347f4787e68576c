# SPDX-License-Identifier: Apache-2.0
"""The paper's encoder: not the algorithm it claims to be, or not the error that is known of it."""

from __future__ import annotations

import numpy as np
import pytest

from paddle_ccq.codec import formats
from paddle_ccq.codec.convolution import ConvolutionalCode
from paddle_ccq.encoder import paper
from paddle_ccq.encoder.base import ErrorStats
from paddle_ccq.encoder.factory import make_encoder


@pytest.mark.parametrize("lns", [(4, 3, 2), (3, 3, 2), (3, 4, 2), (6, 4, 3), (2, 5, 1)])
def test_nearest_walk_is_the_argmin_over_the_whole_codebook(lns: tuple[int, int, int]) -> None:
    code = ConvolutionalCode(*lns)
    x = np.random.default_rng(0).normal(0, code.zero_point / 2, (40, code.N)).astype(np.float32)
    book = code.codebook() - code.zero_point
    distance = ((x[:, None].astype(np.float64) - book) ** 2).sum(-1)
    found = paper.nearest_walk(x, code)
    np.testing.assert_allclose(
        distance[np.arange(40), found], distance.min(axis=1), rtol=1e-5, atol=1e-5
    )


def test_equation_4_minimises_the_error() -> None:
    rng = np.random.default_rng(1)
    w, states = rng.standard_normal((1, 1, 64)), rng.integers(-8, 8, (1, 1, 64))
    best = paper.refit_scale(np.abs(w) * np.sign(states), states)
    target = np.abs(w) * np.sign(states)

    def error(s: float) -> float:
        return float(((target - s * states) ** 2).sum())

    assert error(best[0, 0]) < min(error(best[0, 0] * 1.01), error(best[0, 0] * 0.99))


# rel-MSE on Gaussian channels as published studies of the decoder have it, +-3 % for the sample.
@pytest.mark.parametrize(
    "format,encoder,expected",
    [
        ("wint2", "paper", 0.1297),
        ("wint2", "paper-literal", 0.70),
        ("ccq-2.75", "paper", 0.0954),
        ("ccq-2.5", "paper", 0.1252),
    ],
)
def test_error_is_the_known_one(format: str, encoder: str, expected: float) -> None:
    w = np.random.default_rng(2).standard_normal((64, 4096)).astype(np.float32)
    encoded = make_encoder(format, encoder=encoder).encode(w)
    back = formats.decode(format, encoded.tensors, dtype="float32").T
    assert encoded.stats.rel_mse == pytest.approx(ErrorStats.between(w, back).rel_mse)
    assert encoded.stats.rel_mse == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("format", paper.FORMATS)
def test_zero_channels_and_groups_stay_zero(format: str) -> None:
    w = np.random.default_rng(3).standard_normal((8, 256)).astype(np.float32)
    w[0], w[1, :64] = 0, 0
    back = formats.decode(
        format, make_encoder(format, encoder="paper").encode(w).tensors, "bfloat16"
    ).T
    assert not back[0].any() and not back[1, :64].any() and np.all(np.isfinite(back))


def test_formats_that_the_paper_does_not_have_are_refused() -> None:
    for format in formats.CCQ_FORMATS:
        if format in paper.FORMATS:
            assert make_encoder(format, encoder="paper").format == format
        else:
            with pytest.raises(ValueError, match=f"the paper has no {format}"):
                make_encoder(format, encoder="paper")
    assert set(paper.FORMATS) < set(formats.CCQ_FORMATS)
