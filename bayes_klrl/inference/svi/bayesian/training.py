"""The Pyro programs of a Bayesian policy, their ELBO, and the training loop of `BayesianSVI`.

A policy needs a forward pass of its own, so phi is drawn once an execution and N completions of it stand in a plate; their
terms are scaled by n / N. With phi = mu + sigma eps and log w = log p0 + r / alpha - log p_phi, the gradient of
n E[ELBO(p_phi)] - KL(q(phi) || p(phi)) is estimated by

    n / N sum_n (log w_n - mean of the others) grad_phi log p_phi(x_n),   pulled back through phi(mu, sigma),

and the KL of two Gaussians, which is differentiated exactly. (A pathwise term d log p_phi(x) / d phi at fixed x has mean 0.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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

from bayes_klrl.draws import Cost
from bayes_klrl.inference.svi.bayesian.recipe import BayesianFit, BayesianSVI
from bayes_klrl.inference.svi.loop import learning_rate_schedule, run_training
from bayes_klrl.inference.svi.pyro_backend.elbo import leave_one_out
from bayes_klrl.inference.svi.pyro_backend.sites import check_bounded
from bayes_klrl.inference.svi.pyro_backend.trust_region import TrustRegion
from bayes_klrl.models.mixture import MixtureLM
from bayes_klrl.models.programs.pyro_program import SequenceDistribution, on_model_device, pyro_model, to_sequences
from bayes_klrl.models.torch_lm.offsets import OffsetFamily, offset_family
from bayes_klrl.models.torch_lm.table import TableLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import check_seed, generator
from bayes_klrl.typing import FloatArray

__all__ = ["MeanField", "PolicyELBO", "fit_policies", "policy_programs", "predictive"]

_SCALE_RATE = 0.05
_PREDICTIVE_STREAM = 1


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
    svi: BayesianSVI, posterior: Posterior, family: OffsetFamily, mean_field: MeanField
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return model and guide: sites "phi" (D,) and "x" (N, P, T), the latter's terms scaled by evidence_weight / N.

    They are Pyro programs like any other: `PolicyELBO` is made for them, `TraceGraph_ELBO` works on them.
    """
    conditioned = pyro_model(posterior)
    zeros = torch.zeros_like(mean_field.mu, requires_grad=False)

    def evidence() -> Any:
        return poutine.scale(scale=(svi.evidence_weight or family.size) / svi.num_particles)

    def completions() -> Any:
        return pyro.plate("completions", svi.num_particles, dim=-2)

    def model() -> None:
        pyro.sample("phi", Normal(zeros, svi.prior_scale).to_event(1))
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
        How often the programs are run in a step.

    Attributes
    ----------
    log_weights, log_likelihood
        Of the newest step, (policies, N, P), not scaled.
    policy_kl
        KL(q(phi) || p(phi)).
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
        """Return how far policies have moved since the newest step's draws, in nats, each at the same noise eps."""
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
        """Return the eps of the newest step's policies; to be asked before the parameters move."""
        with torch.no_grad():
            return [
                (trace.nodes["phi"]["value"] - mean_field.mu) / mean_field.log_sigma.exp() for trace, _ in self._traces
            ]

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return -ELBO."""
        with torch.no_grad():
            return float(torch_item(self.differentiable_loss(model, guide, *args, **kwargs)))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return -ELBO and add its gradient to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(torch_item(loss))


def tokens_of(x: Any) -> int:
    """Return the tokens of one policy: every completion is drawn once and scored twice, with its prompt each time."""
    lengths = to_sequences(x["value"], x["fn"].lm).lengths
    return 3 * (int(lengths.sum()) + sum(len(ids) for ids in x["fn"].prompt_ids))


def fit_policies(svi: BayesianSVI, posterior: Posterior, *, seed: int, progress: bool) -> BayesianFit:
    """Return the Gaussian after `svi.num_steps` steps; see `BayesianSVI.fit`."""
    start = time.perf_counter()
    seed = check_seed(seed)
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), on_model_device(posterior.prior):
        torch.manual_seed(seed)
        family = offset_family(posterior.prior, svi.parameters)
        start_scale = svi.initial_scale or svi.prior_scale / 10
        mean_field = MeanField.of(np.zeros(family.size), np.full(family.size, start_scale), family.device)

        def fit_so_far(history: Mapping[str, FloatArray], cost: Cost, interrupted: bool) -> BayesianFit:
            mu, sigma = (value.detach().cpu().numpy().copy() for value in (mean_field.mu, mean_field.log_sigma.exp()))
            return BayesianFit(
                guide=predictive(family, mu, sigma, svi.num_predictive, seed),
                history=history,
                posterior=posterior,
                training=cost,
                interrupted=interrupted,
                mu=mu,
                sigma=sigma,
                recipe=svi,
                seed=seed,
                family=family,
            )

        def status(step: Mapping[str, float]) -> str:
            return f"E[ELBO] {step['elbo']:.3f} nats, KL of the policy's parameters {step['policy_kl']:.1f}"

        steps = training_steps(svi, posterior, family, mean_field)
        return run_training("BayesianSVI", svi.num_steps, steps, fit_so_far, status, start=start, progress=progress)


def training_steps(
    svi: BayesianSVI, posterior: Posterior, family: OffsetFamily, mean_field: MeanField
) -> Iterator[dict[str, float]]:
    """Train the Gaussian in place, one gradient step an item; each item says what the step saw, in nats."""
    model, guide = policy_programs(svi, posterior, family, mean_field)
    elbo = PolicyELBO(svi.num_policies)
    parameters = [mean_field.mu, mean_field.log_sigma]
    rate = svi.learning_rate or default_learning_rate(svi, family)
    optimiser = torch.optim.Adam([{"params": [mean_field.mu]}, {"params": [mean_field.log_sigma]}], lr=rate)
    optimiser.param_groups[1]["lr"] = max(rate, _SCALE_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, learning_rate_schedule(svi.num_steps))
    noise: list[Tensor] = []
    trust_region = TrustRegion(parameters, svi.max_step_kl, lambda: elbo.guide_change(family, mean_field, noise))
    for _ in range(svi.num_steps):
        optimiser.zero_grad(set_to_none=True)
        elbo.loss_and_grads(model, guide)
        noise[:] = elbo.noise(mean_field)
        learning_rate = float(schedule.get_last_lr()[0])
        trust_region.step(optimiser)
        schedule.step()
        gradient = torch.cat([parameter.grad for parameter in parameters if parameter.grad is not None])
        yield {
            "elbo": float(elbo.log_weights.mean()),
            "reward": float(elbo.log_likelihood.mean()) * posterior.alpha,
            "kl": float((elbo.log_likelihood - elbo.log_weights).mean()),
            "policy_kl": elbo.policy_kl,
            "log_weight_sd": float(elbo.log_weights.std(dim=1).mean()),
            "gradient_norm": float(gradient.norm()),
            "learning_rate": learning_rate,
            "step_kl": trust_region.limit.last_kl,
            "tokens": elbo.model_tokens,
        }


def default_learning_rate(svi: BayesianSVI, family: OffsetFamily) -> float:
    """Return what suits the kind of parameters, as for `SVI`."""
    if isinstance(family.lm, TableLM):
        return 0.1
    return 2e-3 if svi.parameters == "all" else 5e-3


def predictive(family: OffsetFamily, mu: np.ndarray, sigma: np.ndarray, num_policies: int, seed: int) -> MixtureLM:
    """Return the mixture of policies drawn from the Gaussian."""
    noise = generator(seed, _PREDICTIVE_STREAM).standard_normal((num_policies, mu.size))
    offsets = torch.as_tensor(mu + sigma * noise, device=family.device)
    return MixtureLM([family.policy(phi) for phi in offsets])
