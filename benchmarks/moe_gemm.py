# SPDX-License-Identifier: Apache-2.0
"""Speed of the WINT2 grouped GEMM on one GPU, next to its peers, in one run.

    python benchmarks/gpu/ccqlib.py /tmp/libccq.so
    python benchmarks/moe_gemm.py --library /tmp/libccq.so [--peers humming,cublas] [--marlin SO]

Method: a CUDA graph of calls, each with another random top-8 routing (so that weights come from
memory and not from L2), replayed; the median replay over the number of calls. Contestants take
turns, a replay each, from 512 tokens on after 0.3 s at work, when the GPU has slowed down. The
roof counts the bytes of the experts hit at 2.0625 bits a weight, activations read and outputs
written, over the rate at which this GPU reads, measured first. Peers: Humming
(humming_peer.py, pip install humming-kernels), vLLM's Marlin (benchmarks/gpu/marlin.py), plain
Triton kernels (triton_kernels.py), a dense product by cuBLAS.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

import block
import ccqlib
import measure
import peers
import report

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LINEAR_ROWS = (1, 4, 16)
PEERS = ("ccq-2t", "humming", "triton", "cublas")


def linear(torch: Any, library: ccqlib.Library, shape: measure.Shape, pairs: str,
           replays: int, bandwidth: float) -> list[dict]:  # fmt: skip
    """One matrix, copies of it in turn so that it comes from memory; beside it cuBLAS in bfloat16
    and the products with 2.5 and 2.75 bits as stored.
    """
    count = max(2, int(2e8 / (shape.n * shape.k / 4)))  # several times the L2
    tensors = (ccqlib.random_weights(torch, 1, shape.k, shape.n, pairs, i) for i in range(count))
    copies = [library.repack(*each) for each in tensors]
    dense = [torch.randn(shape.k, shape.n, device="cuda").bfloat16() for _ in range(count // 4 + 2)]
    stored = stored_matrices(torch, library, shape)
    found = []
    for m in LINEAR_ROWS:
        x = torch.randn(m, shape.k, device="cuda").bfloat16()
        out = torch.full((m, shape.n), float("nan"), device="cuda", dtype=torch.bfloat16)
        room = library.workspace(m, shape.k, shape.n, 1)
        calls = {
            "ccq": [partial(library.gemm, x, None, p, out, room) for p in copies],
            "cublas-bf16": [partial(torch.mm, x, w, out=out) for w in dense],
        }
        for format, (quant, supers) in stored.items():
            one = partial(library.spare_gemm, format, x, None)
            calls[format] = [partial(one, q, supers, out) for q in quant]
        for who, each in calls.items():
            seconds = measure.time_calls(torch, each, replays)
            found.append(measure.figures(who, m, m, shape, 1, seconds, bandwidth))
    return found


def stored_matrices(torch: Any, library: ccqlib.Library, shape: measure.Shape) -> dict:
    """For 2.5 and 2.75 bits as stored: copies of random words, and one set of super scales."""
    if not hasattr(library.lib, "ccq_spare_gemm"):
        return {}
    found = {}
    for format, (_, words) in ccqlib.SPARE_FORMATS.items():
        size = (1, shape.k // 64 * words, shape.n)
        dtype, top = (torch.int16, 2**15) if format == "ccq-2.5" else (torch.uint8, 2**8)
        count = max(2, int(2e8 / (shape.n * shape.k / 4)))
        copies = [torch.randint(0, top, size, dtype=dtype, device="cuda") for _ in range(count)]
        found[format] = copies, torch.full((1, shape.n), 1e-3, device="cuda").bfloat16()
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True, help="what benchmarks/gpu/ccqlib.py built")
    parser.add_argument("--marlin", metavar="SO", help="vLLM's _moe_C library: adds Marlin")
    parser.add_argument("--peers", default="", help=f"comma list of {', '.join(PEERS)}")
    parser.add_argument("--only", default="", help="substring of the shape's name")
    parser.add_argument("--held-out", action="store_true", help="adds shapes not tuned for")
    parser.add_argument("--tokens", default="", help="comma list; default 1..256")
    parser.add_argument("--pairs", default="integer", help="comma list of integer,general")
    parser.add_argument("--variants", default="-1", help="comma list (tuning builds)")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--no-gemm", action="store_true", help="no grouped GEMM")
    parser.add_argument("--no-linear", action="store_true", help="no single matrices")
    parser.add_argument("--block", action="store_true", help="adds the whole expert block")
    parser.add_argument("--json", metavar="OUT", help="writes every figure, shape by shape")
    parser.add_argument("--plot", metavar="SVG", help="draws them (needs matplotlib)")
    args = parser.parse_args(argv)
    unknown = set(args.peers.split(",")) - {"", *PEERS}
    if unknown:
        parser.error(f"--peers: unknown {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    if args.plot and not report.can_plot():
        parser.error("--plot needs matplotlib (pip install matplotlib)")
    return args


def variant_of(peer: peers.Peer) -> int:
    """The kernel of the project's that was timed, or -1."""
    if not isinstance(peer, peers.Ccq):
        return -1
    return peer.variant if peer.variant >= 0 else peer.ran()


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    import torch

    library = ccqlib.Library(args.library)
    tokens = [int(t) for t in args.tokens.split(",")] if args.tokens else TOKENS
    variants = [int(v) for v in args.variants.split(",")]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rates": measure.device_rates(torch),
        "gemm": [],
        "block": [],
    }
    print(report.heading(result), flush=True)
    bandwidth = result["rates"]["read"] * 1e12
    every = measure.SHAPES + (measure.HELD_OUT if args.held_out else ())

    def note(row: dict, pairs: str, variant: int = -1) -> None:
        result["gemm"].append({**row, "pairs": pairs, "variant": variant})
        print(report.line(result["gemm"][-1]), flush=True)

    def save() -> None:
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")

    for pairs in args.pairs.split(","):
        shapes = [s for s in every if args.only in s.name and not args.no_gemm]
        cases = [(s, t * min(measure.TOP_K, s.experts)) for s in shapes for t in tokens]
        names = args.peers.split(",")
        runners = peers.chosen(torch, library, names, args.marlin, pairs, variants, cases)
        for shape in shapes:
            weights: dict[str, Any] = {}
            for peer in runners:
                if peer.who not in weights:
                    weights[peer.who] = peer.weights(shape)
                    torch.cuda.empty_cache()
            contestants = [(peer, weights[peer.who]) for peer in runners]
            torch.cuda.synchronize()
            time.sleep(measure.REST_SECONDS)
            for t in tokens:
                timed = peers.side_by_side(torch, contestants, shape, t, args.replays, bandwidth)
                for peer, row in timed:
                    note(row, pairs, variant_of(peer))
            del weights, contestants
            save()
        for shape in measure.LINEAR:
            if not args.no_linear and args.only in shape.name:
                for row in linear(torch, library, shape, pairs, args.replays, bandwidth):
                    note(row, pairs)
    if args.block:
        for row in block.measured(torch, library, bandwidth, args.only, args.replays):
            result["block"].append(row)
            print(report.block_line(row), flush=True)
    print(report.text(result))
    save()
    if args.plot:
        report.plot(result, args.plot)


if __name__ == "__main__":
    main()
