"""Forward KL on draws of a sampler: the wake phase, on weighted draws of SMC instead of the guide's own.

    surrogate = sum_n W_n log q(x_n),      W_n the normalised weights of the sampler's draws, without a gradient

Its gradient is minus that of KL(p* || q), up to the sampler's bias of order 1 / N. Other than self-normalised importance
sampling from the guide, a sampler that resamples prefixes also finds what the guide cannot draw yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from bayes_klrl.inference.svi.pyro_backend.elbo import ElboTerms
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import Algorithm
from bayes_klrl.weights import normalised

__all__ = ["SampledForwardKL"]


class SampledForwardKL:
    """The loss of a step whose draws come from an algorithm; it has the methods of `SequenceELBO` that a training calls.

    Parameters
    ----------
    sampler
        The algorithm, such as `bk.SMC(64)`. If it takes a proposal and has none, the guide proposes.
    guide
        The guide.
    posterior
        Function that returns the posterior of the step, with the step's alpha.
    """

    last: ElboTerms

    def __init__(
        self,
        sampler: Algorithm,
        guide: Any,
        posterior: Callable[[], Posterior],
    ) -> None:
        takes_proposal = is_dataclass(sampler) and "proposal" in {field.name for field in fields(sampler)}
        guided = takes_proposal and getattr(sampler, "proposal", None) is None
        self._sampler: Any = replace(sampler, proposal=guide) if guided else sampler  # type: ignore[type-var]
        self._guide, self._posterior = guide, posterior

    def loss_and_grads(self, model: object, guide: object, chosen: torch.Tensor | None = None) -> float:
        """Draw, score, and add the gradient to the parameters'; the programs are not run.

        Parameters
        ----------
        model, guide
            Not used; other losses run them.
        chosen
            Indices of the step's prompts; None: all of them.
        """
        whole = self._posterior()
        posterior = whole if chosen is None else whole.select(chosen.tolist())
        with torch.no_grad():
            draws = self._sampler.run(posterior, seed=int(torch.randint(2**31 - 1, (), device="cpu")))
        log_q = self._log_guide(posterior, draws.sequences)
        weights = torch.as_tensor(normalised(draws.log_weights)).to(log_q)
        loss = -(weights * log_q).sum() * (whole.num_prompts / posterior.num_prompts)
        loss.backward()  # type: ignore[no-untyped-call]
        log_guide, num_draws = log_q.detach().T, log_q.shape[1]
        joint = torch.as_tensor(draws.log_prior + draws.log_likelihood).to(log_guide).T
        log_weights = joint - log_guide
        # the draws are the posterior's, so the guide's mean is one under importance weights q / p*
        alive = torch.isfinite(log_weights)
        importance = torch.softmax(torch.where(alive, torch.log(weights.T) - log_weights, -torch.inf), dim=0)
        log_weights = torch.where(alive, log_weights, log_weights[alive].min())
        scored = int(draws.lengths.sum()) + num_draws * sum(map(len, posterior.prompt_ids))
        self.last = ElboTerms(
            log_weights=log_weights,
            log_likelihood=torch.as_tensor(draws.log_likelihood).to(log_guide).T,
            log_guide=log_guide,
            surrogate=torch.zeros(0),
            model_tokens=draws.model_tokens + scored,
            log_ratio=log_guide - torch.as_tensor(draws.log_prior).to(log_guide).T,
            importance=importance,
        )
        self._again = posterior, draws.sequences
        return float(loss.detach())

    def guide_change(self) -> float:
        """See `SequenceELBO.guide_change`."""
        with torch.no_grad():
            now = self._log_guide(*self._again).T
        return float((now - self.last.log_guide).square().mean() / 2)

    def _log_guide(self, posterior: Posterior, sequences: Any) -> torch.Tensor:
        """Return log q of completions, (P, N), float64."""
        return torch.as_tensor(self._guide.token_log_probs(posterior.prompt_ids, sequences)).double().sum(dim=2)
