"""A twist as a small network on the hidden states of a language model or of a recurrent network, `NeuralTwist`.

    log psi_t(x_<t a) = scale(o_a(h(c, x_<t), t) + offset_c) + constant_{c,t},     for every token a at once

h are the features from which the prior itself predicts the next token, so decoding computes them anyway. One step of
look-ahead costs no further forward pass (Zhao et al. 2024 parametrise their twists in this way). The prior's network is
frozen. For a prior without hidden states (an n-gram model) h is a trained GRU over prompt and completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bayes_klrl.arrays import to_host
from bayes_klrl.draws import Cost
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.passes import fits, passes
from bayes_klrl.models.torch_lm.lm import TorchLM
from bayes_klrl.models.torch_lm.network import base_model
from bayes_klrl.posterior import Posterior
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, State, TokenIds

__all__ = ["Features", "LMFeatures", "NeuralTwist", "RecurrentFeatures", "TwistHead", "features_for"]


class Features(Protocol):
    """The features that a twist's head reads, step by step or at all positions; R rows, F the width of a feature vector."""

    width: int

    def prefill(self, prompts: Sequence[TokenIds]) -> State:
        """Return the state after each prompt."""

    def append(self, state: State, tokens: IntArray) -> State:
        """Return the state after one more token per row."""

    def select(self, state: State, rows: IntArray) -> State:
        """Return the state of the given rows."""

    def of_state(self, state: State) -> Tensor:
        """Return the features of each row, (R, F)."""

    def everywhere(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Tensor:
        """Return the features before each token, (P, N, T, F)."""


class LMFeatures:
    """The prior's own hidden states, frozen."""

    def __init__(self, lm: TorchLM) -> None:
        self.lm = lm
        with torch.no_grad():
            self.width = int(lm.prefill([[0]]).features.shape[-1])

    def prefill(self, prompts: Sequence[TokenIds]) -> State:
        """See `Features`."""
        return self.lm.prefill(prompts)

    def append(self, state: State, tokens: IntArray) -> State:
        """See `Features`."""
        return self.lm.append(state, tokens)

    def select(self, state: State, rows: IntArray) -> State:
        """See `Features`."""
        return self.lm.select(state, rows)

    def of_state(self, state: State) -> Tensor:
        """See `Features`."""
        features: Tensor = state.features
        return features.float()

    @torch.no_grad()
    def everywhere(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Tensor:
        """See `Features`."""
        return self.lm.features(prompts, sequences).float()

    def token_embedding(self) -> Tensor:
        """Return a copy of the model's token embedding, each column of variance 1, (V, E)."""
        weight: Tensor = base_model(self.lm.module).get_input_embeddings().weight
        embedding = weight.detach().float()[: self.lm.vocab_size].clone()
        return (embedding - embedding.mean(dim=0)) / embedding.std(dim=0).clamp(min=1e-6)


class RecurrentFeatures(nn.Module):
    """A GRU over a start token, the prompt and the completion; it can remember counts that the last tokens do not show.

    Parameters
    ----------
    vocab_size
        V, the number of tokens.
    width
        F, the size of the hidden state.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.vocab_size, self.width = vocab_size, width
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.cell = nn.GRU(width, width, batch_first=True)

    def prefill(self, prompts: Sequence[TokenIds]) -> Tensor:
        """See `Features`; the state is the feature vector itself, (R, F)."""
        rows = [self._read([self.vocab_size, *map(int, prompt)]) for prompt in prompts]
        return torch.stack(rows)

    def append(self, state: Tensor, tokens: IntArray) -> Tensor:
        """See `Features`."""
        read = self.embedding(torch.as_tensor(tokens, device=state.device)[:, None])
        hidden: Tensor = self.cell(read, state[None])[1][0]
        return hidden

    def select(self, state: Tensor, rows: IntArray) -> Tensor:
        """See `Features`."""
        return state[torch.as_tensor(rows, device=state.device)]

    def of_state(self, state: Tensor) -> Tensor:
        """See `Features`."""
        return state

    def everywhere(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Tensor:
        """See `Features`. Differentiable."""
        num_prompts, num_draws, num_tokens = sequences.tokens.shape
        start = self.prefill(prompts).repeat_interleave(num_draws, dim=0)
        tokens = np.where(sequences.mask, sequences.tokens, 0).reshape(-1, num_tokens)[:, :-1]
        everything = start[:, None]
        if num_tokens > 1:
            read = self.embedding(torch.as_tensor(tokens, device=start.device))
            everything = torch.cat([everything, self.cell(read, start[None].contiguous())[0]], dim=1)
        return everything.reshape(num_prompts, num_draws, num_tokens, self.width)

    def _read(self, ids: list[int]) -> Tensor:
        """Return the hidden state after some tokens, (F,)."""
        device = self.embedding.weight.device
        last: Tensor = self.cell(self.embedding(torch.tensor([ids], device=device)))[1][0, 0]
        return last


def features_for(prior: LanguageModel, width: int) -> LMFeatures | RecurrentFeatures:
    """Return the hidden states of a `TorchLM`, or a GRU of the given width for any other prior."""
    return LMFeatures(prior) if isinstance(prior, TorchLM) else RecurrentFeatures(prior.vocab_size, width)


class TwistHead(nn.Module):
    """Two hidden layers over (features, position), and one output per token: u(h, t) . embedding_a + v(h, t).

    The last layer starts at 0: an untrained head is the constant twist.

    Parameters
    ----------
    width
        F, the size of a feature vector.
    num_tokens
        T, the number of positions.
    hidden
        Number of units of each hidden layer.
    embedding
        The token embedding, shape (V, E).
    frozen
        True: keep the embedding as it is. The prior's own embedding places similar tokens close to each other, and most tokens
        of a large vocabulary do not occur in a few thousand draws. False: train it.
    """

    mean: Tensor
    scale: Tensor
    embedding: Tensor

    def __init__(self, width: int, num_tokens: int, hidden: int, embedding: Tensor, *, frozen: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.first = nn.Linear(width, hidden)
        self.position = nn.Embedding(num_tokens, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, embedding.shape[1] + 1)
        if frozen:
            self.register_buffer("embedding", embedding.clone())
        else:
            self.embedding = nn.Parameter(embedding.clone())
        for weight in (self.last.weight, self.last.bias, self.position.weight):
            nn.init.zeros_(weight)

    def standardise(self, features: Tensor) -> None:
        """Set mean and scale from features (M, F), so that the first layer reads inputs of mean 0 and variance 1."""
        self.mean.copy_(features.mean(dim=0))
        self.scale.copy_(features.std(dim=0).clamp(min=1e-6))

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Return o, shape (..., V), from features (..., F) and the number of tokens so far, broadcast to (...)."""
        read = (features - self.mean) / self.scale
        hidden = nn.functional.silu(self.first(read) + self.position(positions))
        hidden = nn.functional.silu(self.second(hidden))
        out = self.last(hidden)
        size = self.embedding.shape[1]
        by_token: Tensor = out[..., :size] @ self.embedding.T / size**0.5 + out[..., size:]
        return by_token


@dataclass(frozen=True, eq=False)
class _Memo:
    """The last evaluation: R distinct (prompt, prefix) pairs, the state after them, and log psi of every extension."""

    posterior: Posterior
    num_tokens: int
    row_of: dict[bytes, int]
    state: Any
    prompt_index: IntArray  # (R,)
    features: Tensor  # (R, F)
    log_psi: FloatArray | None  # (R, V); None if it is too large to keep

    def with_rows_of(self, other: _Memo) -> _Memo:
        """Return this evaluation with the further pairs of another one, of other rows of the same state."""
        return replace(
            self,
            row_of=self.row_of | {key: len(self.row_of) + row for key, row in other.row_of.items()},
            state=(self.state[0], np.concatenate([self.state[1], other.state[1]])),
            prompt_index=np.concatenate([self.prompt_index, other.prompt_index]),
            features=torch.cat([self.features, other.features]),
            log_psi=None,
        )


@dataclass(eq=False)
class NeuralTwist:
    """A fitted twist: callable as a `Twist`, and with one step of look-ahead.

    It stores the states of the previous step, so that T tokens cost T steps and not T^2 / 2. The returned values do not
    depend on the stored states.

    Parameters
    ----------
    features, head
        The two networks.
    num_tokens
        T. The twist depends on the number of tokens that are left, so it is for this `max_new_tokens` only.
    prompts
        The token ids of the P prompts that it was fitted on. Another prompt gets the mean of their constants.
    log_evidence
        log Z-hat of each prompt, the value before the first token, in nats, shape (P,).
    offsets
        log Z-hat of the draws before the training, which the head's outputs are added to, in nats, shape (P,).
    constants
        Numbers that are added to log psi, so that on average it has the likelihood's scale, in nats, shape (P, T).
    training
        Seconds and model tokens of fitting.
    history
        The loss of every training step.

    Attributes
    ----------
    model_tokens
        Number of tokens that it has read so far with the prior's network, in addition to those of decoding.
    """

    features: Any
    head: TwistHead
    num_tokens: int
    prompts: tuple[tuple[int, ...], ...]
    log_evidence: FloatArray
    offsets: FloatArray
    constants: FloatArray
    training: Cost = field(default_factory=Cost)
    history: FloatArray = field(default_factory=lambda: np.empty(0))
    model_tokens: int = field(default=0, init=False)
    _memo: _Memo | None = field(default=None, init=False, repr=False)

    def __call__(self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
        """See `Twist.__call__`."""
        if prefixes.shape[1] == 0:
            return self._of_prompt(self.log_evidence, posterior)[prompt_index]
        memo, rows = self._ahead(posterior, prompt_index, prefixes[:, :-1], None)
        parts = [np.arange(len(rows))] if memo.log_psi is not None else passes(np.arange(len(rows)), self._vocab_size)
        log_psi: FloatArray = np.empty(len(rows))
        for part in parts:
            log_psi[part] = self._log_psi(memo, rows[part])[np.arange(part.size), prefixes[part, -1]]
        return log_psi

    def next_log_psi(
        self,
        posterior: Posterior,
        prompt_index: IntArray,
        prefixes: IntArray,
        prior_rows: tuple[State, IntArray] | None = None,
    ) -> FloatArray:
        """Return log psi of every one-token extension, (R, V); see `bayes_klrl.models.twists.simple.next_log_psi`."""
        memo, rows = self._ahead(posterior, prompt_index, prefixes, prior_rows)
        return self._log_psi(memo, rows)

    def _ahead(
        self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray, prior_rows: Any
    ) -> tuple[_Memo, IntArray]:
        """Return an evaluation that holds these prefixes, and the row of each in it."""
        self._check(posterior)
        keys = _keys(prompt_index, prefixes)
        memo = self._memo
        if memo is None or memo.posterior is not posterior or memo.num_tokens != prefixes.shape[1]:
            memo = None
        if memo is None or not all(key in memo.row_of for key in keys):
            memo = self._memo = self._computed(posterior, prompt_index, prefixes, keys, prior_rows, memo)
        return memo, np.array([memo.row_of[key] for key in keys], dtype=np.int64)

    @torch.no_grad()
    def _computed(
        self,
        posterior: Posterior,
        prompt_index: IntArray,
        prefixes: IntArray,
        keys: list[bytes],
        prior_rows: Any,
        memo: _Memo | None,
    ) -> _Memo:
        """Return the evaluation of these prefixes: from the prior's state, from the previous step, or from the start.

        Rows of a prior state that are read in several passes are joined: `memo` holds earlier passes.
        """
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        of_prior = (
            prior_rows is not None and isinstance(self.features, LMFeatures) and posterior.prior is self.features.lm
        )
        earlier = memo if of_prior and memo is not None and memo.state[0] is prior_rows[0] else None
        known = {} if earlier is None else earlier.row_of
        chosen = np.array(sorted(row for key, row in first.items() if key not in known), dtype=np.int64)
        if of_prior:
            state, rows = prior_rows[0], prior_rows[1][chosen]
        else:
            state, rows = self._state(posterior, prompt_index[chosen], prefixes[chosen]), np.arange(len(chosen))
        features = self.features.of_state(state)
        features = features[torch.as_tensor(rows, device=features.device)]
        row_of = {keys[row]: place for place, row in enumerate(chosen)}
        found = _Memo(posterior, prefixes.shape[1], row_of, (state, rows), prompt_index[chosen], features, None)
        if earlier is not None:
            return earlier.with_rows_of(found)
        if not fits(len(chosen), self._vocab_size):
            return found
        return replace(found, log_psi=self._log_psi(found, np.arange(len(chosen))))

    @torch.no_grad()
    def _log_psi(self, memo: _Memo, rows: IntArray) -> FloatArray:
        """Return log psi of every extension of some rows of an evaluation, (len(rows), V)."""
        if memo.log_psi is not None:
            return memo.log_psi[rows]
        features, index, t = (
            memo.features[torch.as_tensor(rows, device=memo.features.device)],
            memo.prompt_index[rows],
            memo.num_tokens,
        )
        outputs = self.head(features, torch.tensor(t, device=features.device))
        offsets = self._of_prompt(self.offsets, memo.posterior)[index]
        constants = self._of_prompt(self.constants, memo.posterior)[index, t]
        return to_host(outputs.double() + _column(offsets, outputs) + _column(constants, outputs))

    @property
    def _vocab_size(self) -> int:
        return len(self.head.embedding)

    def _state(self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray) -> Any:
        """Return the state of `features` after distinct prefixes."""
        t, memo = prefixes.shape[1], self._memo
        if t and memo is not None and memo.posterior is posterior and memo.num_tokens == t - 1:
            parents = [memo.row_of.get(key) for key in _keys(prompt_index, prefixes[:, :-1])]
            if all(parent is not None for parent in parents):
                state, rows = memo.state
                grown = self.features.select(state, rows[np.array(parents, dtype=np.int64)])
                self.model_tokens += len(parents)
                return self.features.append(grown, prefixes[:, -1])
        state = self.features.select(self.features.prefill(posterior.prompt_ids), prompt_index)
        self.model_tokens += sum(map(len, posterior.prompt_ids)) + prefixes.size
        for step in range(t):
            state = self.features.append(state, prefixes[:, step])
        return state

    def _of_prompt(self, values: FloatArray, posterior: Posterior) -> FloatArray:
        """Return one row of `values` for each prompt of a posterior; the mean of all rows for an unknown prompt."""
        if posterior.prompt_ids == self.prompts:
            return values
        known = {prompt: row for row, prompt in enumerate(self.prompts)}
        mean = values.mean(axis=0)
        return np.stack([values[known[prompt]] if prompt in known else mean for prompt in posterior.prompt_ids])

    def _check(self, posterior: Posterior) -> None:
        if posterior.max_new_tokens != self.num_tokens or posterior.prior.vocab_size != len(self.head.embedding):
            raise BayesKLRLError(
                f"This twist was fitted for max_new_tokens = {self.num_tokens} and {len(self.head.embedding)} tokens; the "
                f"posterior has {posterior.max_new_tokens} and {posterior.prior.vocab_size}. Fit one for it."
            )


def _keys(prompt_index: IntArray, prefixes: IntArray) -> list[bytes]:
    """Return a key for each row, equal for equal (prompt, prefix) pairs."""
    table = np.ascontiguousarray(np.concatenate([prompt_index[:, None], prefixes], axis=1))
    size = table.shape[1] * table.itemsize
    whole = table.tobytes()
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _column(values: FloatArray, like: Tensor) -> Tensor:
    """Return values (R,) as a float64 column (R, 1) on the device of a tensor."""
    return torch.as_tensor(values, dtype=torch.float64, device=like.device)[:, None]
