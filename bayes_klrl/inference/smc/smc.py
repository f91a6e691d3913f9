"""Sequential Monte Carlo over tokens, with twists (theory.md 3; Zhao et al. 2024).

The intermediate targets are gamma_t(x_1:t) = p0(x_1:t) psi_t(x_1:t); psi of a finished completion is its likelihood. At each
step a particle's log-weight grows by

    log p0(x_t | x_<t) + log psi_t(x_1:t) - log psi_{t-1}(x_<t) - log q(x_t | x_<t),

and log Z-hat adds up logmeanexp of the weights at every resampling and at the end. exp(log Z-hat) is unbiased for every
scheme, adaptive or not; the mean of log Z-hat over runs is a lower bound on log Z, not an unbiased estimate.

With psi = 1 on unfinished prefixes but psi = likelihood on finished ones the scales would not match, and particles that end
early would take over the population (a loss of about 1.2 nats on a problem of 1093 strings). The default twist is therefore
the constant at which the weights of the population are most even; it costs no draws (`most_even_level`). All particles of a
prompt are resampled together, only while at least one of them is unfinished, and never at the end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from bayes_klrl.checks import check_count, check_finite, check_fraction, check_posterior_given
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.inference.sampling.importance import require_positive_weight
from bayes_klrl.inference.sampling.proposals import Proposal, resolve_proposal
from bayes_klrl.inference.smc.runs import EvidenceRuns
from bayes_klrl.inference.smc.spread import grown_islands, spread_evidence_runs
from bayes_klrl.models.twists.simple import ConstantTwist, pilot_twist
from bayes_klrl.models.twists.twisted_lm import TwistedLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.prompts.part import whole_of
from bayes_klrl.randomness import Streams
from bayes_klrl.resampling import resampling_scheme
from bayes_klrl.runners.runner import Runner
from bayes_klrl.runners.serial import chosen_runner
from bayes_klrl.typing import Algorithm, GuideRecipe, LanguageModel, Twist, TwistRecipe
from bayes_klrl.weights import logmeanexp

__all__ = ["SMC"]


@dataclass(frozen=True)
class SMC:
    """Particles that grow token by token and are resampled when their weights degenerate.

    Parameters
    ----------
    num_particles
        Number of particles per prompt, N; every prompt has its own population.
    proposal
        The model that proposes tokens, as in `ImportanceSampling`, or "twisted": the prior times the twist, one token ahead
        (`TwistedLM`).
    twist
        log psi of unfinished prefixes: a `Twist`; a recipe such as `LearnedTwist`, which is fitted first with the same seed;
        a number, for a constant log psi; or None, for the constant at which the weights of a population are most even, found
        anew at every step. A "twisted" proposal needs its twist beforehand; None is then the constant log Z estimated by 64
        prior draws with their own seed.
    ess_threshold
        Resample when ESS < ess_threshold * N: 0 means never, 1 whenever weights differ.
    resampling
        "systematic", "stratified", "residual" or "multinomial".
    num_islands
        Number of independent populations of N particles per prompt, M, merged into one answer of M * N draws: islands can be
        grown by several workers (`run(..., runner=...)`), and not all of them are in memory at once.

    Notes
    -----
    `Draws.ess` counts families by first ancestor, so that it does not return to N right after resampling. The usual ESS of
    every step is in `Draws.info["step_ess"]` (P, T), the ancestors are in `Draws.info["ancestors"]` (P, T, N).

    Islands never meet (Verge et al. 2015; theory.md 3.13). Their particles keep the evidence of their own island in their
    weights, so that Z-hat is the mean of the islands' Z-hats, unbiased as each of them is, and
    `Draws.info["island_log_evidence"]` (P, M) has the log Z-hat of each. `step_ess` is then the sum over islands.

    Examples
    --------
    The reward is the number of heads among four tosses of a coin, log Z = 4 log((1 + e) / 2) = 2.48.

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    >>> heads = bk.TokenReward(lambda tokens, lengths: tokens.sum(axis=1), alpha=1.0)
    >>> draws = bk.SMC(1000).run(bk.Posterior(coin, heads, max_new_tokens=4), seed=0)
    >>> draws.shape, bool(abs(draws.log_evidence[0] - 2.48) < 0.2)
    ((1, 1000), True)
    """

    num_particles: int
    proposal: Proposal | Literal["twisted"] = None
    twist: Twist | TwistRecipe | float | None = None
    ess_threshold: float = 0.5
    resampling: str = "systematic"
    num_islands: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles)
        check_fraction("ess_threshold", self.ess_threshold)
        check_count("num_islands", self.num_islands)
        resampling_scheme(self.resampling)
        is_recipe = isinstance(self.twist, TwistRecipe) and not isinstance(self.twist, Algorithm | LanguageModel)
        if self.twist is not None and not callable(self.twist) and not is_recipe:
            check_finite("A twist that is neither None nor a function", self.twist)

    @property
    def rows_per_prompt(self) -> int:
        """Completions per prompt that are decoded at once; a prompt's draws do not depend on the others (`runners.blocks`)."""
        return self.num_particles * self.num_islands

    @property
    def is_prepared(self) -> bool:
        """Whether proposal and twist are what they will be in every run, so that `prepared` would fit nothing."""
        made = self.twist is None or callable(self.twist) or not isinstance(self.twist, TwistRecipe)
        return made and not isinstance(self.proposal, str | GuideRecipe)

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False, runner: Runner | None = None) -> Draws:
        """See `Algorithm.run`; the islands are spread over the workers of `runner`.

        Raises
        ------
        BudgetError
            If all particles of some prompt have likelihood 0. The error carries the draws.
        """
        check_posterior_given(posterior)
        runner = chosen_runner(runner)
        ready, training = self.prepared(posterior, seed, progress)
        start = time.perf_counter()
        islands = grown_islands(runner, ready, posterior, self.num_islands, Streams.of(seed), progress)
        found = islands.grown
        cost = replace(
            training,
            seconds=training.seconds + time.perf_counter() - start,
            model_tokens=training.model_tokens + found.model_tokens,
        )
        info = found.info if self.num_islands == 1 else {**found.info, "island_log_evidence": islands.log_evidence}
        return require_positive_weight(found.outcome.draws(posterior, type(self).__name__, cost, info), posterior)

    def log_evidences(
        self,
        posterior: Posterior,
        num_runs: int,
        *,
        seed: int,
        progress: bool = False,
        runner: Runner | None = None,
    ) -> EvidenceRuns:
        """Return log Z-hat of M independent runs, shape (P, M), each the mean over its islands; many are decoded together.

        The mean of each Z-hat is Z, so the mean of log Z-hat is at most log Z: with probability 1 - delta, whatever the
        number of particles, log Z >= mean log Z-hat - log(1 / delta) / M (theory.md 3.11). Proposal and twist are fitted once,
        with random numbers of their own, and are the same in all runs.

        Parameters
        ----------
        posterior, seed, progress
            The posterior, seed for all random numbers, and whether to show a progress bar; see `Algorithm.run`.
        num_runs
            Number of runs, M.
        runner
            Where the runs are done; None: here, one after the other.

        Examples
        --------
        >>> import numpy as np, bayes_klrl as bk
        >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
        >>> heads = bk.TokenReward(lambda tokens, lengths: tokens.sum(axis=1), alpha=1.0)
        >>> posterior = bk.Posterior(coin, heads, max_new_tokens=4)
        >>> bk.SMC(64).log_evidences(posterior, 20, seed=0).log_evidence.shape
        (1, 20)
        """
        check_count("num_runs", num_runs)
        runner = chosen_runner(runner)
        ready, training = self.prepared(posterior, seed, progress)
        num_populations = num_runs * self.num_islands
        found = spread_evidence_runs(
            runner, ready, posterior, num_populations, None, Streams.of(seed), training, progress
        )
        if self.num_islands == 1:
            return found
        of_islands = found.log_evidence.reshape(posterior.num_prompts, num_runs, self.num_islands)
        return replace(found, log_evidence=logmeanexp(of_islands))

    def prepared(self, posterior: Posterior, seed: int, progress: bool = False) -> tuple[SMC, Cost]:
        """Return the same sampler with proposal and twist fitted, and the cost of fitting them.

        Preparing a prepared sampler again costs nothing and changes nothing, so several runs can share one twist.
        """
        posterior = whole_of(posterior)  # a twist is made for all prompts
        twist, twist_training = self._fitted_twist(posterior, seed, progress)
        if not (isinstance(self.proposal, str) and self.proposal == "twisted"):
            proposal, training = resolve_proposal(self.proposal, posterior, seed, progress)
            return replace(self, proposal=proposal, twist=twist), training + twist_training
        start, pilot = time.perf_counter(), Cost()
        if twist is None:
            twist, tokens = pilot_twist(posterior, seed)
            pilot = Cost(seconds=time.perf_counter() - start, model_tokens=tokens)
        return replace(self, proposal=TwistedLM(posterior, twist), twist=twist), twist_training + pilot

    def _fitted_twist(self, posterior: Posterior, seed: int, progress: bool) -> tuple[Twist | None, Cost]:
        """Return the twist as a function, fitted if it is a recipe, or None, and the cost of fitting it."""
        if self.twist is None or callable(self.twist):
            return self.twist, Cost()
        if not isinstance(self.twist, TwistRecipe):
            return ConstantTwist(np.full(posterior.num_prompts, float(self.twist))), Cost()
        fitted = self.twist.fit(posterior, seed=seed, progress=progress)
        return fitted, getattr(fitted, "training", Cost())
