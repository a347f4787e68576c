# SPDX-License-Identifier: Apache-2.0
"""Latent attention of prompts by PyTorch's flash attention, for a vLLM without its own.

vLLM's needs FlashAttention 3 with heads of 192 and 128, which builds cut to a few sizes lack. This
one pads the values to 192, so a prompt takes longer; decoding steps don't come here.
"""

from __future__ import annotations

import torch
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
from vllm.v1.attention.backends.mla.prefill.registry import (
    MLAPrefillBackendEnum,
    register_mla_prefill_backend,
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of sequences laid end to end.

    Args:
        q, k: [tokens, heads, size] of queries and of keys.
        v: [tokens of keys, heads, size of a value], at most `size`.
        starts: int32 [sequences + 1], of queries and of keys.
        longest: sequence, in queries and in keys.

    Returns:
        [tokens, heads, size of a value]; float32 [heads, tokens]: logarithm of the sum of weights.
    """
    width = v.shape[-1]
    padded = torch.nn.functional.pad(v, [0, q.shape[-1] - width])
    found = torch.ops.aten._flash_attention_forward(
        q, k, padded, *starts, *longest, 0.0, causal, False, scale=scale
    )
    return found[0][..., :width], found[1]


class TorchPrefill(MLAPrefillBackend):
    @staticmethod
    def get_name() -> str:
        return "TORCH"

    def run_prefill_new_tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        return_softmax_lse: bool,
        out: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if out is not None:
            raise NotImplementedError("an output in 8 bits")
        found = self._prefill_metadata
        starts = (found.query_start_loc,) * 2
        result = attention(q, k, v, starts, (found.max_query_len,) * 2, self.scale, True)
        return result if return_softmax_lse else result[0]

    def run_prefill_context_chunk(
        self, chunk_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._prefill_metadata
        context = found.chunked_context
        starts = (found.query_start_loc, context.cu_seq_lens[chunk_idx])
        longest = (found.max_query_len, context.max_seq_lens[chunk_idx])
        return attention(q, k, v, starts, longest, self.scale, False)


def register() -> None:
    """As the backend that attention_config names CUSTOM; called in each process."""
    register_mla_prefill_backend(MLAPrefillBackendEnum.CUSTOM, f"{__name__}.TorchPrefill")
