"""A tiny model of every architecture of transformers that can generate text."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# One of each kind, and those that are used most. The rest is `exhaustive`: `make test-models`.
COMMON = {
    "bloom", "cohere2", "ctrl", "deepseek_v3", "diffllama", "falcon", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2",
    "gpt_neox", "gpt_oss", "granite", "hrm_text", "jamba", "llama", "llama4_text", "mamba", "mistral", "mixtral", "mpt",
    "olmo2", "opt", "phi3", "phimoe", "prophetnet", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "roberta", "rwkv",
    "smollm3", "stablelm", "starcoder2", "xlnet",
}  # fmt: skip
VOCABULARY, WIDTH, LAYERS, HEADS, POSITIONS = 512, 32, 2, 4, 512
# The sizes of a tiny model, by the names that configurations give them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "num_embeddings", "decoder_vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "emb_dim", "embed_dim", "model_dim", "attention_hidden_size"], WIDTH),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "d_inner", "inner_dim", "dff", "ffn_hidden_size", "shared_expert_intermediate_size", "moe_intermediate_size", "intermediate_size_mlp", "shared_intermediate_size", "n_ffn", "dim_ff", "expert_ffn_hidden_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_layers", "num_decoder_layers", "num_encoder_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads", "num_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "attention_head_dim", "dim_head", "v_head_dim", "qk_nope_head_dim", "kv_channels", "swa_head_dim", "global_head_dim", "d_kv"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim"], 4),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "max_seq_len", "seq_length"], POSITIONS),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_total"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "moe_top_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group"], 1),
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "init_std": 0.2,
    "first_k_dense_replace": 1, "is_decoder": True,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
# What some architectures need besides, or do not take.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"num_key_value_heads": HEADS},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
}


# Configurations of other shapes than the usual ones: (architecture, what differs).
BOUNDARY = 45  # tokens; the rows of the tests are shorter and longer than that
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "a single head of keys": ("llama", {"num_key_value_heads": 1}),
    "as many heads of keys as of queries": ("qwen2", {"num_key_value_heads": HEADS}),
    "wide heads": ("qwen3", {"head_dim": 24}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied embeddings": ("qwen3", {"tie_word_embeddings": True}),
    "windows in some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "a window in all layers": ("mistral", {"sliding_window": 5}),
    "a window of one token": ("gemma3_text", {"sliding_window": 1, "layer_types": ["sliding_attention"] * 2}),
    "keys shared by layers": (
        "gemma3n_text",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
    ),
    "soft-capped logits": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 2.0}),
    "scaled logits": ("cohere2", {"logit_scale": 0.3}),
    "a parallel block": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "ALiBi": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "linear RoPE": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "YaRN": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": BOUNDARY,
            }
        },
    ),
    "dynamic RoPE": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            "max_position_embeddings": BOUNDARY,
        },
    ),
    "RoPE with two sets of factors": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [9.0] * 4,
                "original_max_position_embeddings": BOUNDARY,
            },
            "original_max_position_embeddings": BOUNDARY,
        },
    ),
    "experts in every second layer": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "router losses": ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.5}),
}
# Their tokens see those that follow them, LoRA cannot train them, or a row depends on the rows before it.
REFUSED = {"cpmant", "ctrl", "dynamic RoPE", "git", "xlm", "xlnet"}
# The tokens that follow change what these compute before them, so there is no single reference for probabilities.
LENGTH_DEPENDENT = {"prophetnet", "dynamic RoPE", "RoPE with two sets of factors"}


def shrink(config: Any, special: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a configuration that make a tiny model of it."""
    values = config.to_dict()
    found = {name: size for name, size in SIZES.items() if values.get(name) is not None}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if values.get(name):
            found[name] = list(dict.fromkeys(values[name]))[:LAYERS] * LAYERS
            found[name] = found[name][:LAYERS]
    for name in ("sliding_window", "attention_chunk_size", "window_size"):
        if isinstance(values.get(name), int):
            found[name] = 16
    if "qk_rope_head_dim" in found:  # multi-head latent attention: its head_dim is that of the part with RoPE
        found |= {"head_dim": found["qk_rope_head_dim"], "num_key_value_heads": HEADS}
    return found | special


def make(name: str) -> Any:
    """A model with random weights, of an architecture or an odd configuration.

    Raises:
        Exception: its configuration cannot be made smaller in this way.
    """
    architecture, special = ODD.get(name, (name, {}))
    kind = CONFIG_MAPPING[architecture]
    default = kind()
    arguments = shrink(default, SPECIAL.get(architecture, {}) | special)
    for part in getattr(kind, "sub_configs", {}):
        sub = getattr(default, part, None)
        if sub is not None and part not in arguments:
            arguments[part] = shrink(sub, {})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**arguments)).eval()
