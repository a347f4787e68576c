# SPDX-License-Identifier: Apache-2.0
"""Check a checkpoint and start FastDeploy's server on it; works from a checkout as it is."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paddle_ccq.fastdeploy.launch import main

if __name__ == "__main__":
    sys.exit(main())
