# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in Hugging Face's naming with packed experts, which vLLM reads with our plugin."""
