# SPDX-License-Identifier: Apache-2.0
"""Tuning what is continuous in a quantized model against the float model's logits."""
