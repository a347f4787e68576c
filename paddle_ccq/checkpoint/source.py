# SPDX-License-Identifier: Apache-2.0
"""From what a user calls a model - a folder, a hub id, a short name - to a local folder."""

from __future__ import annotations

import importlib
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import CcqError, readable

# FastDeploy's variables (fastdeploy/envs.py), honoured so that both find the same files.
SOURCE_VARIABLE = "FD_MODEL_SOURCE"
CACHE_VARIABLE = "FD_MODEL_CACHE"

CONNECT_SECONDS = 5.0

# What ModelScope's client leaves in every folder that it fills.
_MODELSCOPE_MARKS = (".msc", ".mdl")


@dataclass(frozen=True)
class Hub:
    """A model hub: its client, the organization that publishes ERNIE there, and its server."""

    organization: str
    client: str  # module with snapshot_download(<id_argument>=, revision=, local_dir=)
    id_argument: str  # by keyword: the clients differ in the order of their arguments
    extra: str
    server: str
    server_variable: str


HUBS = {
    "AISTUDIO": Hub(
        "PaddlePaddle",
        "aistudio_sdk.snapshot_download",
        "repo_id",
        "aistudio",
        "https://git.aistudio.baidu.com",
        "STUDIO_GIT_HOST",
    ),
    "MODELSCOPE": Hub(
        "PaddlePaddle",
        "modelscope.hub.snapshot_download",
        "model_id",
        "modelscope",
        "https://www.modelscope.cn",
        "MODELSCOPE_DOMAIN",
    ),
    "HUGGINGFACE": Hub(
        "baidu",
        "huggingface_hub",
        "repo_id",
        "huggingface",
        "https://huggingface.co",
        "HF_ENDPOINT",
    ),
}
ORGANIZATIONS = ("baidu", "PaddlePaddle")

# Size -> the size as published.
_SIZES = {"300b": "300B-A47B", "21b": "21B-A3B", "0.3b": "0.3B"}
# Published under names that do not follow the pattern.
_OTHERS = (
    "ERNIE-4.5-21B-A3B-Thinking",
    "ERNIE-4.5-VL-28B-A3B-PT",
    "ERNIE-4.5-VL-28B-A3B-Base-PT",
    "ERNIE-4.5-VL-28B-A3B-Thinking",
    "ERNIE-4.5-VL-424B-A47B-PT",
    "ERNIE-4.5-VL-424B-A47B-Base-PT",
    "ERNIE-4.5-300B-A47B-2Bits-Paddle",
    "ERNIE-4.5-300B-A47B-2Bits-TP2-Paddle",
    "ERNIE-4.5-300B-A47B-2Bits-TP4-Paddle",
)
# Of the other families, by the organization that publishes them.
_ELSEWHERE = {
    "deepseek-ai": (
        *("DeepSeek-V3", "DeepSeek-V3-0324", "DeepSeek-V3.1"),
        *("DeepSeek-R1", "DeepSeek-R1-0528"),
    ),
    "moonshotai": ("Kimi-K2-Instruct", "Kimi-K2-Thinking"),
    "Qwen": ("Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3.5-35B-A3B"),
    "zai-org": ("GLM-4.5", "GLM-4.5-Air", "GLM-4.6"),
    "MiniMaxAI": ("MiniMax-M2",),
}
_BY_NAME = {
    name.lower(): f"{organization}/{name}"
    for organization, names in {"baidu": _OTHERS, **_ELSEWHERE}.items()
    for name in names
}
_SHORT_NAME = re.compile(r"ernie-4\.5-(300b|21b|0\.3b)(-a47b|-a3b)?(-base)?(-pt|-paddle)?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def known_names() -> list[str]:
    """The short names that resolve, for messages."""
    sizes = [f"ERNIE-4.5-{size.upper()}" for size in _SIZES]
    others = [name.partition("/")[2] for name in _BY_NAME.values()]
    return [name + base for name in sizes for base in ("", "-Base")] + others


def full_id(name: str) -> str:
    """The hub id meant by a short name or a hub id; the -Paddle version unless -PT is asked for.

    Raises:
        CcqError: if it is neither.
    """
    if _HUB_ID.fullmatch(name):
        return name
    if name.lower() in _BY_NAME:
        return _BY_NAME[name.lower()]
    match = _SHORT_NAME.fullmatch(name.lower())
    if match:
        size, active, base, layout = match.groups()
        published = _SIZES[size]
        if not active or published.lower().endswith(active):
            base = "-Base" if base else ""
            layout = "-PT" if layout == "-pt" else "-Paddle"
            return f"baidu/ERNIE-4.5-{published}{base}{layout}"
    raise CcqError(
        f"{name}: neither a folder, nor a hub id (organization/name), nor one of the short names"
        f" {', '.join(known_names())} (each of the first six also with -Paddle or -PT)"
    )


def resolve_model(
    name: str | os.PathLike[str],
    source: str | None = None,
    revision: str | None = None,
    log: Callable[[str], object] = print,
) -> Path:
    """The local folder of a model, downloaded first where it is not one already.

    `source` is AISTUDIO, MODELSCOPE or HUGGINGFACE; else the environment variable
    FD_MODEL_SOURCE decides, else AISTUDIO.

    Raises:
        CcqError: for a name that is neither a folder nor known to the hub, and for a failed
            download.
    """
    text = os.fspath(name).strip()
    if not text:
        raise CcqError("model: the name is empty; give a folder, a hub id or a short name")
    path = Path(text).expanduser()
    if path.is_dir():
        return snapshot_folder(path)
    if path.exists():
        raise CcqError(f"{path}: not a folder; give the checkpoint's folder")
    if text.startswith(("/", ".", "~")) or text.count("/") > 1 or "\\" in text:
        raise CcqError(f"{text}: no such folder")
    hub_name, hub = _hub(source)
    model = full_id(text)
    organization, _, title = model.partition("/")
    if organization.lower() in (known.lower() for known in ORGANIZATIONS):
        # The same models are published under another organization on each hub.
        model = f"{hub.organization}/{title}"
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home()).expanduser()
    folder = cache / model
    log(f"{text} is {model} on {hub_name}; local folder {folder}")
    return _download(model, hub_name, hub, revision, folder, log)


def snapshot_folder(path: Path) -> Path:
    """The snapshot that a repository's folder in Hugging Face's cache holds; else `path` itself.

    Raises:
        CcqError: several snapshots, and refs/main names none of them.
    """
    snapshots = path / "snapshots"
    if not path.resolve().name.startswith("models--") or not snapshots.is_dir():
        return path
    found = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    main = path / "refs" / "main"
    commit = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    if commit not in found:
        if len(found) != 1:
            raise CcqError(
                f"{path}: {len(found)} snapshots and none of them is refs/main; pass one of the"
                f" folders in {snapshots}"
            )
        commit = found[0]
    return snapshots / commit


def model_name(model: str | os.PathLike[str]) -> str:
    """What a model is called: a hub id or short name as given, a folder's own name, or, of a
    folder in a hub's cache, the name of the repository.

    Hugging Face's cache has models--ORGANIZATION--NAME/snapshots/COMMIT, newer ModelScope clients
    the same, older ones modelscope/hub/(models/)ORGANIZATION/NAME with "___" for a dot.
    """
    text = os.fspath(model)
    path = Path(text).expanduser()
    if not path.is_dir():
        return readable(text)
    # A link may lead into a cache, or lie in one and lead to a disk elsewhere.
    for place in (path.resolve(), Path(os.path.abspath(path))):
        found = _cached_name(place)
        if found:
            return readable(found)
    return readable(path.resolve().name)


def hub_id(model: str | os.PathLike[str]) -> str | None:
    """The model's id on a hub: as given, of a short name, or of a hub's cache; else None."""
    name = model_name(model)
    if _HUB_ID.fullmatch(name):
        return name
    return None if Path(os.fspath(model)).expanduser().is_dir() else full_id(name)


def _cached_name(place: Path) -> str | None:
    if place.parent.name == "snapshots":
        place = place.parent.parent
    if place.name.startswith("models--"):
        return place.name.removeprefix("models--").replace("--", "/") or None
    organization = place.parent
    cached = "modelscope" in organization.parts or any(
        (place / mark).is_file() for mark in _MODELSCOPE_MARKS
    )
    if cached and organization.parent.name in ("models", "hub"):
        return f"{organization.name}/{place.name}".replace("___", ".")
    return None


def _hub(source: str | None) -> tuple[str, Hub]:
    origin = "--source" if source else SOURCE_VARIABLE
    name = (source or os.environ.get(SOURCE_VARIABLE) or "AISTUDIO").upper()
    if name not in HUBS:
        raise CcqError(f"{origin}: {name!r} is not one of {', '.join(HUBS)}")
    return name, HUBS[name]


def _download(
    model: str,
    hub_name: str,
    hub: Hub,
    revision: str | None,
    folder: Path,
    log: Callable[[str], object],
) -> Path:
    here = (folder / "config.json").is_file()
    instead = "pass the folder of a downloaded checkpoint instead, or another --source"
    try:
        client = importlib.import_module(hub.client)
    except ImportError:
        if here:
            log(f"{hub_name}'s client is not installed; using what is in {folder}")
            return folder
        raise CcqError(
            f"{model}: downloading from {hub_name} needs its client:"
            f" pip install 'paddle-ccq[{hub.extra}]'; or {instead}"
        ) from None
    problem = connection_problem(os.environ.get(hub.server_variable) or hub.server)
    if problem:
        # Clients retry for minutes; without a network that only hides what is wrong.
        if here:
            log(f"{hub_name} is out of reach ({problem}); using what is in {folder}")
            return folder
        raise CcqError(f"{model}: {hub_name} is out of reach ({problem}); {instead}")
    options = {hub.id_argument: model, "local_dir": str(folder)}
    if revision:
        options["revision"] = revision
    try:
        client.snapshot_download(**options)
    except Exception as error:
        # Each client has its own exceptions, which cannot be named without importing all three.
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CcqError(
            f"{model}: download from {hub_name} failed: {type(error).__name__}: {reason}; {instead}"
        ) from error
    if not folder.is_dir():
        raise CcqError(f"{model}: {hub_name}'s client reported success but {folder} is not there")
    return folder


def connection_problem(server: str, seconds: float = CONNECT_SECONDS) -> str | None:
    """Why a server cannot be reached, or None; answers within about `seconds`.

    With a proxy configured, the proxy is what must be reachable.
    """
    url = urlsplit(server if "//" in server else f"https://{server}")
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    outcome: list[str | None] = []

    def connect() -> None:
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            socket.create_connection((url.hostname or "", port), timeout=seconds).close()
            outcome.append(None)
        except (OSError, ValueError) as error:
            outcome.append(f"{url.hostname}: {getattr(error, 'strerror', None) or error}")

    # Name resolution obeys no timeout, so the attempt runs beside us and may be left behind.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(seconds + 1)
    return outcome[0] if outcome else f"{url.hostname}: no answer within {seconds:g} s"
