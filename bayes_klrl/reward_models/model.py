"""A Bayesian reward model: features, a prior on their weights, and NUTS for the posterior."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from bayes_klrl.checks import check_count, check_positive
from bayes_klrl.errors import BayesKLRLError, ConvergenceError, needs_jax
from bayes_klrl.inference.mcmc.diagnostics import ess_bulk, ess_tail, r_hat
from bayes_klrl.posterior import check_language_model
from bayes_klrl.randomness import generator
from bayes_klrl.reward_models.features import FeatureMap, as_features
from bayes_klrl.reward_models.posterior import ChainDiagnostics, RewardPosterior, observed
from bayes_klrl.reward_models.preferences import Preferences, Scores
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = ["RewardModel"]

_SAME = 1e-12


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A reward that is linear in features of completions, and whose weights NUTS infers from preferences or scores.

        theta ~ Normal(0, prior_scale^2),   P(x_w > x_l) = sigmoid(theta . (z(x_w) - z(x_l)))

    Parameters
    ----------
    features
        A function with the signature of a `Reward`'s that returns J numbers per completion; `TokenFeatures(fn)`; or
        `HiddenStates(lm)`. Features are standardised by the training set.
    prior_scale
        Prior standard deviation of the weights, in units of reward per standard deviation of a feature. None: it is inferred,
        with the prior HalfNormal(1).
    num_components
        Number of principal components of the training set's features that replace the features, for instance of hidden
        states, which have many dimensions. None: the features themselves.
    num_chains, num_draws, num_warmup, target_accept
        Options of NUTS: number of chains, draws and warm-up steps per chain, and the acceptance probability to adapt to.
    drop_ties
        Whether pairs whose two completions have the same features are left out; otherwise they are refused.

    Examples
    --------
    >>> model = RewardModel(lambda completions: [[len(c), c.count("!")] for c in completions])
    >>> model.prior_scale, model.num_chains
    (1.0, 4)

    `fit` infers the weights; `RewardPosterior` has an example of it.
    """

    features: Any
    prior_scale: float | None = 1.0
    num_components: int | None = None
    num_chains: int = 4
    num_draws: int = 1000
    num_warmup: int = 1000
    target_accept: float = 0.8
    drop_ties: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", as_features(self.features))
        if self.prior_scale is not None:
            check_positive("prior_scale", self.prior_scale)
        if self.num_components is not None:
            check_count("num_components", self.num_components)
        for name in ("num_chains", "num_draws", "num_warmup"):
            check_count(name, getattr(self, name))
        check_positive("target_accept", self.target_accept)
        if self.target_accept >= 1:
            raise BayesKLRLError(f"target_accept is a probability below 1; got {self.target_accept!r}.")

    def fit(
        self, prior: LanguageModel, data: Preferences | Scores, *, seed: int, accept_unconverged: bool = False
    ) -> RewardPosterior:
        """Return the posterior of the weights.

        Parameters
        ----------
        prior
            The language model whose completions the data are about: it encodes texts and computes hidden states.
        data
            The preferences or scores to learn from.
        seed
            Seed for all random numbers of the chains.
        accept_unconverged
            Whether to return draws that have not converged (R-hat above 1.01, bulk or tail ESS below 400, or more than a
            thousandth of the transitions divergent) instead of raising; their `diagnostics.problems` say what is wrong.

        Raises
        ------
        BayesKLRLError
            If the data or their features cannot be used; this is checked before anything is sampled.
        ConvergenceError
            If the chains have not converged; its `result` holds the draws.
        ImportError
            If NumPyro is not installed.
        """
        start = time.perf_counter()
        check_language_model("The prior", prior)
        if not isinstance(data, Preferences | Scores):
            raise BayesKLRLError(f"data is a bk.Preferences or bk.Scores; got {type(data).__name__}.")
        if isinstance(data, Preferences):
            data.check_winners()
        run_nuts = _nuts()
        chain_seed = int(generator(seed).integers(2**31))
        function = self.features.of(prior)
        function.check(prior, frozenset(data.columns))
        raw = function(data.batch(prior))
        features = FeatureMap.fitted(function, raw, self.num_components)
        design, scores = observed(data, features.standardised(raw))
        if scores is None:
            design = self._without_ties(design)
        arguments = _arguments(design, scores, getattr(data, "noise", None), self.prior_scale)
        options = {name: getattr(self, name) for name in ("num_chains", "num_warmup", "num_draws", "target_accept")}
        sites, statistics = run_nuts(arguments, seed=chain_seed, **options)
        scales = {name: sites[name] for name in ("prior_scale", "noise") if name in sites}
        result = RewardPosterior(
            draws=sites["theta"],
            scales=scales,
            diagnostics=diagnosed(sites["theta"], scales, int(statistics["diverging"].sum())),
            sample_stats=statistics,
            features=features,
            prior=prior,
            design=design,
            scores=scores,
            noise=getattr(data, "noise", None),
            seconds=time.perf_counter() - start,
        )
        if result.diagnostics.problems and not accept_unconverged:
            raise ConvergenceError(
                f"NUTS has not converged: {'; '.join(result.diagnostics.problems)}. Raise num_warmup and num_draws "
                "(target_accept too for divergences), run at least 2 chains, or accept_unconverged=True. This error's "
                "`result` holds the draws.",
                result,
            )
        return result

    def _without_ties(self, design: FloatArray) -> FloatArray:
        """Return the feature differences of the pairs whose two completions have different features."""
        tied = np.abs(design).max(axis=1) <= _SAME
        if not tied.any():
            return design
        if not self.drop_ties:
            raise BayesKLRLError(
                f"Pair {int(tied.argmax())} is a tie: its two completions have identical features, so it is no information "
                f"({int(tied.sum())} of {len(design)} pairs are). Remove them (drop_ties=True), or add features that tell "
                "them apart."
            )
        if tied.all():
            raise BayesKLRLError(
                "All pairs are ties: no feature tells any two completions apart. Add features that do."
            )
        kept: FloatArray = design[~tied]
        return kept


def diagnosed(theta: FloatArray, scales: dict[str, FloatArray], num_divergent: int) -> ChainDiagnostics:
    """Return the convergence diagnostics of theta (C, S, J) and of the scales (C, S)."""
    names = (*(f"theta[{j}]" for j in range(theta.shape[2])), *scales)
    values = np.stack([*np.moveaxis(theta, 2, 0), *scales.values()])
    bulk, sd = ess_bulk(values), values.std(axis=(1, 2))
    return ChainDiagnostics(
        names=names,
        mean=values.mean(axis=(1, 2)),
        sd=sd,
        mcse=sd / np.sqrt(bulk),
        r_hat=r_hat(values),
        ess_bulk=bulk,
        ess_tail=ess_tail(values),
        num_divergent=num_divergent,
        num_draws=int(theta.shape[0] * theta.shape[1]),
    )


def _arguments(
    design: FloatArray, scores: FloatArray | None, noise: FloatArray | None, prior_scale: float | None
) -> dict[str, FloatArray | float]:
    """Return the arguments of the NumPyro program, without those that are None."""
    noise_scale = float(scores.std()) if scores is not None and noise is None else None
    given = {
        "design": design,
        "scores": scores,
        "noise": noise,
        "noise_scale": noise_scale,
        "prior_scale": prior_scale,
    }
    return {name: value for name, value in given.items() if value is not None}


def _nuts() -> Any:
    """Return the sampler; the error of a missing package names the extra to install."""
    with needs_jax("bk.RewardModel"):
        from bayes_klrl.reward_models.numpyro_program import run_nuts
    return run_nuts
