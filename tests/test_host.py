# SPDX-License-Identifier: Apache-2.0
"""The math library's path, and work that all processors share."""

from __future__ import annotations

import os

import numpy as np
import pytest

from paddle_ccq import host
from paddle_ccq.errors import CcqError
from paddle_ccq.host import thread_count, use_fast_products

VARIABLE = "MKL_DEBUG_CPU_TYPE"
FLAGS = "flags\t\t: fpu sse2 fma sse4_2 avx f16c avx2 bmi2\n"


@pytest.mark.parametrize(
    ("text", "known", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\n" + FLAGS, None, "5"),
        ("vendor_id\t: AuthenticAMD\n" + FLAGS, "4", "4"),
        ("vendor_id\t: GenuineIntel\n" + FLAGS, None, None),
        # Without AVX2 that path would end the process.
        ("vendor_id\t: AuthenticAMD\n" + FLAGS.replace("avx2", "xop"), None, None),
        (None, None, None),
    ],
    ids=["amd", "set by the user", "intel", "no avx2", "no such file"],
)
def test_avx2_is_asked_for_where_it_is_and_not_used(tmp_path, monkeypatch, text, known, expected):
    monkeypatch.delenv(VARIABLE, raising=False)
    if known:
        monkeypatch.setenv(VARIABLE, known)
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    use_fast_products(str(path))
    assert os.environ.get(VARIABLE) == expected
    monkeypatch.delenv(VARIABLE, raising=False)


# --- work on stripes of rows ----------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
def test_stripes_cover_a_range_once_and_in_order(monkeypatch, threads, count):
    monkeypatch.setattr(host, "default_threads", lambda: threads)
    found = np.zeros(count, np.int32)

    def work(stripe: slice) -> tuple[int, int]:
        found[stripe] += 1
        return stripe.start, stripe.stop

    places = host.on_stripes(work, count, 64)
    assert np.all(found == 1)
    assert places == sorted(places)
    assert all(end - begin >= 64 for begin, end in places[:-1])


def test_what_a_stripe_raises_is_raised(monkeypatch):
    monkeypatch.setattr(host, "default_threads", lambda: 2)

    def work(stripe: slice) -> None:
        if stripe.start:
            raise ValueError("the second")

    with pytest.raises(ValueError, match="the second"):
        host.on_stripes(work, 128, 64)


def test_more_threads_than_any_machine_has() -> None:
    assert thread_count(65536) == 65536
    with pytest.raises(CcqError, match="--threads 65537: must be at most 65536"):
        thread_count(65537)
