"""Conditional SMC: an upper bound on log Z from one exact posterior draw (theory.md 3.10).

Particle 0 is a retained completion x* ~ p*: it follows the tokens of x*, and its ancestor is always itself. The others are
drawn as in plain SMC and resampled multinomially from all N particles. Weights and log Z-hat are those of plain SMC, but now

    E[1 / Z-hat] = 1 / Z,   so   E[log Z-hat] >= log Z   and   P(log Z-hat + log(1 / delta) < log Z) <= delta

over x* and the other particles (Grosse et al. 2015; Zhao et al. 2024). Where all particles of a plain run may have weight 0 it
is E[1 / Z-hat] = P(Z-hat > 0) / Z, less than 1 / Z, and the bounds hold all the more. Together with plain SMC, which bounds
log Z from below, it brackets log Z by sampling alone. All of this requires that x* is an exact posterior draw: conditioned on
the output of SMC, of a Markov chain or of best-of-n it is not a bound (theory.md 3.10).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from bayes_klrl.checks import check_posterior_given
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.same_posterior import check_are_of
from bayes_klrl.inference.smc.runs import EvidenceRuns, grown
from bayes_klrl.inference.smc.smc import SMC
from bayes_klrl.inference.smc.spread import spread_evidence_runs
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.runners.runner import Runner
from bayes_klrl.runners.serial import chosen_runner
from bayes_klrl.sequences import Sequences

__all__ = ["DRAW_AGAIN", "ConditionalSMC", "retainable"]

DRAW_AGAIN = (
    "Take draws of this posterior: bk.Exact(num_draws=...) or bk.RejectionSampling(...).run(posterior, seed=...)."
)

_EXACT_METHODS = ("Exact", "RejectionSampling")


@dataclass(frozen=True)
class ConditionalSMC:
    """SMC with one particle fixed to an exact posterior draw, for upper bounds on log Z.

    Parameters
    ----------
    smc
        The sampler with number of particles, proposal, twist and threshold. Its `resampling` is not used, because it must be
        multinomial here. To share twist and proposal with the runs for the lower bound, prepare it once:
        `smc, cost = smc.prepared(posterior, seed)`.

    Examples
    --------
    Log Z lies between the means of 20 runs of plain and of conditional SMC, up to sampling error:

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0, bounds=(1, 3))
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> smc, _ = bk.SMC(16).prepared(posterior, seed=0)
    >>> exact = bk.RejectionSampling(20).run(posterior, seed=1)
    >>> lower = smc.log_evidences(posterior, 20, seed=2).log_evidence
    >>> upper = bk.ConditionalSMC(smc).log_evidences(posterior, exact, seed=3).log_evidence
    >>> lower.shape, upper.shape, bool(lower.mean() < upper.mean())
    ((1, 20), (1, 20), True)
    """

    smc: SMC

    def __post_init__(self) -> None:
        if not isinstance(self.smc, SMC):
            raise BayesKLRLError(
                f"ConditionalSMC takes a bk.SMC, such as bk.ConditionalSMC(bk.SMC(64)); got {self.smc!r}."
            )
        if self.smc.num_islands > 1:
            raise BayesKLRLError(
                f"A conditional run is one population; got num_islands = {self.smc.num_islands}. Use num_islands=1 and more "
                "runs (more retained draws)."
            )

    def run(self, posterior: Posterior, retained: Sequences | Draws, *, seed: int, progress: bool = False) -> Draws:
        """Return the particles, the retained one first, with log Z-hat as `log_evidence`.

        Parameters
        ----------
        posterior, seed, progress
            The posterior, seed for all random numbers, and whether to show a progress bar; see `Algorithm.run`.
        retained
            One exact posterior draw per prompt, (P, 1, T).

        Raises
        ------
        BayesKLRLError
            If there is more than one completion per prompt, or if they are known not to be exact draws.
        SupportError
            If a retained completion has weight 0.
        """
        check_posterior_given(posterior)
        given = retainable(posterior, retained)
        if given.lengths.shape[1] != 1:
            raise BayesKLRLError(
                f"One run retains one completion per prompt; got {given.lengths.shape[1]}. For several runs use log_evidences."
            )
        ready, training = self.smc.prepared(posterior, seed, progress)
        start = time.perf_counter()
        found = grown(ready, posterior, 1, given, Streams.of(seed), progress)
        cost = replace(
            training,
            seconds=training.seconds + time.perf_counter() - start,
            model_tokens=training.model_tokens + found.model_tokens,
        )
        draws = found.outcome.draws(posterior, type(self).__name__, cost, found.info)
        # the standard error's formula assumes that every particle is drawn
        return replace(draws, log_evidence_se=np.full(posterior.num_prompts, np.nan))

    def log_evidences(
        self,
        posterior: Posterior,
        retained: Sequences | Draws,
        *,
        seed: int,
        progress: bool = False,
        runner: Runner | None = None,
    ) -> EvidenceRuns:
        """Return log Z-hat of M independent runs, shape (P, M); many runs are decoded together.

        Parameters
        ----------
        posterior, seed, progress
            The posterior, seed for all random numbers, and whether to show a progress bar; see `Algorithm.run`.
        retained
            M independent exact posterior draws per prompt, (P, M, T), one for each run.
        runner
            Where the runs are done; None: here, one after the other.
        """
        runner = chosen_runner(runner)
        given = retainable(posterior, retained)
        ready, training = self.smc.prepared(posterior, seed, progress)
        return spread_evidence_runs(
            runner, ready, posterior, given.lengths.shape[1], given, Streams.of(seed), training, progress
        )


def retainable(posterior: Posterior, retained: Sequences | Draws) -> Sequences:
    """Return the completions to retain, (P, M, T), after checking that they can be exact draws from the posterior.

    Parameters
    ----------
    posterior
        The posterior they were drawn from.
    retained
        Draws of an exact method, or bare completions, which the caller knows to be exact.

    Raises
    ------
    BayesKLRLError
        If they are draws of an approximate method, weighted draws, or draws from another posterior.
    """
    if isinstance(retained, Draws) and (retained.method not in _EXACT_METHODS or np.ptp(retained.log_weights) > 0):
        raise BayesKLRLError(
            f"Draws of {retained.method}, weighted or resampled, are not exact posterior draws, and conditioning on them "
            "gives no bound. Retain draws from bk.RejectionSampling(...) or bk.Exact(num_draws=...). If you know that "
            "these are exact, pass `draws.sequences`."
        )
    if isinstance(retained, Draws):
        check_are_of(posterior, retained, DRAW_AGAIN)
    return posterior.sequences(retained)
