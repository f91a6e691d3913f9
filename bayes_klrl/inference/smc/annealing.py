"""Annealed SMC over alpha: from the prior to the posterior by tempering, with suffix moves (theory.md 3.12).

    p_s(x) prop. p0(x) exp(s r(x) / alpha),   0 = s_0 < s_1 < ... < s_m = 1

At each step log-weights gain (s_j - s_{j-1}) r / alpha of the particles before they move, log Z-hat adds up logmeanexp of the
weights at every resampling, and every particle then makes suffix moves that leave p_{s_j} invariant (Neal 2001; Del Moral,
Doucet and Jasra 2006). exp(log Z-hat) is unbiased for a schedule that is fixed beforehand. A schedule chosen from the same
particles would bias it, so a pilot run with its own random numbers chooses the schedule, which is then fixed.

Particles of `SMC` grow token by token and need a twist to anticipate the reward; here they are whole completions throughout.
Along the path they also estimate the frontier of reward against KL between the prior and the posterior at alpha.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bayes_klrl.checks import check_count, check_fraction, check_posterior_given
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.mcmc.suffix_moves import check_cut
from bayes_klrl.inference.sampling.importance import require_positive_weight
from bayes_klrl.inference.sampling.proposals import Proposal, resolve_proposal
from bayes_klrl.inference.smc.swarm import Swarm, next_powers
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.randomness import Streams
from bayes_klrl.resampling import resampling_scheme
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, LanguageModel
from bayes_klrl.weights import grouped_ess, log_evidence_se, logmeanexp, psis

__all__ = ["AnnealedSMC"]

_MOST_STEPS = 100  # most steps of a schedule that a pilot chooses
_PILOT_STREAM, _MOVES = 1, 2  # numbers of the streams of the pilot and of moves


@dataclass(frozen=True)
class AnnealedSMC:
    """Particles that start as prior draws and follow tempered posteriors while the reward is turned on.

    Parameters
    ----------
    num_particles
        Number of particles per prompt, N; every prompt has its own population.
    schedule
        The powers s_1 < ... < s_m = 1, the same for all prompts, or None: a pilot run chooses them for each prompt.
    conditional_ess
        The pilot chooses each step so that conditional ESS / N has this value, between 0 and 1; values near 1 give more and
        smaller steps.
    num_pilot
        Number of particles per prompt in the pilot run.
    num_moves
        Number of suffix moves per particle and step.
    ess_threshold, resampling
        When and how to resample, as in `SMC`. Nothing is resampled at the end.
    proposal, cut
        The model that draws new suffixes, and the rule for cuts, as in `SuffixMH`.

    Notes
    -----
    `Draws.info` holds the path, shape (P, m + 1) from s = 0 on, padded with s = 1 for prompts with fewer steps: `schedule`,
    `path_log_evidence` (log Z(s)), `path_reward` (E[r] under p_s), `path_kl` (KL(p_s || p0) in nats), `path_ess`, and
    `acceptance_rate` of the moves. The target at s = 0 is the prior restricted to completions of positive likelihood, and its
    log evidence is the log prior mass of the constraints. `Draws.ess` counts families, as in `SMC`; because moves make the
    members of a family differ, it is a cautious value. `log_proposal` is NaN.

    Examples
    --------
    The reward is the number of heads among four tosses of a coin, log Z = 4 log((1 + e) / 2) = 2.48.

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    >>> heads = bk.TokenReward(lambda tokens, lengths: tokens.sum(axis=1), alpha=1.0)
    >>> annealed = bk.AnnealedSMC(1000, schedule=(0.3, 1.0))
    >>> draws = annealed.run(bk.Posterior(coin, heads, max_new_tokens=4), seed=0)
    >>> draws.info["schedule"], bool(abs(draws.log_evidence[0] - 2.48) < 0.2)
    (array([[0. , 0.3, 1. ]]), True)
    """

    num_particles: int
    schedule: Sequence[float] | None = field(default=None, kw_only=True)
    conditional_ess: float = field(default=0.9, kw_only=True)
    num_pilot: int = field(default=64, kw_only=True)
    num_moves: int = field(default=1, kw_only=True)
    ess_threshold: float = field(default=0.5, kw_only=True)
    resampling: str = field(default="systematic", kw_only=True)
    proposal: Proposal = field(default=None, kw_only=True)
    cut: str = field(default="own_length", kw_only=True)

    def __post_init__(self) -> None:
        for name in ("num_particles", "num_pilot", "num_moves"):
            check_count(name, getattr(self, name))
        for name in ("ess_threshold", "conditional_ess"):
            check_fraction(name, getattr(self, name))
        if self.conditional_ess in (0, 1):
            raise BayesKLRLError(f"conditional_ess must lie between 0 and 1; got {self.conditional_ess!r}.")
        resampling_scheme(self.resampling)
        check_cut(self.cut)
        if self.schedule is not None:
            object.__setattr__(self, "schedule", _checked_schedule(self.schedule))

    @property
    def rows_per_prompt(self) -> int | None:
        """Completions per prompt that are decoded at once, if a schedule is given; prompts wait for each other otherwise."""
        return None if self.schedule is None else self.num_particles

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`.

        Raises
        ------
        BudgetError
            If all particles of some prompt have likelihood 0. The error carries the draws.
        """
        check_posterior_given(posterior)
        proposal, training = resolve_proposal(self.proposal, posterior, seed, progress)
        models, start = (proposal, posterior.prior), time.perf_counter()
        schedule, pilot_tokens = self._resolved_schedule(posterior, models, seed)
        rngs, scheme = Streams.of(seed, _MOVES).generators(posterior.prompt_ids), resampling_scheme(self.resampling)
        swarm = Swarm(posterior, models, self.num_particles, Streams.of(seed))
        swarm.resample_where_degenerate(self.ess_threshold, scheme, rngs)
        num_steps = schedule.shape[1]
        with track("annealing", num_steps, progress) as advance:
            for step, power in enumerate(schedule.T, start=1):
                swarm.temper(power)
                if step < num_steps:
                    swarm.resample_where_degenerate(self.ess_threshold, scheme, rngs)
                swarm.move(self.num_moves, self.cut, rngs)
                advance()
        seconds = time.perf_counter() - start
        cost = replace(training, seconds=seconds, model_tokens=swarm.model_tokens + pilot_tokens)
        return require_positive_weight(self._draws(posterior, swarm, cost), posterior)

    def _resolved_schedule(
        self, posterior: Posterior, models: tuple[LanguageModel, LanguageModel], seed: int
    ) -> tuple[FloatArray, int]:
        """Return s_1 to s_m of each prompt, (P, m), and the number of model tokens that choosing them took."""
        if self.schedule is not None:
            return np.tile(np.array(self.schedule), (posterior.num_prompts, 1)), 0
        rngs = Streams.of(seed, _PILOT_STREAM, _MOVES).generators(posterior.prompt_ids)
        scheme = resampling_scheme(self.resampling)
        swarm = Swarm(posterior, models, self.num_pilot, Streams.of(seed, _PILOT_STREAM))
        steps: list[FloatArray] = []
        swarm.resample_where_degenerate(self.ess_threshold, scheme, rngs)
        while (swarm.power < 1).any():
            steps.append(next_powers(swarm, self.conditional_ess, 1 / (_MOST_STEPS - len(steps))))
            swarm.temper(steps[-1])
            if (swarm.power < 1).any():  # else there is no further step to choose
                swarm.resample_where_degenerate(self.ess_threshold, scheme, rngs)
                swarm.move(self.num_moves, self.cut, rngs)
        return np.stack(steps, axis=1), swarm.model_tokens

    def _draws(self, posterior: Posterior, swarm: Swarm, cost: Cost) -> Draws:
        """Return the particles, their final weights including the accumulated log evidence."""
        states, shape = swarm.states, swarm.shape
        draws = Draws.equally_weighted(
            posterior,
            Sequences(states.tokens.reshape(*shape, -1), states.lengths.reshape(shape)),
            method=type(self).__name__,
            reward=states.reward.reshape(shape),
            log_prior=states.log_probs[1].reshape(shape),
            log_proposal=None,
            cost=cost,
        )
        log_weights = swarm.log_weights + swarm.log_evidence[:, None]
        ess = np.array([grouped_ess(row, family) for row, family in zip(log_weights, swarm.family, strict=True)])
        return replace(
            draws,
            log_weights=log_weights,
            log_evidence=logmeanexp(log_weights),
            log_evidence_se=log_evidence_se(ess, shape[1], swarm.num_resampled),
            ess=ess,
            pareto_k=psis(log_weights)[1],
            info={name: np.stack(values, axis=1) for name, values in swarm.path.items()},
        )


def _checked_schedule(schedule: object) -> tuple[float, ...]:
    """Return s_1 to s_m as floats; raise a `BayesKLRLError` unless they increase from above 0 to exactly 1."""
    try:
        powers = tuple(float(power) for power in schedule)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        powers = ()
    if not powers or powers[-1] != 1 or not (np.diff((0.0, *powers)) > 0).all():
        raise BayesKLRLError(
            f"A schedule must increase from above 0 to exactly 1, such as (0.1, 0.3, 1.0); got {schedule!r}."
        )
    return powers
