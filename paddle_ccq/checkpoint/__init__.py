# SPDX-License-Identifier: Apache-2.0
"""Reading and writing ERNIE-4.5 checkpoints; the FastDeploy contract."""
