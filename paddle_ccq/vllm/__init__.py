# SPDX-License-Identifier: Apache-2.0
"""CCQ checkpoints in vLLM: a plugin that vLLM finds by itself."""
