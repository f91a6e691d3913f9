"""What a certificate needs of the posterior alone, whichever the policy: computed when first asked for, and shared.

Certificates of many policies for one posterior (the checkpoints of a training) rest on the same enumeration, the same exact
draws, the same SMC runs and the same draws of the prior. None of them looks at the policy, so each certificate is the very
one that it would be alone with this seed. The certificates then fail together where the shared part fails, and their
differences are less noisy than those of independent ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bayes_klrl.analysis.certificate.evidence import PriorRuns, Settings, can_enumerate, exact_or_given, prior_runs
from bayes_klrl.analysis.certificate.intervals import expected, mean_intervals
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BudgetError
from bayes_klrl.inference.exact.exact import Exact
from bayes_klrl.inference.exact.exact_draws import ExactDraws
from bayes_klrl.inference.sampling.importance import ImportanceSampling
from bayes_klrl.inference.smc.sandwich import STATEMENTS
from bayes_klrl.inference.smc.smc import SMC
from bayes_klrl.posterior import Posterior
from bayes_klrl.runners.blocks import run_in_blocks
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray

__all__ = ["Groundwork"]


@dataclass(frozen=True, eq=False)
class Groundwork:
    """The part of certificates that depends on the posterior alone.

    Parameters
    ----------
    posterior, settings
        The posterior, and the options of `certify`.
    smc
        The algorithm of the runs that bound the evidence.
    given
        The caller's own exact draws; None: the package looks for its own.
    """

    posterior: Posterior
    settings: Settings
    smc: SMC
    given: Sequences | Draws | None

    @property
    def is_enumerated(self) -> bool:
        """Whether both KLs are exact sums over all completions."""
        settings = self.settings
        return (
            self.given is None and not settings.sampling_only and can_enumerate(self.posterior, settings.max_sequences)
        )

    @cached_property
    def everything(self) -> Draws:
        """All completions with their prior and likelihood."""
        return Exact(max_sequences=self.settings.max_sequences).run(self.posterior, seed=0)

    @cached_property
    def exact(self) -> ExactDraws:
        """Exact posterior draws, given or found."""
        return exact_or_given(self.posterior, self.given, self.settings)

    @cached_property
    def runs(self) -> PriorRuns:
        """Runs of SMC below, and conditional ones above, with the prior as proposal."""
        return prior_runs(self.posterior, self.exact, self.smc, self.settings)

    @cached_property
    def prior_draws(self) -> Draws:
        """Weighted draws of the prior; all of weight 0 where it met nothing possible, which is no reason to stop."""
        settings = self.settings
        try:
            return run_in_blocks(
                settings.runner,
                ImportanceSampling(settings.num_draws),
                self.posterior,
                seed=settings.stream("frontier"),
                progress=settings.progress,
                name="prior draws",
            )
        except BudgetError as error:
            if error.draws is None:
                raise
            return error.draws

    def prior_elbo(self) -> FloatArray:
        """Return the interval of E_p0[r / alpha], the prior's own ELBO, for the mean over prompts, (2,)."""
        if not self.is_enumerated:
            settings = self.settings
            return mean_intervals(self.prior_draws.log_likelihood, settings.failure_probability / STATEMENTS)[1]
        log_prior, log_likelihood = self.everything.log_prior, self.everything.log_likelihood
        elbo = expected(log_prior, log_likelihood, np.zeros_like(log_likelihood)).mean()
        return np.array([elbo, elbo])

    @property
    def cost(self) -> Cost:
        """Seconds and model tokens of what has been computed so far."""
        done = vars(self)
        return sum((done[name].cost for name in ("everything", "exact", "runs", "prior_draws") if name in done), Cost())
