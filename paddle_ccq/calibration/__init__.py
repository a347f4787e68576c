# SPDX-License-Identifier: Apache-2.0
"""What a text says about the inputs of every expert: what calibrated encoding uses."""
