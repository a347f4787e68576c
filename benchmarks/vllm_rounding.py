# SPDX-License-Identifier: Apache-2.0
"""Where bfloat16 moves a model's loss: float32 with the roundings of one kind of place at a time.

    python benchmarks/vllm_rounding.py FOLDER [--text FILE] [--json OUT.json]

FOLDER is a bfloat16 checkpoint in transformers' naming (`dequantize --naming pt`). Scores the
windows of benchmarks/gpu/vllm_engine.py; needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

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


def scores(model: Any, windows: np.ndarray, kinds: list[str]) -> np.ndarray:
    """float64 [windows, tokens - 1] log-probabilities, with outputs of some places rounded."""
    import torch

    def rounded(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].bfloat16().float(), *output[1:])
        return output.bfloat16().float()

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
    import torch
    import transformers
    from vllm_engine import windows_of

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", default="examples/data/public-domain-sample.txt")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(arguments.folder, dtype=torch.float32).eval()
    windows = windows_of(arguments.folder, arguments.text)
    exact = scores(model, windows, [])
    result = {"nll": -exact.mean(), "places": {}}
    print(f"float32: {-exact.mean():.5f}", flush=True)
    for kinds in [*([kind] for kind in PLACES), list(PLACES)]:
        found = scores(model, windows, kinds) - exact
        name = "all" if len(kinds) > 1 else kinds[0]
        error = found.std() / np.sqrt(found.size)
        entry = {"nll": -found.mean(), "error": error, "each": np.abs(found).mean()}
        result["places"][name] = entry
        print(f"{name:28} {-found.mean():+.5f} ({error:.5f}), each {entry['each']:.4f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
