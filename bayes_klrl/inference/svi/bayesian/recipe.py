"""SVI over the parameters of a policy and not only over completions: a tuned policy with epistemic uncertainty.

Experimental: names, defaults and results may change in any version.

    phi ~ Normal(0, prior_scale^2),  x ~ p0,  factor exp(r(x) / alpha)        the model; phi does not touch x
    phi ~ q(phi) = Normal(mu, sigma^2),  x ~ p_phi                            the guide; p_0 is the prior

    ELBO = E_q(phi)[ELBO(p_phi)] - KL(q(phi) || p(phi))
        <= E_q(phi)[ELBO(p_phi)] = ELBO(q-bar) - I(phi; x)
        <= ELBO(q-bar)           = log Z - KL(q-bar || p*)
        <= log Z,                               q-bar(x) = E_q(phi) p_phi(x) the predictive,

where I, the mutual information of phi and x under the guide, is what the policies disagree about. With several prompts all
but the KL of phi are sums over them.

Over all q(phi), n E[ELBO(p_phi)] - KL is largest at q(phi) ~ p(phi) exp(-n KL(p_phi || p*)): the generalised posterior of
phi whose loss is the distance to the posterior over completions, tempered by n (Bissiri, Holmes and Walker 2016). n = 1
gives the bound above. But the evidence is only log Z nats, too few to move thousands of parameters: q(phi) stays near p(phi),
and the policy untuned. By default n is the number of parameters, one nat of evidence for each; for larger n sigma
shrinks as 1 / sqrt(n), and the policies disagree less. The inequalities hold for every n that the Gaussian was trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bayes_klrl.checks import check_count, check_positive, check_posterior_given
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.inference.svi.bayesian.uncertainty import PolicyUncertainty, policy_uncertainty
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.models.mixture import MixtureLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import generator
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = ["PARAMETERS", "BayesianFit", "BayesianSVI"]

PARAMETERS = ("lora", "bias", "all")
_FILE = "bayesian_fit.json"


@dataclass(frozen=True)
class BayesianSVI:
    """Experimental: train a Gaussian over a policy's parameters on the ELBO; the module has the formulas.

    Names, defaults and results may change in any version.

    Parameters
    ----------
    num_steps
        Number of gradient steps.
    num_particles
        Completions per prompt that each step draws from each policy, at least 2: every policy has its own leave-one-out
        baseline.
    num_policies
        Policies that each step draws from the Gaussian.
    parameters
        The uncertain parameters: "lora" or a `peft` configuration for adapters over the frozen prior, "bias" for every bias,
        "all" for all of them (for an `NgramLM` the logits).
    prior_scale
        Standard deviation under the prior of every parameter's offset from its pretrained value. A parameter that does not
        matter keeps it.
    evidence_weight
        n, the weight of the evidence relative to the Gaussian's own KL. 1: a lower bound of log Z is maximised; None: the
        number of parameters.
    initial_scale
        sigma at the start of the training; None: a tenth of `prior_scale`.
    learning_rate
        Adam's peak rate for mu: 5 % warm-up, then linear decay to 0. None: the default of `SVI`. For log sigma it is the
        larger of this and 0.05.
    max_step_kl
        The most nats that a step may move a policy, as for `SVI`.
    num_predictive
        Policies that are drawn after the training and mixed into the predictive.
    num_draws
        Completions per prompt that `run` draws.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> fit = bk.BayesianSVI(50, parameters="all", prior_scale=1.0, evidence_weight=20.0).fit(posterior, seed=0)
    >>> fit.guide, fit.mu.shape, bool(fit.uncertainty(200, seed=0).mutual_information[0] > 0.01)
    (MixtureLM(16 x NgramLM), (2,), True)
    """

    num_steps: int
    num_particles: int = 32
    num_policies: int = 4
    parameters: Any = "lora"
    prior_scale: float = 0.1
    evidence_weight: float | None = None
    initial_scale: float | None = None
    learning_rate: float | None = None
    max_step_kl: float = 0.03
    num_predictive: int = 16
    num_draws: int = 1000

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps)
        check_count("num_particles", self.num_particles, least=2)
        check_count("num_policies", self.num_policies)
        check_count("num_predictive", self.num_predictive)
        check_count("num_draws", self.num_draws)
        check_positive("prior_scale", self.prior_scale)
        for name in ("evidence_weight", "initial_scale", "learning_rate"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.max_step_kl != np.inf:
            check_positive("max_step_kl", self.max_step_kl)
        if isinstance(self.parameters, str) and self.parameters not in PARAMETERS:
            raise BayesKLRLError(
                f"Unknown parameters {self.parameters!r}; choose one of {list(PARAMETERS)}, or give a peft configuration."
            )

    def fit(self, posterior: Posterior, *, seed: int, progress: bool = False) -> BayesianFit:
        """Return the Gaussian over policies and its predictive. Ctrl-C ends training early and keeps what was learned.

        Raises
        ------
        UnboundedLossError
            If a draw has likelihood 0; see `SVI.fit`.
        """
        check_posterior_given(posterior)
        from bayes_klrl.inference.svi.bayesian.training import fit_policies

        made = partial(BayesianFit, recipe=self)
        return fit_policies(self, posterior, made, seed=seed, progress=progress)

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """Return draws from the predictive, with `Draws.guide` set; see `Fit.run`."""
        return self.fit(posterior, seed=seed, progress=progress).run(self.num_draws, seed, progress=progress)

    def trains_like(self, other: object) -> bool:
        """Return whether another recipe would train the same guide under one seed: all but `num_draws` is equal."""
        return isinstance(other, BayesianSVI) and replace(self, num_draws=other.num_draws) == other


@dataclass(frozen=True, eq=False, kw_only=True)
class BayesianFit(Fit):
    """Experimental: a Gaussian over policies, as `BayesianSVI` trains it. Names and results may change in any version.

    Its `guide` is the predictive, a `MixtureLM` of `num_predictive` drawn policies; the rest is as in `Fit`.

    Parameters
    ----------
    history
        The arrays of `Fit`, here means over prompts and policies, and "policy_kl", KL(q(phi) || p(phi)) of all parameters
        together, in nats.
    mu, sigma
        Mean and standard deviation of every parameter's offset from its pretrained value, shape (D,).
    recipe, seed
        The recipe and the seed of the training; the seed also determines which policies the predictive mixes.
    family
        Function from an offset to its policy, a `bayes_klrl.models.torch_lm.offsets.OffsetFamily`.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> fit = bk.BayesianSVI(20, parameters="all", prior_scale=1.0, num_predictive=4).fit(posterior, seed=0)
    >>> len(fit.policies), fit.run(100, seed=1).shape, fit.policy(seed=2).vocab_size
    (4, (1, 100), 2)
    """

    mu: FloatArray = field(repr=False)
    sigma: FloatArray = field(repr=False)
    recipe: BayesianSVI
    seed: int
    family: Any = field(repr=False)

    method: ClassVar[str] = "BayesianSVI"

    @property
    def policies(self) -> tuple[LanguageModel, ...]:
        """The drawn policies that the predictive mixes."""
        assert isinstance(self.guide, MixtureLM)
        return self.guide.models

    @property
    def policy_kl(self) -> float:
        """KL(q(phi) || p(phi)) = sum_d log(s / sigma_d) + (sigma_d^2 + mu_d^2) / (2 s^2) - 1/2, in nats."""
        s = self.recipe.prior_scale
        return float((np.log(s / self.sigma) + (self.sigma**2 + self.mu**2) / (2 * s**2) - 0.5).sum())

    @property
    def evidence_weight(self) -> float:
        """n: the recipe's evidence weight, or the number of parameters if it has none."""
        return float(self.recipe.evidence_weight or self.mu.size)

    def policy(self, seed: int | None = None) -> LanguageModel:
        """Return a policy drawn from the Gaussian, as a `TorchLM` (or `NgramLM`); without a seed, the policy at mu."""
        noise = np.zeros_like(self.mu) if seed is None else generator(seed).standard_normal(self.mu.size)
        return self.policy_at(self.mu + self.sigma * noise)

    def policy_at(self, phi: FloatArray) -> LanguageModel:
        """Return the policy at an offset phi, shape (D,)."""
        import torch

        policy: LanguageModel = self.family.policy(torch.as_tensor(phi, device=self.family.device))
        return policy

    def uncertainty(self, num_draws: int = 1000, *, seed: int, progress: bool = False) -> PolicyUncertainty:
        """Return the disagreement of the predictive's policies, estimated from `num_draws` completions of each."""
        return policy_uncertainty(self.posterior, self.policies, num_draws, seed=seed, progress=progress)

    def programs(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """Return model and guide as Pyro programs, sites "phi" (D,) and "x" (num_particles, P, T), trained further by any SVI.

        Their loss is `bayesian.programs.PolicyELBO`; `TraceGraph_ELBO` and `Predictive` work too.
        """
        from bayes_klrl.inference.svi.bayesian.programs import MeanField, policy_programs

        mean_field = MeanField.of(self.mu, self.sigma, self.family.device)
        return policy_programs(self.recipe, self.posterior, self.family, mean_field)

    def save(self, folder: str | Path, *, merged: bool = True, certificate: Any | None = None) -> Path:
        """Write mu, sigma, the parameters that they are offsets from, the recipe and the history; return the folder.

        The model card is that of `Fit.save`. `fit.policy(seed).save_pretrained(folder)` writes one policy in Hugging Face's
        format.

        Raises
        ------
        OutputError
            If it cannot be written.
        BayesKLRLError
            If the certificate is none, or is of another posterior or policy.
        """
        return super().save(folder, merged=merged, certificate=certificate)

    def _save_guide(self, folder: str | Path, merged: bool) -> None:
        from bayes_klrl.inference.svi.bayesian.files import save_fit

        save_fit(self, Path(folder) / _FILE)

    def _how_to_load(self) -> str:
        return "BayesianFit.load(folder, posterior)"

    @staticmethod
    def is_saved_in(folder: str | Path) -> bool:
        """Return whether `save` wrote this folder."""
        return (Path(folder) / _FILE).is_file()

    @classmethod
    def load(cls, folder: str | Path, posterior: Posterior) -> BayesianFit:
        """Return the fit that `save` wrote, for the posterior that it was fitted to; the predictive's policies are the same.

        Raises
        ------
        CheckpointError
            If the folder holds no such fit, or one of another prior.
        """
        from bayes_klrl.inference.svi.bayesian.files import read_fit

        recipe, fitted = read_fit(Path(folder) / _FILE, posterior)
        try:
            return cls(recipe=BayesianSVI(**recipe), **fitted)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder} does not hold a readable BayesianFit: {error}") from error
