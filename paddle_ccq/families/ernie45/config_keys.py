# SPDX-License-Identifier: Apache-2.0
"""What every key of a config.json means here: another key's value, a fixed value, or nothing.

A key is one of five kinds. Keys that `config.py` reads; other names of these (ALIASES), which must
not say anything else; keys that change what is computed (FIXED), which must have the one value
that ERNIE-4.5 computes with; keys that change nothing (NEUTRAL); and unknown ones, which are passed
on with a warning. The names are those of transformers, PaddleFormers, ERNIEKit, FastDeploy, vLLM
and of configs of other model families.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..fields import Fail, check_same, same, show

# The name that is read -> other names of the same value.
ALIASES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("n_vocab",),
    "hidden_size": ("n_embd", "d_model"),
    "intermediate_size": ("n_inner", "ffn_hidden_size"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads", "n_head_kv"),
    "head_dim": ("attention_head_dim", "head_size", "kv_channels"),
    "hidden_act": ("activation_function", "hidden_activation"),
    "rms_norm_eps": (
        "layer_norm_epsilon",
        "layer_norm_eps",
        "rms_norm_epsilon",
        "layernorm_epsilon",
        "norm_eps",
        "norm_epsilon",
    ),
    "rope_theta": ("rotary_emb_base", "rotary_base", "rope_base"),
    "max_position_embeddings": (
        "n_positions",
        "max_seq_len",
        "max_seq_length",
        "max_position_embedding",
    ),
    "tie_word_embeddings": ("tie_embeddings", "tied_embeddings", "tie_embedding"),
    "moe_num_experts": (
        "num_experts",
        "n_routed_experts",
        "num_routed_experts",
        "num_local_experts",
        "n_experts",
    ),
    "moe_k": ("moe_topk", "moe_top_k", "num_experts_per_tok", "num_experts_per_token"),
    "moe_num_shared_experts": ("n_shared_experts", "num_shared_experts"),
    "moe_intermediate_size": ("moe_ffn_hidden_size", "expert_intermediate_size"),
    "moe_layer_start_index": ("first_k_dense_replace", "num_dense_layers"),
    "num_nextn_predict_layers": ("num_mtp_layers", "mtp_num_layers"),
}
_READ_NAME = {other: name for name, others in ALIASES.items() for other in others}
# Of a nested text_config; they speak of the nested object itself.
_OF_THE_OBJECT = ("architectures", "model_type", "_name_or_path", "transformers_version")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _fixed(names: str, *values: Any) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(names.split(), values)


# Key -> the values that mean what ERNIE-4.5 computes. No value: the key must be absent or null.
FIXED: dict[str, tuple[Any, ...]] = {
    **_fixed("hidden_act", "silu"),
    **_fixed("attention_bias mlp_bias qkv_bias use_qkv_bias add_bias_linear lm_head_bias", False),
    **_fixed("use_qk_norm qk_norm use_qk_layernorm qk_layernorm", False),
    **_fixed("use_rmsnorm use_rms_norm", True),
    **_fixed(
        "norm_type normalization layernorm_type layer_norm_type",
        "rms_norm",
        "rmsnorm",
        "RMSNorm",
        "rms",
    ),
    **_fixed(
        "scale_qk_coeff attention_multiplier embedding_multiplier embedding_scale scale_emb"
        " residual_multiplier logit_scale logits_scaling compression_ratio partial_rotary_factor"
        " rotary_pct rotary_percent",
        1,
    ),
    **_fixed(
        "attn_logit_softcapping attn_logit_softcap final_logit_softcapping logit_softcap"
        " logit_softcapping router_logit_softcapping qk_norm_type"
        " query_pre_attn_scalar attention_scale scale_depth no_rope_layers no_rope_layer_interval"
        " sparse_attention attention_chunk_size swiglu_limit mrope_section freq_allocation"
        " vision_config audio_config vision_tower mm_projector_type"
    ),
    **_fixed(
        "use_sliding_window use_attention_sink attention_sinks attn_output_gate use_alibi alibi"
        " use_sparse_attn parallel_attn use_parallel_residual use_mla cachekv_quant"
        " multi_query is_encoder_decoder add_cross_attention tie_encoder_decoder use_post_norm"
        " apply_residual_connection_post_layernorm",
        False,
    ),
    **_fixed("q_lora_rank kv_lora_rank mm_vocab_size num_zero_experts zero_expert_num", 0),
    **_fixed("use_rope use_rotary rotary", True),
    **_fixed("position_embedding_type", "rope", "rotary", "absolute"),
    # Queries and keys are turned in neighbouring pairs; neox style turns the two halves.
    **_fixed("rope_is_neox_style is_neox_style", False),
    **_fixed(
        "rope_interleave rope_interleaved rotary_interleaved interleaved_rope rope_traditional",
        True,
    ),
    **_fixed("rope_3d use_3d_rope use_mrope", False),
    **_fixed("pruned_heads", {}),
}
# The same for models with experts; in a dense model they mean nothing.
FIXED_MOE: dict[str, tuple[Any, ...]] = {
    **_fixed(
        "moe_gate_act scoring_func score_func score_function moe_score_func"
        " moe_router_score_function moe_router_activation_func router_activation_func"
        " router_activation router_act gate_act scoring_function",
        "softmax",
    ),
    **_fixed(
        "moe_norm_gate_logits norm_topk_prob moe_renormalize route_norm norm_topk moe_norm_topk"
        " normalize_expert_weights norm_expert_weight",
        True,
    ),
    **_fixed(
        "routed_scaling_factor moe_routed_scaling_factor route_scale router_scaling_factor"
        " router_scale moe_router_scale"
        " moe_router_topk_scaling_factor",
        1,
    ),
    # The correction bias takes part in the choice of experts.
    **_fixed(
        "moe_use_aux_free use_expert_bias use_routing_bias moe_router_enable_expert_bias", True
    ),
    **_fixed("n_group topk_group num_expert_group n_expert_groups moe_n_group", 0, 1),
    **_fixed("topk_method", "noaux_tc"),
    # All of them choose the moe_k best; the names tell kernels apart.
    **_fixed("moe_gate", "topk", "topk_fused", "top2", "top2_fused"),
    **_fixed("moe_use_hard_gate moe_group_experts moe_use_token_type_bias", False),
    **_fixed("use_shared_expert_gate moe_shared_expert_gate shared_expert_gate", False),
    **_fixed("moe_latent_size moe_latent_dim", 0),
    **_fixed("router_bias moe_router_bias gate_bias add_router_bias", False),
    **_fixed("moe_layer_freq decoder_sparse_step", 1),
    **_fixed("mlp_only_layers", []),
}

# Read by config.py or by another module, and so neither unknown nor neutral.
READ = _names(
    """architectures model_type use_bias dtype torch_dtype rope_scaling rope_parameters rotary_dim
    moe_layer_end_index moe_layer_interval moe_norm_min use_moe sliding_window layer_types
    mlp_layer_types
    shared_expert_intermediate_size moe_shared_expert_intermediate_size quantization_config
    compression_config bos_token_id eos_token_id pad_token_id paddle_ccq text_config"""
)
# Keys that change nothing that is computed from given weights and tokens: of files, of training, of
# fused kernels with the same result, of generation, and of Python classes.
NEUTRAL = _names(
    """_name_or_path _attn_implementation _attn_implementation_autoset auto_map
    transformers_version paddlenlp_version paddleformers_version model_name name_or_path
    initializer_range use_cache use_flash_attention use_fast_ln use_sparse_flash_attn
    use_var_len_flash_attn use_sparse_head_and_loss_fn weight_share_add_bias add_tail_layers
    max_sequence_length seq_length max_window_layers ignored_index micro_batch_size num_acc_steps
    token_balance_loss token_balance_seqlen pp_seg_method skip_recompute_ops
    loss_subbatch_seqlen disable_ffn_model_parallel sequence_parallel
    global_aux_loss moe_capacity moe_group moe_group_origin moe_rank moe_world_size
    moe_group_orthogonal_loss moe_reverse_token_drop moe_dense_experts_token_type_id
    moe_multimodal_dispatch_use_allgather moe_fuse_experts moe_use_size_all2all
    moe_layer_feed_fake_token sinkhorn_2gate sinkhorn_temp enable_delay_scale_loss
    enable_mtp_magic_send router_aux_loss_coef router_z_loss_coef router_jitter_noise
    is_decoder cross_attention_hidden_size return_dict torchscript use_bfloat16 is_quantized
    is_moe_quantized finetuning_task id2label label2id num_labels problem_type prefix
    task_specific_params tokenizer_class decoder_start_token_id sep_token_id unk_token_id
    begin_suppress_tokens suppress_tokens bad_words_ids exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id remove_invalid_values chunk_size_feed_forward
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty penalty_score
    frequency_score presence_score no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_return_sequences max_new_tokens max_model_len tf_legacy_loss pretraining_tp
    tensor_parallel_degree tensor_parallel_output tensor_parallel_rank pipeline_parallel_degree
    virtual_pp_degree use_recompute gradient_checkpointing"""
)
NEUTRAL_PATTERN = re.compile(
    r"fuse_\w+|use_fused_\w+|(?:use_)?recompute(?:_\w+)?|refined_recompute|use_recompute_\w+"
    r"|\w*dropout(?:_\w+)?|\w+_lambda|dpo_\w+|mtp_loss_\w+|output_\w+|base_model_\w+"
)


def unified(values: Mapping[str, Any], fail: Fail) -> dict[str, Any]:
    """The config with every value under the name that is read, and a text_config at the top.

    Raises:
        What `fail` builds: if two names of one value say different things.
    """
    nested = values.get("text_config")
    if nested is not None and not isinstance(nested, Mapping):
        raise fail("text_config", f"{show(nested)} is not an object")
    statements: dict[str, tuple[str, Any]] = {}
    result: dict[str, Any] = {}
    for key, value in values.items():
        # A null says nothing, but stays where it was.
        if key != "text_config" and (key not in _READ_NAME or value is not None):
            _state(statements, result, key, key, value, fail)
    for key, value in (nested or {}).items():
        if key not in _OF_THE_OBJECT and value is not None:
            _state(statements, result, key, f"text_config.{key}", value, fail)
    return result


def _state(
    statements: dict[str, tuple[str, Any]],
    result: dict[str, Any],
    key: str,
    label: str,
    value: Any,
    fail: Fail,
) -> None:
    name = _READ_NAME.get(key, key)
    if value is None:
        result.setdefault(name, None)
        return
    if name in statements:
        check_same(*statements[name], label, value, fail)
        return
    statements[name] = (label, value)
    result[name] = value


def fixed_problems(values: Mapping[str, Any], experts: bool) -> Iterator[tuple[str, str]]:
    """Keys that change the model and don't have ERNIE-4.5's value, each with what is wrong."""
    for key, allowed in (*FIXED.items(), *(FIXED_MOE.items() if experts else ())):
        value = values.get(key)
        if value is None or any(same(value, one) for one in allowed):
            continue
        if not allowed:
            yield key, f"{show(value)} is not supported; the key must be absent"
            continue
        shown = " or ".join(show(one) for one in allowed)
        yield key, f"{show(value)} is not supported, only {shown}"


def unknown_keys(values: Mapping[str, Any]) -> list[str]:
    """Keys with a value of which nothing is known here."""
    return [
        key
        for key, value in values.items()
        if value is not None
        and key not in ALIASES
        and key not in FIXED
        and key not in FIXED_MOE
        and key not in READ
        and key not in NEUTRAL
        and not NEUTRAL_PATTERN.fullmatch(key)
    ]
