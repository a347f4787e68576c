# SPDX-License-Identifier: Apache-2.0
"""Texts that a user gives: files and pipes, the records in them, and documents."""
