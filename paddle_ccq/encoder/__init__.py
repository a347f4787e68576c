# SPDX-License-Identifier: Apache-2.0
"""Choosing codes, scales and code-cluster pairs for a weight matrix."""
