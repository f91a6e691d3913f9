"""Markov chains on completions by suffix moves; `suffix_moves` has the step and its acceptance probability."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np

from bayes_klrl.checks import check_count, check_posterior_given
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BudgetError
from bayes_klrl.inference.mcmc.diagnostics import ess_bulk, r_hat
from bayes_klrl.inference.mcmc.suffix_moves import Moved, States, check_cut, suffix_move
from bayes_klrl.inference.sampling.accept_reject import accept_reject
from bayes_klrl.inference.sampling.drawing import Drawn
from bayes_klrl.inference.sampling.proposals import Proposal, resolve_proposal
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.prompts.part import named_prompt
from bayes_klrl.randomness import Streams
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = ["SuffixMH"]

_START = 1  # number of the streams that draw the starts of chains
_START_PROPOSALS = 10_000  # most prior draws per prompt in the search for starts


@dataclass(frozen=True)
class SuffixMH:
    """Several Markov chains per prompt that redraw the end of a completion and accept or reject it.

    Chains start from prior draws of positive likelihood. The chains of all prompts advance together, with one decoding per
    sweep; kept tokens pass through the model again together with new ones.

    Parameters
    ----------
    num_chains
        Number of chains per prompt, C. R-hat needs at least two.
    num_draws
        Number of draws kept per chain, D, so that N = C * D.
    num_warmup
        Number of sweeps before the first draw is kept.
    thinning
        Number of sweeps per kept draw.
    proposal
        The model that draws new suffixes, as in `ImportanceSampling`.
    cut
        The number of tokens that are kept is uniform on 0 .. |x| - 1 ("own_length"), or uniform on 0 .. T - 1, with no move if
        the completion is shorter ("max_length"). Both are exact; the first wastes no sweep.

    Notes
    -----
    Draws are ordered chain by chain: draw d of chain c is n = c * D + d, `Draws.info["chain"]` (N,) gives its chain, and
    `Draws.to_arviz()` has C chains. `Draws.info` also has, in shape (P,), `acceptance_rate` and, for the scalars `reward`,
    `log_prior` and `length`, ArviZ's R-hat and bulk ESS (`r_hat_reward`, `ess_bulk_reward` and so on), NaN if the scalar is
    constant. `Draws.ess` is the smallest of the three bulk ESS. An R-hat above 1.01 means that the chains disagree; a smaller
    one does not exclude that all of them miss the same mode.

    Examples
    --------
    The reward is the number of heads among four tosses of a coin, with posterior mean 4 e / (1 + e) = 2.92.

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    >>> heads = bk.TokenReward(lambda tokens, lengths: tokens.sum(axis=1), alpha=1.0)
    >>> draws = bk.SuffixMH(4, 250, thinning=4).run(bk.Posterior(coin, heads, max_new_tokens=4), seed=0)
    >>> draws.shape, bool(abs(draws.reward.mean() - 2.92) < 0.2), bool(draws.info["r_hat_reward"][0] < 1.05)
    ((1, 1000), True, True)
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

    @property
    def rows_per_prompt(self) -> int:
        """Completions per prompt that are decoded at once; a prompt's draws do not depend on the others (`runners.blocks`)."""
        return self.num_chains

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`; `log_proposal` is NaN, because draws of a chain have no proposal density.

        Raises
        ------
        BudgetError
            If some prompt has no prior draw of positive likelihood, so that its chains have no start.
        """
        check_posterior_given(posterior)
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
        """Return the kept states, chain by chain, with ArviZ's diagnostics."""
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
    """Return prior draws of positive likelihood, one per chain, and the number of model tokens they took.

    `models` are (proposal, prior). If fewer draws are found than there are chains, several chains start from the same one.
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
            f"None of {found.num_proposals[p]} prior draws of {named_prompt(posterior, p)} has "
            "positive likelihood, so that chains have nowhere to start. Use bk.SMC with a twist that knows the "
            "constraint, or relax it to log(eps)."
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
    """Return the counts (R,) of proposed and accepted moves after one more sweep."""
    return proposed + moved.proposed, accepted + moved.accepted


def _per_prompt(counts: np.ndarray, posterior: Posterior) -> FloatArray:
    """Return counts (P * C,) summed over chains, (P,)."""
    total: FloatArray = counts.reshape(posterior.num_prompts, -1).sum(axis=1).astype(np.float64)
    return total
