# SPDX-License-Identifier: Apache-2.0
"""Targets: what a checkpoint for an engine looks like, one folder an engine."""
