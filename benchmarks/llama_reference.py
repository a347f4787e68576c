# SPDX-License-Identifier: Apache-2.0
"""The same network in llama.cpp, as a reference for the embedded server's speed.

    pip install llama-cpp-python gguf
    python benchmarks/llama_reference.py FLOAT [--experts Q4_0]

Writes the checkpoint as GGUF (experts in a format of llama.cpp, other linear layers in Q8_0, no
tokenizer) and times one sequence, in this process and without HTTP. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paddle_ccq.checkpoint.reader import Checkpoint, open_checkpoint
from serving import NEW_TOKENS, REPEATS, memory_mib, tokens

ARCHITECTURE = "ernie4_5-moe"


def write_gguf(checkpoint: Checkpoint, path: Path, experts: Type) -> None:
    """An ERNIE-4.5 MoE checkpoint under llama.cpp's names."""
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_theta))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.moe_num_experts)
    writer.add_expert_used_count(config.moe_k)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.moe_num_shared_experts)
    writer.add_interleave_moe_layer_step(1)
    writer.add_leading_dense_block_count(config.moe_layer_start_index)
    writer.add_vocab_size(config.vocab_size)
    writer.add_string("tokenizer.ggml.model", "no_vocab")

    def add(name: str, weight: np.ndarray, type: Type = Type.F32) -> None:
        writer.add_tensor(name, quants.quantize(weight, type), raw_dtype=type)

    def matrix(name: str) -> np.ndarray:
        return checkpoint.read_out_in(f"ernie.{name}.weight")

    def halves(weight: np.ndarray) -> list[np.ndarray]:
        return [np.ascontiguousarray(part) for part in np.split(weight, 2)]

    # An embedding is stored as [vocabulary, hidden], without an orientation to turn.
    embedding = np.ascontiguousarray(checkpoint.read("ernie.embed_tokens.weight"))
    add("token_embd.weight", embedding, Type.Q8_0)
    add("output_norm.weight", checkpoint.read("ernie.norm.weight"))
    if not config.tie_word_embeddings:
        add("output.weight", checkpoint.read_out_in("lm_head.weight"), Type.Q8_0)
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    for layer in range(config.num_hidden_layers):
        to, of = f"blk.{layer}", f"layers.{layer}"
        add(f"{to}.attn_norm.weight", checkpoint.read(f"ernie.{of}.input_layernorm.weight"))
        norm = checkpoint.read(f"ernie.{of}.post_attention_layernorm.weight")
        add(f"{to}.ffn_norm.weight", norm)
        parts = np.split(matrix(f"{of}.self_attn.qkv_proj"), [heads, heads + keys])
        for letter, part in zip("qkv", parts, strict=True):
            add(f"{to}.attn_{letter}.weight", part, Type.Q8_0)
        add(f"{to}.attn_output.weight", matrix(f"{of}.self_attn.o_proj"), Type.Q8_0)
        if not config.is_moe_layer(layer):
            gate, up = halves(matrix(f"{of}.mlp.up_gate_proj"))
            add(f"{to}.ffn_gate.weight", gate, Type.Q8_0)
            add(f"{to}.ffn_up.weight", up, Type.Q8_0)
            add(f"{to}.ffn_down.weight", matrix(f"{of}.mlp.down_proj"), Type.Q8_0)
            continue
        add(f"{to}.ffn_gate_inp.weight", matrix(f"{of}.mlp.gate"))
        bias = checkpoint.read(f"ernie.{of}.mlp.moe_statics.e_score_correction_bias")
        add(f"{to}.exp_probs_b.bias", bias.reshape(-1))
        names = [f"{of}.mlp.experts.{e}" for e in range(config.moe_num_experts)]
        pairs = [halves(matrix(f"{name}.up_gate_proj")) for name in names]
        add(f"{to}.ffn_gate_exps.weight", np.stack([gate for gate, _ in pairs]), experts)
        add(f"{to}.ffn_up_exps.weight", np.stack([up for _, up in pairs]), experts)
        down = np.stack([matrix(f"{name}.down_proj") for name in names])
        add(f"{to}.ffn_down_exps.weight", down, experts)
        if config.moe_num_shared_experts:
            gate, up = halves(matrix(f"{of}.mlp.shared_experts.up_gate_proj"))
            add(f"{to}.ffn_gate_shexp.weight", gate, Type.Q8_0)
            add(f"{to}.ffn_up_shexp.weight", up, Type.Q8_0)
            shared = matrix(f"{of}.mlp.shared_experts.down_proj")
            add(f"{to}.ffn_down_shexp.weight", shared, Type.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """llama.cpp's C interface for one sequence; its Python class wants a tokenizer."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_log_set(_silent, None)
        self.vocabulary = 0
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise SystemExit(f"error: llama.cpp does not load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = 1024
        context.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def use_threads(self, count: int) -> None:
        llama_cpp.llama_set_n_threads(self.context, count, count)

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def next(self, given: list[int]) -> int:
        """The most likely token after these, which continue what was given before."""
        array = (llama_cpp.llama_token * len(given))(*given)
        batch = llama_cpp.llama_batch_get_one(array, len(given))
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("error: llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def generate(self, prompt: list[int], count: int) -> list[int]:
        self.reset()
        found = [self.next(prompt)]
        while len(found) < count:
            found.append(self.next(found[-1:]))
        return found


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("float", help="the unquantized checkpoint")
    parser.add_argument("--experts", default="Q4_0", help="GGUF type of the experts (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.gguf"
        write_gguf(open_checkpoint(args.float), path, Type[args.experts])
        size = path.stat().st_size
        empty = memory_mib(os.getpid())
        model = Model(path)
        found = [measure(model, n) for n in sorted({1, len(os.sched_getaffinity(0))})]
    result = {
        "version": llama_cpp.__version__,
        "experts": args.experts,
        "file_mib": size / 2**20,
        "memory_mib": memory_mib(os.getpid()),
        "empty_mib": empty,
        # On two cores more threads than one may help or not.
        **max(found, key=lambda one: one["tokens_per_second"]),
    }
    print(json.dumps(result))


def measure(model: Model, threads: int) -> dict[str, object]:
    """The best of some runs, after one to warm up."""
    model.use_threads(threads)
    firsts, rates = [], []
    for seed in range(-1, 4 * REPEATS):
        begun = time.perf_counter()
        model.generate(tokens(seed), 1)
        firsts.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        answer = model.generate(tokens(seed), NEW_TOKENS)
        rates.append(NEW_TOKENS / (time.perf_counter() - begun))
    return {
        "threads": threads,
        "tokens_per_second": max(rates[1:]),
        "first_p50_ms": 1e3 * min(firsts[1:]),
        "answer": answer[:8],
    }


if __name__ == "__main__":
    main()
