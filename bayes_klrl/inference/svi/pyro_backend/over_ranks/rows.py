"""Who computes which completions of a step: every rank some of them, and all ranks then know all.

A step needs the model for four things: to draw completions, to score them under guide and prior, to compute rewards, and to
differentiate. The first three are done here: a rank computes its share of the rows, and the numbers of all rows are gathered.
So everything else in a step (leave-one-out baselines, importance weights, critics, replay, a trainer's loss on a group) is
the code of one process, on the numbers of all completions of a prompt, on whichever rank they were drawn. Log-probs of a
rank's own rows carry a gradient and those of the others do not. With L the loss and l_n the log-prob of row n,

    grad L = sum_n dL/dl_n grad l_n,

and each rank has the part of its own n; `Ranks.sum_gradients` adds these up. `SVI(particles_per_pass=...)` splits the same sum
into passes, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bayes_klrl.inference.svi.ranks.group import Ranks
from bayes_klrl.models.decoding import decode_by
from bayes_klrl.posterior import Posterior
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, State, TokenIds

__all__ = ["SharedLM", "SharedPosterior", "over_ranks"]


def over_ranks(ranks: Ranks, compute: Callable[[slice], Any], total: int) -> Tensor:
    """Return `compute` of all rows, of which this rank computes its share; that share keeps its gradient.

    A rank without a row of its own computes the first one, and takes nothing of it.

    Parameters
    ----------
    ranks
        The group.
    compute
        Function of a slice of rows that returns their numbers, (rows, ...), and may return further ones behind them.
    total
        The number of rows, at least 1.

    Examples
    --------
    >>> from bayes_klrl.inference.svi.ranks.group import ALONE
    >>> over_ranks(ALONE, lambda rows: torch.arange(5.0)[rows], 5)
    tensor([0., 1., 2., 3., 4.])
    """
    share = ranks.share(total)
    with ranks.together():
        found = torch.as_tensor(compute(slice(0, 1) if share.start == share.stop else share))
    own = found[: share.stop - share.start]
    everything: Tensor = ranks.gathered(own, total)
    # without a row of its own a rank still has the graph, so that it may take part in what the backward pass exchanges
    return torch.cat([everything[: share.start], own, everything[share.stop :]]) if found.requires_grad else everything


class SharedLM:
    """A language model whose completions are drawn and scored by the ranks together; see `LanguageModel` for the methods.

    It has all attributes of the model. Its methods that take completions of P prompts, N each, give every rank some of the N.
    All ranks must call them with the same completions. Decoding states are the model's own, and are not shared.

    Parameters
    ----------
    whole
        The model, of which each rank has a copy.
    ranks
        The group.
    """

    def __init__(self, whole: LanguageModel, ranks: Ranks) -> None:
        self.whole, self.ranks = whole, ranks

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model; scores of other kinds are shared too, where it has them."""
        if name in ("whole", "ranks", "lockstep"):  # a lockstep is of the models that it is asked for
            raise AttributeError(name)
        found = getattr(self.whole, name)
        if name not in ("position_log_probs", "features"):
            return found
        return lambda prompts, sequences: self._scored(found, prompts, sequences)

    @property
    def vocab_size(self) -> int:
        """See `LanguageModel.vocab_size`."""
        return self.whole.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `LanguageModel.eos_token_ids`."""
        return self.whole.eos_token_ids

    @property
    def full_support(self) -> bool:
        """See `LanguageModel.full_support`."""
        return self.whole.full_support

    @property
    def tokenizer(self) -> Any | None:
        """See `LanguageModel.tokenizer`."""
        return self.whole.tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `LanguageModel.encode`."""
        return self.whole.encode(texts)

    def decode(self, ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel.decode`."""
        return self.whole.decode(ids)

    def prefill(self, prompts: Sequence[TokenIds]) -> State:
        """See `LanguageModel.prefill`."""
        return self.whole.prefill(prompts)

    def next_log_probs(self, state: State) -> Any:
        """See `LanguageModel.next_log_probs`."""
        return self.whole.next_log_probs(state)

    def append(self, state: State, tokens: IntArray) -> State:
        """See `LanguageModel.append`."""
        return self.whole.append(state, tokens)

    def select(self, state: State, rows: IntArray) -> State:
        """See `LanguageModel.select`."""
        return self.whole.select(state, rows)

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Tensor:
        """See `LanguageModel.token_log_probs`; (P, N, T), with a gradient where this rank computed it."""
        return self._scored(self.whole.token_log_probs, prompts, sequences)

    def drawn_tokens(self, prompt_ids: Sequence[TokenIds], uniforms: FloatArray) -> IntArray:
        """Return N completions per prompt by the uniforms (T, P * N) of rank 0, (P * N, T), prompt by prompt."""
        num_prompts, num_tokens = len(prompt_ids), len(uniforms)
        by_prompt = uniforms.reshape(num_tokens, num_prompts, -1)

        def draw(rows: slice) -> Tensor:
            own = by_prompt[:, :, rows].reshape(num_tokens, -1)
            with self.working():
                tokens = decode_by((self.whole,), prompt_ids, own).tokens
            return torch.as_tensor(tokens.reshape(num_prompts, -1, num_tokens), device="cpu").transpose(0, 1)

        found = over_ranks(self.ranks, draw, by_prompt.shape[2])
        tokens: IntArray = found.transpose(0, 1).reshape(-1, num_tokens).numpy()
        return tokens

    def working(self) -> AbstractContextManager[None]:
        """Return the context in which this rank decodes its completions."""
        return nullcontext()

    def evened(self, sequences: Sequences, rows: slice) -> Sequences:
        """Return the completions of these rows, and behind them further ones if ranks must score as many."""
        return Sequences(sequences.tokens[:, rows], sequences.lengths[:, rows])

    def _scored(self, score: Callable[..., Any], prompts: Sequence[TokenIds], sequences: Sequences) -> Tensor:
        """Return what `score` gives for all completions, (P, N, ...)."""

        def of(rows: slice) -> Tensor:
            return torch.as_tensor(score(prompts, self.evened(sequences, rows))).transpose(0, 1)

        return over_ranks(self.ranks, of, sequences.tokens.shape[1]).transpose(0, 1)


class SharedPosterior(Posterior):
    """A posterior whose rewards are computed by the ranks together; its prior is a `SharedLM`.

    Rewards of completions must not depend on the other completions of the call, as everywhere in the package.

    Parameters
    ----------
    whole
        The posterior, which each rank has.
    ranks
        The group.
    prior
        The posterior's prior, shared by the ranks; None: a `SharedLM` of it.
    """

    def __init__(self, whole: Posterior, ranks: Ranks, prior: SharedLM | None = None) -> None:
        self.__dict__.update(whole.__dict__)
        self.whole, self.ranks = whole, ranks
        self.prior = SharedLM(whole.prior, ranks) if prior is None else prior
        self._shared_prior = self.prior

    def reward_of_rows(self, tokens: IntArray, lengths: IntArray, prompt_index: IntArray) -> FloatArray:
        """See `Posterior.reward_of_rows`."""

        def of(rows: slice) -> Tensor:
            found = self.whole.reward_of_rows(tokens[rows], lengths[rows], prompt_index[rows])
            return torch.as_tensor(found, dtype=torch.float64, device="cpu")

        if len(tokens) == 0:
            return self.whole.reward_of_rows(tokens, lengths, prompt_index)
        rewards: FloatArray = over_ranks(self.ranks, of, len(tokens)).numpy()
        return rewards

    def at_alpha(self, alpha: float) -> SharedPosterior:
        """See `Posterior.at_alpha`."""
        return SharedPosterior(self.whole.at_alpha(alpha), self.ranks, self._shared_prior)

    def select(self, indices: Iterable[int] | slice) -> SharedPosterior:
        """See `Posterior.select`."""
        return SharedPosterior(self.whole.select(indices), self.ranks, self._shared_prior)

    def _with_prompts(self, prompts: Sequence[Any], columns: Mapping[str, Any], numbers: IntArray) -> SharedPosterior:
        return SharedPosterior(self.whole._with_prompts(prompts, columns, numbers), self.ranks, self._shared_prior)
