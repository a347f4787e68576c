# SPDX-License-Identifier: Apache-2.0
"""Formats: pure functions on arrays, [K, N] = [in, out], groups of 64 rows."""
