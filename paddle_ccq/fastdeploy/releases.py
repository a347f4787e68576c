# SPDX-License-Identifier: Apache-2.0
"""FastDeploy's release lines, as far as they differ for a WINT2 checkpoint and its server."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib import metadata

from ..codec.row_order import FASTDEPLOY_2_1, PLAIN
from ..errors import CcqError


@dataclass(frozen=True)
class Release:
    """One release line.

    Attributes:
        row_order: the order that its WINT2 kernel wants inside 64-groups.
        keeps_dense: knows modules_to_not_convert, so dense layers may stay bf16.
        reads_dense_type: reads dense_quant_type under the key that is written.
        api_keys: has FD_API_KEY and --api-key.
        most_sequences: the largest --max-num-seqs that it accepts.
        commit: where its server flags were read; "" where they were not read.
        own_wint2: its own WINT2 layers run; where not, only our plugin runs them.
        block_divides: its workers stop unless the block size divides --max-model-len.
        counts_drafts: a sequence takes one token of a step for each speculative token too.
        workers: API server processes that it starts by default.
        concurrency: requests that the API takes at once by default.
        output_cache: keeps the KV cache of answers for later prompts by default.
    """

    name: str
    row_order: str
    keeps_dense: bool
    reads_dense_type: bool
    api_keys: bool
    most_sequences: int
    commit: str
    own_wint2: bool = True
    block_divides: bool = False
    counts_drafts: bool = False
    workers: int = 1
    concurrency: int = 512
    output_cache: bool = False

    @property
    def numbers(self) -> tuple[float, float]:
        """For comparisons; develop is newer than every numbered line."""
        if self.name == DEVELOP:
            return math.inf, 0
        major, minor = self.name.split(".")
        return int(major), int(minor)


DEVELOP = "develop"
# The version that the develop branch had when it was read. Older versions with "dev" occur in the
# source of more than one line: 2.4 built at c45e064f calls itself 2.3.0-dev.
DEVELOP_SINCE = (2, 6)

# Reads down: name, row order, keeps_dense, reads_dense_type, api_keys, most_sequences, commit.
RELEASES = {
    release.name: release
    for release in (
        Release("2.0", PLAIN, False, False, False, 256, ""),
        Release("2.1", FASTDEPLOY_2_1, False, False, False, 256, ""),
        Release("2.2", FASTDEPLOY_2_1, False, False, False, 256, ""),
        Release("2.3", FASTDEPLOY_2_1, False, False, False, 256, "0df488c7"),
        Release(
            *("2.4", FASTDEPLOY_2_1, False, True, True, 256, "c45e064f"),
            block_divides=True,
            output_cache=True,
        ),
        Release(
            *("2.5", FASTDEPLOY_2_1, True, True, True, 256, "7648164f"),
            block_divides=True,
            output_cache=True,
        ),
        Release(
            *("2.6", FASTDEPLOY_2_1, True, True, True, 512, "8c4f5a6a"),
            block_divides=True,
            counts_drafts=True,
            workers=4,
            concurrency=2048,
        ),
        Release(
            *(DEVELOP, FASTDEPLOY_2_1, True, True, True, 512, "564c78d78"),
            # Since 5e54770b (2026-04-15) moe.py hands its WINT2 method more than it takes.
            own_wint2=False,
            block_divides=True,
            counts_drafts=True,
            workers=4,
            concurrency=2048,
        ),
    )
}
DEFAULT_RELEASE = "2.5"


def find_release(version: str) -> Release:
    """The release line of a version such as "2.5", "2.5.0", "2.5.0+cu126" or "2.6.0-dev".

    A build of the develop branch carries the number of a release that it is not, with "dev"
    behind it; whatever the number, it is the line "develop".

    Raises:
        CcqError: if it is not a version, or of a line that was never looked at.
    """
    text = version.strip().lower()
    if text in ("dev", DEVELOP):
        return RELEASES[DEVELOP]
    built = re.fullmatch(r"v?(\d+)\.(\d+)(?:\.\d+)?[-._]?dev.*", text)
    if built:
        if (int(built[1]), int(built[2])) >= DEVELOP_SINCE:
            return RELEASES[DEVELOP]
        raise CcqError(
            f"FastDeploy {version!r}: a build of a branch, which may be older or newer than its"
            " number; --fastdeploy-version says which release line to take it for"
        )
    found = re.match(r"v?(\d+)\.(\d+)(?![\d])", text)
    name = f"{int(found[1])}.{int(found[2])}" if found else None
    if name not in RELEASES:
        raise CcqError(
            f"FastDeploy {version!r}: not a release line known here; known are"
            f" {', '.join(RELEASES)}; --fastdeploy-version says which one to take it for"
        )
    return RELEASES[name]


def installed_version(packages: tuple[str, ...] = ("fastdeploy-gpu", "fastdeploy")) -> str | None:
    """The installed FastDeploy's version, found without importing it."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def release_of(asked: str | None) -> Release:
    """The release line asked for, else the installed one, else the default."""
    return find_release(asked or installed_version() or DEFAULT_RELEASE)
