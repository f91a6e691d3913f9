"""What a run of sequential Monte Carlo leaves: the finished particles with their weights, as log evidence or as `Draws`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from bayes_klrl.draws import Cost, Draws
from bayes_klrl.posterior import Posterior
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import grouped_ess, log_evidence_se, logmeanexp

__all__ = ["Outcome", "in_prompt_order"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The finished particles of R runs of N particles each; R = P * M for M runs of each of P prompts, prompt by prompt.

    Parameters
    ----------
    tokens, lengths
        The completions, (R, N, T) and (R, N).
    reward
        Rewards, (R, N).
    log_prior, log_proposal
        Log-probs of the completions in nats, (R, N).
    log_weights
        Log-weights since the last resampling, (R, N).
    log_evidence
        Sum of the log mean weights of all resamplings, (R,).
    family
        The particle of the first step that each descends from, (R, N).
    num_resampled
        Number of multinomial resamplings, (R,).
    ancestors
        The particle that each descends from at each step, (R, T, N).
    step_ess
        Effective sample size before the resampling of each step, (R, T); NaN after the last step.
    """

    tokens: IntArray
    lengths: IntArray
    reward: FloatArray
    log_prior: FloatArray
    log_proposal: FloatArray
    log_weights: FloatArray
    log_evidence: FloatArray
    family: IntArray
    num_resampled: IntArray
    ancestors: IntArray
    step_ess: FloatArray

    def log_evidences(self, num_runs: int) -> FloatArray:
        """Return log Z-hat of each of M runs per prompt, (P, M)."""
        log_mean: FloatArray = logmeanexp(self.log_weights) + self.log_evidence
        return log_mean.reshape(-1, num_runs)

    def draws(self, posterior: Posterior, method: str, cost: Cost, info: Mapping[str, FloatArray]) -> Draws:
        """Return the particles of one run per prompt, their final weights including the accumulated log evidence."""
        draws = Draws.weighted(
            posterior,
            Sequences(self.tokens, self.lengths),
            method=method,
            reward=self.reward,
            log_prior=self.log_prior,
            log_proposal=self.log_proposal,
            cost=cost,
        )
        ess = np.array([grouped_ess(row, family) for row, family in zip(self.log_weights, self.family, strict=True)])
        log_weights = self.log_weights + self.log_evidence[:, None]
        return replace(
            draws,
            log_weights=log_weights,
            log_evidence=logmeanexp(log_weights),
            log_evidence_se=log_evidence_se(ess, self.lengths.shape[1], self.num_resampled),
            elbo=np.full(len(ess), np.nan),
            ess=ess,
            info={"ancestors": self.ancestors, "step_ess": self.step_ess, **info},
        )


def in_prompt_order(outcomes: Sequence[Outcome], populations: Sequence[IntArray]) -> Outcome:
    """Return the outcomes of several pieces of work as one, prompt by prompt and run by run.

    Parameters
    ----------
    outcomes, populations
        The outcome of each piece, and the numbers of its populations: p * M + m is run m of M of prompt p.
    """
    order = np.argsort(np.concatenate(populations))
    arrays = {
        field.name: np.concatenate([getattr(outcome, field.name) for outcome in outcomes])[order]
        for field in fields(Outcome)
    }
    return Outcome(**arrays)
