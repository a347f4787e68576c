# SPDX-License-Identifier: Apache-2.0
"""Model families: what tensors a model has, what each of them is, and how it lies on disk."""
