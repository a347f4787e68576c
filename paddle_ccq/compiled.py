# SPDX-License-Identifier: Apache-2.0
"""The compiled core, `core`; where it was never built, importing this says what to run.

Modules that need the core import it from here, and nothing imports them before they are needed:
planning, verifying and dequantizing work without it.
"""

from __future__ import annotations

from .errors import CoreMissingError

HOW_TO_BUILD = (
    "`pip install .` builds it; in a source tree, `python setup.py build_ext --inplace` does"
)

try:
    from . import _core as core
except ImportError as _error:
    raise CoreMissingError(
        f"the compiled core of paddle_ccq is missing or does not load ({_error}); {HOW_TO_BUILD}"
    ) from None

__all__ = ["HOW_TO_BUILD", "core"]
