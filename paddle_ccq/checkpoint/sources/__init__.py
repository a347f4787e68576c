# SPDX-License-Identifier: Apache-2.0
"""Numeric formats that models are published in: float, FP8 with scales, INT4 groups, stacks."""
