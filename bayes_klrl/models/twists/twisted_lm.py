"""The prior times a twist, one token ahead, as a language model: the locally optimal proposal of SMC.

    q(a | x_<t) = (1 - epsilon) p0(a | x_<t) psi_t(x_<t a) / sum_b p0(b | x_<t) psi_t(x_<t b) + epsilon p0(a | x_<t)

With epsilon = 0 the weight of a particle does not depend on the token drawn (theory.md 3.6), and with the exact twist q is the
posterior: every weight is the evidence, and one particle is enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bayes_klrl.arrays import to_host
from bayes_klrl.batch import completion_texts
from bayes_klrl.checks import check_count, check_fraction
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.passes import next_log_probs_of, passes
from bayes_klrl.models.twists.simple import next_log_psi
from bayes_klrl.posterior import Posterior
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, State, TokenIds, Twist
from bayes_klrl.weights import check_log_weights, logsumexp

__all__ = ["TwistedLM"]

_DEFAULT_EPSILON = 0.05


@dataclass(frozen=True, eq=False)
class TwistedState:
    """The state of R rows: the prior's state, and the prompts and prefixes that the twist is evaluated at."""

    base: State
    prompt_index: IntArray  # (R,)
    prefixes: IntArray  # (R, t)


class TwistedLM:
    """A `LanguageModel` that draws from prior x twist; for `SMC(proposal=...)` and `ImportanceSampling(proposal=...)`.

        q(a | x_<t) = (1 - epsilon) p0(a | x_<t) psi_t(x_<t a) / sum_b p0(b | x_<t) psi_t(x_<t b) + epsilon p0(a | x_<t)

    When this model and the prior are decoded in lockstep, the prior is run once and not twice.

    Parameters
    ----------
    posterior
        The posterior whose prior is multiplied by the twist. This model continues only the prompts of this posterior.
    twist
        A `Twist` (a fitted one, not a recipe). It must be positive wherever the posterior is, as for SMC.
    top_k
        Apply the twist only to the k tokens of highest prior probability; the other tokens keep epsilon times their prior
        probability. This saves time if the twist has to be called token by token and the vocabulary is large. None: apply it
        to all tokens.
    epsilon
        Weight of the unmodified prior. None: 0 without `top_k`, 0.05 with it. With `top_k` it must be positive: a proposal
        that never draws some tokens makes log Z-hat too low, without any warning.

    Raises
    ------
    BayesKLRLError
        If the twist is a recipe, or if `top_k` is given with epsilon = 0.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.4, 0.4, 0.2]), eos_token_id=2)
    >>> ones = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1), alpha=1.0)
    >>> posterior = bk.Posterior(coin, ones, max_new_tokens=6)
    >>> twist = bk.PartialRewardTwist().fit(posterior, seed=0)
    >>> twisted = bk.TwistedLM(posterior, twist)
    >>> twisted.next_log_probs(twisted.prefill([[]])).argmax(axis=1)  # the prior likes 0 and 1 equally
    array([1])
    >>> draws = bk.SMC(num_particles=100, proposal=twisted, twist=twist).run(posterior, seed=0)
    """

    def __init__(
        self, posterior: Posterior, twist: Twist, *, top_k: int | None = None, epsilon: float | None = None
    ) -> None:
        if not callable(twist):
            raise BayesKLRLError(
                f"A TwistedLM needs a twist that can be called; got {twist!r}. Fit a recipe first: recipe.fit(posterior, "
                "seed=...)."
            )
        if top_k is not None:
            check_count("top_k", top_k)
        if epsilon is None:
            epsilon = 0.0 if top_k is None else _DEFAULT_EPSILON
        check_fraction("epsilon", epsilon)
        if top_k is not None and top_k < posterior.prior.vocab_size and epsilon == 0:
            raise BayesKLRLError(
                "With top_k, epsilon must be positive: tokens outside the k would never be drawn, and the evidence would "
                "be too low without any warning."
            )
        self._posterior, self._twist = posterior, twist
        self._top_k = min(top_k or posterior.prior.vocab_size, posterior.prior.vocab_size)
        self._epsilon = float(epsilon)
        self._eos = np.array(sorted(self.eos_token_ids), dtype=np.int64)

    @property
    def base(self) -> LanguageModel:
        """The prior, whose state is part of this model's own."""
        return self._posterior.prior

    @property
    def twist(self) -> Twist:
        """The twist that the prior is multiplied by."""
        return self._twist

    @property
    def vocab_size(self) -> int:
        """See `LanguageModel`."""
        return self.base.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `LanguageModel`."""
        return self.base.eos_token_ids

    @property
    def full_support(self) -> bool:
        """The prior's: the twist may be 0 only where the posterior is 0, so nothing of the posterior is missed."""
        return self.base.full_support

    @property
    def tokenizer(self) -> Any | None:
        """See `LanguageModel`."""
        return self.base.tokenizer

    @property
    def context_length(self) -> int | None:
        """See `LanguageModel`."""
        return getattr(self.base, "context_length", None)

    @property
    def prompt_apart(self) -> bool:
        """See `LanguageModel`."""
        return bool(getattr(self.base, "prompt_apart", False))

    @property
    def accepts_empty_prompt(self) -> bool:
        """See `LanguageModel`."""
        return bool(getattr(self.base, "accepts_empty_prompt", False))

    @property
    def half_precision(self) -> bool:
        """True if the prior's weights have fewer bits than float32."""
        return bool(getattr(self.base, "half_precision", False))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `LanguageModel`."""
        return self.base.encode(texts)

    def decode(self, ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel`."""
        return self.base.decode(ids)

    def decode_after(self, prompts: Sequence[TokenIds], ids: Sequence[TokenIds]) -> list[str]:
        """See `LanguageModel`."""
        return completion_texts(self.base, prompts, ids)

    def prefill(self, prompts: Sequence[TokenIds]) -> TwistedState:
        """See `LanguageModel`; all prompts must be prompts of the posterior."""
        index = self._prompt_index(prompts)
        return TwistedState(self.base.prefill(prompts), index, np.empty((len(index), 0), dtype=np.int64))

    def next_log_probs(self, state: TwistedState) -> FloatArray:
        """See `LanguageModel`. Shape (R, V), float64 on the host."""
        return self.log_probs_with_base(state)[0]

    def next_log_probs_of(self, state: TwistedState, rows: IntArray) -> FloatArray:
        """Return the next-token log-probs of some rows, (len(rows), V); no cache is copied."""
        return self.log_probs_with_base(state, rows)[0]

    def log_probs_with_base(self, state: TwistedState, rows: IntArray | None = None) -> tuple[FloatArray, Any]:
        """Return the next-token log-probs of this model and of the prior, from one run of the prior, for some rows or all."""
        if rows is None:
            rows, of_base = np.arange(len(state.prefixes)), self.base.next_log_probs(state.base)
        else:
            of_base = next_log_probs_of(self.base, state.base, rows)
        log_prior = to_host(of_base).astype(np.float64)
        log_probs = log_prior.copy()
        unfinished = np.flatnonzero(~np.isin(state.prefixes[rows], self._eos).any(axis=1))
        if state.prefixes.shape[1] < self._posterior.max_new_tokens and unfinished.size:
            chosen = rows[unfinished]
            arguments = (self._twist, self._posterior, state.prompt_index[chosen], state.prefixes[chosen])
            log_psi_of = partial(next_log_psi, *arguments, prior_rows=(state.base, chosen))
            log_probs[unfinished] = self._steered(log_prior[unfinished], log_psi_of)
        return log_probs, of_base

    def append(self, state: TwistedState, tokens: IntArray) -> TwistedState:
        """See `LanguageModel`."""
        tokens = np.asarray(tokens, dtype=np.int64)
        prefixes = np.concatenate([state.prefixes, tokens[:, None]], axis=1)
        return TwistedState(self.base.append(state.base, tokens), state.prompt_index, prefixes)

    def select(self, state: TwistedState, rows: IntArray) -> TwistedState:
        """See `LanguageModel`."""
        return TwistedState(self.base.select(state.base, rows), state.prompt_index[rows], state.prefixes[rows])

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> FloatArray:
        """See `LanguageModel`; not differentiable: it steps through the tokens as decoding does."""
        num_prompts, num_draws, num_tokens = sequences.tokens.shape
        tokens = np.where(sequences.mask, sequences.tokens, self._posterior.pad_token).reshape(-1, num_tokens)
        state = self.select(self.prefill(prompts), np.repeat(np.arange(num_prompts), num_draws))
        log_probs = np.zeros(tokens.shape)
        longest = int(sequences.lengths.max(initial=0))
        for t in range(longest):
            for rows in passes(np.arange(len(tokens)), self.vocab_size):
                log_probs[rows, t] = self.next_log_probs_of(state, rows)[np.arange(rows.size), tokens[rows, t]]
            if t + 1 < longest:
                state = self.append(state, tokens[:, t])
        return np.where(sequences.mask, log_probs.reshape(sequences.tokens.shape), 0.0)

    def _steered(self, log_prior: FloatArray, log_psi_of: Callable[[IntArray | None], FloatArray]) -> FloatArray:
        """Return log q of unfinished rows, (R, V); the prior where the twist is 0 for all tokens."""
        if self._top_k < log_prior.shape[1]:
            likely = np.argpartition(-log_prior, self._top_k - 1, axis=1)[:, : self._top_k]
            scores = np.full(log_prior.shape, -np.inf)
            kept = np.take_along_axis(log_prior, likely, axis=1) + check_log_weights(log_psi_of(likely))
            np.put_along_axis(scores, likely, kept, axis=1)
        else:
            scores = log_prior + check_log_weights(log_psi_of(None))
        total = logsumexp(scores)[:, None]
        hopeless = np.isneginf(total)
        twisted = np.where(hopeless, log_prior, scores - np.where(hopeless, 0.0, total))
        if self._epsilon in (0.0, 1.0):
            return twisted if self._epsilon == 0 else log_prior
        mixed: FloatArray = np.logaddexp(np.log1p(-self._epsilon) + twisted, np.log(self._epsilon) + log_prior)
        return mixed

    def _prompt_index(self, prompts: Sequence[TokenIds]) -> IntArray:
        """Return the index of each prompt among the posterior's prompts."""
        own, given = self._posterior.prompt_ids, [tuple(int(i) for i in prompt) for prompt in prompts]
        if given == list(own):
            return np.arange(len(own))
        places: dict[tuple[int, ...], list[int]] = {}
        for place, prompt in enumerate(own):
            places.setdefault(prompt, []).append(place)
        copies = Counter(given)
        for prompt in given:
            if prompt not in places:
                raise BayesKLRLError(
                    f"A TwistedLM continues only the prompts of its own posterior; got the ids {list(prompt)}. Make a "
                    "TwistedLM for a posterior that has this prompt."
                )
            if len(places[prompt]) not in (1, copies[prompt]) and self._posterior.columns:
                raise BayesKLRLError(
                    f"The prompt of ids {list(prompt)} occurs more than once in the posterior, with different columns, so it "
                    "is not clear which one is meant. Give all copies of it, in the posterior's order."
                )
        seen: Counter[tuple[int, ...]] = Counter()
        index = []
        for prompt in given:  # the k-th copy here is the k-th there, if all are here
            all_here = len(places[prompt]) == copies[prompt]
            index.append(places[prompt][seen[prompt] if all_here else 0])
            seen[prompt] += 1
        return np.array(index, dtype=np.int64)
