# SPDX-License-Identifier: Apache-2.0
"""Where bits matter: what each layer costs in each format, and the best formats for a size."""
