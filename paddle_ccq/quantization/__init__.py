# SPDX-License-Identifier: Apache-2.0
"""One quantization from its options to the finished folder."""
