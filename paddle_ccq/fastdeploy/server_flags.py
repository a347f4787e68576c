# SPDX-License-Identifier: Apache-2.0
"""The flags of FastDeploy's API server, and a command line made of settings.

FastDeploy drops the keys of a YAML file that it does not know without a word; here they are
errors. The names were read from entrypoints/openai/utils.py and engine/args_utils.py at the
commits in releases.py.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence

from ..errors import CcqError
from .releases import DEVELOP, RELEASES, Release

SERVER_MODULE = "fastdeploy.entrypoints.openai.api_server"
PORTS = ("port", "metrics_port", "engine_worker_queue_port", "cache_queue_port")

# Flags by the first release line in which they were seen.
_FIRST_SEEN = {
    "2.3": """
        block-size cache-queue-port cache-transfer-protocol chat-template controller-port convert
        data-parallel-size disable-custom-all-reduce dynamic-load-weight early-stop-config
        enable-chunked-prefill enable-early-stop enable-expert-parallel enable-logprob enable-mm
        enable-mm-output enable-prefix-caching engine-worker-queue-port gpu-memory-utilization
        graph-optimization-config guided-decoding-backend guided-decoding-disable-any-whitespace
        host innode-prefill-ports ips kv-cache-ratio limit-mm-per-prompt lm_head-fp32 load-choices
        load-strategy local-data-parallel-id logits-processors logprobs-mode
        long-prefill-token-threshold max-concurrency max-encoder-cache max-long-partial-prefills
        max-model-len max-num-batched-tokens max-num-partial-prefills max-num-seqs
        max-processor-cache max-waiting-time metrics-port mm-processor-kwargs model
        model-config-name num-gpu-blocks-override override-pooler-config pd-comm-port
        plas-attention-config port prealloc-dec-block-slot-num-threshold quantization
        rdma-comm-ports reasoning-parser revision runner scheduler-db scheduler-expire-period
        scheduler-host scheduler-load-shards-num scheduler-max-size scheduler-min-load-score
        scheduler-name scheduler-password scheduler-port scheduler-reader-batch-size
        scheduler-reader-parallel scheduler-release-load-expire-period scheduler-sync-period
        scheduler-topic scheduler-ttl scheduler-writer-batch-size scheduler-writer-parallel seed
        served-model-name speculative-config splitwise-role static-decode-blocks swap-space task
        tensor-parallel-size timeout timeout-graceful-shutdown tokenizer tokenizer-base-url
        tool-call-parser tool-parser-plugin use-warmup workers""",
    "2.4": """
        api-key chunked-moe-size disable-chunked-mm-input disable-sequence-parallel-moe
        enable-chunked-moe enable-eplb enable-output-caching eplb-config max-logprobs router
        use-internode-ll-two-stage""",
    "2.5": """
        enable-entropy enable-overlap-schedule kvcache-storage-backend model-impl
        routing-replay-config rsync-config shutdown-comm-group-if-worker-idle write-policy""",
    "2.6": """
        deploy-modality enable-flashinfer-allreduce-fusion enable-keep-sampling-mask
        enable-moe-scores-elementwise-fuse ep-prefill-use-worst-num-tokens moe-gate-fp32""",
    DEVELOP: "model-loader-extra-config write-through-threshold",
}
_LAST_SEEN = {"innode-prefill-ports": "2.3", "enable-keep-sampling-mask": "2.6"}
# On by default in some release, and switched off by --no-...; the release is the first with the
# negative form.
_NEGATABLE = {
    "enable-prefix-caching": "2.3",
    "enable-output-caching": "2.4",
    "shutdown-comm-group-if-worker-idle": "2.5",
    "enable-overlap-schedule": "2.6",
}

# Flags that take several values: given several times, as several words, or joined by commas. No
# other flag takes a list.
_REPEATED = {"api-key"}
_SEVERAL_WORDS = {"logits-processors"}
_JOINED = {
    *("cache-queue-port", "cache-transfer-protocol", "engine-worker-queue-port"),
    *("innode-prefill-ports", "ips", "pd-comm-port", "rdma-comm-ports"),
}
# argparse takes a word for a flag if it begins with a dash, unless it is a negative number.
_FLAG_LIKE = re.compile(r"-(?!\d+$|\d*\.\d+$)")


def known_flags(release: Release) -> dict[str, str]:
    """Settings key (as in a YAML file) -> flag without dashes; {} where no flags were read."""
    if not release.commit:
        return {}
    flags: dict[str, str] = {}
    for name, text in _FIRST_SEEN.items():
        if RELEASES[name].numbers <= release.numbers:
            flags |= {flag.replace("-", "_"): flag for flag in text.split()}
    for flag, name in _LAST_SEEN.items():
        if RELEASES[name].numbers < release.numbers:
            flags.pop(flag.replace("-", "_"), None)
    return flags


def unknown_settings(settings: Mapping[str, object], release: Release) -> list[str]:
    """The keys that this release's server has no flag for."""
    flags = known_flags(release)
    return [key for key in settings if flags and key not in flags]


def arguments(settings: Mapping[str, object], release: Release) -> list[str]:
    """Settings as command-line arguments, in their order; None and false give nothing.

    Raises:
        CcqError: for a key that the release has no flag for.
    """
    unknown = unknown_settings(settings, release)
    if unknown:
        raise CcqError(
            f"{', '.join(unknown)}: FastDeploy {release.name} has no such flag and would ignore it"
        )
    flags = known_flags(release)
    result: list[str] = []
    for key, value in settings.items():
        flag = flags.get(key, key.replace("_", "-"))
        if value is None:
            continue
        if value is True:
            result.append(f"--{flag}")
        elif value is False:
            first = _NEGATABLE.get(flag)
            if first and RELEASES[first].numbers <= release.numbers:
                result.append(f"--no-{flag}")
        elif isinstance(value, Mapping):
            result += [f"--{flag}", json.dumps(value, separators=(",", ":"))]
        elif isinstance(value, (list, tuple)):
            result += _list_words(key, flag, value)
        else:
            result += _words(key, flag, [value])
    return result


def _list_words(key: str, flag: str, values: Sequence[object]) -> list[str]:
    """The words of a list, in the way in which the flag takes several values."""
    if flag in _REPEATED:
        return [word for value in values for word in _words(key, flag, [value])]
    if flag in _SEVERAL_WORDS:
        return _words(key, flag, values) if values else []
    if flag not in _JOINED:
        raise CcqError(f"{key}: takes one value, not a list of {len(values)}")
    if any("," in str(value) for value in values):
        raise CcqError(f"{key}: a comma in a value would cut it in two")
    _check_values(key, values)
    return _words(key, flag, [",".join(map(str, values))]) if values else []


def _words(key: str, flag: str, values: Sequence[object]) -> list[str]:
    """A flag and its values; a value that looks like a flag is joined to it."""
    _check_values(key, values)
    texts = [str(value) for value in values]
    if any(_FLAG_LIKE.match(text) for text in texts):
        if len(texts) > 1:
            raise CcqError(f"{key}: a value that begins with - would be taken for a flag")
        return [f"--{flag}={texts[0]}"]
    return [f"--{flag}", *texts]


def _check_values(key: str, values: Sequence[object]) -> None:
    for value in values:
        if value is None or isinstance(value, (bool, Mapping, list, tuple)) or value == "":
            raise CcqError(f"{key}: {value!r} is no value; give a text or a number")


def server_command(
    settings: Mapping[str, object], release: Release, python: str = "python"
) -> list[str]:
    """The whole command that starts the server."""
    return [python, "-m", SERVER_MODULE, *arguments(settings, release)]


def four_ports(first: int) -> dict[str, int]:
    """The API's port and the three that follow it.

    Raises:
        CcqError: if one of them is no port.
    """
    if not 1 <= first <= 65535 - len(PORTS) + 1:
        raise CcqError(f"--port {first}: the port and the {len(PORTS) - 1} after it are needed")
    return {name: first + i for i, name in enumerate(PORTS)}


def shown(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command as a person would type it, one flag a line."""
    words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    lines = [" ".join([*words, *map(shlex.quote, command[:3])])]
    for word in command[3:]:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join(lines)
