"""The posterior of a reward model's weights, as draws: r_theta(x) = theta . z(x), z standardised features.

    preferences   P(x_w > x_l | theta) = sigmoid(r_theta(x_w) - r_theta(x_l))   (Bradley and Terry 1952)
    scores        y = mean(y) + r_theta(x) + noise                              (Gaussian)
    prior         theta ~ Normal(0, prior_scale^2), prior_scale given or ~ HalfNormal(1)

`bayes_klrl.reward_models.model.RewardModel` makes one; the NumPyro program is in `numpyro_program`. Preferences determine a
reward up to a constant, the same for all completions of a prompt. Scores determine the constant too, but it cancels in every
posterior over completions, so the mean score is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.batch import Batch
from bayes_klrl.checks import check_count
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.reward_models.ensemble import EnsembleReward
from bayes_klrl.reward_models.features import FeatureMap
from bayes_klrl.reward_models.preferences import Preferences, Scores
from bayes_klrl.typing import FloatArray, LanguageModel

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ChainDiagnostics", "RewardPosterior", "observed"]

MAX_R_HAT, MIN_ESS, MAX_DIVERGENT = 1.01, 400, 1e-3  # Vehtari et al. 2021; divergent transitions: a thousandth


@dataclass(frozen=True, eq=False)
class ChainDiagnostics:
    """Convergence diagnostics of Markov chains, one value per parameter.

    Parameters
    ----------
    names
        The names of the K parameters.
    mean, sd
        Mean and standard deviation of all draws, shape (K,).
    mcse
        Monte Carlo standard error of the mean, sd / sqrt(bulk ESS), shape (K,).
    r_hat, ess_bulk, ess_tail
        R-hat, bulk and tail effective sample size (Vehtari et al. 2021), shape (K,).
    num_divergent, num_draws
        Number of divergent transitions, and of all transitions.
    """

    names: tuple[str, ...]
    mean: FloatArray
    sd: FloatArray
    mcse: FloatArray
    r_hat: FloatArray
    ess_bulk: FloatArray
    ess_tail: FloatArray
    num_divergent: int
    num_draws: int

    @property
    def problems(self) -> list[str]:
        """The signs that the chains have not converged, in words: R-hat above 1.01 or unknown, ESS below 400, divergences."""
        found = []
        worst = int(np.argmax(np.nan_to_num(self.r_hat, nan=np.inf)))
        if not self.r_hat[worst] <= MAX_R_HAT:
            found.append(f"R-hat of {self.names[worst]} is {self.r_hat[worst]:.3f}, more than {MAX_R_HAT}")
        for kind, ess in (("bulk", self.ess_bulk), ("tail", self.ess_tail)):
            least = int(np.argmin(np.nan_to_num(ess, nan=0.0)))
            if not ess[least] >= MIN_ESS:
                found.append(f"the {kind} ESS of {self.names[least]} is {ess[least]:.0f}, less than {MIN_ESS}")
        if self.num_divergent > MAX_DIVERGENT * self.num_draws:
            found.append(f"{self.num_divergent} of {self.num_draws:,} transitions diverged")
        return found

    def table(self) -> pd.DataFrame:
        """Return a table with one row per parameter."""
        import pandas as pd

        columns = ("mean", "sd", "mcse", "r_hat", "ess_bulk", "ess_tail")
        return pd.DataFrame(
            {name: getattr(self, name) for name in columns}, index=pd.Index(self.names, name="parameter")
        )

    def __str__(self) -> str:
        verdict = "; ".join(self.problems) or "converged"
        return (
            f"{len(self.names)} parameters, {self.num_draws:,} draws; R-hat <= {np.max(self.r_hat):.3f}, bulk ESS >= "
            f"{np.min(self.ess_bulk):,.0f}, tail ESS >= {np.min(self.ess_tail):,.0f}, {self.num_divergent} diverged: {verdict}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class RewardPosterior:
    """Draws of the weights theta of a reward model, with their diagnostics; `RewardModel.fit` returns one.

    Parameters
    ----------
    draws
        The weights theta of standardised features, shape (C, S, J): chains, draws, features.
    scales
        Draws of `prior_scale` and `noise` where they are inferred, shape (C, S) each.
    diagnostics
        R-hat, ESS and divergences.
    sample_stats
        NUTS's statistics, shape (C, S) each: `diverging`, `num_steps`, `accept_prob`, `potential_energy`.
    features
        Function from completions to standardised features.
    prior
        The language model whose completions the data are about.
    design
        The features that the likelihood depends on: z(chosen) - z(rejected), or z(x), shape (n, J).
    scores, noise
        The observed scores minus their mean, and their noise, shape (n,); both are None for preferences, and the noise is
        None where it is inferred.
    seconds
        Wall time of the fit, compilation included.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> prior = bk.NgramLM.fit(["ha!", "ha ha!", "hm.", "no."], order=2)
    >>> pairs = bk.Preferences("", chosen=["ha!", "ha ha!", "ha!"], rejected=["hm.", "no.", "no."])
    >>> model = bk.RewardModel(
    ...     lambda completions: [[len(c), c.count("!")] for c in completions], num_chains=2, num_draws=50, num_warmup=50
    ... )
    >>> learned = model.fit(prior, pairs, seed=0, accept_unconverged=True)  # far too few draws, to be quick
    >>> learned
    RewardPosterior(3 preferences, 2 features, 2 chains x 50 draws)
    >>> learned.predict(bk.Preferences("", chosen=["hm!"], rejected=["hm."])) > 0.5
    array([ True])

    As a likelihood, with its uncertainty:

    >>> bk.Posterior(prior, learned.reward(alpha=0.5), max_new_tokens=4)
    Posterior(prior=NgramLM, likelihood='uncertain reward (cut)', alpha=0.5, prompts=1, max_new_tokens=4)
    """

    draws: FloatArray
    scales: Mapping[str, FloatArray]
    diagnostics: ChainDiagnostics
    sample_stats: Mapping[str, np.ndarray] = field(repr=False)
    features: FeatureMap
    prior: LanguageModel
    design: FloatArray
    scores: FloatArray | None = None
    noise: FloatArray | None = None
    seconds: float = 0.0

    @property
    def num_features(self) -> int:
        """J, the number of features."""
        return int(self.draws.shape[2])

    @property
    def from_preferences(self) -> bool:
        """Whether the data are preferences, which determine r_theta only up to a constant."""
        return self.scores is None

    @property
    def mean(self) -> FloatArray:
        """The posterior mean E[theta], shape (J,): the weights of the plug-in reward."""
        result: FloatArray = self.draws.mean(axis=(0, 1))
        return result

    def thetas(self, num: int | None = None) -> FloatArray:
        """Return `num` draws of theta, evenly spaced over all chains, shape (num, J); None: all of them."""
        flat = self.draws.reshape(-1, self.num_features)
        if num is None:
            return flat
        check_count("num", num)
        if num > len(flat):
            raise BayesKLRLError(f"{num} draws of theta were asked for, and there are {len(flat)}. Ask for fewer.")
        return flat[((np.arange(num) + 0.5) * len(flat) / num).astype(np.int64)]

    def rewards(self, batch: Batch, num: int | None = None) -> FloatArray:
        """Return r_theta(x) of M completions under draws of theta, shape (S, M); see `thetas` for `num`."""
        return self.thetas(num) @ self.features(batch).T

    def predict(self, pairs: Preferences, *, plug_in: bool = False) -> FloatArray:
        """Return P(chosen preferred to rejected | data) of each pair, E_theta sigmoid(r_theta(x_w) - r_theta(x_l)), (n,).

        Parameters
        ----------
        pairs
            The pairs to predict.
        plug_in
            Whether to use the mean reward as if it were known, which makes predictions overconfident.
        """
        if not isinstance(pairs, Preferences):
            raise BayesKLRLError(f"predict takes bk.Preferences, pairs of completions; got {type(pairs).__name__}.")
        difference = np.subtract(*np.split(self.features(pairs.batch(self.prior)), 2))
        thetas = self.mean[None] if plug_in else self.thetas()
        probability: FloatArray = np.exp(-np.logaddexp(0.0, -(difference @ thetas.T))).mean(axis=1)
        return probability

    def log_likelihood(self) -> FloatArray:
        """Return the log-likelihood of every observation under every draw, shape (C, S, n)."""
        reward = self.draws @ self.design.T
        if self.scores is None:
            return -np.logaddexp(0.0, -reward)
        noise = self.scales["noise"][..., None] if self.noise is None else self.noise
        result: FloatArray = -0.5 * np.square((self.scores - reward) / noise) - np.log(noise) - 0.5 * np.log(2 * np.pi)
        return result

    def reward(self, alpha: float, **options: Any) -> EnsembleReward:
        """Return the uncertain reward as a likelihood, `bk.EnsembleReward(self, alpha=alpha, **options)`."""
        return EnsembleReward(self, alpha=alpha, **options)

    def to_arviz(self) -> Any:
        """Return the object that the installed ArviZ summarises.

        It holds the log-likelihood, so that `az.loo` compares models of one data set.
        """
        from bayes_klrl.reward_models.datatree import reward_posterior_to_arviz

        return reward_posterior_to_arviz(
            self.draws, self.scales, self.sample_stats, self.log_likelihood(), self.design, self.scores
        )

    def __repr__(self) -> str:
        what = "preferences" if self.from_preferences else "scores"
        chains, draws, features = self.draws.shape
        return f"RewardPosterior({len(self.design)} {what}, {features} features, {chains} chains x {draws} draws)"

    def __str__(self) -> str:
        return f"{self!r}\n{self.diagnostics}"


def observed(data: Preferences | Scores, z: FloatArray) -> tuple[FloatArray, FloatArray | None]:
    """Return the design (n, J), and the centred scores (n,) or None, from the standardised features of a data set's batch."""
    if isinstance(data, Preferences):
        return np.subtract(*np.split(z, 2)), None
    return z, data.scores - data.scores.mean()
