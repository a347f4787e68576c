# SPDX-License-Identifier: Apache-2.0
"""Serving a checkpoint with FastDeploy: what must hold before the start, and how to start it."""
