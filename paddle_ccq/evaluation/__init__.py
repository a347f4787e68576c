# SPDX-License-Identifier: Apache-2.0
"""Perplexity, KL, top-1 agreement and tasks."""
