"""Markov chains on completions, by suffix moves; see `suffix_moves` for the step and its acceptance."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np

from bayes_klrl.checks import check_count
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BudgetError
from bayes_klrl.inference.mcmc.diagnostics import ess_bulk, r_hat
from bayes_klrl.inference.mcmc.suffix_moves import Moved, States, check_cut, suffix_move
from bayes_klrl.inference.sampling.accept_reject import accept_reject
from bayes_klrl.inference.sampling.drawing import Drawn
from bayes_klrl.inference.sampling.proposals import Proposal, resolve_proposal
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.randomness import Streams
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = ["SuffixMH"]

_START = 1  # of the streams that starts of chains are drawn from
_START_PROPOSALS = 10_000  # prior draws for each prompt among which a chain's start is looked for


@dataclass(frozen=True)
class SuffixMH:
    """Several Markov chains for each prompt that redraw the end of a completion and accept or not.

    Chains start from prior draws of positive likelihood. They advance together, all prompts' in one decoding a sweep; kept
    tokens pass through the model again, beside those that are drawn.

    Parameters
    ----------
    num_chains
        C for each prompt; two or more, or R-hat cannot be computed.
    num_draws
        D kept of each chain, so that N = C * D.
    num_warmup
        Sweeps that are not kept.
    thinning
        Sweeps for each draw that is kept.
    proposal
        Draws the new suffix; see `ImportanceSampling`.
    cut
        How many tokens are kept: uniform on 0 .. |x| - 1 ("own_length"), or on 0 .. T - 1 with nothing done where the
        completion is shorter ("max_length"). Both are exact; the first wastes no sweep.

    Notes
    -----
    Draws are ordered chain by chain: draw d of chain c is n = c * D + d, as `Draws.info["chain"]` (N,) says, and
    `Draws.to_arviz()` has C chains. Of each prompt, (P,): `acceptance_rate`, and for the scalars `reward`, `log_prior` and
    `length` ArviZ's R-hat and bulk ESS, `r_hat_reward` and so on, `ess_bulk_reward` and so on, NaN where a scalar is
    constant. `Draws.ess` is the smallest of the three bulk ESS. Above R-hat = 1.01 the chains disagree; below it they may
    all have missed the same mode.
    """

    num_chains: int
    num_draws: int
    num_warmup: int = field(default=100, kw_only=True)
    thinning: int = field(default=1, kw_only=True)
    proposal: Proposal = field(default=None, kw_only=True)
    cut: str = field(default="own_length", kw_only=True)

    def __post_init__(self) -> None:
        check_count("num_chains", self.num_chains)
        check_count("num_draws", self.num_draws)
        check_count("num_warmup", self.num_warmup, least=0)
        check_count("thinning", self.thinning)
        check_cut(self.cut)

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`; `log_proposal` is NaN, for chains have no proposal density.

        Raises
        ------
        BudgetError
            If no prior draw of some prompt has positive likelihood: there is nowhere to start.
        """
        proposal, training = resolve_proposal(self.proposal, posterior, seed, progress)
        models, start = (proposal, posterior.prior), time.perf_counter()
        rngs = Streams.of(seed).generators(posterior.prompt_ids)
        states, model_tokens = starting_states(posterior, models, self.num_chains, Streams.of(seed, _START))
        kept: list[States] = []
        proposed, accepted = (np.zeros(states.lengths.size, dtype=np.int64) for _ in range(2))
        num_sweeps = self.num_warmup + self.num_draws * self.thinning
        with track("suffix MH", num_sweeps, progress) as advance:
            for sweep in range(1, num_sweeps + 1):
                moved = suffix_move(posterior, models, states, 1.0, self.cut, rngs)
                states, model_tokens = moved.states, model_tokens + moved.model_tokens
                if sweep > self.num_warmup:
                    proposed, accepted = _counted(proposed, accepted, moved)
                    if (sweep - self.num_warmup) % self.thinning == 0:
                        kept.append(states)
                advance()
        cost = replace(training, seconds=time.perf_counter() - start, model_tokens=model_tokens)
        rate = _per_prompt(accepted, posterior) / np.maximum(_per_prompt(proposed, posterior), 1)
        return self._draws(posterior, kept, rate, cost)

    def _draws(self, posterior: Posterior, kept: list[States], rate: FloatArray, cost: Cost) -> Draws:
        """Return the kept states, chain by chain, with what ArviZ says of them."""
        shape = (posterior.num_prompts, self.num_chains * self.num_draws)

        def chain_by_chain(name: str) -> np.ndarray:  # (D, P * C, ...) to (P, C * D, ...)
            stacked = np.stack([getattr(states, name) for states in kept], axis=1)
            return stacked.reshape(*shape, *stacked.shape[2:])

        draws = Draws.equally_weighted(
            posterior,
            Sequences(chain_by_chain("tokens"), chain_by_chain("lengths")),
            method=type(self).__name__,
            reward=chain_by_chain("reward"),
            log_prior=np.stack([states.log_probs[1] for states in kept], axis=1).reshape(shape),
            log_proposal=None,
            cost=cost,
        )
        scalars = {"reward": draws.reward, "log_prior": draws.log_prior, "length": draws.lengths.astype(np.float64)}
        info: dict[str, np.ndarray] = {"chain": np.repeat(np.arange(self.num_chains), self.num_draws)}
        info["acceptance_rate"] = rate
        for name, values in scalars.items():
            chains = values.reshape(shape[0], self.num_chains, self.num_draws)
            info[f"r_hat_{name}"], info[f"ess_bulk_{name}"] = r_hat(chains), ess_bulk(chains)
        ess = np.fmin.reduce([info[f"ess_bulk_{name}"] for name in scalars])
        return replace(draws, ess=ess, info=info)


def starting_states(
    posterior: Posterior, models: tuple[LanguageModel, LanguageModel], num_chains: int, streams: Streams
) -> tuple[States, int]:
    """Return prior draws of positive likelihood, one a chain, and the model tokens they took.

    `models` are (proposal, prior). Where fewer are found than there are chains, several chains start from the same one.
    """

    def possible(drawn: Drawn) -> FloatArray:
        return np.where(np.isneginf(drawn.reward), -np.inf, 0.0)

    proposal, prior = models
    found = accept_reject(
        (prior, proposal),
        posterior,
        possible,
        0.0,
        num_chains,
        max(_START_PROPOSALS, num_chains),
        streams,
        description="starts of chains",
        progress=False,
    )
    if not found.num_accepted.all():
        p = int(found.num_accepted.argmin())
        raise BudgetError(
            f"None of {found.num_proposals[p]} prior draws of prompt {p} ({posterior.prompts[p]!r}) has positive likelihood, "
            "so that a chain has nowhere to start. Use bk.SMC with a twist that knows the constraint, or relax it to log(eps)."
        )
    rows = np.arange(num_chains) % found.num_accepted[:, None]
    prompt = np.arange(posterior.num_prompts)[:, None]
    states = States(
        found.tokens[prompt, rows].reshape(rows.size, -1),
        found.lengths[prompt, rows].ravel(),
        found.reward[prompt, rows].ravel(),
        found.log_probs[::-1, prompt, rows].reshape(2, -1),
    )
    return states, found.model_tokens


def _counted(proposed: np.ndarray, accepted: np.ndarray, moved: Moved) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts of proposed and accepted moves, one sweep more."""
    return proposed + moved.proposed, accepted + moved.accepted


def _per_prompt(counts: np.ndarray, posterior: Posterior) -> FloatArray:
    """Return counts (P * C,) summed over chains, (P,)."""
    total: FloatArray = counts.reshape(posterior.num_prompts, -1).sum(axis=1).astype(np.float64)
    return total
