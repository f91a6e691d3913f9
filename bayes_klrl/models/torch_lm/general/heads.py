"""The head of a model apart from its body, so that logits are made only of the rows that are asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayes_klrl.models.torch_lm.network import accepted, base_model, has_virtual_tokens, model_device

__all__ = ["Head", "head_of"]

_ACTIVATIONS = 8
"""The width of a body's widest layer, in units of its hidden size."""


@dataclass(frozen=True, eq=False)
class Head:
    """The body of a model without its head, and the function from hidden states to logits.

        logits = scale (W h + b) + bias,   or   cap tanh((W h + b) / cap)

    Parameters
    ----------
    body, head
        The model without its head, whose last hidden states h are (..., D), and the head, W h + b.
    scale, cap, bias
        The step after the head; 1 and None: none.
    width
        D.
    """

    body: nn.Module
    head: nn.Module
    scale: float
    cap: float | None
    bias: Tensor | None
    width: int

    @property
    def widest(self) -> int:
        """Floats per token at the widest layer of the body, about."""
        return _ACTIVATIONS * self.width

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D), float32."""
        logits: Tensor = self.head(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = (logits / self.cap).tanh() * self.cap
        return (logits if self.bias is None else logits + self.bias).float()


@torch.no_grad()
def head_of(module: nn.Module, vocab_size: int) -> Head | None:
    """Return the head of a model apart from its body, if together they give the model's own logits on one text; else None.

    None for a model with virtual tokens, and for one with hooks, which a call of the body would miss.
    """
    model = base_model(module)
    body, head = getattr(model, "model", None), model.get_output_embeddings()
    body = getattr(model, model.base_model_prefix, None) if body is None else body
    if not isinstance(body, nn.Module) or head is None or body is model or has_virtual_tokens(module):
        return None
    hooked = model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model) or "forward" in vars(module)
    if hooked or module._forward_hooks or module._forward_pre_hooks:
        return None
    ids = torch.tensor([[index * vocab_size // 5 for index in (1, 2, 3, 4)]], device=model_device(module))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    try:
        options = accepted(module, {"use_cache": False, "return_dict": True})
        own = module(**inputs, **options).logits
        hidden = body(**inputs, **options).last_hidden_state
        plain = head(hidden)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    if plain.shape != own.shape:
        return None
    largest = plain.abs().argmax()
    ratio = float(own.flatten()[largest] / plain.flatten()[largest])
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    bias = getattr(model, "final_logits_bias", None)
    tries = [(1.0, None, None), (1.0, cap, None), (1.0, None, bias), (ratio, None, None)]
    for scale, its_cap, its_bias in tries:
        found = Head(body, head, scale, its_cap, its_bias, hidden.shape[-1])
        if (found.logits(hidden) - own.float()).abs().max() <= 1e-5 * max(1.0, float(own.abs().max())):
            return found
    return None
