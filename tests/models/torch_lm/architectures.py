"""Tiny random models of every architecture that transformers builds in about a second, from its own mappings.

Run `python -m tests.models.torch_lm.architectures` to build them all and see how long each takes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["CAUSAL", "CAUSAL_SWITCH", "NOT_BUILT", "SEQ2SEQ", "tiny"]

# fmt: off
CAUSAL: tuple[str, ...] = (
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bailing_hybrid", "bamba", "bart", "beam", "bert",
    "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "bitnet", "blenderbot", "blenderbot-small",
    "bloom", "blt", "camembert", "codegen", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "cpmant",
    "ctrl", "cwm", "data2vec-text", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4",
    "diffllama", "doge", "dots1", "dots3_note", "dots3_note_text", "electra", "emu3", "ernie", "ernie4_5",
    "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "flint", "fuyu",
    "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified",
    "gemma4_unified_text", "git", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "got_ocr2", "gpt-sw3",
    "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa",
    "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax", "inkling2_text", "inkling_text",
    "internlm3", "iquestcoder", "jais2", "jamba", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2",
    "lfm2_moe", "lfm3", "llama", "llama4", "llama4_text", "longcat_flash", "mamba", "mamba2", "marian", "mbart",
    "megatron-bert", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "minimax_m3_vl_text",
    "ministral", "ministral3", "mistral", "mixtral", "mllama", "modernbert-decoder", "moshi",
    "moss_transcribe_diarize", "mpt", "mvp", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3",
    "olmo_hybrid", "olmoe", "openai-gpt", "opt", "pegasus", "persimmon", "phi", "phi3", "phi4_multimodal",
    "phimoe", "plbart", "prophetnet", "qwen2", "qwen2_moe", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "reformer",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "rwkv", "seed_oss", "smollm3",
    "solar_open", "stablelm", "starcoder2", "trocr", "vaultgemma", "whisper", "xglm", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "xlnet", "xlstm", "xmod", "youtu", "zamba", "zamba2", "zaya",
)
SEQ2SEQ: tuple[str, ...] = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "fsmt", "led", "longt5",
    "m2m_100", "marian", "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet",
    "seamless_m4t", "seamless_m4t_v2", "switch_transformers", "t5", "t5gemma", "t5gemma2", "umt5",
)
# Tokens of these see the tokens after them, by default: these overrides make them causal. Nothing does that for cpmant,
# and reformer cannot be built without is_decoder, which it has below.
CAUSAL_SWITCH: dict[str, dict[str, Any]] = {
    **{model_type: {"is_decoder": True} for model_type in (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
    )},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
}
# fmt: on
NOT_BUILT: dict[str, str] = {
    "audioflamingo3": "takes audio, and is a decoder alone",
    "gemma3n": "its vision tower needs the package timm; gemma3n_text is built",
    "gemma4_assistant": "reads the states of a target model, not token ids",
    "gemma4_unified_assistant": "reads the states of a target model, not token ids",
    "glmasr": "takes audio, and is a decoder alone",
    "granite_speech": "takes audio, and is a decoder alone",
    "granite_speech_plus": "takes audio, and is a decoder alone",
    "musicflamingo": "takes audio, and is a decoder alone",
    "musicgen": "generates audio codes",
    "musicgen_melody": "generates audio codes",
    "nemo_speechlm": "takes audio, and is a decoder alone",
    "qwen2_audio": "takes audio, and is a decoder alone",
    "qwen3_asr": "takes audio, and is a decoder alone",
    "vibevoice_asr": "takes audio, and is a decoder alone; takes 10 seconds",
    "voxtral": "takes audio, and is a decoder alone",
    "voxtral_realtime": "takes audio, and is a decoder alone",
}

# What a configuration's fields become, by their names, where the default is not None.
SIZES: dict[str, int | None] = {
    name: value
    for value, names in [
        (64, "vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size unpadded_vocab_size"),
        (64, "vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab"),
        (64, "max_position_embeddings max_encoder_position_embeddings max_decoder_position_embeddings n_positions"),
        (64, "original_max_position_embeddings max_seq_len max_target_positions max_source_positions n_ctx"),
        (64, "context_length model_max_length"),
        (32, "hidden_size hidden_size_global d_model n_embd emb_dim embedding_dim embedding_size lru_width"),
        (32, "input_embedding_size output_embedding_size word_embed_proj_dim pronunciation_embed_dim shape_embed_dim"),
        (48, "intermediate_size intermediate_size_mlp ffn_dim d_ff dff dim_ff d_inner n_inner ffn_hidden_size"),
        (48, "encoder_ffn_dim decoder_ffn_dim feed_forward_size expert_ffn_hidden_size dense_intermediate_size"),
        (48, "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size"),
        (48, "shared_experts_intermediate_size moe_shared_expert_intermediate_size prompt_mid_dim"),
        (2, "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers"),
        (2, "num_decoder_layers num_blocks num_layers_per_stack"),
        (4, "num_attention_heads num_heads n_head n_heads attention_heads encoder_attention_heads"),
        (4, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
        (4, "linear_num_heads linear_num_value_heads index_n_heads"),
        (2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads n_mamba_heads"),
        (8, "head_dim d_kv d_head dim_head attention_head_size swa_head_dim v_head_dim qk_nope_head_dim kv_channels"),
        (8, "linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim mamba_d_head mamba_head_dim"),
        (4, "qk_rope_head_dim rotary_dim index_topk"),
        (12, "qk_head_dim"),
        (16, "q_lora_rank kv_lora_rank o_lora_rank"),
        (8, "mamba_n_heads mamba_num_heads state_size ssm_state_size mamba_d_state time_step_rank mamba_dt_rank"),
        (8, "chunk_size mamba_chunk_size block_size hidden_size_per_layer_input laurel_rank gated_norm_rank"),
        (8, "hc_lowrank adapter_rank d_rel relative_attention_num_buckets num_buckets"),
        (8, "sliding_window sliding_window_size window_size attention_window attention_window_size local_attention"),
        (8, "attention_chunk_size local_attention_window_len"),
        (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
        (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k"),
        (1, "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts"),
        (1, "first_k_dense_replace num_dense_layers mamba_n_groups n_groups mamba_ngroups"),
        (0, "num_nextn_predict_layers pad_token_id"),
        (1, "bos_token_id"),
        (2, "eos_token_id"),
        (None, "forced_bos_token_id forced_eos_token_id"),
    ]
    for name in names.split()
}
PER_LAYER = ("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type")  # one layer of each kind is built

# Fields by the model type of their configuration, or of the one that it is a part of.
MLA = {"num_key_value_heads": 4}  # the latent is expanded to a key and a value for every head
KIMI_DELTA = {**MLA, "linear_num_heads": 2, "linear_head_dim": 4}  # its tables are 64 x 64 x heads x dimension per row
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": MLA,
    "axk2": MLA,
    "bailing_hybrid": KIMI_DELTA,
    "bamba": {"attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_key_value_heads": 2,
        "logit_scale": 0.5,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "cpmant": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": MLA | {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_text": MLA
    | {
        "layer_types": ["indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling_text": {"logits_mup_width_multiplier": 2.0, "mlp_layer_types": ["dense", "sparse"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": KIMI_DELTA,
    "laguna": {"layer_types": ["full_attention", "sliding_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": MLA | {"head_dim": 4, "zero_expert_num": 2},
    "longt5": {"decoder_start_token_id": 0},
    "mamba2": {"num_heads": 8},
    "mbart": {"decoder_start_token_id": 1},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"]},
    "minicpm3": MLA,
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "ministral": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "plbart": {"decoder_start_token_id": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 31,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 64,  # all: hashing at random into more chunks is not quite causal
        "is_decoder": True,
    },
    "roc_bert": {"bos_token_id": 1, "eos_token_id": 2},
    "smollm3": {"no_rope_layers": [1, 0]},
    "switch_transformers": {"decoder_start_token_id": 0},
    "t5": {"decoder_start_token_id": 0},
    "t5gemma": {"decoder_start_token_id": 1},
    "t5gemma2": {"decoder_start_token_id": 1},
    "xmod": {"default_language": "en_XX"},
    "youtu": MLA,
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {
        "layer_types": ["hybrid", "hybrid_sliding"],
        "sliding_window": 8,
        "num_experts_per_tok": 1,
        "router_hidden_size": 32,
    },
}
OUTPUT_STD = dict.fromkeys(("longt5", "switch_transformers", "t5", "umt5"), 1.5)  # their logits are divided by sqrt(32)


def tiny(model_type: str, *, seed: int = 0, seq2seq: bool | None = None, **overrides: Any) -> torch.nn.Module:
    """Return a tiny model in eval mode, whose random weights are large enough for sharp distributions.

    A type in both lists is built as a decoder alone unless seq2seq is True. The overrides are fields of the
    configuration, or of its text_config. The ids: pad 0, bos 1, eos 2; the decoder of a seq2seq model starts with
    whichever of them its architecture starts with.
    """
    if seq2seq is None:
        seq2seq = model_type not in CAUSAL
    if model_type == "encoder-decoder":
        decoder = tiny_config(CONFIG_MAPPING["bert"], {"is_decoder": True, "add_cross_attention": True})
        ids = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        parts = {"encoder": tiny_config(CONFIG_MAPPING["bert"]).to_dict(), "decoder": decoder.to_dict()}
        config = CONFIG_MAPPING[model_type](**parts | ids | overrides)
    else:
        config = tiny_config(CONFIG_MAPPING[model_type], overrides)
    factory = hf.AutoModelForSeq2SeqLM if seq2seq else hf.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = factory.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:  # sinusoids are no weights
                parameter.normal_(std=0.3)
        if model_type in OUTPUT_STD:
            model.get_output_embeddings().weight.normal_(std=OUTPUT_STD[model_type])
        model.eval()
    assert isinstance(model, torch.nn.Module)
    return model


def tiny_config(config_class: Any, overrides: dict[str, Any] | None = None) -> Any:
    """Return the class's default configuration made small, with the overrides."""
    special = SPECIAL.get(config_class.model_type, {}) | (overrides or {})
    names = {field.name for field in dataclasses.fields(config_class)}
    stored = vars(config_class())  # getattr refuses fields that vary by layer
    default = {name: stored.get(config_class.attribute_map.get(name, name)) for name in sorted(names)}
    if "text_config" in names:
        text = {name: special.pop(name) for name in set(special) - names}
        special["text_config"] = special.get("text_config", {}) | text
    settings: dict[str, Any] = {}
    for name, value in default.items():
        if isinstance(value, hf.PreTrainedConfig):
            settings[name] = tiny_config(type(value), special.pop(name, {}))
        elif name == "decoder_start_token_id" and value is not None:
            settings[name] = {default["pad_token_id"]: 0, default.get("bos_token_id"): 1}.get(value, 2)
        elif name in SIZES and (value is not None or name in {"pad_token_id", "bos_token_id", "eos_token_id"}):
            settings[name] = SIZES[name]
    kinds = {name: list(dict.fromkeys(default[name])) for name in PER_LAYER if isinstance(default.get(name), list)}
    kinds |= {name: special.pop(name) for name in PER_LAYER if name in special}
    if kinds:
        num_layers = max(2, *map(len, kinds.values()))
        settings |= {name: kind + kind[-1:] * (num_layers - len(kind)) for name, kind in kinds.items()}
        settings["num_hidden_layers"] = num_layers
    return config_class(**settings | special)


def main() -> int:
    """Build every model, run six tokens through it and print how that went; the number of failures."""
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    tiny(CAUSAL[0])  # what every model imports takes seconds
    failures = 0
    for seq2seq, model_types in [(False, CAUSAL), (True, SEQ2SEQ)]:
        for model_type in model_types:
            start = time.perf_counter()
            try:
                model = tiny(model_type, seq2seq=seq2seq)
                ids = torch.tensor([[5, 9, 3, 7, 11, 4]])
                inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if seq2seq else {})
                with torch.no_grad():
                    logits = model(**inputs, use_cache=False).logits
                verdict = "ok" if logits.isfinite().all() else "not finite"
            except Exception as error:
                verdict = f"{type(error).__name__}: {error}".splitlines()[0]
            failures += verdict != "ok"
            seconds = time.perf_counter() - start
            print(f"{model_type:28} {'seq2seq' if seq2seq else 'causal':8} {seconds:5.2f} s  {verdict}")
    print(f"{len(CAUSAL)} causal, {len(SEQ2SEQ)} seq2seq, {failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(main() > 0)
