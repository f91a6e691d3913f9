"""Twists without training (a constant, and the reward so far), and one step of look-ahead with any twist.

    log psi_t(x_1:t), an estimate of log E_p0[exp(r(x) / alpha) | x_1:t]      (theory.md 3.1; Zhao et al. 2024)

alpha log psi is a soft value function of RL. SMC compares psi between the particles of one step. Finished particles have
their likelihood as weight, so the twist of unfinished ones must have the same scale; otherwise the particles that end first
replace all others. Every twist here therefore starts from log Z-hat of a small pilot sample from the prior.

A *recipe* makes a twist for a posterior by `fit(posterior, seed=...)`; `SMC(twist=recipe)` calls it first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from bayes_klrl.checks import check_count, check_fraction, check_positive
from bayes_klrl.draws import Cost
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.completions import Completions
from bayes_klrl.models.decoding import decode_by
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams, prompt_keys
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, State, Twist
from bayes_klrl.weights import logmeanexp

__all__ = [
    "ConstantTwist",
    "FittedPartialReward",
    "PartialRewardTwist",
    "completed_log_psi",
    "fitted_rows",
    "log_evidence_of_pilot",
    "log_likelihoods_of",
    "model_draws",
    "next_log_psi",
    "pilot_twist",
    "prior_draws",
    "prior_pilot",
]

PILOT_DRAWS = 64
"""Prior draws per prompt from which the constant twist is made."""

_PREFIXES_AT_ONCE = 2**14


@dataclass(frozen=True, eq=False)
class ConstantTwist:
    """A twist with the same log psi for all unfinished prefixes of a prompt; `values` of shape (P,)."""

    values: FloatArray

    def __call__(self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
        """See `Twist.__call__`."""
        return self.values[prompt_index]


def pilot_twist(posterior: Posterior, seed: int) -> tuple[ConstantTwist, int]:
    """Return the constant twist log Z-hat from a small prior sample with its own random stream, and its model tokens.

    Without EOS all completions end together, a constant changes nothing, and the sample is omitted.
    """
    if not posterior.prior.eos_token_ids:
        return ConstantTwist(np.zeros(posterior.num_prompts)), 0
    pilot, log_likelihood = prior_pilot(posterior, PILOT_DRAWS, Streams.of(seed, PILOT_DRAWS))
    return ConstantTwist(log_evidence_of_pilot(log_likelihood)), pilot.model_tokens


def prior_pilot(posterior: Posterior, num_draws: int, streams: Streams) -> tuple[Completions, FloatArray]:
    """Return N draws per prompt from the prior, and their log-likelihoods, (P, N)."""
    pilot = prior_draws(posterior, num_draws, streams)
    return pilot, log_likelihoods_of(posterior, pilot)


def prior_draws(posterior: Posterior, num_draws: int, streams: Streams) -> Completions:
    """Return N draws per prompt from the prior."""
    return model_draws(posterior.prior, posterior, num_draws, streams)


def model_draws(lm: LanguageModel, posterior: Posterior, num_draws: int, streams: Streams) -> Completions:
    """Return N draws per prompt from a model on the prior's vocabulary."""
    uniforms = streams.uniforms(prompt_keys(posterior.prompt_ids), 0, num_draws, posterior.max_new_tokens)
    return decode_by((lm,), posterior.prompt_ids, uniforms)


def log_likelihoods_of(posterior: Posterior, pilot: Completions) -> FloatArray:
    """Return the log-likelihoods of the draws of a pilot, (P, N)."""
    reward = posterior.reward_of_rows(pilot.tokens, pilot.lengths, pilot.prompt_index)
    return posterior.likelihood.log_likelihood(reward).reshape(posterior.num_prompts, -1)


def log_evidence_of_pilot(log_likelihood: FloatArray) -> FloatArray:
    """Return log Z-hat from log-likelihoods of prior draws, (P, N) to (P,).

    If all N likelihoods are 0 it is log(1 / (N + 1)), as if one more draw had had likelihood 1.
    """
    log_evidence = logmeanexp(log_likelihood)
    return np.where(np.isneginf(log_evidence), -np.log(log_likelihood.shape[-1] + 1), log_evidence)


def fitted_rows(posterior: Posterior, prompts: tuple[tuple[int, ...], ...], prompt_index: IntArray) -> IntArray:
    """Return the row of each prompt among the prompts that a twist was fitted on, shape (R,).

    Parameters
    ----------
    posterior
        The posterior that the twist is used for.
    prompts
        Token ids of the prompts that the twist was fitted on.
    prompt_index
        Indices of prompts of `posterior`, shape (R,).

    Raises
    ------
    BayesKLRLError
        If the posterior has a prompt that the twist was not fitted on.
    """
    if posterior.prompt_ids == prompts:
        return prompt_index
    row_of = {ids: row for row, ids in enumerate(prompts)}
    unknown = [ids for ids in posterior.prompt_ids if ids not in row_of]
    if unknown:
        raise BayesKLRLError(
            f"This twist was fitted on other prompts, not on the one with ids {list(unknown[0])}. Fit it on a posterior that "
            "has this prompt."
        )
    rows: IntArray = np.array([row_of[ids] for ids in posterior.prompt_ids], dtype=np.int64)[prompt_index]
    return rows


@dataclass(frozen=True)
class PartialRewardTwist:
    """A recipe of a twist: the likelihood of the prefix, scored as if it were a completion.

    It is greedy, and good where the reward accrues token by token.

        psi_t(x_1:t) = (1 - floor) c_t exp(gamma r(x_1:t) / alpha) + floor Z-hat

    c_t makes the mean of psi_t over unfinished pilot draws Z-hat, so that finished and unfinished particles have one scale
    (theory.md 3.7). The floor keeps prefixes of low likelihood alive, such as a text that must contain a
    word but does not yet.

    Parameters
    ----------
    gamma
        Power of the likelihood, positive. The smaller it is, the closer the twist is to a constant.
    floor
        Weight of the constant Z-hat, in (0, 1].
    num_pilot
        Draws per prompt from the prior, from which Z-hat and c_t are estimated.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.4, 0.4, 0.2]), eos_token_id=2)
    >>> ones = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1), alpha=1.0)
    >>> posterior = bk.Posterior(coin, ones, max_new_tokens=6)
    >>> draws = bk.SMC(num_particles=500, twist=bk.PartialRewardTwist()).run(posterior, seed=0)
    >>> exact = bk.Exact().run(posterior, seed=0)
    >>> bool(abs(draws.log_evidence[0] - exact.log_evidence[0]) < 0.2)
    True
    """

    gamma: float = 1.0
    floor: float = 0.01
    num_pilot: int = PILOT_DRAWS

    def __post_init__(self) -> None:
        check_positive("gamma", self.gamma)
        check_fraction("floor", self.floor)
        if self.floor == 0:
            raise BayesKLRLError(
                "floor must be positive: with floor = 0 a prefix of likelihood 0 is dropped, although a continuation may "
                "have a positive one, and the evidence comes out too low."
            )
        check_count("num_pilot", self.num_pilot)

    def fit(self, posterior: Posterior, *, seed: int, progress: bool = False) -> FittedPartialReward:
        """See `TwistRecipe.fit`."""
        start = time.perf_counter()
        pilot, log_likelihood = prior_pilot(posterior, self.num_pilot, Streams.of(seed, self.num_pilot))
        log_evidence = log_evidence_of_pilot(log_likelihood)
        constants = np.repeat(log_evidence[:, None], posterior.max_new_tokens, axis=1)
        partial = self.gamma * _log_likelihoods_of_prefixes(posterior, pilot)
        for t in range(1, min(posterior.max_new_tokens, int(pilot.lengths.max()))):
            unfinished = (pilot.lengths > t).reshape(log_likelihood.shape).mean(axis=1)
            with np.errstate(divide="ignore"):
                mean = logmeanexp(partial[:, t].reshape(log_likelihood.shape)) - np.log(np.maximum(unfinished, 1e-300))
            constants[:, t] -= np.where(np.isfinite(mean) & (unfinished > 0), mean, 0.0)
        training = Cost(training_tokens=pilot.model_tokens, training_seconds=time.perf_counter() - start)
        return FittedPartialReward(self.gamma, self.floor, posterior.prompt_ids, log_evidence, constants, training)


@dataclass(frozen=True, eq=False)
class FittedPartialReward:
    """The twist that `PartialRewardTwist.fit` returns.

    Parameters
    ----------
    gamma, floor
        The options of `PartialRewardTwist`.
    prompts
        The token ids of the P prompts.
    log_evidence
        log Z-hat of each prompt in nats, shape (P,).
    log_constants
        log c_t in nats, shape (P, T).
    training
        Seconds and model tokens of the pilot.
    """

    gamma: float
    floor: float
    prompts: tuple[tuple[int, ...], ...]
    log_evidence: FloatArray
    log_constants: FloatArray
    training: Cost = field(default_factory=Cost)

    def __call__(self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
        """See `Twist.__call__`."""
        rows, t = fitted_rows(posterior, self.prompts, prompt_index), prefixes.shape[1]
        constant = self.log_evidence[rows]
        if t == 0 or self.floor == 1:
            return constant
        partial = self.gamma * _partial_log_likelihood(posterior, prompt_index, prefixes) + self.log_constants[rows, t]
        mixed: FloatArray = np.logaddexp(np.log1p(-self.floor) + partial, np.log(self.floor) + constant)
        return mixed


def _partial_log_likelihood(posterior: Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
    """Return r / alpha of prefixes, scored as completions, shape (R,)."""
    lengths = np.full(len(prefixes), prefixes.shape[1])
    reward = posterior.reward_of_rows(_padded(prefixes, posterior), lengths, prompt_index)
    return posterior.likelihood.log_likelihood(reward)


def _log_likelihoods_of_prefixes(posterior: Posterior, pilot: Completions) -> FloatArray:
    """Return r / alpha of the first t tokens of draws that are longer, scored as completions, (R, T); -inf elsewhere.

    All prefixes of a draw are scored in one call, because some rewards then take little more time than for the draw alone.
    """
    num_tokens = posterior.max_new_tokens
    found = np.full(pilot.tokens.shape, -np.inf)
    step = max(1, _PREFIXES_AT_ONCE // num_tokens)
    for start in range(0, len(pilot.tokens), step):
        row, t = np.nonzero(np.arange(num_tokens) < pilot.lengths[start : start + step, None])
        row, t = row[t > 0] + start, t[t > 0]
        if row.size:
            prefixes = np.where(np.arange(num_tokens) < t[:, None], pilot.tokens[row], posterior.pad_token)
            reward = posterior.reward_of_rows(prefixes, t, pilot.prompt_index[row])
            found[row, t] = posterior.likelihood.log_likelihood(reward)
    return found


def _padded(prefixes: IntArray, posterior: Posterior) -> IntArray:
    """Return the prefixes padded to width T, shape (R, T)."""
    missing = posterior.max_new_tokens - prefixes.shape[1]
    return np.pad(prefixes, ((0, 0), (0, missing)), constant_values=posterior.pad_token)


def next_log_psi(
    twist: Twist,
    posterior: Posterior,
    prompt_index: IntArray,
    prefixes: IntArray,
    candidates: IntArray | None = None,
    prior_rows: tuple[State, IntArray] | None = None,
) -> FloatArray:
    """Return log psi of one-token extensions, shape (R, K): one step of look-ahead.

    If the twist has a method `next_log_psi(posterior, prompt_index, prefixes, prior_rows)`, which returns log psi for the
    whole vocabulary, (R, V), that method is used; it may leave out what is the same for all extensions of a prefix, since a
    proposal normalises over them. Any other twist is called on K extensions per row; complete extensions get their
    log-likelihood.

    Parameters
    ----------
    twist, posterior, prompt_index, prefixes
        The arguments of `Twist.__call__`; every prefix must be unfinished.
    candidates
        The tokens to extend each prefix by, shape (R, K); None: all V.
    prior_rows
        A decoding state of the prior, and the row of it that each prefix is at, shape (R,). A twist on the prior's hidden
        states then needs no forward pass of its own. None if there is no such state.
    """
    ahead = getattr(twist, "next_log_psi", None)
    if ahead is not None:
        everything: FloatArray = ahead(posterior, prompt_index, prefixes, prior_rows)
        return everything if candidates is None else np.take_along_axis(everything, candidates, axis=1)
    if candidates is None:
        candidates = np.tile(np.arange(posterior.prior.vocab_size), (len(prefixes), 1))
    num_rows, num_candidates = candidates.shape
    extended = np.concatenate([np.repeat(prefixes, num_candidates, axis=0), candidates.reshape(-1, 1)], axis=1)
    values = completed_log_psi(twist, posterior, np.repeat(prompt_index, num_candidates), extended)
    return values.reshape(num_rows, num_candidates)


def completed_log_psi(twist: Twist, posterior: Posterior, prompt_index: IntArray, extended: IntArray) -> FloatArray:
    """Return log psi of prefixes that may be complete, shape (R,): the log-likelihood if complete, else the twist."""
    width = extended.shape[1]
    complete = np.isin(extended[:, -1], list(posterior.prior.eos_token_ids)) | (width == posterior.max_new_tokens)
    values = np.empty(len(extended))
    if complete.any():
        values[complete] = _partial_log_likelihood(posterior, prompt_index[complete], extended[complete])
    if not complete.all():
        values[~complete] = twist(posterior, prompt_index[~complete], extended[~complete])
    return values
