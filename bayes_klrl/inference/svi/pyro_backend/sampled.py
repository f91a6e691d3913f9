"""Forward KL on draws of a sampler: the wake phase, on weighted draws of SMC instead of the guide's own.

    surrogate = sum_n W_n log q(x_n),      W_n the normalised weights of the sampler's draws, without a gradient

Its gradient is minus that of KL(p* || q), up to the sampler's bias of order 1 / N. The sampler does not know the guide, so
that it also finds what the guide does not draw yet, and gets no better as the guide does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.sampling.best_of_n import BestOfN
from bayes_klrl.inference.sampling.quasi_rejection import QuasiRejection
from bayes_klrl.inference.svi.pyro_backend.elbo import ElboTerms
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import Algorithm, GuideRecipe, TwistRecipe
from bayes_klrl.weights import normalised

__all__ = ["SampledForwardKL"]


class SampledForwardKL:
    """The loss of a step whose draws come from an algorithm; it has the methods of `SequenceELBO` that a training calls.

    Parameters
    ----------
    sampler
        The algorithm, such as `bk.SMC(64)`. What it has to fit (a twist, a proposal) is fitted once, before the first step.
    guide
        The guide.
    posterior
        Function that returns the posterior of the step, with the step's alpha.
    seed
        Seed for what the sampler fits.
    in_parts
        Whether steps use some of the prompts.

    Raises
    ------
    BayesKLRLError
        If the algorithm's draws are not the posterior's; or if steps use some of the prompts and the sampler has a twist or
        proposal to fit, or a twist, which knows prompts by their numbers, which are others in each step.
    """

    last: ElboTerms

    def __init__(
        self, sampler: Algorithm, guide: Any, posterior: Callable[[], Posterior], *, seed: int, in_parts: bool
    ) -> None:
        name = type(sampler).__name__
        if isinstance(sampler, BestOfN | QuasiRejection | GuideRecipe):
            raise BayesKLRLError(
                f"ForwardKL learns from draws of the posterior; those of {name} are not. Use bk.SMC(64)."
            )
        recipes = [getattr(sampler, part, None) for part in ("proposal", "twist")]
        to_fit = any(isinstance(recipe, GuideRecipe | TwistRecipe) for recipe in recipes)
        if to_fit and (in_parts or not hasattr(sampler, "prepared")):
            raise BayesKLRLError(
                f"{name} would fit its proposal or twist anew in each step. Give it a fitted one, such as "
                "proposal=bk.SVI(60).fit(posterior, seed=0).guide, or leave prompts_per_step out."
            )
        if in_parts and callable(getattr(sampler, "twist", None)):
            raise BayesKLRLError(
                "A step of some prompts gives the sampler a posterior of these alone, where a twist, which asks for "
                "prompt_index, would find other numbers. Leave out the twist, or leave prompts_per_step out."
            )
        self._sampler: Any = sampler
        self._guide, self._posterior, self.model_tokens = guide, posterior, 0
        prepared = getattr(sampler, "prepared", None)
        if not in_parts and prepared is not None:
            self._sampler, cost = prepared(posterior(), seed)
            self.model_tokens = cost.model_tokens + cost.training_tokens

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
        seed = int(torch.randint(2**31 - 1, (), device="cpu"))
        with torch.no_grad():
            draws = self._sampler.run(posterior, seed=seed)
        if draws.shape[1] < 2:
            raise BayesKLRLError("ForwardKL needs at least 2 draws per prompt and step; its sampler makes one.")
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
