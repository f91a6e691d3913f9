"""Critics: what a prefix is worth, as the baseline of each token's gradient.

With V_t any function of the prefix x_1:t (V_0 its start, V at the end r / alpha) and l_t = log q_t - log p0_t, the increments
of SMC's log-weight are temporal differences, and their discounted sums are advantages:

    delta_t = V_t - V_(t-1) - l_t,      A_t = sum_k lambda^k delta_(t+k),
    grad ELBO ~ 1/N sum_n sum_t A_t grad log q(x_t | x_<t)

At lambda = 1 this is exact for every V that does not depend on the batch, since V_(t-1) is a baseline that depends on x_<t
alone. At any lambda it is exact where V is the log-weight to come, E_q[log w | x_1:t] (theory.md 2.14; Schulman et al. 2016).
A critic is a twist of SMC: alpha V is a value function of RL.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bayes_klrl.errors import BayesKLRLError, RewardError
from bayes_klrl.models.twists.simple import PartialRewardTwist, prior_pilot
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import FloatArray, IntArray, Twist, TwistRecipe

__all__ = ["Critic", "PrefixRewardCritic", "Rows", "TwistCritic", "advantages", "critic_of", "prefix_log_likelihoods"]


@dataclass(frozen=True, eq=False)
class Rows:
    """R completions of any prompts.

    Parameters
    ----------
    prompt_index
        Index of the prompt that each completion follows, shape (R,).
    tokens, lengths
        The tokens with filler past the lengths, (R, T), and the lengths, (R,).
    """

    prompt_index: IntArray
    tokens: IntArray
    lengths: IntArray

    @property
    def mask(self) -> np.ndarray:
        """True at the tokens of each completion, (R, T)."""
        inside: np.ndarray = np.arange(self.tokens.shape[1]) < self.lengths[:, None]
        return inside


class Critic(Protocol):
    """What a training step asks of a critic."""

    def values(self, rows: Rows) -> FloatArray:
        """Return V of the prefix before each token, in nats, shape (R, T); what stands past a length is not used."""

    def learn(self, rows: Rows, log_ratio: FloatArray, log_likelihood: FloatArray) -> None:
        """Learn from completions whose values were used.

        Parameters
        ----------
        rows
            The completions.
        log_ratio
            l_t = log q_t - log p0_t of each token, 0 past the lengths, shape (R, T).
        log_likelihood
            r / alpha of each completion in nats, shape (R,).
        """


def advantages(
    values: FloatArray, log_ratio: FloatArray, log_likelihood: FloatArray, lengths: IntArray, discount: float
) -> FloatArray:
    """Return A_t of every token, 0 past the lengths, shape (R, T).

    Parameters
    ----------
    values, log_ratio, log_likelihood
        As in `Critic`.
    lengths
        The lengths of the completions, (R,).
    discount
        lambda, in [0, 1].

    Examples
    --------
    With lambda = 1 the values cancel but for the one before the token:

    >>> values, ratio = np.array([[1.0, 2.0, 9.0]]), np.array([[0.5, 0.25, 0.0]])
    >>> advantages(values, ratio, np.array([4.0]), np.array([2]), 1.0)
    array([[2.25, 1.75, 0.  ]])
    """
    num_tokens = values.shape[1]
    inside = np.arange(num_tokens) < lengths[:, None]
    is_last = np.arange(num_tokens) == lengths[:, None] - 1
    after = np.concatenate([values[:, 1:], values[:, -1:]], axis=1)
    delta = np.where(inside, np.where(is_last, log_likelihood[:, None], after) - values - log_ratio, 0.0)
    found = np.zeros_like(delta)
    running = np.zeros(len(delta))
    for t in range(num_tokens - 1, -1, -1):
        running = delta[:, t] + discount * running
        found[:, t] = running
    return np.where(inside, found, 0.0)


def prefix_log_likelihoods(posterior: Posterior, rows: Rows) -> FloatArray:
    """Return r / alpha of the prefix before each token, scored as a completion, (R, T); NaN where there is none.

    Equal prefixes of a prompt are scored once.
    """
    num_rows, num_tokens = rows.tokens.shape
    found = np.full((num_rows, num_tokens), np.nan)
    row, t = np.nonzero(rows.mask & (np.arange(num_tokens) > 0))
    if not row.size:
        return found
    prefixes = np.where(np.arange(num_tokens) < t[:, None], rows.tokens[row], posterior.pad_token)
    keys = np.concatenate([rows.prompt_index[row][:, None], t[:, None], prefixes], axis=1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    reward = posterior.reward_of_rows(prefixes[first], t[first], rows.prompt_index[row[first]])
    found[row, t] = posterior.likelihood.log_likelihood(reward)[inverse.ravel()]
    return found


def critic_of(twist: Any, posterior: Posterior, seed: int) -> Critic:
    """Return a twist as a critic.

    Parameters
    ----------
    twist
        A twist or a recipe of one, as SMC takes them. `PartialRewardTwist` becomes `PrefixRewardCritic`, which learns during
        the training.
    posterior, seed
        The posterior that is trained on, and the seed for the recipe's own draws.
    """
    if isinstance(twist, PartialRewardTwist):
        return PrefixRewardCritic(posterior, seed)
    if isinstance(twist, TwistRecipe):
        return TwistCritic(twist.fit(posterior, seed=seed), posterior)
    if callable(twist):
        return TwistCritic(twist, posterior)
    raise BayesKLRLError(f"twist is a twist or a recipe of one, such as bk.PartialRewardTwist(); got {twist!r}.")


class TwistCritic:
    """A fitted twist as a critic; it does not learn. V of the empty prefix is the twist's start value."""

    def __init__(self, twist: Twist, posterior: Posterior) -> None:
        self._twist, self._posterior = twist, posterior

    def values(self, rows: Rows) -> FloatArray:
        """See `Critic.values`."""
        found = np.zeros(rows.tokens.shape)
        for t in range(rows.tokens.shape[1]):
            there = np.flatnonzero(rows.lengths > t)
            if there.size:
                found[there, t] = self._twist(self._posterior, rows.prompt_index[there], rows.tokens[there, :t])
        return found

    def learn(self, rows: Rows, log_ratio: FloatArray, log_likelihood: FloatArray) -> None:
        """See `Critic.learn`."""


class PrefixRewardCritic:
    """V by ridge regression on the rewards of prefixes, with forgetting.

    The log-weight to come, r / alpha - sum of l_u from here on, is regressed on the position, the prompt, and u and u^2 times
    (1, tau, tau^2), where u is r / alpha of the prefix in units of two standard deviations under the prior, and tau = t / T.
    What was learned is multiplied by `forgetting` before each update.

    Parameters
    ----------
    posterior
        The posterior that is trained on.
    seed
        Seed for the prior draws that the regression starts from.
    num_pilot
        Number of these draws, shared by the prompts.
    forgetting, ridge
        The factor of earlier steps, and the ridge penalty.
    forgiving
        True: where the reward of a prefix cannot be had, since the reward function takes whole completions only, the values of
        that step know the position alone. False: its error is raised.

    Attributes
    ----------
    model_tokens
        Tokens that the prior read and drew for the start.
    seconds_of_draws, seconds_of_rewards
        Time that these draws took, and the rewards of all of them.
    """

    def __init__(
        self,
        posterior: Posterior,
        seed: int,
        *,
        num_pilot: int = 256,
        forgetting: float = 0.9,
        ridge: float = 10.0,
        forgiving: bool = False,
    ) -> None:
        self._posterior, self._forgetting, self._ridge = posterior, forgetting, ridge
        self._forgiving = forgiving
        each = max(2, -(-num_pilot // posterior.num_prompts))
        start = time.perf_counter()
        pilot, log_likelihood = prior_pilot(posterior, each, Streams.of(seed, each))
        whole, again = time.perf_counter() - start, time.perf_counter()
        posterior.reward_of_rows(pilot.tokens, pilot.lengths, pilot.prompt_index)
        self.seconds_of_rewards = time.perf_counter() - again
        self.seconds_of_draws = max(whole - self.seconds_of_rewards, 0.0)
        self.model_tokens = pilot.model_tokens
        finite = log_likelihood[np.isfinite(log_likelihood)]
        self._scale = 2 * float(finite.std()) if finite.size > 1 and finite.std() > 0 else 1.0
        size = posterior.max_new_tokens + posterior.num_prompts + 7
        self._gram: FloatArray = np.zeros((size, size))
        self._moment: FloatArray = np.zeros(size)
        self._weights: FloatArray = np.zeros(size)
        self._last: tuple[IntArray, FloatArray] | None = None
        rows = Rows(pilot.prompt_index, pilot.tokens, pilot.lengths)
        lowest = float(finite.min()) if finite.size else 0.0
        target = np.where(np.isfinite(log_likelihood), log_likelihood, lowest).ravel()
        self.learn(rows, np.zeros(rows.tokens.shape), target)

    def values(self, rows: Rows) -> FloatArray:
        """See `Critic.values`."""
        features = self._features(rows)
        self._last = rows.tokens, features
        found: FloatArray = features @ self._weights
        return found

    def learn(self, rows: Rows, log_ratio: FloatArray, log_likelihood: FloatArray) -> None:
        """See `Critic.learn`."""
        known = self._last is not None and self._last[0] is rows.tokens
        features = self._last[1] if known and self._last is not None else self._features(rows)
        to_come = log_ratio[:, ::-1].cumsum(axis=1)[:, ::-1]
        inside = rows.mask
        x, y = features[inside], (log_likelihood[:, None] - to_come)[inside]
        self._gram = self._forgetting * self._gram + x.T @ x
        self._moment = self._forgetting * self._moment + x.T @ y
        self._weights[:] = np.linalg.solve(self._gram + self._ridge * np.eye(len(self._moment)), self._moment)

    def state(self) -> dict[str, FloatArray]:
        """Return what was learned, for a checkpoint."""
        return {"gram": self._gram, "moment": self._moment, "weights": self._weights}

    def load_state(self, state: Any) -> None:
        """Go on from what `state` returned."""
        self._gram, self._moment = np.array(state["gram"]), np.array(state["moment"])
        self._weights = np.array(state["weights"])

    def _features(self, rows: Rows) -> FloatArray:
        """Return the regressors of the prefix before each token, (R, T, K)."""
        num_rows, num_tokens = rows.tokens.shape
        num_prompts = self._posterior.num_prompts
        try:
            raw = prefix_log_likelihoods(self._posterior, rows) / self._scale
        except RewardError:
            if not self._forgiving:
                raise
            raw = np.full(rows.tokens.shape, np.nan)
        impossible = np.isneginf(raw)
        u = np.where(np.isfinite(raw), raw, 0.0)
        tau = np.broadcast_to(np.arange(num_tokens) / num_tokens, u.shape)
        powers = np.stack([np.ones_like(tau), tau, tau**2], axis=-1)
        parts: list[FloatArray] = [
            np.broadcast_to(np.eye(num_tokens), (num_rows, num_tokens, num_tokens)),
            np.broadcast_to(np.eye(num_prompts)[rows.prompt_index][:, None], (num_rows, num_tokens, num_prompts)),
            u[..., None] * powers,
            u[..., None] ** 2 * powers,
            impossible[..., None].astype(np.float64),
        ]
        return np.concatenate(parts, axis=-1)
