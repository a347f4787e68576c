# SPDX-License-Identifier: Apache-2.0
"""2-bit Convolutional Code Quantization (arXiv 2507.07145) for mixture-of-experts models."""

from .host import use_fast_products
from .version import __version__

__all__ = ["__version__"]

# Before Paddle is imported, by whichever module comes first.
use_fast_products()
