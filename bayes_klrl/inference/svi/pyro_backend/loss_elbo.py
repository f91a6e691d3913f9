"""Any loss that `bk.audit` takes, a user's function included, as a Pyro `ELBO`.

The loss gets the N completions of one prompt at a time, as trainers have them: a group. It is in units of reward, and should
descend -alpha ELBO, so that

    surrogate of a prompt = -loss / alpha,

whose gradient is the ELBO's for a loss that is right. Completions are drawn from the guide, or from the prior for a loss with
the attribute `draw_from = "prior"`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.loss_inputs import Loss, LossInputs, draws_from_prior, value_of
from bayes_klrl.inference.svi.pyro_backend.elbo import ElboTerms, SequenceELBO, model_tokens, own_likelihood
from bayes_klrl.inference.svi.pyro_backend.scores import tokens_of
from bayes_klrl.models.programs.pyro_program import distinct_completions, to_sequences
from bayes_klrl.sequences import Sequences

__all__ = ["LossELBO"]


class LossELBO(SequenceELBO):
    """A loss of N completions, one prompt at a time.

    Parameters
    ----------
    num_particles
        N, completions per prompt.
    loss
        The loss.
    alpha
        Function that returns the KL coefficient that the loss gets, the posterior's present alpha.
    """

    def __init__(self, num_particles: int, loss: Loss, alpha: Callable[[], float]) -> None:
        super().__init__(num_particles)
        self.loss_function, self.alpha = loss, alpha
        self.from_prior = draws_from_prior(loss)

    def terms(self, model_trace: Any, guide_trace: Any) -> ElboTerms:
        """Return log w and minus the loss of each prompt, over alpha."""
        log_lik = own_likelihood(model_trace, guide_trace)
        x, guide, prior = guide_trace.nodes["x"]["value"], guide_trace.nodes["x"]["fn"], model_trace.nodes["x"]["fn"]
        sequences = to_sequences(x, guide.lm)
        distinct, index = distinct_completions(sequences)
        log_q = tokens_of(guide, distinct, index)  # (P, N, T)
        with torch.no_grad():
            log_p = tokens_of(prior, distinct, index)
        alpha = self.alpha()
        rewards = log_lik.T * alpha
        batches = [self.inputs(p, sequences, log_q, log_p, rewards[p], guide, prior) for p in range(len(log_q))]
        losses = torch.stack([value_of(self.loss_function, batch) for batch in batches])
        if not torch.isfinite(losses).all():
            raise BayesKLRLError(
                f"The loss is {losses.tolist()}, one value per prompt. The rewards and log-probs it was given are finite: "
                "look for a division by 0 (a length, a standard deviation), an overflow of exp, or a log."
            )
        log_guide = log_q.detach().sum(dim=2).T
        terms = ElboTerms(
            log_weights=log_lik + log_p.sum(dim=2).T - log_guide,
            log_likelihood=log_lik,
            log_guide=log_guide,
            surrogate=-losses[None] / alpha,
            model_tokens=model_tokens(guide_trace),
        )
        if not self.from_prior:
            return terms
        return replace(terms, importance=torch.softmax(log_guide - log_p.sum(dim=2).T, dim=0))

    def inputs(
        self, p: int, sequences: Sequences, log_q: Tensor, log_p: Tensor, rewards: Tensor, guide: Any, prior: Any
    ) -> LossInputs:
        """Return what the loss reads of prompt p."""
        own = Sequences(sequences.tokens[p : p + 1], sequences.lengths[p : p + 1])
        tokens = torch.as_tensor(own.tokens[0], device=log_q.device)
        return _StepInputs(
            log_probs=log_q[p],
            old_log_probs=(log_p if self.from_prior else log_q.detach())[p],
            ref_log_probs=log_p[p],
            mask=torch.as_tensor(own.mask[0], device=log_q.device),
            rewards=rewards.to(log_q),
            alpha=self.alpha(),
            tokens=tokens,
            states=torch.arange(tokens.numel(), device=log_q.device).reshape(tokens.shape),
            policy_table=torch.empty(0),
            ref_table=torch.empty(0),
            of_policy=lambda: _positions(guide.lm, guide.prompt_ids[p], own),
            of_prior=lambda: _positions(prior.lm, prior.prompt_ids[p], own),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class _StepInputs(LossInputs):
    """Inputs whose tables over the vocabulary are computed when a loss reads them; most do not."""

    of_policy: Callable[[], Tensor]
    of_prior: Callable[[], Tensor]

    @property
    def all_log_probs(self) -> Tensor:
        """See `LossInputs`."""
        return self.of_policy()

    @property
    def all_ref_log_probs(self) -> Tensor:
        """See `LossInputs`."""
        with torch.no_grad():
            return self.of_prior()


def _positions(lm: Any, prompt: Any, sequences: Sequences) -> Tensor:
    """Return log-probs of every token at every position of one prompt's completions, (N, T, V), float64."""
    if not hasattr(lm, "position_log_probs"):
        raise BayesKLRLError(
            f"The loss reads all_log_probs, which need position_log_probs; {type(lm).__name__} lacks it. Build the loss from "
            "log_probs alone."
        )
    return torch.as_tensor(lm.position_log_probs([prompt], sequences))[0].double()
