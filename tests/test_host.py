# SPDX-License-Identifier: Apache-2.0
"""The math library's path: not chosen where it is slow, or chosen where it cannot run."""

from __future__ import annotations

import os

import pytest

from paddle_ccq.host import use_fast_products

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
