"""The posterior over completions: prior x likelihood / evidence.

    p*(x | c) = p0(x | c) exp(r(x, c) / alpha) / Z(c)

Completions follow the convention "absorb": x ends with EOS, which is part of it, or was cut at `max_new_tokens`, which is an
outcome like any other. So p0 sums to exactly 1 over completions, and sampling with `max_new_tokens` draws from it
(theory.md 1.2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.arrays import no_gradient, to_host
from bayes_klrl.batch import RESERVED_NAMES, Batch, Setting
from bayes_klrl.checks import check_count, check_positive
from bayes_klrl.errors import BayesKLRLError, needs_jax
from bayes_klrl.likelihood import Likelihood
from bayes_klrl.prompts import prompt_list
from bayes_klrl.sequences import Sequences, pad_token
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel

if TYPE_CHECKING:
    from bayes_klrl.draws import Draws
    from bayes_klrl.models.programs.numpyro_program import NumpyroGuide, NumpyroModel

__all__ = ["Posterior", "check_context", "check_language_model", "completion_log_probs", "encoded_prompts"]

_TOKENS_PER_CHUNK = 2**14


class Posterior:
    """The prior conditioned on a reward: the optimal policy of KL-regularised RL.

    Parameters
    ----------
    prior
        The pretrained language model p0 (RL: the reference model).
    likelihood
        The likelihood exp(r / alpha): a `Reward`, `TokenReward`, `Constraint`, or a product of them.
    prompts
        One prompt or a list of P prompts: texts, or lists or arrays of token ids. Of a tokenizer's output (a
        `transformers.BatchEncoding`) the `input_ids` are taken, without padding.
    max_new_tokens
        T, the largest number of tokens that a completion may have, EOS included.
    **columns
        Further data about the prompts, each column a list of length P, which reward functions may ask for by name.

    Attributes
    ----------
    prompt_ids
        The P prompts as token ids; an empty prompt has become the model's BOS.

    Raises
    ------
    BayesKLRLError
        If an argument is wrong, before any model is run. `TextRewardError` for a reward that reads text and a prior that
        has no tokenizer.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> posterior.log_joint([[1], [0, 1]]).round(3)
    array([[0.307, 0.614]])
    """

    def __init__(
        self,
        prior: LanguageModel,
        likelihood: Likelihood,
        *,
        prompts: str | Sequence[Any] = "",
        max_new_tokens: int,
        **columns: Sequence[Any],
    ) -> None:
        check_language_model("The prior", prior)
        if not isinstance(likelihood, Likelihood):
            raise BayesKLRLError(
                f"likelihood must be a bk.Reward, bk.TokenReward or bk.Constraint; got {likelihood!r}. Wrap a function: "
                "bk.Reward(fn, alpha=...)."
            )
        check_count("max_new_tokens", max_new_tokens)
        self.prior = prior
        self.max_new_tokens = int(max_new_tokens)
        self.prompts = prompt_list(prompts)
        self.columns = _checked_columns(columns, len(self.prompts))
        likelihood.check(prior, self.columns)
        self.prompt_ids = encoded_prompts(self.prompts, prior)
        check_context(self.prompt_ids, self.max_new_tokens, prior)
        self._given = likelihood
        self.likelihood = likelihood.bind(
            Setting(prior, self.prompts, self.prompt_ids, self.columns, self.max_new_tokens)
        )

    def __repr__(self) -> str:
        return (
            f"Posterior(prior={type(self.prior).__name__}, likelihood={self.likelihood.label!r}, alpha="
            f"{self.likelihood.alpha}, prompts={len(self.prompts)}, max_new_tokens={self.max_new_tokens})"
        )

    @property
    def num_prompts(self) -> int:
        """P, the number of prompts."""
        return len(self.prompt_ids)

    @property
    def alpha(self) -> float:
        """Units of reward per nat; 1 for constraints alone, whose reward is 0 or -inf."""
        return self.likelihood.alpha or 1.0

    @property
    def pad_token(self) -> int:
        """The token id at positions past a completion's length: the EOS id, 0 if there is none."""
        return pad_token(self.prior.eos_token_ids)

    def at_alpha(self, alpha: float) -> Posterior:
        """Return the posterior of the same prior and reward at another alpha; constraints are untouched by it.

        Raises
        ------
        BayesKLRLError
            If alpha is not a positive number, if there is no alpha (constraints alone), if rewards have different ones, or if
            the reward itself depends on it.

        Examples
        --------
        >>> import numpy as np, bayes_klrl as bk
        >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
        >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
        >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3).at_alpha(0.5)
        >>> posterior.alpha, posterior.log_likelihood([[0, 1]])
        (0.5, array([[4.]]))
        """
        check_positive("alpha", alpha)
        if self.likelihood.alpha is None:
            raise BayesKLRLError("A likelihood of constraints alone has no alpha. Multiply it by a bk.Reward.")
        if len({factor.alpha for factor in self.likelihood.factors if factor.alpha is not None}) > 1:
            raise BayesKLRLError(
                f"The rewards of {self.likelihood.label!r} have different alphas, so there is no alpha to change. Take a new "
                "bk.Posterior with likelihood ** gamma, or give them one alpha."
            )
        if self.likelihood.depends_on_alpha:
            raise BayesKLRLError(
                f"The reward {self.likelihood.label!r} itself changes with alpha. Make a new bk.Posterior with a new reward."
            )
        if alpha == self.alpha:
            return self
        other = copy.copy(self)
        gamma = self.alpha / alpha
        other._given, other.likelihood = self._given**gamma, self.likelihood**gamma
        return other

    def select(self, indices: Sequence[int] | IntArray) -> Posterior:
        """Return the posterior of some of the prompts, with their columns, in the order of the indices.

        Examples
        --------
        >>> import numpy as np, bayes_klrl as bk
        >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
        >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
        >>> posterior = bk.Posterior(coin, longer, prompts=[[0], [0, 0], [0, 0, 0]], max_new_tokens=3)
        >>> posterior.select([2, 0]).prompt_ids
        ((0, 0, 0), (0,))
        """
        chosen = [int(index) for index in indices]
        wrong = [index for index in chosen if not -self.num_prompts <= index < self.num_prompts]
        if wrong or not chosen:
            raise BayesKLRLError(
                f"Indices of prompts are from 0 to {self.num_prompts - 1}, at least one of them; got {wrong or 'none'}."
            )
        return Posterior(
            self.prior,
            self._given,
            prompts=[self.prompts[index] for index in chosen],
            max_new_tokens=self.max_new_tokens,
            **{name: [values[index] for index in chosen] for name, values in self.columns.items()},
        )

    def sequences(self, x: Sequences | Draws | Sequence[Sequence[int]]) -> Sequences:
        """Return completions as `Sequences` of width T; completions that are not outcomes of this posterior are refused.

        Parameters
        ----------
        x
            The completions: `Sequences` or `Draws` for P prompts, or for one prompt a list of token-id lists.
        """
        if hasattr(x, "tokens") and hasattr(x, "lengths"):
            given = Sequences(x.tokens, x.lengths)
        else:
            if self.num_prompts != 1:
                raise BayesKLRLError(
                    f"Lists of token ids are for one prompt; this posterior has {self.num_prompts}. Give bk.Sequences."
                )
            given = Sequences.from_lists(x, max_new_tokens=self.max_new_tokens, pad_token=self.pad_token)
        if given.tokens.shape[0] != self.num_prompts:
            raise BayesKLRLError(
                f"The completions are of {given.tokens.shape[0]} prompts, the posterior has {self.num_prompts}."
            )
        padded = given.padded(self.max_new_tokens, self.pad_token)
        _check_outcomes(padded, self.prior)
        return padded

    def log_prior(self, x: Sequences | Draws | Sequence[Sequence[int]]) -> FloatArray:
        """Return log p0(x | c) = sum_t log p0(x_t | c, x_<t), EOS included, shape (P, N), float64."""
        return completion_log_probs(self.prior, self.prompt_ids, self.sequences(x))

    def reward(self, x: Sequences | Draws | Sequence[Sequence[int]]) -> FloatArray:
        """Return r(x, c), shape (P, N), float64; -inf outside a constraint."""
        sequences = self.sequences(x)
        num_prompts, num_draws, num_tokens = sequences.tokens.shape
        prompt_index = np.repeat(np.arange(num_prompts), num_draws)
        rewards = self.reward_of_rows(sequences.tokens.reshape(-1, num_tokens), sequences.lengths.ravel(), prompt_index)
        return rewards.reshape(num_prompts, num_draws)

    def reward_of_rows(self, tokens: IntArray, lengths: IntArray, prompt_index: IntArray) -> FloatArray:
        """Return r(x, c) of M completions of any prompts, shape (M,), float64.

        Parameters
        ----------
        tokens, lengths
            The token ids, shape (M, T), with `pad_token` past each length, and the lengths, shape (M,).
        prompt_index
            Index of the prompt that each completion follows, shape (M,).
        """
        batch = Batch(tokens, lengths, prompt_index, self.prompts, self.columns, self.prior, self.prompt_ids)
        return self.likelihood.reward(batch)

    def log_likelihood(self, x: Sequences | Draws | Sequence[Sequence[int]]) -> FloatArray:
        """Return r(x, c) / alpha in nats, shape (P, N), float64."""
        return self.likelihood.log_likelihood(self.reward(x))

    def log_joint(self, x: Sequences | Draws | Sequence[Sequence[int]]) -> FloatArray:
        """Return log p0(x | c) + r(x, c) / alpha, the log posterior up to log Z(c), shape (P, N), float64."""
        return self.log_prior(x) + self.log_likelihood(x)

    def pyro_model(self) -> Callable[[], Any]:
        """Return the posterior as a Pyro program; see `bayes_klrl.models.programs.pyro_program.pyro_model`."""
        from bayes_klrl.models.programs.pyro_program import pyro_model

        return pyro_model(self)

    def pyro_guide(self, lm: LanguageModel) -> Callable[[], Any]:
        """Return a language model as a Pyro guide; see `bayes_klrl.models.programs.pyro_program.pyro_guide`."""
        from bayes_klrl.models.programs.pyro_program import pyro_guide

        return pyro_guide(self, lm)

    def numpyro_model(self) -> NumpyroModel:
        """Return the posterior as a NumPyro program; see `bayes_klrl.models.programs.numpyro_program.numpyro_model`."""
        with needs_jax("posterior.numpyro_model()"):
            from bayes_klrl.models.programs.numpyro_program import numpyro_model

        return numpyro_model(self)

    def numpyro_guide(self, lm: LanguageModel) -> NumpyroGuide:
        """Return a language model as a NumPyro guide; see `bayes_klrl.models.programs.numpyro_program.numpyro_guide`."""
        with needs_jax("posterior.numpyro_guide(lm)"):
            from bayes_klrl.models.programs.numpyro_program import numpyro_guide

        return numpyro_guide(self, lm)


def check_language_model(what: str, lm: object) -> None:
    """Refuse an object that lacks an attribute or method of the `LanguageModel` protocol."""
    missing = [name for name in vars(LanguageModel) if not name.startswith("_") and not hasattr(lm, name)]
    if missing:
        if hasattr(lm, "guide"):
            raise BayesKLRLError(f"{what} must be a language model; of a {type(lm).__name__} give its `guide`.")
        raise BayesKLRLError(
            f"{what} must be a language model, such as bk.TorchLM.from_pretrained(...); a {type(lm).__name__} has no "
            f"{', '.join(missing)}. See bk.LanguageModel."
        )


def completion_log_probs(lm: LanguageModel, prompt_ids: Sequence[Sequence[int]], sequences: Sequences) -> FloatArray:
    """Return log p(x | c) of every completion, shape (P, N), float64, in chunks of draws so that memory is bounded."""
    num_prompts, num_draws, num_tokens = sequences.tokens.shape
    total = np.empty((num_prompts, num_draws))
    step = max(1, _TOKENS_PER_CHUNK // (num_tokens * num_prompts))
    with no_gradient():
        for start in range(0, num_draws, step):
            part = slice(start, start + step)
            chunk = Sequences(sequences.tokens[:, part], sequences.lengths[:, part])
            total[:, part] = to_host(lm.token_log_probs(prompt_ids, chunk)).sum(axis=2, dtype=np.float64)
    return total


def _checked_columns(columns: dict[str, Sequence[Any]], num_prompts: int) -> dict[str, tuple[Any, ...]]:
    """Return the columns as tuples, refusing reserved names and wrong lengths."""
    for name, values in columns.items():
        if name in RESERVED_NAMES:
            raise BayesKLRLError(f"A column cannot be called {name!r}: the name is reserved. Choose another.")
        if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != num_prompts:
            raise BayesKLRLError(
                f"Column {name!r} needs one value per prompt, a list of length {num_prompts}; got {values!r}."
            )
    return {name: tuple(values) for name, values in columns.items()}


def encoded_prompts(prompts: tuple[Any, ...], prior: LanguageModel) -> tuple[tuple[int, ...], ...]:
    """Return the prompts' token ids; an empty prompt becomes BOS where the model has one."""
    texts = all(isinstance(prompt, str) for prompt in prompts)
    if texts and prior.tokenizer is None and any(prompts):
        raise BayesKLRLError(
            f"The prompt {next(p for p in prompts if p)!r} is text, but the prior has no tokenizer. Give token ids, or "
            "the model a tokenizer."
        )
    ids = prior.encode(list(prompts)) if texts and prior.tokenizer is not None else [list(p) for p in prompts]
    bos = getattr(prior, "bos_token_id", None)
    for p, row in enumerate(ids):
        outside = [token for token in row if not 0 <= token < prior.vocab_size]
        if outside:
            raise BayesKLRLError(
                f"Prompt {p} has the token id {outside[0]}, outside the vocabulary 0..{prior.vocab_size - 1}."
            )
        if not row and bos is None and not getattr(prior, "accepts_empty_prompt", False):
            raise BayesKLRLError(
                f"Prompt {p} is empty, and the model has no BOS token to start from. Give a prompt of at least one token."
            )
    return tuple(tuple(row) if row or bos is None else (int(bos),) for row in ids)


def check_context(prompt_ids: tuple[tuple[int, ...], ...], max_new_tokens: int, lm: LanguageModel) -> None:
    """Refuse a prompt and completion that do not fit into the model's context."""
    context = getattr(lm, "context_length", None)
    longest = max(len(row) for row in prompt_ids)
    apart = getattr(lm, "prompt_apart", False)
    needed = max(longest, max_new_tokens) if apart else longest + max_new_tokens
    if context is not None and needed > context:
        raise BayesKLRLError(
            f"A prompt of {longest} tokens and max_new_tokens = {max_new_tokens} exceed the model's context of {context} "
            "tokens. Shorten one of them."
        )


def _check_outcomes(sequences: Sequences, prior: LanguageModel) -> None:
    """Refuse ids outside the vocabulary, EOS before the end, and prefixes: they are not outcomes of p0."""
    tokens, mask = sequences.tokens, sequences.mask
    if (mask & ((tokens < 0) | (tokens >= prior.vocab_size))).any():
        bad = tokens[mask & ((tokens < 0) | (tokens >= prior.vocab_size))][0]
        raise BayesKLRLError(f"Token id {bad} is outside the vocabulary 0..{prior.vocab_size - 1}.")
    is_last = np.arange(tokens.shape[2]) == sequences.lengths[..., None] - 1
    early = (mask & ~is_last & np.isin(tokens, list(prior.eos_token_ids))).any(axis=2)
    if early.any():
        p, n = np.argwhere(early)[0]
        raise BayesKLRLError(
            f"Completion {n} of prompt {p} goes on after EOS: {tokens[p, n].tolist()}. Its length ends at the first EOS."
        )
    prefix = (sequences.lengths < tokens.shape[2]) & ~sequences.finished(prior.eos_token_ids)
    if prefix.any():
        p, n = np.argwhere(prefix)[0]
        ids = tokens[p, n, : sequences.lengths[p, n]].tolist()
        raise BayesKLRLError(
            f"Completion {n} of prompt {p} is a prefix, not an outcome: {ids} neither ends with EOS nor has "
            f"max_new_tokens = {tokens.shape[2]} tokens."
        )
