"""The methods of the suite, and how each spends the same number of model tokens.

A budget of tokens is a number of completions, by their mean length under the prior, and a method has passes over completions
to spend it on: one to draw from the prior, a pilot for a twist, one for each step of an annealing path, three to train on one
(draw, score, differentiate), two to draw from a guide and score. Tokens are counted as if every completion went through the
model by itself. The package's own decoding shares what has the same prefix: on vocabularies of two or four tokens that makes
nearly everything free, which says nothing about methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import numpy as np

from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError, BudgetError
from bayes_klrl.inference.exact.message_lm import MessageTwist
from bayes_klrl.inference.exact.messages import backward_messages, why_no_messages
from bayes_klrl.inference.mcmc.suffix_mh import SuffixMH
from bayes_klrl.inference.sampling.best_of_n import BestOfN
from bayes_klrl.inference.sampling.importance import ImportanceSampling
from bayes_klrl.inference.sampling.rejection import RejectionSampling, largest_log_likelihood
from bayes_klrl.inference.smc.annealing import AnnealedSMC
from bayes_klrl.inference.smc.smc import SMC
from bayes_klrl.inference.svi.svi import SVI
from bayes_klrl.models.twists.simple import PartialRewardTwist, prior_pilot
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import Algorithm

__all__ = ["METHODS", "Recipe", "run_or_partial", "tokens_per_completion"]

Recipe = Callable[[Posterior, int], Algorithm]
"""A function (posterior, size) that makes an algorithm which passes `size` completions per prompt through a model once."""

_LEAST_SIZE = 16
_BEST_OF = 16
_NUM_CHAINS = 8
_NUM_PILOT = 64  # completions that SMC's partial-reward twist and the annealing schedule are made from
_SVI_PARTICLES = 32
_LEAST_STEPS = 20  # of gradient; with fewer, nothing has been learned that could be judged


def _best_of_n(_: Posterior, size: int) -> Algorithm:
    return BestOfN(_BEST_OF, size // _BEST_OF)


def _suffix_mh(posterior: Posterior, size: int) -> Algorithm:
    """Return chains of which half is warm-up, less what it costs to find a possible completion for each to start from."""
    chance = _chance_of_possible(posterior, 16 * _NUM_PILOT)
    if chance < 0.01:
        chance = _chance_of_possible(posterior, max(size, 16 * _NUM_PILOT))
    starts = int(_NUM_CHAINS / chance)
    kept = max(0, size - starts) // (2 * _NUM_CHAINS)
    if kept < 4:
        raise BayesKLRLError(
            f"the budget pays {kept} sweeps of {_NUM_CHAINS} chains after warm-up, at least 4 are needed; finding their "
            f"starts takes about {starts:,} completions"
        )
    return SuffixMH(_NUM_CHAINS, kept, num_warmup=kept)


def _smc(_: Posterior, size: int, *, has_pilot: bool, **options: Any) -> Algorithm:
    return SMC(_affordable(size - _NUM_PILOT if has_pilot else size, "after its pilot"), **options)


def _annealed(posterior: Posterior, size: int) -> Algorithm:
    """Return annealed SMC with as many particles as its path leaves: each step moves all of them once."""
    path = run_or_partial(AnnealedSMC(_LEAST_SIZE, num_pilot=_NUM_PILOT), posterior, 0)[0].info["schedule"]
    num_passes = path.shape[1]
    return AnnealedSMC(_affordable(size // num_passes - _NUM_PILOT, f"over {num_passes} steps"), num_pilot=_NUM_PILOT)


def _exact_twist(posterior: Posterior, size: int) -> Algorithm:
    return SMC(size, proposal="twisted", twist=_optimal_twist(posterior))


def _chance_of_possible(posterior: Posterior, num_draws: int) -> float:
    """Return how often a prior completion has positive likelihood, of the worst prompt; half a hit where there was none."""
    possible = np.isfinite(prior_pilot(posterior, num_draws, Streams.of(0))[1]).sum(axis=1)
    return float(max(0.5, possible.min()) / num_draws)


@lru_cache(maxsize=4)
def _optimal_twist(posterior: Posterior) -> MessageTwist:
    """Return the exact twist, solved once per posterior."""
    obstacle = why_no_messages(posterior)
    if obstacle is not None:
        raise BayesKLRLError(f"no exact twist is known: {obstacle}")
    return backward_messages(posterior).twist()


def _svi_then_is(_: Posterior, size: int) -> Algorithm:
    """Return SVI for two thirds of the tokens, and importance sampling from its guide for one."""
    num_steps = size * 2 // (3 * 3 * _SVI_PARTICLES)
    if num_steps < _LEAST_STEPS:
        raise BayesKLRLError(
            f"the budget pays {num_steps} gradient steps of {_SVI_PARTICLES} completions, at least {_LEAST_STEPS} are needed"
        )
    return ImportanceSampling(size // (3 * 2), proposal=SVI(num_steps, _SVI_PARTICLES))


def _affordable(size: int, when: str) -> int:
    """Return a number of particles, or say that it is too small to be worth running."""
    if size < _LEAST_SIZE:
        raise BayesKLRLError(f"the budget pays {max(size, 0)} particles {when}, at least {_LEAST_SIZE} are needed")
    return size


@dataclass(frozen=True)
class _Rejection:
    """Rejection sampling that proposes `num_proposals` completions of each prompt and keeps what is accepted."""

    num_proposals: int

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`; for one prompt log Z-hat is the log of the share accepted, plus the bound."""
        sampler = RejectionSampling(self.num_proposals, max_proposals=self.num_proposals)
        try:
            draws = sampler.run(posterior, seed=seed, progress=progress)
        except BudgetError as error:  # those accepted within a fixed number of proposals are exact draws, too
            if error.draws is None or not error.draws.shape[1]:
                raise
            draws = error.draws
        num_prompts, num_accepted = draws.shape
        log_evidence = np.full(num_prompts, np.nan)
        if num_prompts == 1:  # of several, only as many draws are kept as the unluckiest has
            log_evidence[:] = np.log(num_accepted / self.num_proposals) + largest_log_likelihood(posterior)
        return replace(draws, log_evidence=log_evidence, ess=np.full(num_prompts, float(num_accepted)))


METHODS: Mapping[str, Recipe] = MappingProxyType(
    {
        "prior-is": lambda posterior, size: ImportanceSampling(size),
        "best-of-n": _best_of_n,
        "rejection": lambda posterior, size: _Rejection(size),
        "suffix-mh": _suffix_mh,
        "annealed-smc": _annealed,
        "smc-no-twist": partial(_smc, has_pilot=False, twist=0.0),
        "smc": partial(_smc, has_pilot=False),
        "smc-partial": partial(_smc, has_pilot=True, twist=PartialRewardTwist()),
        "smc-exact-twist": _exact_twist,
        "svi-is": _svi_then_is,
    }
)
"""The methods by name: importance sampling from the prior, best of 16, rejection, Metropolis-Hastings on suffixes, annealed
SMC, SMC with the twist psi = 1, a constant, the reward so far, or the exact one, and SVI with importance sampling from its
guide."""


def tokens_per_completion(posterior: Posterior, seed: int) -> float:
    """Return the mean length of a prior completion, summed over prompts."""
    drawn, _ = prior_pilot(posterior, 4 * _NUM_PILOT, Streams.of(seed))
    return float(drawn.lengths.sum() / (4 * _NUM_PILOT))


def run_or_partial(algorithm: Algorithm, posterior: Posterior, seed: int) -> tuple[Draws, str]:
    """Return an algorithm's draws, also the partial ones of a spent budget, and a note on them."""
    try:
        return algorithm.run(posterior, seed=seed), ""
    except BudgetError as error:
        if error.draws is None or not error.draws.shape[1]:
            raise
        return error.draws, str(error)
