"""The two families of the tight forward: GPT-2, and Llama with its relatives (Mistral, Qwen2, Qwen3).

A family computes one layer from the model's own modules, except for attention. Hidden states are flat, one row per token.
`family_of` is the allow-list: exact classes, known configuration values, no hooks or patched forwards on the containers
whose forward the tight loop replaces. All other models get the general network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.pytorch_utils import Conv1D

from bayes_klrl.models.torch_lm.network import adapter_configs, base_model, model_device
from bayes_klrl.models.torch_lm.tight.activation import tanh_gelu
from bayes_klrl.models.torch_lm.tight.products import gelu_linear, linear

__all__ = ["Family", "Layer", "Rotation", "family_of"]

Function: TypeAlias = Callable[[Tensor], Tensor]
Rotation: TypeAlias = tuple[Tensor, Tensor] | None

STATIC_ROPE = {"default", "linear", "llama3", "yarn"}
"""Types of rotary embeddings whose frequencies do not depend on the length of the sequence."""

RMS_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)


class Layer(Protocol):
    """One layer around its attention; M = R * S tokens, hidden size D, heads of size d."""

    scale: float

    def heads(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (M, H, d), keys and values (M, H or fewer, d) of hidden states (M, D)."""

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output (M, D) from its input (M, D) and its attended values (M, H d)."""


class Family(Protocol):
    """One architecture: embedding, layers, final norm and head, ready to be called."""

    final_norm: Function
    head: Function
    width: int
    device: torch.device

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers from the first to the last."""

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        """Return hidden states (R, S, D) of tokens (R, S) at positions (R or 1, S), and the rotation of the heads."""


class GPT2Layer:
    """One layer of GPT-2: LayerNorm first; one projection for queries, keys and values."""

    def __init__(self, block: Any) -> None:
        self.size, self.scale = block.attn.head_dim, float(block.attn.scaling)
        self.norm_1, self.norm_2 = direct(block.ln_1), direct(block.ln_2)
        self.attention_in, self.attention_out = direct(block.attn.c_attn), direct(block.attn.c_proj)
        self.mlp_in, self.mlp_out = activated(block.mlp.c_fc, block.mlp.act), direct(block.mlp.c_proj)

    def heads(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        joint = self.attention_in(self.norm_1(hidden)).view(hidden.shape[0], 3, -1, self.size)
        queries, keys, values = joint.unbind(1)
        return queries, keys, values

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + self.attention_out(attended)
        return hidden + self.mlp_out(self.mlp_in(self.norm_2(hidden)))


class GPT2Family:
    """GPT-2, with learned positions."""

    def __init__(self, model: Any) -> None:
        body = model.transformer
        self.tokens, self.positions = direct(body.wte), direct(body.wpe)
        self.layers = [GPT2Layer(block) for block in body.h]
        self.final_norm, self.head = direct(body.ln_f), direct(model.lm_head)
        self.width = model.config.n_inner or 4 * model.config.hidden_size
        self.device = model_device(model)

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        return self.tokens(tokens) + self.positions(positions), None


class LlamaLayer:
    """One layer of Llama: RMSNorm first, rotated keys and queries, gated MLP. Qwen3 also normalises the heads."""

    def __init__(self, block: Any) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.size, self.scale = attention.head_dim, float(attention.scaling)
        self.norm_1, self.norm_2 = direct(block.input_layernorm), direct(block.post_attention_layernorm)
        self.queries, self.keys = direct(attention.q_proj), direct(attention.k_proj)
        self.values, self.attention_out = direct(attention.v_proj), direct(attention.o_proj)
        self.query_norm = direct(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.key_norm = direct(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.gate, self.up, self.down = direct(mlp.gate_proj), direct(mlp.up_proj), direct(mlp.down_proj)
        self.activation = direct(mlp.act_fn)

    def heads(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        assert rotation is not None
        hidden = self.norm_1(hidden)
        shape = (hidden.shape[0], -1, self.size)
        queries, keys = self.queries(hidden).view(shape), self.keys(hidden).view(shape)
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        return rotate(queries, *rotation), rotate(keys, *rotation), self.values(hidden).view(shape)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + self.attention_out(attended)
        inner = self.norm_2(hidden)
        return hidden + self.down(self.activation(self.gate(inner)) * self.up(inner))


class LlamaFamily:
    """Llama and relatives, with rotary positions."""

    def __init__(self, model: Any) -> None:
        body = model.model
        self.tokens, self.rotary = direct(body.embed_tokens), body.rotary_emb
        self.layers = [LlamaLayer(block) for block in body.layers]
        self.final_norm, self.head = direct(body.norm), direct(model.lm_head)
        self.width = model.config.intermediate_size
        self.device = model_device(model)

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        hidden = self.tokens(tokens)
        cos, sin = self.rotary(hidden, position_ids=positions)  # (R or 1, S, d)
        half = cos.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        shape = (*tokens.shape, cos.shape[-1])
        return hidden, (cos.expand(shape).reshape(-1, 1, shape[2]), sin.expand(shape).reshape(-1, 1, shape[2]))


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the heads (M, H, d), rotated by their positions' angles (M, 1, d); the first half of the sines is negated."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)


def direct(module: Any) -> Function:
    """Return a function (M, features) -> (M, features) that computes what the module does.

    A plain layer without hooks is replaced by a call of its kernel, which for a small model saves half the time. Any other
    module, such as a LoRA layer, is called itself.
    """
    if not untouched([module]):
        return module  # type: ignore[no-any-return]
    kind = type(module)
    if kind is Conv1D:
        weight, bias = module.weight, module.bias
        return lambda inputs: linear(inputs, weight.t(), bias)
    if kind is nn.Linear:
        return partial(linear, weight=module.weight, bias=module.bias)
    if kind is nn.LayerNorm:
        shape = module.normalized_shape
        return partial(F.layer_norm, normalized_shape=shape, weight=module.weight, bias=module.bias, eps=module.eps)
    if kind in RMS_NORMS and module.weight.dtype == torch.float32:  # in half precision the original rounds in between
        shape, epsilon = tuple(module.weight.shape), module.variance_epsilon
        return partial(F.rms_norm, normalized_shape=shape, weight=module.weight, eps=epsilon)
    if kind is NewGELUActivation:
        return tanh_gelu  # the same function by four kernels instead of eight
    return module  # type: ignore[no-any-return]


def activated(module: Any, activation: Any) -> Function:
    """Return a function that computes an activation of a layer; in one kernel where both are GPT-2's own."""
    if type(module) is Conv1D and type(activation) is NewGELUActivation and untouched([module, activation]):
        weight, bias = module.weight, module.bias
        return lambda inputs: gelu_linear(inputs, weight.t(), bias)
    inner, outer = direct(module), direct(activation)
    return lambda inputs: outer(inner(inputs))


def family_of(module: nn.Module) -> Family | None:
    """Return the family of a model; None if the tight loop may differ from the model's own forward."""
    model = base_model(module)
    if not adapter_is_in_place(module):
        return None
    if type(model) is GPT2LMHeadModel:
        return gpt2_family(module, model)
    if type(model) in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM):
        return llama_family(module, model)
    return None


def gpt2_family(module: nn.Module, model: Any) -> Family | None:
    """Return GPT-2's family; None if an option is on that the tight loop does not support."""
    containers = [module, model, model.transformer]
    for layer in model.transformer.h:
        if (type(layer), type(layer.attn), type(layer.mlp)) != (GPT2Block, GPT2Attention, GPT2MLP):
            return None
        containers += [layer, layer.attn, layer.mlp]
    plain = not (model.config.add_cross_attention or model.config.reorder_and_upcast_attn)
    return GPT2Family(model) if plain and untouched(containers) else None


def llama_family(module: nn.Module, model: Any) -> Family | None:
    """Return Llama's family; None if an option is on that the tight loop does not support."""
    config, prefix = model.config, type(model).__name__.removesuffix("ForCausalLM")
    expected = [prefix + part for part in ("DecoderLayer", "Attention", "MLP")]
    containers = [module, model, model.model]
    for layer in model.model.layers:
        parts = [layer, layer.self_attn, layer.mlp]
        if [type(part).__name__ for part in parts] != expected:
            return None
        containers += parts
    full_attention = {"full_attention"} >= set(getattr(config, "layer_types", None) or ())
    no_window = full_attention and (type(model) is not MistralForCausalLM or config.sliding_window is None)
    static_rope = (config.rope_parameters or {}).get("rope_type", "default") in STATIC_ROPE
    return LlamaFamily(model) if no_window and static_rope and untouched(containers) else None


def adapter_is_in_place(module: nn.Module) -> bool:
    """Return whether the model has no PEFT wrapper, or one that only replaces layers (LoRA) and adds no virtual tokens."""
    return all(
        str(getattr(config.peft_type, "value", config.peft_type)) == "LORA"
        and getattr(config, "alora_invocation_tokens", None) is None
        for config in adapter_configs(module)
    )


def untouched(modules: list[Any]) -> bool:
    """Return whether these modules have no hooks and no patched forward."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module)
        for module in modules
    )
