# SPDX-License-Identifier: Apache-2.0
"""FastDeploy's WINT2 layout: stored tensors, limits, config.json, model card, inspection."""
