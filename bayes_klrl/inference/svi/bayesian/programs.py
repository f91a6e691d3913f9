"""The Pyro programs of a Bayesian policy, their ELBO, and the predictive. Experimental.

Every policy needs its own forward pass, so each execution draws phi once and N completions of that policy in a plate, whose
terms are scaled by n / N. With phi = mu + sigma eps and log w = log p0 + r / alpha - log p_phi, the gradient of
n E[ELBO(p_phi)] - KL(q(phi) || p(phi)) is estimated by

    n / N sum_n (log w_n - mean of the others) grad_phi log p_phi(x_n),   pulled back through phi(mu, sigma),

and the KL of two Gaussians, which is differentiated exactly. (A pathwise term d log p_phi(x) / d phi at fixed x has mean 0.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pyro
import torch
from numpy.typing import ArrayLike
from pyro import poutine
from pyro.distributions import Normal
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from torch import Tensor, nn
from torch.distributions import kl_divergence

from bayes_klrl.inference.svi.estimators import leave_one_out
from bayes_klrl.inference.svi.pyro_backend.sites import check_bounded
from bayes_klrl.models.mixture import MixtureLM
from bayes_klrl.models.programs.pyro_program import SequenceDistribution, on_model_device, pyro_model, to_sequences
from bayes_klrl.models.programs.turns import PYRO_TURN, in_turn
from bayes_klrl.models.torch_lm.offsets import OffsetFamily
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import generator

__all__ = ["MeanField", "PolicyELBO", "PolicyPlan", "policy_programs", "predictive"]

_PREDICTIVE_STREAM = 1


class PolicyPlan(Protocol):
    """The numbers that the programs and their training need; `BayesianSVI` has and documents them."""

    @property
    def num_steps(self) -> int:
        """Number of gradient steps."""

    @property
    def num_particles(self) -> int:
        """Number of completions per prompt, policy and step."""

    @property
    def num_policies(self) -> int:
        """Number of policies per step."""

    @property
    def parameters(self) -> Any:
        """The parameters that are uncertain."""

    @property
    def prior_scale(self) -> float:
        """Standard deviation of every offset under the prior."""

    @property
    def evidence_weight(self) -> float | None:
        """Weight of the evidence against the KL of phi; None: the number of parameters."""

    @property
    def initial_scale(self) -> float | None:
        """Sigma at the start; None: a tenth of `prior_scale`."""

    @property
    def learning_rate(self) -> float | None:
        """Adam's peak rate on mu; None: the default for the kind of parameters."""

    @property
    def max_step_kl(self) -> float:
        """The most nats that a step may move a policy."""

    @property
    def num_predictive(self) -> int:
        """Number of policies that the predictive mixes."""


class MeanField(nn.Module):
    """q(phi) = Normal(mu, sigma^2), independent over D numbers."""

    def __init__(self, mu: Tensor, sigma: Tensor) -> None:
        super().__init__()
        self.mu, self.log_sigma = nn.Parameter(mu.clone()), nn.Parameter(sigma.log())

    @classmethod
    def of(cls, mu: ArrayLike, sigma: ArrayLike, device: torch.device) -> MeanField:
        """Return the Gaussian of these means and standard deviations, shape (D,), float64."""
        return cls(*(torch.tensor(np.array(value), dtype=torch.float64, device=device) for value in (mu, sigma)))

    def distribution(self) -> Any:
        """Return q(phi)."""
        return Normal(self.mu, self.log_sigma.exp()).to_event(1)


def policy_programs(
    plan: PolicyPlan, posterior: Posterior, family: OffsetFamily, mean_field: MeanField
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return model and guide: sites "phi" (D,) and "x" (N, P, T), the latter's terms scaled by evidence_weight / N.

    They are ordinary Pyro programs: `PolicyELBO` is made for them, and `TraceGraph_ELBO` works on them, too.
    """
    conditioned = pyro_model(posterior)
    zeros = torch.zeros_like(mean_field.mu, requires_grad=False)

    def evidence() -> Any:
        return poutine.scale(scale=(plan.evidence_weight or family.size) / plan.num_particles)

    def completions() -> Any:
        return pyro.plate("completions", plan.num_particles, dim=-2)

    def model() -> None:
        pyro.sample("phi", Normal(zeros, plan.prior_scale).to_event(1))
        with evidence(), completions():
            conditioned()

    def guide() -> None:
        pyro.module("policies", mean_field)
        phi = pyro.sample("phi", mean_field.distribution())
        policy = family.at(phi)
        with evidence(), on_model_device(policy), completions(), pyro.plate("prompts", posterior.num_prompts, dim=-1):
            pyro.sample("x", SequenceDistribution(policy, posterior.prompt_ids, posterior.max_new_tokens))

    return model, guide


class PolicyELBO(ELBO):
    """The ELBO of `policy_programs`, each policy with a leave-one-out baseline over its own completions.

    Parameters
    ----------
    num_policies
        Policies per step: the programs are run once for each.

    Attributes
    ----------
    log_weights, log_likelihood
        Values of the newest step in nats, shape (policies, N, P), not scaled.
    policy_kl
        KL(q(phi) || p(phi)), in nats.
    """

    log_weights: Tensor
    log_likelihood: Tensor
    policy_kl: float
    model_tokens: int

    def __init__(self, num_policies: int = 4) -> None:
        super().__init__(num_particles=num_policies, max_plate_nesting=2, vectorize_particles=False)
        self._traces: list[tuple[Any, Tensor]] = []

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the traces of one policy: the model replayed on the guide's draws."""
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        return model_trace, guide_trace

    @in_turn(PYRO_TURN)
    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return a scalar whose value is -ELBO and whose gradient is the module's estimator."""
        losses, weights, likelihoods, self._traces, self.model_tokens = [], [], [], [], 0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            x, prior, phi = guide_trace.nodes["x"], model_trace.nodes["x"], guide_trace.nodes["phi"]
            factor = model_trace.nodes["likelihood"]
            log_lik = factor["fn"].log_prob(factor["value"])
            check_bounded("likelihood", log_lik, x)
            log_q = x["fn"].log_prob(x["value"])
            log_w = prior["fn"].log_prob(x["value"]) + log_lik - log_q.detach()
            policy_kl = kl_divergence(phi["fn"], model_trace.nodes["phi"]["fn"])
            surrogate = prior["scale"] * (leave_one_out(log_w) * log_q).sum() - policy_kl
            value = prior["scale"] * log_w.sum() - policy_kl
            losses.append(surrogate.detach() - surrogate - value.detach())
            weights.append(log_w)
            likelihoods.append(log_lik)
            self._traces.append((guide_trace, log_q.detach()))
            self.model_tokens += tokens_of(x)
            self.policy_kl = float(policy_kl.detach())
        self.log_weights, self.log_likelihood = torch.stack(weights), torch.stack(likelihoods)
        return torch.stack(losses).mean()

    def guide_change(self, family: OffsetFamily, mean_field: MeanField, noise: list[Tensor]) -> float:
        """Return the KL in nats by which policies have moved since the newest step's draws, each at the same noise eps."""
        changes = []
        with torch.no_grad():
            for (trace, log_q), eps in zip(self._traces, noise, strict=True):
                site = trace.nodes["x"]
                moved = family.at(mean_field.mu + mean_field.log_sigma.exp() * eps)
                now = SequenceDistribution(moved, site["fn"].prompt_ids, site["fn"].event_shape[0]).log_prob(
                    site["value"]
                )
                changes.append((now - log_q).square().mean() / 2)
        return float(torch.stack(changes).mean())

    def noise(self, mean_field: MeanField) -> list[Tensor]:
        """Return the noise eps of the newest step's policies; call it before the parameters move."""
        with torch.no_grad():
            return [
                (trace.nodes["phi"]["value"] - mean_field.mu) / mean_field.log_sigma.exp() for trace, _ in self._traces
            ]

    @in_turn(PYRO_TURN)
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return -ELBO."""
        with torch.no_grad():
            return float(torch_item(self.differentiable_loss(model, guide, *args, **kwargs)))

    @in_turn(PYRO_TURN)
    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return -ELBO and add its gradient to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(torch_item(loss))


def tokens_of(x: Any) -> int:
    """Return the tokens of one policy: every completion is drawn once and scored twice, with its prompt each time."""
    lengths = to_sequences(x["value"], x["fn"].lm).lengths
    return 3 * (int(lengths.sum()) + sum(len(ids) for ids in x["fn"].prompt_ids))


def predictive(family: OffsetFamily, mu: np.ndarray, sigma: np.ndarray, num_policies: int, seed: int) -> MixtureLM:
    """Return the mixture of policies drawn from the Gaussian."""
    noise = generator(seed, _PREDICTIVE_STREAM).standard_normal((num_policies, mu.size))
    offsets = torch.as_tensor(mu + sigma * noise, device=family.device)
    return MixtureLM([family.policy(phi) for phi in offsets])
