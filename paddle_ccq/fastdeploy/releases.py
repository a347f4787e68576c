# SPDX-License-Identifier: Apache-2.0
"""FastDeploy's release lines, as far as they differ for a WINT2 checkpoint and its server."""

from __future__ import annotations

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
    """

    name: str
    row_order: str
    keeps_dense: bool
    reads_dense_type: bool
    api_keys: bool
    most_sequences: int
    commit: str

    @property
    def numbers(self) -> tuple[int, int]:
        major, minor = self.name.split(".")
        return int(major), int(minor)


RELEASES = {
    release.name: release
    for release in (
        Release("2.0", PLAIN, False, False, False, 256, ""),
        Release("2.1", FASTDEPLOY_2_1, False, False, False, 256, ""),
        Release("2.2", FASTDEPLOY_2_1, False, False, False, 256, ""),
        Release("2.3", FASTDEPLOY_2_1, False, False, False, 256, "0df488c7"),
        Release("2.4", FASTDEPLOY_2_1, False, True, True, 256, "c45e064f"),
        Release("2.5", FASTDEPLOY_2_1, True, True, True, 256, "7648164f"),
        Release("2.6", FASTDEPLOY_2_1, True, True, True, 512, "8c4f5a6a"),
    )
}
DEFAULT_RELEASE = "2.5"


def find_release(version: str) -> Release:
    """The release line of a version such as "2.5", "2.5.0" or "2.5.0+cu126".

    Raises:
        CcqError: if it is not a version, or of a line that was never looked at.
    """
    found = re.match(r"v?(\d+)\.(\d+)(?![\d])", version.strip())
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
