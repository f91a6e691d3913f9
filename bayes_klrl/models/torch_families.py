"""The two families that the tight forward knows: GPT-2, and Llama with its relatives (Mistral, Qwen2, Qwen3).

A family says how one layer is computed from the model's own modules, attention excepted. `family_of` is the
allow-list: exact classes, known configuration values, no hooks or patched forwards on the containers that the tight
loop steps over (leaf modules are called, so theirs run). Anything else gets the general network.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block

from bayes_klrl.models.torch_network import base_model, model_device

__all__ = ["Family", "family_of"]

Rotation: TypeAlias = tuple[Tensor, Tensor] | None
Heads: TypeAlias = tuple[Tensor, Tensor, Tensor]

STATIC_ROPE = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose frequencies do not depend on the length of the sequence."""


class Family(Protocol):
    """One architecture, layer by layer; R rows, S new positions, D hidden size, H heads of size d."""

    num_layers: int
    scales: list[float]
    width: int
    device: torch.device

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        """Return hidden states (R, S, D) of tokens (R, S) at positions (R or 1, S), and what rotates the heads."""

    def queries_keys_values(self, layer: int, hidden: Tensor, rotation: Rotation) -> Heads:
        """Return queries (R, H, S, d), keys and values (R, H or fewer, S, d)."""

    def finish_layer(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output from its input and its attended values, all (R, S, D)."""

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Return what the head reads."""

    def head(self, features: Tensor) -> Tensor:
        """Return the logits in the weights' precision."""


class GPT2Family:
    """GPT-2: learned positions, LayerNorm first, one projection for queries, keys and values."""

    def __init__(self, model: Any) -> None:
        self.model, body = model, model.transformer
        self.body, self.layers = body, list(body.h)
        self.num_layers = len(self.layers)
        self.scales = [float(layer.attn.scaling) for layer in self.layers]
        self.width = model.config.n_inner or 4 * model.config.hidden_size
        self.device = model_device(model)

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        return self.body.wte(tokens) + self.body.wpe(positions), None

    def queries_keys_values(self, layer: int, hidden: Tensor, rotation: Rotation) -> Heads:
        block = self.layers[layer]
        joint = block.attn.c_attn(block.ln_1(hidden))
        shape = (*joint.shape[:2], 3, block.attn.num_heads, block.attn.head_dim)
        queries, keys, values = joint.view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        return queries, keys, values

    def finish_layer(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        block = self.layers[layer]
        hidden = hidden + block.attn.c_proj(attended)
        mlp = block.mlp
        inner = mlp.c_fc(block.ln_2(hidden))
        # the same function, in one kernel instead of Hugging Face's eight
        fused = type(mlp.act) is NewGELUActivation
        activated = F.gelu(inner, approximate="tanh") if fused else mlp.act(inner)
        output: Tensor = hidden + mlp.c_proj(activated)
        return output

    def final_norm(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.body.ln_f(hidden)
        return output

    def head(self, features: Tensor) -> Tensor:
        output: Tensor = self.model.lm_head(features)
        return output


class LlamaFamily:
    """Llama and relatives: rotary positions, RMSNorm first, fewer key heads than query heads, gated MLP."""

    def __init__(self, model: Any) -> None:
        self.model, body = model, model.model
        self.body, self.layers = body, list(body.layers)
        self.num_layers = len(self.layers)
        self.scales = [float(layer.self_attn.scaling) for layer in self.layers]
        self.width = model.config.intermediate_size
        self.device = model_device(model)

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        hidden = self.body.embed_tokens(tokens)
        cos, sin = self.body.rotary_emb(hidden, position_ids=positions)
        return hidden, (cos[:, None], sin[:, None])

    def queries_keys_values(self, layer: int, hidden: Tensor, rotation: Rotation) -> Heads:
        assert rotation is not None
        block = self.layers[layer]
        attention, inner = block.self_attn, rms_norm(block.input_layernorm, hidden)
        shape = (*inner.shape[:2], -1, attention.head_dim)
        queries, keys = attention.q_proj(inner).view(shape), attention.k_proj(inner).view(shape)
        if hasattr(attention, "q_norm"):
            queries, keys = rms_norm(attention.q_norm, queries), rms_norm(attention.k_norm, keys)
        values = attention.v_proj(inner).view(shape).transpose(1, 2)
        return rotate(queries.transpose(1, 2), *rotation), rotate(keys.transpose(1, 2), *rotation), values

    def finish_layer(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        block = self.layers[layer]
        hidden = hidden + block.self_attn.o_proj(attended)
        mlp, inner = block.mlp, rms_norm(block.post_attention_layernorm, hidden)
        output: Tensor = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(inner)) * mlp.up_proj(inner))
        return output

    def final_norm(self, hidden: Tensor) -> Tensor:
        return rms_norm(self.body.norm, hidden)

    def head(self, features: Tensor) -> Tensor:
        output: Tensor = self.model.lm_head(features)
        return output


def rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    """Return the module's output; in float32, by the fused kernel that computes the same."""
    output: Tensor = norm(hidden)
    return output


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the heads (R, H, S, d) turned by their positions' angles (R or 1, 1, S, d)."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def family_of(module: nn.Module) -> Family | None:
    """Return the family of a model that the tight loop computes as the model itself does, else None."""
    if not adapter_is_in_place(module):
        return None
    model = base_model(module)
    if type(model) is GPT2LMHeadModel:
        return gpt2_family(module, model)
    if type(model) in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM):
        return llama_family(module, model)
    return None


def gpt2_family(module: nn.Module, model: Any) -> Family | None:
    """Return GPT-2's family unless an option is on that the tight loop does not know."""
    config = model.config
    stepped_over = [module, model, model.transformer]
    for layer in model.transformer.h:
        if (type(layer), type(layer.attn), type(layer.mlp)) != (GPT2Block, GPT2Attention, GPT2MLP):
            return None
        stepped_over += [layer, layer.attn, layer.mlp]
    plain = not (config.add_cross_attention or config.reorder_and_upcast_attn)
    return GPT2Family(model) if plain and untouched(stepped_over) else None


def llama_family(module: nn.Module, model: Any) -> Family | None:
    """Return Llama's family unless an option is on that the tight loop does not know."""
    config, prefix = model.config, type(model).__name__.removesuffix("ForCausalLM")
    expected = (f"{prefix}DecoderLayer", f"{prefix}Attention", f"{prefix}MLP")
    stepped_over = [module, model, model.model]
    for layer in model.model.layers:
        if tuple(type(part).__name__ for part in (layer, layer.self_attn, layer.mlp)) != expected:
            return None
        stepped_over += [layer, layer.self_attn, layer.mlp]
    full_attention = {"full_attention"} >= set(getattr(config, "layer_types", None) or ())
    no_window = full_attention and (type(model) is not MistralForCausalLM or config.sliding_window is None)
    static_rope = (config.rope_parameters or {}).get("rope_type", "default") in STATIC_ROPE
    return LlamaFamily(model) if no_window and static_rope and untouched(stepped_over) else None


def adapter_is_in_place(module: nn.Module) -> bool:
    """Return whether the model has no PEFT wrapper, or one that only replaces layers (LoRA): no virtual tokens."""
    configs = getattr(module, "peft_config", None)
    if not isinstance(configs, dict):
        return True
    return all(
        str(getattr(config.peft_type, "value", config.peft_type)) == "LORA"
        and getattr(config, "alora_invocation_tokens", None) is None
        for config in configs.values()
    )


def untouched(modules: list[Any]) -> bool:
    """Return whether nobody hooked into these modules or patched their forward."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module)
        for module in modules
    )
