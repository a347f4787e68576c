# SPDX-License-Identifier: Apache-2.0
"""Serve a quantized checkpoint behind the OpenAI API, experts kept at 2 bits."""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .addresses import bare, http_address
from .arguments import Arguments, count, whole
from .checkpoint.reader import open_checkpoint
from .checkpoint.source import model_name
from .command import no_message, run_command
from .errors import CcqError, describe_os_error, visible
from .models.support import require_computed
from .units import gibibytes

if TYPE_CHECKING:
    import uvicorn

    from .ops.gpu_memory import Device
    from .serving.service import Service

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
# Beyond this, the cache of one sequence alone is large; ask for more with --max-model-len.
DEFAULT_MAX_LENGTH = 8192
DEFAULT_SEQUENCES = 16
BACKLOG = 2048  # connections that wait to be accepted, uvicorn's own


def serve(folder: str | os.PathLike[str], **options: Any) -> None:
    """Serve a checkpoint folder until a signal; options are the command's flags, `max_model_len=`.

    Raises:
        CcqError: what the command would print.
        TypeError: an option that is no flag.
    """
    args = build_parser().parse_args([os.fspath(folder)])
    for name, value in options.items():
        if name == "folder" or not hasattr(args, name):
            raise TypeError(f"serve() has no option {name!r}")
        setattr(args, name, value)
    run_server(build_service(args), args)


def build_service(args: argparse.Namespace) -> Service:
    """The service that the flags describe, not loaded yet; every mistake in them is found here.

    Raises:
        CcqError: for a flag or a checkpoint that is not right, or a package that is
            missing.
    """
    try:
        from .serving import resources
        from .serving.engine import EngineSettings
        from .serving.service import Service, ServiceSettings
    except ImportError as error:
        raise CcqError(
            f"serving needs more packages; install them with: pip install 'paddle-ccq[serve]' "
            f"(import {error.name}: {error})"
        ) from None
    say = no_message if args.quiet else _say
    checkpoint = open_checkpoint(args.folder, args.row_order, drop_mtp=True)
    require_computed(checkpoint.config, "serve")
    name = model_name(checkpoint.path)
    for message in checkpoint.messages:
        say(f"{name}: {message}")
    config = checkpoint.config
    longest = config.max_position_embeddings
    length = args.max_model_len or min(longest, DEFAULT_MAX_LENGTH)
    if length > longest:
        raise CcqError(
            f"--max-model-len {length}: more than the model's max_position_embeddings ({longest})"
        )
    tokens = args.kv_cache_tokens or resources.cache_tokens(config, length, args.max_num_seqs)
    if tokens < length:
        raise CcqError(
            f"--kv-cache-tokens {tokens}: less than one sequence of --max-model-len {length}"
        )
    engine = EngineSettings(args.max_num_seqs, tokens, args.max_num_batched_tokens, args.max_queue)
    settings = ServiceSettings(
        name=args.served_model_name or name,
        max_length=length,
        engine=engine,
        api_key=resources.api_key(args.api_key),
        max_body_bytes=args.max_body_mib << 20,
        threads=args.threads or resources.threads_for(config),
        device=_device(args.device),
        allow_origins=_origins(args.allow_origin),
        generation_config=args.generation_config == "auto",
    )
    if settings.api_key is None and not _is_loopback(args.host):
        say(f"warning: {args.host} can be reached by others, and there is no --api-key")
    service = Service(checkpoint, settings)
    if defaults := service.defaults.describe():
        say(f"generation_config.json: {defaults}, where a request does not say")
    if service.without_effect:
        say(f"generation_config.json: {', '.join(service.without_effect)}: no effect here")
    return service


def _origins(given: Sequence[str] | str | None) -> tuple[str, ...]:
    """Origins as browsers send them: scheme, host and port, nothing behind them."""
    found = []
    for text in [given] if isinstance(given, str) else given or ():
        origin = text.strip().lower().removesuffix("/")
        parts = urlsplit(origin)
        rest = parts.path or parts.query or parts.fragment or parts.username
        if origin not in ("*", "null") and (not parts.scheme or not parts.netloc or rest):
            raise CcqError(
                f"--allow-origin {text}: must be * or a scheme and a host such as"
                " http://localhost:3000"
            )
        found.append(origin)
    return tuple(found)


def _device(name: str) -> Device | None:
    """The GPU if it is asked for, with the library found to be usable before anything is loaded."""
    if name != "gpu":
        return None
    from .ops import gpu_library
    from .ops.gpu_memory import Device

    gpu_library.load_products()
    return Device()


def run_server(service: Service, args: argparse.Namespace) -> int:
    """Serve until a signal, then drain."""
    from .serving.service import load_in_background

    say = no_message if args.quiet else _say
    failure: list[Exception] = []
    server = _server(service, args.drain_timeout, say)

    def failed(error: Exception) -> None:
        failure.append(error)
        server.should_exit = True

    def load() -> None:
        service.load()
        for line in _ready(service, args):
            say(line)

    listening = _bind(args.host, args.port)
    args.port = listening.getsockname()[1]
    load_in_background(load, failed)
    try:
        server.run([listening])
    finally:
        if service.engine is not None:
            service.engine.stop()
    if failure:
        raise failure[0]
    return 0


def _server(service: Service, drain_timeout: int, say: Callable[[str], object]) -> uvicorn.Server:
    """uvicorn with the service's API, that ends when requests are finished."""
    import uvicorn

    from .serving.app import create_app

    class Server(uvicorn.Server):
        """Its first SIGTERM or SIGINT drains; the second ends it at once."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if service.draining:
                self.force_exit = self.should_exit = True
                return
            service.drain()
            say("draining: what runs is finished, new requests get 503")
            threading.Thread(target=self._exit_when_idle, daemon=True).start()

        def _exit_when_idle(self) -> None:
            engine = service.engine
            idle = engine is None or engine.wait_until_idle(drain_timeout)
            if not idle:
                say(f"ending with requests unfinished after {drain_timeout} s")
                engine.stop()
            self.should_exit = True

    return Server(
        uvicorn.Config(
            create_app(service),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
            ws="none",
            lifespan="off",
        )
    )


def _bind(host: str, port: int) -> socket.socket:
    """Bound here and not by uvicorn, whose own failure is a log line and not one error."""
    if not host:
        raise CcqError("--host: is empty; 0.0.0.0 or :: listens on every interface")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            bare(host), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        # From now on clients wait; refused, they would take the line "serving" for untrue.
        listening.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
        raise CcqError(f"--host {host} --port {port}: {reason}") from None
    return listening


def _say(text: str) -> None:
    """Messages are the command's results: they go to standard output, at once."""
    print(visible(text), flush=True)


def _ready(service: Service, args: argparse.Namespace) -> tuple[str, str]:
    from .serving.resources import resident_bytes

    engine, settings = service.engine, service.settings
    model = engine.model
    floats = 4 * sum(_size(service, name) for name in service.checkpoint.model_names())
    on_gpu = f" and {gibibytes(model.gpu_bytes)} on the GPU" if model.gpu_bytes else ""
    return (
        f"{settings.name}: experts {gibibytes(model.expert_bytes)}{on_gpu}, other weights"
        f" {gibibytes(model.dense_bytes)} (all as float32: {gibibytes(floats)}); KV cache"
        f" {gibibytes(engine.cache.nbytes)} for {engine.cache.tokens} tokens, touched as it is"
        f" used; resident {gibibytes(resident_bytes())}",
        f"serving {settings.name} at {http_address(args.host, args.port)}/v1",
    )


def _size(service: Service, name: str) -> int:
    size = 1
    for extent in service.checkpoint.shape(name):
        size *= extent
    return size


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(bare(host)).is_loopback
    except ValueError:
        return host == "localhost"


def _port(text: str) -> int:
    value = whole(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError("must be 0 to 65535")
    return value


def build_parser() -> Arguments:
    """Arguments of build_service() and run_server(); tests build servers from them too."""
    parser = Arguments("serve", __doc__)
    parser.subject("folder", "checkpoint folder", "DIR")
    _add_api(parser)
    parser.device(
        "gpu: wint2 and ccq-2t experts run on the first GPU, the rest stays here (%(default)s)"
    )
    _add_limits(parser)
    parser.add_argument(
        "--threads", type=count, metavar="N", help="of the packed products (default: by size)"
    )
    parser.row_order()
    parser.quiet("no messages; errors only")
    return parser


def _add_api(parser: Arguments) -> None:
    """Where the server listens, who may ask it, and what a request gets that does not say."""
    parser.add_argument(
        "--host", default=DEFAULT_HOST, help="address (%(default)s: only this host)"
    )
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT, help="0: any (%(default)s)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="wanted as a bearer token under /v1; better given as PADDLE_CCQ_API_KEY",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        metavar="ORIGIN",
        help="let pages of this origin, such as http://localhost:3000, use the API from a browser;"
        " * for all (repeatable; default: none)",
    )
    parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="the API's model (default: the folder's name; in a hub's cache the repository's)",
    )
    parser.add_argument(
        "--generation-config",
        choices=("auto", "none", "vllm"),
        default="auto",
        help="auto: the checkpoint's generation_config.json says how requests that do not are"
        " sampled; none, or vllm as vLLM calls it: temperature 1, top_p 1, nothing else"
        " (%(default)s)",
    )


def _add_limits(parser: Arguments) -> None:
    """What the server holds at once, and for how long."""
    parser.add_argument(
        "--max-model-len",
        type=count,
        metavar="N",
        help=f"tokens of prompt and answer together (default: the model's, at most"
        f" {DEFAULT_MAX_LENGTH})",
    )
    parser.add_argument(
        "--max-num-seqs",
        type=count,
        default=DEFAULT_SEQUENCES,
        metavar="N",
        help="sequences generated at once (%(default)s)",
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        type=count,
        default=512,
        metavar="N",
        help="tokens of one step; a long prompt takes several steps (%(default)s)",
    )
    parser.add_argument(
        "--kv-cache-tokens",
        type=count,
        metavar="N",
        help="places of the KV cache (default: all sequences at their longest, in at most a"
        " quarter of the free memory)",
    )
    parser.add_argument(
        "--max-queue",
        type=count,
        default=256,
        metavar="N",
        help="sequences that may wait; more get 429 (%(default)s)",
    )
    parser.add_argument(
        "--max-body-mib", type=count, default=4, metavar="N", help="request size (%(default)s)"
    )
    parser.add_argument(
        "--drain-timeout",
        type=count,
        default=60,
        metavar="S",
        help="seconds that running requests have after SIGTERM (%(default)s)",
    )


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal; exit code 0, or 2 if the folder or an argument is not right."""
    return run_command(build_parser(), argv, lambda args: run_server(build_service(args), args))


if __name__ == "__main__":
    sys.exit(main())
