# SPDX-License-Identifier: Apache-2.0
"""The package version: part of every checkpoint's provenance and of the resume fingerprint."""

__version__ = "0.1.0"
