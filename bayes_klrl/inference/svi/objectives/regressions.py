"""Critics that learn during the training: ridge regression on the rewards of prefixes, or on hidden states.

`critic_of` chooses: it turns what `SVI(twist=...)` is given into a critic.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from bayes_klrl.arrays import no_gradient, to_host
from bayes_klrl.errors import BayesKLRLError, RewardError
from bayes_klrl.inference.svi.objectives.critics import Critic, Rows, TwistCritic
from bayes_klrl.models.twists.simple import PartialRewardTwist, log_likelihoods_of, prior_draws
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams, generator
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, TwistRecipe

__all__ = ["NUM_PILOT", "HiddenStateCritic", "PrefixRewardCritic", "RidgeCritic", "critic_of", "prefix_log_likelihoods"]

NUM_PILOT = 256
"""Prior draws, shared by the prompts, from which a critic that learns starts."""


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
        A twist or a recipe of one, as SMC takes them. `PartialRewardTwist` becomes `PrefixRewardCritic`, and "hidden_states" a
        `HiddenStateCritic`: these learn during the training.
    posterior, seed
        The posterior that is trained on, and the seed for the recipe's own draws.
    """
    if isinstance(twist, PartialRewardTwist):
        return PrefixRewardCritic(posterior, seed)
    if twist == "hidden_states":
        return HiddenStateCritic(posterior, seed)
    if isinstance(twist, TwistRecipe):
        return TwistCritic(twist.fit(posterior, seed=seed), posterior)
    if callable(twist):
        return TwistCritic(twist, posterior)
    raise BayesKLRLError(f"twist is a twist or a recipe of one, such as bk.PartialRewardTwist(); got {twist!r}.")


class RidgeCritic(ABC):
    """V by ridge regression with forgetting, on the position, the prompt, and what a subclass reads of each prefix.

    The target is the log-weight to come, r / alpha - sum of l_u from here on. The regression sees it less the mean r / alpha
    of the prior's draws, so that its penalty draws V towards that mean, and a constant in the reward changes nothing else.
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

    Attributes
    ----------
    model_tokens
        Tokens that the prior read and drew for the start.
    seconds_of_draws, seconds_of_prefixes
        Time that these draws took, and to learn from all their prefixes. Some rewards score all prefixes in one pass.
    num_read
        K, the number of regressors that `read` returns; a subclass sets it.
    """

    num_read: int

    def __init__(
        self,
        posterior: Posterior,
        seed: int,
        *,
        num_pilot: int = NUM_PILOT,
        forgetting: float = 0.9,
        ridge: float = 10.0,
    ) -> None:
        self._posterior, self._forgetting, self._ridge = posterior, forgetting, ridge
        each = max(2, -(-num_pilot // posterior.num_prompts))
        start = time.perf_counter()
        pilot = prior_draws(posterior, each, Streams.of(seed, each))
        self.seconds_of_draws = time.perf_counter() - start
        log_likelihood = log_likelihoods_of(posterior, pilot)
        self.model_tokens = pilot.model_tokens
        self._finite = log_likelihood[np.isfinite(log_likelihood)]
        self._centre = float(self._finite.mean()) if self._finite.size else 0.0
        size = posterior.max_new_tokens + posterior.num_prompts + self.num_read
        self._gram: FloatArray = np.zeros((size, size))
        self._moment: FloatArray = np.zeros(size)
        self._weights: FloatArray = np.zeros(size)
        self._last: tuple[IntArray, FloatArray] | None = None
        rows = Rows(pilot.prompt_index, pilot.tokens, pilot.lengths)
        self.start(rows)
        lowest = float(self._finite.min()) if self._finite.size else 0.0
        target = np.where(np.isfinite(log_likelihood), log_likelihood, lowest).ravel()
        start = time.perf_counter()
        self.learn(rows, np.zeros(rows.tokens.shape), target)
        self.seconds_of_prefixes = time.perf_counter() - start

    @abstractmethod
    def read(self, rows: Rows) -> FloatArray:
        """Return the regressors of the prefix before each token, (R, T, K)."""

    @abstractmethod
    def start(self, rows: Rows) -> None:
        """Look at the prior's draws, before they are learned from."""

    def values(self, rows: Rows) -> FloatArray:
        """See `Critic.values`."""
        features = self._features(rows)
        self._last = rows.tokens, features
        found: FloatArray = features @ self._weights + self._centre
        return found

    def learn(self, rows: Rows, log_ratio: FloatArray, log_likelihood: FloatArray) -> None:
        """See `Critic.learn`."""
        known = self._last is not None and self._last[0] is rows.tokens
        features = self._last[1] if known and self._last is not None else self._features(rows)
        to_come = log_ratio[:, ::-1].cumsum(axis=1)[:, ::-1]
        inside = rows.mask
        x, y = features[inside], (log_likelihood[:, None] - self._centre - to_come)[inside]
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
        """Return all regressors, (R, T, T + P + K)."""
        num_rows, num_tokens = rows.tokens.shape
        num_prompts = self._posterior.num_prompts
        prompts = np.eye(num_prompts)[rows.prompt_index][:, None]
        return np.concatenate(
            [
                np.broadcast_to(np.eye(num_tokens), (num_rows, num_tokens, num_tokens)),
                np.broadcast_to(prompts, (num_rows, num_tokens, num_prompts)),
                self.read(rows),
            ],
            axis=-1,
        )


class PrefixRewardCritic(RidgeCritic):
    """V by regression on the rewards of prefixes: u and u^2 times (1, tau, tau^2).

    u is r / alpha of the prefix, scored as a completion, less the mean under the prior, in units of two standard deviations
    under the prior, and tau = t / T.

    Parameters
    ----------
    posterior, seed
        See `RidgeCritic`.
    forgiving
        True: where the reward of a prefix cannot be had, since the reward function takes whole completions only, the values of
        that step know the position alone. False: its error is raised.
    options
        The further options of `RidgeCritic`.
    """

    num_read = 7

    def __init__(self, posterior: Posterior, seed: int, *, forgiving: bool = False, **options: Any) -> None:
        self._forgiving = forgiving
        self._scale = 1.0
        super().__init__(posterior, seed, **options)

    def start(self, rows: Rows) -> None:
        """See `RidgeCritic.start`: the rewards' scale."""
        spread = float(self._finite.std()) if self._finite.size > 1 else 0.0
        self._scale = 2 * spread if spread > 0 else 1.0

    def read(self, rows: Rows) -> FloatArray:
        """See `RidgeCritic.read`."""
        num_tokens = rows.tokens.shape[1]
        try:
            raw = (prefix_log_likelihoods(self._posterior, rows) - self._centre) / self._scale
        except RewardError:
            if not self._forgiving:
                raise
            raw = np.full(rows.tokens.shape, np.nan)
        impossible = np.isneginf(raw)
        u = np.where(np.isfinite(raw), raw, 0.0)[..., None]
        tau = np.broadcast_to(np.arange(num_tokens) / num_tokens, rows.tokens.shape)
        powers = np.stack([np.ones_like(tau), tau, tau**2], axis=-1)
        return np.concatenate([u * powers, u**2 * powers, impossible[..., None]], axis=-1)


class HiddenStateCritic(RidgeCritic):
    """V as a linear head on the prior's hidden states, for rewards that are too dear on every prefix.

    The hidden states after each prefix, those from which the prior predicts the next token, are standardised on the prior's
    draws, and where they are wider than `width` projected to it by a fixed random matrix (Johnson and Lindenstrauss 1984).

    Parameters
    ----------
    posterior, seed
        See `RidgeCritic`.
    width
        The largest number of regressors.
    options
        The further options of `RidgeCritic`.

    Raises
    ------
    BayesKLRLError
        If the prior has no hidden states: a bk.TorchLM has.
    """

    def __init__(self, posterior: Posterior, seed: int, *, width: int = 256, **options: Any) -> None:
        prior: Any = posterior.prior
        if not hasattr(prior, "features"):
            raise BayesKLRLError(
                f'twist="hidden_states" reads the hidden states of a bk.TorchLM; a {type(prior).__name__} has none to read. '
                "Use bk.PartialRewardTwist()."
            )
        with no_gradient():
            full = int(
                to_host(prior.features([[0]], Sequences(np.zeros((1, 1, 1), int), np.ones((1, 1), int)))).shape[-1]
            )
        self._projection: FloatArray | None = None
        if full > width:
            self._projection = generator(0).standard_normal((full, width)) / np.sqrt(full)
        self.num_read = min(full, width)
        self._mean, self._sd = np.zeros(self.num_read), np.ones(self.num_read)
        super().__init__(posterior, seed, **options)

    def start(self, rows: Rows) -> None:
        """See `RidgeCritic.start`: means and standard deviations, which do not change later."""
        found = self._hidden(rows)[rows.mask]
        self._mean, self._sd = found.mean(axis=0), np.maximum(found.std(axis=0), 1e-6)

    def read(self, rows: Rows) -> FloatArray:
        """See `RidgeCritic.read`."""
        read: FloatArray = (self._hidden(rows) - self._mean) / self._sd
        return read

    def _hidden(self, rows: Rows) -> FloatArray:
        """Return the projected hidden states, (R, T, K)."""
        prior: Any = self._posterior.prior
        found = np.zeros((*rows.tokens.shape, self.num_read))
        for prompt in np.unique(rows.prompt_index):
            own = np.flatnonzero(rows.prompt_index == prompt)
            sequences = Sequences(rows.tokens[own][None], rows.lengths[own][None])
            with no_gradient():
                hidden = to_host(prior.features([self._posterior.prompt_ids[prompt]], sequences))[0]
            found[own] = hidden if self._projection is None else hidden @ self._projection
        return found
