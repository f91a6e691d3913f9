"""A tuned policy with epistemic uncertainty: SVI over the policy's parameters, not only over completions.

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
gives the bound above; but a reward has only log Z nats to give, and thousands of parameters cannot pay for much with them:
q(phi) stays near p(phi) and the policy untuned. By default n is the number of parameters, a nat of evidence for each; from
there on sigma shrinks as 1 / sqrt(n), and with it what the policies disagree about. The inequalities hold whatever n the
Gaussian was trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bayes_klrl.checks import check_count, check_positive
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
    """Train a Gaussian over a policy's parameters on the ELBO; see the module's formulas. Experimental.

    Parameters
    ----------
    num_steps
        Gradient steps.
    num_particles
        N completions a prompt, policy and step, at least 2: each policy has a leave-one-out baseline of its own.
    num_policies
        Policies a step, drawn from the Gaussian.
    parameters
        What is uncertain: "lora" or a `peft` configuration, adapters over the frozen prior; "bias", every bias; "all", for an
        `NgramLM` the logits.
    prior_scale
        Standard deviation of every parameter's offset from the prior's own value, before anything is seen. A policy whose
        parameters do not matter keeps it.
    evidence_weight
        n, by which the evidence counts against the Gaussian's own KL. 1: a lower bound of log Z is maximised; None: the number
        of parameters.
    initial_scale
        sigma at the start; None: a tenth of `prior_scale`.
    learning_rate
        Of Adam on mu, at its highest; None: as `SVI` has it. On log sigma it is 0.05 or that, whichever is more.
    max_step_kl
        As for `SVI`: nats that a policy may move in a step.
    num_predictive
        Policies that are drawn when training is over, and mixed into the predictive.
    num_draws
        N of `run`.

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
            If a draw has likelihood 0, as for `SVI.fit`.
        """
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
    """A Gaussian over policies, as `BayesianSVI` trains it. Experimental.

    Its `guide` is the predictive, a `MixtureLM` of `num_predictive` drawn policies; the rest is as in `Fit`.

    Parameters
    ----------
    history
        As in `Fit`, means over prompts and policies; and "policy_kl", KL(q(phi) || p(phi)) of all parameters together.
    mu, sigma
        Of every parameter's offset from the prior's own value, shape (D,).
    recipe, seed
        What was asked for; the seed also says which policies the predictive mixes.
    family
        The policies at an offset, a `bayes_klrl.models.torch_lm.offsets.OffsetFamily`.
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
        """n, as it was asked for, else the number of parameters."""
        return float(self.recipe.evidence_weight or self.mu.size)

    def policy(self, seed: int | None = None) -> LanguageModel:
        """Return a policy drawn from the Gaussian, as a `TorchLM` (or `NgramLM`) of its own; without a seed, that at mu."""
        noise = np.zeros_like(self.mu) if seed is None else generator(seed).standard_normal(self.mu.size)
        return self.policy_at(self.mu + self.sigma * noise)

    def policy_at(self, phi: FloatArray) -> LanguageModel:
        """Return the policy at an offset phi, shape (D,)."""
        import torch

        policy: LanguageModel = self.family.policy(torch.as_tensor(phi, device=self.family.device))
        return policy

    def uncertainty(self, num_draws: int = 1000, *, seed: int, progress: bool = False) -> PolicyUncertainty:
        """Return what the predictive's policies disagree about, from `num_draws` completions of each."""
        return policy_uncertainty(self.posterior, self.policies, num_draws, seed=seed, progress=progress)

    def programs(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """Return model and guide as Pyro programs, sites "phi" (D,) and "x" (num_particles, P, T), trained further by any SVI.

        Their loss is `bayesian.programs.PolicyELBO`; `TraceGraph_ELBO` and `Predictive` work too.
        """
        from bayes_klrl.inference.svi.bayesian.programs import MeanField, policy_programs

        mean_field = MeanField.of(self.mu, self.sigma, self.family.device)
        return policy_programs(self.recipe, self.posterior, self.family, mean_field)

    def save(self, folder: str | Path) -> Path:
        """Write mu, sigma, where they are offsets from, the recipe and the history; return the folder.

        For one policy in Hugging Face's format there is `fit.policy(seed).save_pretrained(folder)`.
        """
        from bayes_klrl.inference.svi.bayesian.files import save_fit

        save_fit(self, Path(folder) / _FILE)
        return Path(folder)

    @staticmethod
    def is_saved_in(folder: str | Path) -> bool:
        """Return whether `save` wrote this folder."""
        return (Path(folder) / _FILE).is_file()

    @classmethod
    def load(cls, folder: str | Path, posterior: Posterior) -> BayesianFit:
        """Return what `save` wrote, for the posterior that it was fitted to; the predictive's policies are the same.

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
