"""The allow-list of configurations for which the JAX forward computes the same as transformers.

Every key of a config.json must be one that the forward uses, one whose value is known not to change it, or one that does not
affect log-probs; any other key is refused by name. A loader that ignores unknown keys can be wrong without an error: reading
an old key instead of `rope_parameters.rope_theta` changed logits by 89.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from bayes_klrl.errors import CheckpointError
from bayes_klrl.models.checkpoint_files import OWN_ENTRY
from bayes_klrl.models.jax_lm.forward import ACTIVATIONS, Architecture, Rope

__all__ = ["MODEL_TYPES", "architecture_of"]

MODEL_TYPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")

IRRELEVANT_KEYS = {
    *("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "model_type", OWN_ENTRY),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range", "task_specific_params"),
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "pretraining_tp", "n_ctx", "is_llama_config"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    *("return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type"),
    *("gradient_checkpointing", "transformers.js_config", "torchscript", "use_bfloat16", "_num_labels", "num_labels"),
    *(
        "_attn_implementation",
        "attn_implementation",
        "_attn_implementation_autoset",
        "finetuning_task",
        "unsloth_version",
    ),
}
"""Keys that do not affect the forward: dropout is off, `JaxLM` reads the EOS ids, the others describe files and training."""

COMMON_VALUES = {
    "chunk_size_feed_forward": (0,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
}
GPT2_VALUES: dict[str, tuple[Any, ...]] = COMMON_VALUES | {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
LLAMA_VALUES: dict[str, tuple[Any, ...]] = COMMON_VALUES | {
    "use_mrope": (False,),
    "partial_rotary_factor": (None, 1.0),
    "rope_interleaved": (False,),
}
"""Options that the forward does not support, and the values that turn them off."""

GPT2_KEYS = {
    *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function"),
    *("layer_norm_epsilon", "tie_word_embeddings"),
}
LLAMA_KEYS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    ),
    *("rope_parameters", "rope_theta", "rope_scaling"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
}
BIAS_KEYS = {"llama": {"attention_bias", "mlp_bias"}, "qwen3": {"attention_bias"}}
ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
ROPE_IRRELEVANT_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a config.json.

    Raises
    ------
    CheckpointError
        If a key or its value is not on the list; the message names both, and the supported ones.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        refuse("model_type", model_type, MODEL_TYPES)
    return gpt2_architecture(config) if model_type == "gpt2" else llama_architecture(config, str(model_type))


def gpt2_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a GPT-2; missing sizes are those of the smallest GPT-2."""
    check_keys(config, GPT2_KEYS, GPT2_VALUES)
    hidden_size, num_heads = size(config, "n_embd", 768), size(config, "n_head", 12)
    check_divides(config, "n_head", num_heads, hidden_size)
    return Architecture(
        vocab_size=size(config, "vocab_size", 50257),
        hidden_size=hidden_size,
        inner_size=4 * hidden_size if config.get("n_inner") is None else size(config, "n_inner"),
        num_layers=size(config, "n_layer", 12),
        num_heads=num_heads,
        num_key_heads=num_heads,
        head_size=hidden_size // num_heads,
        context_length=size(config, "n_positions", 1024),
        epsilon=number(config, "layer_norm_epsilon", 1e-5),
        activation=allowed(config, "activation_function", "gelu_new", ACTIVATIONS),
        tied=allowed(config, "tie_word_embeddings", True, (True, False)),
    )


def llama_architecture(config: Mapping[str, Any], model_type: str) -> Architecture:
    """Return the architecture of a Llama or a relative; most sizes must be given."""
    check_keys(config, LLAMA_KEYS | BIAS_KEYS.get(model_type, set()), LLAMA_VALUES)
    hidden_size, num_heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    num_key_heads = 8 if model_type == "mistral" else num_heads  # the default of each class of transformers
    if "num_key_value_heads" in config:
        num_key_heads = num_heads if config["num_key_value_heads"] is None else size(config, "num_key_value_heads")
    check_divides(config, "num_key_value_heads", num_key_heads, num_heads)
    head_size = 128 if model_type == "qwen3" else hidden_size // num_heads
    head_size = head_size if config.get("head_dim") is None else size(config, "head_dim")
    if head_size % 2:
        refuse("head_dim", head_size, ["an even number"])
    attention_bias = allowed(config, "attention_bias", False, (False, True))
    window, slides = window_of(config, model_type)
    return Architecture(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden_size,
        inner_size=size(config, "intermediate_size"),
        num_layers=size(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_key_heads=num_key_heads,
        head_size=head_size,
        context_length=size(config, "max_position_embeddings"),
        epsilon=number(config, "rms_norm_eps", 1e-6),
        activation=allowed(config, "hidden_act", "silu", ACTIVATIONS),
        tied=allowed(config, "tie_word_embeddings", False, (True, False)),
        rope=rope_of(config),
        head_norm=model_type == "qwen3",
        input_bias=model_type == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=allowed(config, "mlp_bias", False, (False, True)),
        window=window,
        slides=slides,
    )


def rope_of(config: Mapping[str, Any]) -> Rope:
    """Return the rotary positions, from the key `rope_scaling` of older versions if given, else from `rope_parameters`."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    if not isinstance(config.get(key) or {}, Mapping):
        refuse(key, config[key], ["a dictionary"])
    entry = dict(config.get(key) or {})
    kind = entry.get("rope_type", entry.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        refuse(f"{key}.rope_type", kind, ROPE_KEYS)
    for name, value in entry.items():
        if name not in ROPE_KEYS[kind] | ROPE_IRRELEVANT_KEYS:
            refuse(f"{key}.{name}", value, [*ROPE_KEYS[kind], "rope_type", "rope_theta"], what="keys")
    allowed(entry, "partial_rotary_factor", 1.0, (1.0,), prefix=f"{key}.")
    given = {name: number(entry, name, None, prefix=f"{key}.") for name in ROPE_KEYS[kind]}
    theta = entry if entry.get("rope_theta") is not None else config
    return Rope(
        number(theta, "rope_theta", 10_000.0, prefix=f"{key}." if theta is entry else ""),
        kind,
        given.get("factor", 1.0),
        given.get("low_freq_factor", 1.0),
        given.get("high_freq_factor", 4.0),
        int(given.get("original_max_position_embeddings", 8192)),
    )


def window_of(config: Mapping[str, Any], model_type: str) -> tuple[int | None, tuple[bool, ...]]:
    """Return the sliding window, and for each layer whether it has one; (None, ()) if no window has an effect.

    Mistral has a window in all layers unless it is null. The Qwen models have one only with `use_sliding_window`: in the
    layers that `layer_types` names, else in those from `max_window_layers` on.
    """
    qwen, num_layers = model_type in ("qwen2", "qwen3"), size(config, "num_hidden_layers")
    used = allowed(config, "use_sliding_window", False, (False, True) if qwen else (False,))
    given = config.get("sliding_window", None if model_type == "llama" else 4096)
    if model_type == "llama" and given is not None:
        refuse("sliding_window", given, [None])
    window = None if given is None or (qwen and not used) else size({"sliding_window": given}, "sliding_window")
    known = ["full_attention", "sliding_attention"] if qwen and window else ["full_attention"]
    types = config.get("layer_types")
    if types is not None and (len(types) != num_layers or any(kind not in known for kind in types)):
        refuse("layer_types", types, [f"null, or for each of the {num_layers} layers {' or '.join(known)}"])
    if window is None or window >= size(config, "max_position_embeddings"):
        return None, ()
    if not qwen:
        return window, (True,) * num_layers
    first = size(config, "max_window_layers", 28, least=0)
    slides = tuple(layer >= first if types is None else types[layer] == known[1] for layer in range(num_layers))
    return (window, slides) if any(slides) else (None, ())


def check_keys(config: Mapping[str, Any], read: Collection[str], values: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse unknown keys, and options that the forward does not support."""
    for key, value in config.items():
        if key in values:
            allowed(config, key, value, values[key])
        elif key not in read and key not in IRRELEVANT_KEYS:
            refuse(key, value, [*read, *values], what="keys")


def allowed(config: Mapping[str, Any], key: str, default: Any, values: Collection[Any], *, prefix: str = "") -> Any:
    """Return a key's value; refuse one that is not among `values`."""
    value = config.get(key, default)
    if not isinstance(value, str | int | float | None) or value not in values:
        refuse(prefix + key, value, values)
    return value


def size(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """Return an integer, which must be given if it has no default."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        refuse(key, value, ["a positive integer" if least else "0 or a positive integer"])
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None, *, prefix: str = "") -> float:
    """Return a positive number, which must be given if it has no default."""
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        refuse(prefix + key, value, ["a positive number"])
    return float(value)


def check_divides(config: Mapping[str, Any], key: str, value: int, total: int) -> None:
    """Refuse a number of heads that does not divide `total`."""
    if total % value:
        refuse(key, config.get(key), [f"a divisor of {total}"])


def refuse(key: str, value: Any, supported: Collection[Any], *, what: str = "values") -> NoReturn:
    """Raise the error that names the key, its value and the supported ones."""
    listed = ", ".join(sorted(map(str, supported)))
    raise CheckpointError(
        f"The configuration has {key} = {value!r}, which the JAX forward does not support; supported {what}: {listed}. "
        "Use bk.TorchLM for this model."
    )
