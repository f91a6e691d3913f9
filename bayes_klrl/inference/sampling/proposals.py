"""Proposals: a language model, or a recipe such as `SVI` that is fitted first (amortise, then correct)."""

from __future__ import annotations

from bayes_klrl.draws import Cost
from bayes_klrl.models.decoding import check_proposal
from bayes_klrl.posterior import Posterior, check_context
from bayes_klrl.prompts.part import whole_of
from bayes_klrl.typing import GuideRecipe, LanguageModel

__all__ = ["Proposal", "resolve_proposal"]

Proposal = LanguageModel | GuideRecipe | None


def resolve_proposal(proposal: Proposal, posterior: Posterior, seed: int, progress: bool) -> tuple[LanguageModel, Cost]:
    """Return the language model to draw from, and the cost of its training.

    None is the prior itself; a recipe such as `SVI` is fitted under the same seed.
    """
    if isinstance(proposal, GuideRecipe):
        fit = proposal.fit(posterior, seed=seed, progress=progress)
        return fit.guide, fit.training
    lm = posterior.prior if proposal is None else proposal
    # a solved posterior gives probability 0 only where the posterior does: as its own proposal it misses nothing
    covers = getattr(lm, "posterior", None) is whole_of(posterior)
    check_proposal(lm, posterior.prior, covers=covers)
    check_context(posterior.prompt_ids, posterior.max_new_tokens, lm)
    return lm, Cost()
