# SPDX-License-Identifier: Apache-2.0
"""Hosts and ports as the address of an HTTP server."""

from __future__ import annotations

# Where a server that listens on every interface is found from its own machine.
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def bare(host: str) -> str:
    """An IPv6 address without the brackets that it has in a URL; other hosts as they are."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def http_address(host: str, port: object) -> str:
    """`http://HOST:PORT`, with an IPv6 address in brackets and its zone escaped (RFC 6874)."""
    host = bare(host)
    if ":" in host:
        host = "[" + host.replace("%", "%25") + "]"
    return f"http://{host}:{port}"


def local(host: str) -> str:
    """The host to ask for a server on this machine that listens on `host`."""
    return _EVERYWHERE.get(bare(host), bare(host))
