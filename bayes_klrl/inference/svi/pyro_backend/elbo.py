"""Score-function gradients of the ELBO, as Pyro `ELBO`s that keep the terms which stock losses drop.

With s(x) = grad log q(x), l_t = log q_t - log p0_t and log w = log p0 + r / alpha - log q, the gradient of

    ELBO(q) = E_q[log w] = E_q[r] / alpha - KL(q || p0)

from N draws of one prompt is estimated by

leave-one-out (Kool et al. 2019):     1/(N-1) sum_n (log w_n - mean log w) s(x_n)
Rao-Blackwellised (Amini et al. 2025): 1/(N-1) sum_n (r_n - mean r) / alpha s(x_n)
                                       - 1/N sum_n sum_t [grad KL_t + (sum_{u>t} KL_u - baseline_t) s_t],
                                       KL_t over the whole vocabulary at the drawn prefix.

Both are unbiased. At q = p* all log w are equal and the first has variance zero, while the second keeps the reward's
noise; at q = p0 the second's variance is an order of magnitude lower (theory.md 2.5). The default is the first.

In a joint program with further latents z = g(noise, parents), log w holds all sites (see `sites`), and the first becomes

    1/N sum_n [ d/d parameters log w_n through every z_n + (log w_n - mean of the others) grad log q(x_n | parents) ],

log q(x) itself left out of the pathwise part, where its mean is 0. Where no z outside the prompts' plate is drawn after x,
the score of one prompt's x is multiplied by that prompt's terms and the shared ones alone: the others are independent of it.

`bayes_klrl.inference.svi.svi` refuses stock losses by name, because several are silently wrong on a discrete sequence site
(theory.md 9.7).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from torch import Tensor

from bayes_klrl.checks import check_count
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.estimators import leave_one_out
from bayes_klrl.inference.svi.pyro_backend.sites import check_bounded, random_sites, site_terms
from bayes_klrl.models.programs.pyro_program import SequenceDistribution, to_sequences
from bayes_klrl.models.programs.turns import PYRO_TURN, in_turn

__all__ = [
    "ElboTerms",
    "LeaveOneOutELBO",
    "RaoBlackwellELBO",
    "SequenceELBO",
    "model_tokens",
    "own_likelihood",
    "spread",
]


@dataclass(frozen=True)
class ElboTerms:
    """The terms of one step's draws in nats, each (N, P); (N, 1) where a latent is shared by the prompts."""

    log_weights: Tensor
    log_likelihood: Tensor
    """log_weights without prior and guide of x: the factor r / alpha, and the terms of other sites."""
    log_guide: Tensor
    """log q(x), always (N, P)."""
    surrogate: Tensor
    """Its mean over N, summed over the rest, has the gradient of the ELBO."""
    model_tokens: int
    """Tokens that went through a model: to draw, and to score under guide and prior."""
    log_ratio: Tensor | None = None
    """log q - log p0, (N, P), where log w can be -inf; None: the difference of the first two."""
    importance: Tensor | None = None
    """Weights of the draws as draws of the guide, each prompt's with sum 1, (N, P), where others drew; None: 1 / N."""

    def mean(self, values: Tensor) -> float:
        """Return the mean of values (N, P) over the guide's draws and over prompts."""
        if self.importance is None:
            return float(values.mean())
        return float(torch.where(self.importance > 0, self.importance * values, 0.0).sum(dim=0).mean())

    @property
    def kl(self) -> float:
        """The mean of log q - log p0, the KL to the prior."""
        difference = self.log_likelihood - self.log_weights if self.log_ratio is None else self.log_ratio
        return self.mean(difference)

    @property
    def log_weight_sd(self) -> float:
        """The standard deviation of log w, the mean over prompts; see `spread`."""
        if torch.isfinite(self.log_weights).all():
            return float(self.log_weights.std(dim=0).mean())
        return float(np.mean([variance**0.5 for variance in spread(self.log_weights)]))


def spread(log_weights: Tensor) -> list[float]:
    """Return twice the distance to the posterior that the draws of each prompt show, in nats.

    That is the variance of log w near the posterior. Where draws have likelihood 0, a share 1 - A of them, the posterior is
    further by -log A: the variance of the others, and twice that, with A at least 1 / (N + 1).
    """
    found = []
    for column in log_weights.T:
        finite = column[torch.isfinite(column)]
        variance = float(finite.var()) if len(finite) > 1 else 0.0
        share = max(len(finite), len(column) / (len(column) + 1)) / len(column)
        found.append(variance - 2 * float(np.log(share)))
    return found


class SequenceELBO(ELBO):
    """Common part: run guide and model once with all particles in a plate, and differentiate a surrogate.

    Parameters
    ----------
    num_particles
        N, the number of particles per prompt, at least 2.
    max_plate_nesting
        Depth to which the program's plates are nested, the plate of the prompts included.

    Attributes
    ----------
    last
        The `ElboTerms` of the newest step.
    """

    last: ElboTerms
    last_site: Any

    def __init__(self, num_particles: int = 64, max_plate_nesting: int = 1) -> None:
        if num_particles < 2:
            raise BayesKLRLError(f"A leave-one-out baseline needs num_particles >= 2; got {num_particles}.")
        check_count("max_plate_nesting", max_plate_nesting)
        super().__init__(num_particles=num_particles, max_plate_nesting=max_plate_nesting, vectorize_particles=True)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the traces of one execution: the model replayed on the guide's draws."""
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        return model_trace, guide_trace

    @abstractmethod
    def terms(self, model_trace: Any, guide_trace: Any) -> ElboTerms:
        """Return this estimator's terms."""

    @in_turn(PYRO_TURN)
    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return a scalar whose value is -ELBO, summed over prompts, and whose gradient is the estimator's."""
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            self.last = self.terms(model_trace, guide_trace)
            self.last_site = guide_trace.nodes["x"]
            scale = model_trace.nodes["x"]["scale"]  # P / prompts_per_step where prompts are subsampled
        surrogate = -self.last.surrogate.mean(dim=0).sum() * scale
        value = -self.last.log_weights.mean(dim=0).sum() * scale
        loss: Tensor = surrogate - surrogate.detach() + value.detach()
        return loss

    def guide_change(self) -> float:
        """Return the KL by which the guide has moved since the newest step's draws x, in nats.

        The estimate is 1/2 mean (log q_now(x) - log q(x))^2. It equals KL(q || q_now) to second order, and is quadratic in the
        length of a short step.
        """
        with torch.no_grad():
            now = self.last_site["fn"].log_prob(self.last_site["value"])
        return float((now.reshape(self.last.log_guide.shape) - self.last.log_guide).square().mean() / 2)

    @in_turn(PYRO_TURN)
    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return -ELBO, summed over prompts."""
        with torch.no_grad():
            return float(torch_item(self.differentiable_loss(model, guide, *args, **kwargs)))

    @in_turn(PYRO_TURN)
    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return -ELBO and add its gradient to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return float(torch_item(loss))


class LeaveOneOutELBO(SequenceELBO):
    """The ELBO with a leave-one-out baseline of the whole log-weight; see the module's formulas.

    Joint programs are allowed: in addition to "x" any number of reparametrised latents, outside the prompts' plate or inside,
    drawn by the guide in any order; observed sites and factors of any name; parameters in the model. For programs with a
    second discrete latent use `pyro.infer.TraceGraph_ELBO`.
    """

    def terms(self, model_trace: Any, guide_trace: Any) -> ElboTerms:
        """Return log w, and pathwise log w + (log w - mean of the others) log q(x)."""
        sites = site_terms(model_trace, guide_trace, -self.max_plate_nesting)
        # log q(x) itself is detached: the mean of its gradient is 0
        log_w = sites.log_prior + sites.inside - sites.log_guide.detach()
        pathwise = log_w.sum(dim=1) + sites.outside
        weights, other = log_w, sites.inside
        if sites.joint:
            weights = pathwise[:, None]
            other = sites.inside.sum(dim=1, keepdim=True) + sites.outside[:, None]
        cost = weights if sites.whole else log_w + sites.outside[:, None]
        score = (leave_one_out(cost.detach()) * sites.raw_log_guide).sum(dim=1)
        return ElboTerms(
            log_weights=weights.detach(),
            log_likelihood=other.detach(),
            log_guide=sites.raw_log_guide.detach(),
            surrogate=pathwise + score,
            model_tokens=model_tokens(guide_trace),
        )


class RaoBlackwellELBO(SequenceELBO):
    """The ELBO with its KL summed over the vocabulary at every prefix; see the module's formula.

    Both models must offer `position_log_probs`, as `TorchLM` and `NgramLM` do; the table (N, T, V) must fit into memory.
    """

    def terms(self, model_trace: Any, guide_trace: Any) -> ElboTerms:
        """Return log w with its KL Rao-Blackwellised, and the surrogate."""
        guide_site, prior_site = guide_trace.nodes["x"], model_trace.nodes["x"]
        x, guide, prior = guide_site["value"], guide_site["fn"], prior_site["fn"]
        sequences = to_sequences(x, guide.lm)
        log_q = _position_log_probs(guide, sequences)
        with torch.no_grad():
            log_p = _position_log_probs(prior, sequences)
        # a token of probability 0 adds nothing to the KL and nothing to its gradient
        possible = log_q.detach() > -torch.inf
        difference = torch.where(possible, log_q - log_p, 0.0)
        kl = (torch.where(possible, log_q, 0.0).exp() * difference).masked_fill(~possible, 0.0).sum(dim=-1)
        inside = torch.as_tensor(sequences.mask, device=kl.device)
        kl = kl.double() * inside
        later = kl.detach().flip(2).cumsum(2).flip(2) - kl.detach()
        tokens = torch.as_tensor(sequences.tokens, device=kl.device).masked_fill(~inside, 0)
        drawn = log_q.gather(3, tokens[..., None])[..., 0].double() * inside
        score_term = (leave_one_out_by_prompt(later) * drawn).sum(dim=2)
        log_lik = own_likelihood(model_trace, guide_trace)
        credit = leave_one_out(log_lik) * drawn.sum(dim=2).T
        surrogate = credit - (kl.sum(dim=2) + score_term).T
        log_w, log_guide = log_lik - kl.detach().sum(dim=2).T, drawn.detach().sum(dim=2).T
        return ElboTerms(log_w, log_lik, log_guide, surrogate, model_tokens(guide_trace))


def leave_one_out_by_prompt(values: Tensor) -> Tensor:
    """Return `leave_one_out` of values (P, N, T) along N."""
    by_particle: Tensor = leave_one_out(values.transpose(0, 1))
    return by_particle.transpose(0, 1)


def own_likelihood(model_trace: Any, guide_trace: Any, *, zero: bool = False) -> Tensor:
    """Return the factor's log-likelihood (N, P) of a posterior's own program, refusing any other site.

    -inf is refused too, unless `zero` says that likelihoods may be 0.
    """
    for what, trace in (("model", model_trace), ("guide", guide_trace)):
        for name, _ in random_sites(trace):
            if name not in ("x", "likelihood"):
                raise BayesKLRLError(
                    f"The {what} has a site {name!r} beside 'x' and 'likelihood', which the Rao-Blackwellised loss would "
                    "ignore. Use LeaveOneOutELBO, which takes joint models."
                )
    site = model_trace.nodes["likelihood"]
    log_lik: Tensor = site["fn"].log_prob(site["value"])
    checked = torch.where(torch.isneginf(log_lik), 0.0, log_lik) if zero else log_lik
    check_bounded("likelihood", checked, guide_trace.nodes["x"])
    return log_lik


def model_tokens(guide_trace: Any) -> int:
    """Return the tokens of one step: every completion is drawn once and scored twice, with its prompt each time."""
    site = guide_trace.nodes["x"]
    if not isinstance(site["fn"], SequenceDistribution):  # a site of the user's own, which no model of ours has seen
        return 0
    lengths = to_sequences(site["value"], site["fn"].lm).lengths
    return 3 * (int(lengths.sum()) + sum(len(ids) for ids in site["fn"].prompt_ids))


def _position_log_probs(site: SequenceDistribution, sequences: Any) -> Tensor:
    """Return a model's full next-token log-probs (P, N, T, V)."""
    if not hasattr(site.lm, "position_log_probs"):
        raise BayesKLRLError(
            f"The Rao-Blackwellised estimator needs position_log_probs, which {type(site.lm).__name__} lacks. Use "
            'estimator="leave_one_out".'
        )
    return torch.as_tensor(site.lm.position_log_probs(site.prompt_ids, sequences))
