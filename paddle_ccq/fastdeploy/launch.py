# SPDX-License-Identifier: Apache-2.0
"""Start FastDeploy's API server on a checkpoint that was checked first, or wait for one."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path

from ..addresses import http_address, local
from ..arguments import Arguments, number, whole
from ..command import run_command
from ..engine_check import card_bytes
from ..errors import CcqError
from .cards import Card, find_cards
from .check import check, judge_machine, print_result
from .plugin import GROUP, NAME, SUPPORTED
from .releases import DEFAULT_RELEASE, Release, release_of
from .server_flags import PORTS, server_command, shown
from .settings import ServerSettings, load_settings, serve_config_of, with_overrides, with_ports

WAIT_SECONDS = 1800
_POLL_SECONDS = 2.0


def launch(args: argparse.Namespace) -> int:
    """Check, then replace this process by the server; returns only if nothing is started.

    Raises:
        CcqError: if the model is not named, FastDeploy is not installed, or a port is in
            use.
    """
    release = release_of(args.fastdeploy_version)
    settings = _settings(args)
    if args.wait is not None:
        return wait(settings, args.wait)
    if "model" not in settings:
        raise CcqError("--model: needed, the folder of the checkpoint")
    command = server_command(settings, release, sys.executable)
    environment = environment_of(args.devices, args.log_dir)
    if args.plugin:
        environment["FD_PLUGINS"] = plugins(release, os.environ.get("FD_PLUGINS"))
    if not args.no_check and not _checked(args, settings, release, environment):
        return 1
    print(shown(command, environment), flush=True)
    if args.dry_run:
        return 0
    if util.find_spec("fastdeploy") is None:
        raise CcqError("fastdeploy is not installed here; serving/README.md says how")
    for port in busy_ports(settings):
        raise CcqError(f"port {port} is in use; --port N takes N to N+{len(PORTS) - 1} instead")
    os.execve(command[0], command, {**os.environ, **environment})
    return 0


def _settings(args: argparse.Namespace) -> ServerSettings:
    settings = load_settings(Path(args.config))
    if args.model is not None:
        settings = {"model": args.model, **{k: v for k, v in settings.items() if k != "model"}}
    return with_ports(with_overrides(settings, args.set), args.port)


def environment_of(devices: str | None, log_dir: str | None) -> dict[str, str]:
    """The variables to set; everything else is inherited, FD_API_KEY among it.

    Raises:
        CcqError: for --devices that are no numbers.
    """
    environment = {}
    if devices is not None:
        if not devices or not all(part.strip().isdigit() for part in devices.split(",")):
            raise CcqError(f"--devices {devices}: must be numbers such as 0,1")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(p.strip() for p in devices.split(","))
    if log_dir is not None:
        environment["FD_LOG_DIR"] = log_dir
    return environment


def plugins(release: Release, present: str | None) -> str:
    """FD_PLUGINS with our entry point among those that are there already.

    Raises:
        CcqError: for a release that the plugin is not made for, or if the package is not
            installed.
    """
    if release.name not in SUPPORTED:
        raise CcqError(
            f"--plugin: made for FastDeploy {', '.join(SUPPORTED)}, this is {release.name}"
        )
    if NAME not in metadata.entry_points(group=GROUP).names:
        raise CcqError(
            "--plugin: FastDeploy finds it only if this package is installed: pip install -e ."
        )
    names = [name for name in (present or "").split(",") if name]
    return ",".join(dict.fromkeys([*names, NAME]))


def _checked(
    args: argparse.Namespace,
    settings: ServerSettings,
    release: Release,
    environment: dict[str, str],
) -> bool:
    model = str(settings["model"])
    if not Path(model).is_dir():
        raise CcqError(
            f"--model {model}: no such folder; --no-check leaves it to FastDeploy to find it"
        )
    cards = _visible(find_cards(), args.devices) if args.gpu_memory is None else []
    if args.gpu_memory is None and not cards:
        raise CcqError("--gpu-memory: needed, since nvidia-smi finds no card here")
    memory = min((c.memory for c in cards), default=0)
    if args.gpu_memory is not None:
        memory = card_bytes(args.gpu_memory)
    named = environment.get("FD_PLUGINS", os.environ.get("FD_PLUGINS", "")).split(",")
    serve = serve_config_of(settings, release, memory, plugin=NAME in named)
    result = check(model, serve)
    judge_machine(result, cards, serve.tensor_parallel_size)
    result.command = []  # the real one is printed below, with every setting
    print_result(result, serve, environment)
    return result.good


def _visible(cards: list[Card], devices: str | None) -> list[Card]:
    chosen = devices or os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = chosen.split(",") if chosen else []
    if not numbers or not all(number.strip().isdigit() for number in numbers):
        return cards  # names of cards are left to the driver
    return [cards[int(n)] for n in numbers if int(n) < len(cards)]


def busy_ports(settings: Mapping[str, object]) -> list[int]:
    """The ports among the four that another process listens on already."""
    busy = []
    for name in PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(str(settings[name]))))
            except OSError:
                busy.append(int(str(settings[name])))
    return busy


def wait(settings: Mapping[str, object], seconds: float) -> int:
    """Wait until /health of the server answers 200; returns 0, or 1 if the time is over."""
    host = local(str(settings.get("host", "127.0.0.1")))
    url = http_address(host, settings["port"]) + "/health"
    start = time.monotonic()
    answer = "no answer yet"
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    print(f"{url}: ready after {time.monotonic() - start:.0f} s")
                    return 0
        except urllib.error.HTTPError as error:
            answer = f"status {error.code}"
        except OSError as error:
            answer = str(getattr(error, "reason", error))
        if time.monotonic() - start >= seconds:
            print(f"error: {url}: not ready after {seconds:g} s: {answer}", file=sys.stderr)
            return 1
        time.sleep(min(_POLL_SECONDS, max(0.05, seconds / 10)))


def build_parser() -> Arguments:
    """The settings file, and flags that replace its entries or add to them."""
    parser = Arguments("fastdeploy-launch", __doc__)
    add = parser.add_argument
    add("config", metavar="FILE.yaml", help="server settings, see serving/*.yaml")
    add("--model", metavar="DIR", help="folder of the quantized checkpoint")
    add("--devices", metavar="0,1", help="sets CUDA_VISIBLE_DEVICES")
    add("--port", type=whole, help="first of four ports, instead of those in the file")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="another server flag")
    add("--log-dir", metavar="DIR", help="sets FD_LOG_DIR")
    add("--plugin", action="store_true", help="load our kernels into FastDeploy (FD_PLUGINS)")
    add("--fastdeploy-version", metavar="X.Y", help=f"(the installed one, else {DEFAULT_RELEASE})")
    add("--gpu-memory", type=number, metavar="GIB", help="memory of one card (asks nvidia-smi)")
    add("--no-check", action="store_true", help="start without looking at the checkpoint")
    add("--dry-run", action="store_true", help="print the command and stop")
    add(
        "--wait",
        nargs="?",
        type=number,
        const=WAIT_SECONDS,
        metavar="SECONDS",
        help=f"start nothing; wait for this config's server to be healthy ({WAIT_SECONDS})",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 if the checkpoint can't be served, or --wait is over; 2 for bad input."""
    return run_command(build_parser(), argv, launch)


if __name__ == "__main__":
    sys.exit(main())
