"""A recurrent language model: an LSTM in the format of transformers, so that `bk.TorchLM` samples, scores, tunes and saves it.

    i, f, g, o = W x_t + U h_{t-1} + b
    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),      h_t = sigmoid(o) tanh(c_t)

The state (h, c) of a layer is all that it remembers of a text. It is kept in the key-value cache of transformers, which has
room for keys and values of one position: a sliding window of attention whose window is the last token. So the particles of
SMC copy a state by copying a cache, as for any other model, and a step costs the same at every length. The gates are two
linear layers, so that adapters (LoRA) fit. Importing this module tells transformers of the architecture.

Reference: Hochreiter and Schmidhuber, "Long short-term memory" (1997); forget gates by Gers et al. (2000).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from bayes_klrl.models.torch_lm.lm import TorchLM

__all__ = ["LSTMConfig", "LSTMForCausalLM", "LSTMModel", "shipped_lstm"]


class LSTMConfig(PretrainedConfig):
    """The sizes of an `LSTMForCausalLM`.

    Parameters
    ----------
    vocab_size
        V, the number of tokens.
    embedding_size, hidden_size
        Numbers per token that the first layer reads, and numbers in h and in c of each layer.
    num_hidden_layers
        The number of layers, each of which reads the h of the one below.
    dropout
        The probability with which a number between layers is left out in training; `bk.TorchLM` always switches it off.
    """

    model_type = "bayes_klrl_lstm"
    vocab_size: int = 40
    embedding_size: int = 64
    hidden_size: int = 256
    num_hidden_layers: int = 1
    dropout: float = 0.0
    sliding_window: int = 2  # the cache keeps one position less: the state after the last token
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False


class LSTMLayer(nn.Module):
    """One layer of cells."""

    def __init__(self, num_inputs: int, num_hidden: int) -> None:
        super().__init__()
        self.read = nn.Linear(num_inputs, 4 * num_hidden)
        self.recall = nn.Linear(num_hidden, 4 * num_hidden, bias=False)

    def forward(self, inputs: Tensor, state: tuple[Tensor, Tensor], is_text: Tensor) -> tuple[Tensor, Tensor]:
        """Return h and c after each position, (R, S, D); padding leaves the state as it is.

        Parameters
        ----------
        inputs
            What the layer reads, (R, S, D').
        state
            h and c before the first position, (R, D).
        is_text
            False at padding, (R, S, 1).
        """
        h, c = state
        read, every_h, every_c = self.read(inputs), [], []
        for t in range(inputs.shape[1]):
            i, f, g, o = (read[:, t] + self.recall(h)).chunk(4, dim=-1)
            after = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = torch.where(is_text[:, t], o.sigmoid() * after.tanh(), h)
            c = torch.where(is_text[:, t], after, c)
            every_h.append(h)
            every_c.append(c)
        return torch.stack(every_h, dim=1), torch.stack(every_c, dim=1)


class LSTMPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model: its configuration, and how new weights begin."""

    config_class = LSTMConfig
    base_model_prefix = "model"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights of variance 1 / inputs; a forget gate begins almost open, so that gradients reach far back."""
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, module.weight.shape[1] ** -0.5)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
        if isinstance(module, LSTMLayer):
            module.read.bias.chunk(4)[1].fill_(1.0)


class LSTMModel(LSTMPreTrainedModel):
    """The layers without the head."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        widths = [config.embedding_size] + [config.hidden_size] * config.num_hidden_layers
        self.layers = nn.ModuleList(LSTMLayer(width, config.hidden_size) for width in widths[:-1])
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the tokens."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of the tokens."""
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **_others: Any,
    ) -> BaseModelOutputWithPast:
        """Return h of the last layer after each token, (R, S, D), and the cache with the states after the last one.

        Parameters
        ----------
        input_ids
            Token ids, (R, S).
        attention_mask
            0 at padding on the left, (R, S) or, with a cache, longer; None: there is no padding.
        past_key_values
            A cache of transformers with the states before the first token; None or an empty one: they are zero.
        use_cache, return_dict
            Whether to make a cache where none is given; the answer is always a record with names.
        """
        num_rows, num_tokens = input_ids.shape
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        hidden = self.dropout(self.embedding(input_ids))
        is_text = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -num_tokens:]
        zero = hidden.new_zeros(num_rows, self.config.hidden_size)
        for number, layer in enumerate(self.layers):
            hidden, memory = layer(hidden, self._state(past_key_values, number, zero), is_text[..., None].bool())
            if past_key_values is not None:
                past_key_values.update(hidden[:, None], memory[:, None], number)
            hidden = self.dropout(hidden)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def _state(self, cache: Any | None, number: int, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Return h and c of a layer before the next token, (R, D) each."""
        if cache is None or not cache.get_seq_length(number):
            return zero, zero
        layer = cache.layers[number]
        return layer.keys[:, 0, -1], layer.values[:, 0, -1]


class LSTMForCausalLM(LSTMPreTrainedModel, GenerationMixin):
    """The layers with a head: logits of the next token.

    Examples
    --------
    A small one with random weights as a language model, whose own check has compared sampling, scoring and its plain forward:

    >>> import bayes_klrl as bk
    >>> lm = bk.TorchLM(LSTMForCausalLM(LSTMConfig(vocab_size=5, hidden_size=8)), eos_token_id=0)
    >>> lm.self_check.gap < 1e-5
    True
    """

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.model = LSTMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **_others: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits of the next token after each one, (R, S, V); see `LSTMModel.forward` for the parameters."""
        output = self.model(input_ids, attention_mask, past_key_values, use_cache, return_dict)
        logits = self.lm_head(output.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


AutoConfig.register(LSTMConfig.model_type, LSTMConfig, exist_ok=True)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM, exist_ok=True)


def shipped_lstm() -> TorchLM:
    """Return what `examples/train_lstm.py` trained: lower case, the first 32 characters of Jane Austen's sentences."""
    return TorchLM.from_pretrained(Path(__file__).parents[1] / "shipped" / "lstm")
