# SPDX-License-Identifier: Apache-2.0
"""Where bfloat16 moves a model's loss: float32 with the roundings of one kind of place at a time.

    python benchmarks/vllm_rounding.py CHECKPOINT [--text FILE] [--json OUT.json]

CHECKPOINT is a quantized one, whose weights are decoded exactly. Scores the windows of
benchmarks/gpu/vllm_engine.py; needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

# Weights that an engine may hold as bfloat16: long prompts meet dense ones decoded to it.
WEIGHTS: dict[str, Callable[[Any], bool]] = {
    "dense weights": lambda tensor: tensor.is_linear and not tensor.is_expert,
    "experts' weights": lambda tensor: tensor.is_expert,
}
# Kind of place -> ends of the names of modules whose outputs are rounded.
PLACES = {
    "embedding": ("embed_tokens",),
    "norms": ("input_layernorm", "post_attention_layernorm", "model.norm"),
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "attention's output product": ("o_proj",),
    "dense MLP": ("gate_proj", "up_proj", "down_proj", "act_fn"),
    "experts' output": ("mlp",),
    "residual stream": ("self_attn", "layer"),
    "logits": ("lm_head",),
}


def decoded_model(checkpoint: Any, rounded: Callable[[Any], bool]) -> Any:
    """transformers' float32 model of exactly decoded weights, but for those to be rounded."""
    import torch
    import transformers
    from safetensors.numpy import save_file

    tensors = {}
    for name in checkpoint.model_names():
        spec = checkpoint.config.tensors[name]
        values = checkpoint.read(name, "bfloat16" if rounded(spec) else "float32")
        storage = spec.sources["pt"]
        values = values.T if storage.transposed else values
        for part in storage.parts:
            piece = values if part.columns is None else values[part.columns]
            tensors[part.name] = np.ascontiguousarray(piece, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        config = {k: v for k, v in checkpoint.config.raw.items() if k != "quantization_config"}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(folder, dtype=torch.float32).eval()


def scores(
    model: Any, windows: np.ndarray, kinds: list[str], seed: int | None = None
) -> np.ndarray:
    """float64 [windows, tokens - 1] log-probabilities, with outputs of some places rounded.

    Args:
        seed: rounded up or down at random, as often up as the value is far from below.
    """
    import torch

    generator = None if seed is None else torch.Generator().manual_seed(seed)

    def bfloat16(value: Any) -> Any:
        if generator is None:
            return value.bfloat16().float()
        bits = value.contiguous().view(torch.int32)
        more = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=generator)
        return ((bits + more) & -(1 << 16)).view(torch.float32)

    def rounded(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (bfloat16(output[0]), *output[1:])
        return bfloat16(output)

    ends = [end for kind in kinds for end in PLACES[kind]]
    handles = []
    for name, module in model.named_modules():
        layer = "layer" in ends and name.rpartition(".")[0] == "model.layers"
        if layer or any(name == end or name.endswith(f".{end}") for end in ends):
            handles.append(module.register_forward_hook(rounded))
    if kinds and not handles:
        raise SystemExit(f"error: no module for {', '.join(kinds)}")
    rows = []
    with torch.no_grad():
        for window in torch.tensor(windows):
            logits = model(window[None]).logits[0].double().log_softmax(-1)
            rows.append(logits[torch.arange(len(window) - 1), window[1:]].numpy())
    for handle in handles:
        handle.remove()
    return np.array(rows)


def main() -> int:
    from vllm_engine import windows_of

    from paddle_ccq.checkpoint.reader import open_checkpoint

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", default="examples/data/public-domain-sample.txt")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=8, help="runs of random rounding")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.folder)
    windows = windows_of(arguments.folder, arguments.text)
    model = decoded_model(checkpoint, lambda _: False)
    exact = scores(model, windows, [])
    result: dict[str, Any] = {"nll": -exact.mean(), "places": {}}
    print(f"float32: {-exact.mean():.5f}", flush=True)

    def note(name: str, found: np.ndarray) -> None:
        moved = found - exact
        error, each = moved.std() / np.sqrt(moved.size), np.abs(moved).mean()
        result["places"][name] = {"nll": -moved.mean(), "error": error, "each": each}
        print(f"{name:28} {-moved.mean():+.5f} ({error:.5f}), each {each:.4f}", flush=True)

    for kind in PLACES:
        note(kind, scores(model, windows, [kind]))
    note("all of these", scores(model, windows, list(PLACES)))
    for kind, rounded in WEIGHTS.items():
        note(kind, scores(decoded_model(checkpoint, rounded), windows, []))
    every = decoded_model(checkpoint, WEIGHTS["dense weights"])
    note("dense weights and all places", scores(every, windows, list(PLACES)))
    for seed in range(arguments.seeds):
        note(f"all places, random {seed}", scores(model, windows, list(PLACES), seed))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
