# SPDX-License-Identifier: Apache-2.0
"""The sensitivities as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CcqError
from ..reporting import write_whole
from .costs import PROJECTIONS, Sensitivities

SUFFIXES = (".png", ".svg", ".pdf")


def require_matplotlib(path: str | Path) -> Any:
    """matplotlib's pyplot without a display; called before hours of work, not after them.

    Raises:
        CcqError: if it is not installed, or the file's name has no known ending.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise CcqError(f"--plot {path}: must end in {', '.join(SUFFIXES)}")
    try:
        import matplotlib
    except ImportError as error:
        raise CcqError(
            "--plot needs matplotlib; install it with: pip install 'paddle-ccq[plot]'"
            f" (import matplotlib: {error})"
        ) from None
    matplotlib.use("Agg")
    # The same input gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "paddle-ccq"
    import matplotlib.pyplot as pyplot

    return pyplot


def plot(found: Sensitivities, path: str | Path) -> None:
    """One panel for every projection, with one bar for every layer and format."""
    pyplot = require_matplotlib(path)
    layers = list(found.costs)
    width = 0.8 / len(found.formats)
    figure, panels = pyplot.subplots(
        len(PROJECTIONS), 1, sharex=True, sharey=True, figsize=(max(5, 0.3 * len(layers) + 2), 5)
    )
    for panel, projection in zip(panels, PROJECTIONS, strict=True):
        for i, format in enumerate(found.formats):
            at = [n + (i - (len(found.formats) - 1) / 2) * width for n in range(len(layers))]
            heights = [found.costs[layer][projection][format] for layer in layers]
            panel.bar(at, heights, width, label=format)
        panel.set_title(projection, loc="left", fontsize=10)
        panel.set_ylabel("KL, nats")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xticks(range(len(layers)), [str(layer) for layer in layers])
    panels[-1].set_xlabel("layer")
    panels[0].legend(frameon=False)
    figure.suptitle(f"{found.model}: cost of each part alone, {found.method}", fontsize=10)
    figure.tight_layout()
    metadata = {"Date": None} if Path(path).suffix.lower() == ".svg" else None
    form = Path(path).suffix.lower().removeprefix(".")
    write_whole(path, lambda to: figure.savefig(to, metadata=metadata, format=form))
    pyplot.close(figure)
