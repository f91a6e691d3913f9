"""Proposing and accepting until there are N draws: the loop shared by rejection, quasi-rejection and the starts of chains.

    x ~ q,   accept with probability min(1, w(x) / B),   w = p0(x) exp(r(x) / alpha) / q(x) or any other weight

Proposals are drawn in blocks whose size adapts to the acceptance rate; each prompt's stream of proposals is read in order
and ends with its N-th acceptance. The result therefore does not depend on the blocks: accepted completions are independent
draws from q min(1, w / B), normalised, and the number of proposals has a negative binomial distribution. Only where a prompt
is given up before its budget ends (`Accepted.is_hopeless`) the blocks say when; there are no draws then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bayes_klrl.checks import check_count
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError, BudgetError
from bayes_klrl.inference.sampling.drawing import Drawn, draw
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.prompts.part import named_prompt
from bayes_klrl.randomness import Streams, prompt_keys
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel
from bayes_klrl.weights import logsumexp

__all__ = ["Accepted", "accept_reject", "check_max_proposals"]

_ACCEPTANCE = 1  # number of the streams that decide on acceptance
_MAX_ROWS = 4096  # most proposals in one block, over all prompts
_MARGIN = 1.2  # proposals per expected need: a little waste is cheaper than one more block
_HOPELESS = 0.01  # acceptances expected in the whole budget below which a prompt without any is given up
_DOUBT = 1e-3  # probability with which each of the two bounds on them may be wrong

LogWeights = Callable[[Drawn], FloatArray]


@dataclass(eq=False)
class Accepted:
    """The first N accepted proposals of each of P prompts; fewer if the budget ends first.

    Parameters
    ----------
    tokens, lengths, log_probs, reward
        The accepted completions, shapes (P, N, T), (P, N), (models, P, N) and (P, N); entries from `num_accepted` on are
        not used.
    num_accepted, num_proposals
        Acceptances of each prompt, and proposals up to and including the N-th acceptance, (P,) each.
    num_drawn, log_sum_weights, log_sum_acceptance, log_largest_prior
        Number, log sum of w, log sum of min(1, w / B) and largest log p0 of all proposals that were drawn, (P,) each.
        Proposals after the N-th acceptance are included.
    model_tokens
        Number of tokens that passed through a model.
    """

    tokens: IntArray
    lengths: IntArray
    log_probs: FloatArray
    reward: FloatArray
    num_accepted: IntArray
    num_proposals: IntArray
    num_drawn: IntArray
    log_sum_weights: FloatArray
    log_sum_acceptance: FloatArray
    log_largest_prior: FloatArray
    model_tokens: int = 0

    @classmethod
    def none(cls, num_models: int, posterior: Posterior, num_draws: int) -> Accepted:
        """Return the empty record before the first block."""
        shape = (posterior.num_prompts, num_draws)
        zero, nothing = np.zeros(shape[0], dtype=np.int64), np.full(shape[0], -np.inf)
        return cls(
            tokens=np.full((*shape, posterior.max_new_tokens), posterior.pad_token, dtype=np.int64),
            lengths=np.ones(shape, dtype=np.int64),
            log_probs=np.full((num_models, *shape), -np.inf),
            reward=np.full(shape, -np.inf),
            num_accepted=zero.copy(),
            num_proposals=zero.copy(),
            num_drawn=zero.copy(),
            log_sum_weights=nothing.copy(),
            log_sum_acceptance=nothing.copy(),
            log_largest_prior=nothing.copy(),
        )

    @property
    def log_mean_weight(self) -> FloatArray:
        """Log mean of w over all proposals, (P,): the importance-sampling estimate of log Z."""
        return self.log_sum_weights - np.log(self.num_drawn)

    @property
    def log_acceptance_rate(self) -> FloatArray:
        """Log mean of min(1, w / B) over all proposals, (P,)."""
        return self.log_sum_acceptance - np.log(self.num_drawn)

    def open_prompts(self, max_proposals: int) -> IntArray:
        """Return the indices of prompts that need more draws and have budget left; they all have equally many proposals."""
        return np.flatnonzero((self.num_accepted < self.reward.shape[1]) & (self.num_proposals < max_proposals))

    def is_hopeless(self, prior_power: float, max_proposals: int) -> bool:
        """Return whether some prompt has no acceptance and can expect none, w / B being p0(x)^k at most, k = `prior_power`.

        With L = log(1 / 0.001), n proposals so far and their mean acceptance probability m,

            u = max(L / n, largest p0 seen),    rate <= (sqrt(m + h) + sqrt(h))^2,    h = u^k L / (2 n).

        No completion has p0(x) > u, since it would have been missed with probability (1 - u)^n <= 0.001 only; so acceptance
        probabilities are in [0, u^k], and the second bound is Chernoff's (theory.md 6.3). Without a `prior_power` no prompt
        is given up: rare completions that are accepted for another reason than their p0 cannot be excluded.

        The draws are exact all the same. The decision is made by proposals that were all rejected, and what is accepted
        later is independent of them; a prompt with an acceptance is never given up.
        """
        if prior_power <= 0:
            return False
        level, drawn = -np.log(_DOUBT), self.num_drawn
        u = np.minimum(np.maximum(level / drawn, np.exp(self.log_largest_prior)), 1.0)
        h = u**prior_power * level / (2 * drawn)
        rate = (np.sqrt(np.exp(self.log_acceptance_rate) + h) + np.sqrt(h)) ** 2
        return bool(((self.num_accepted == 0) & (max_proposals * rate < _HOPELESS)).any())

    def next_block(self, prompts: IntArray, max_proposals: int) -> int:
        """Return the number of proposals per open prompt in the next block: what the slowest of them is expected to need."""
        lacking, drawn = self.reward.shape[1] - self.num_accepted[prompts], self.num_drawn[prompts]
        rate = np.maximum(np.exp(self.log_sum_acceptance[prompts]), 0.5) / np.maximum(drawn, 1)
        needed = np.where(drawn == 0, lacking, _MARGIN * lacking / rate).max()
        budget = max_proposals - int(self.num_proposals[prompts[0]])
        return min(int(np.ceil(needed)), budget, max(1, _MAX_ROWS // prompts.size))

    def add(
        self, prompts: IntArray, drawn: Drawn, log_weights: FloatArray, log_acceptance: FloatArray, taken: np.ndarray
    ) -> None:
        """Store the accepted proposals of a block in order, up to N in all."""
        for row, p in enumerate(prompts):
            start = self.num_accepted[p]
            chosen = np.flatnonzero(taken[row])[: self.reward.shape[1] - start]
            place = slice(start, start + chosen.size)
            self.tokens[p, place], self.lengths[p, place] = (
                drawn.sequences.tokens[row, chosen],
                drawn.sequences.lengths[row, chosen],
            )
            self.log_probs[:, p, place], self.reward[p, place] = (
                drawn.log_probs[:, row, chosen],
                drawn.reward[row, chosen],
            )
            self.num_accepted[p] += chosen.size
            complete = self.num_accepted[p] == self.reward.shape[1]
            self.num_proposals[p] += chosen[-1] + 1 if complete else taken.shape[1]
        self.num_drawn[prompts] += taken.shape[1]
        self.log_sum_weights[prompts] = np.logaddexp(self.log_sum_weights[prompts], logsumexp(log_weights))
        self.log_sum_acceptance[prompts] = np.logaddexp(self.log_sum_acceptance[prompts], logsumexp(log_acceptance))
        self.log_largest_prior[prompts] = np.maximum(self.log_largest_prior[prompts], drawn.log_probs[-1].max(axis=1))
        self.model_tokens += drawn.model_tokens

    def draws(self, posterior: Posterior, method: str, cost: Cost) -> Draws:
        """Return the accepted completions as N equally weighted draws per prompt.

        Raises
        ------
        BudgetError
            If some prompt has fewer than N. The error carries the first M draws of every prompt, where M is the smallest
            number of acceptances; it carries None if M = 0.
        """
        num_draws, least = self.reward.shape[1], int(self.num_accepted.min())
        draws = None
        if least:
            draws = Draws.equally_weighted(
                posterior,
                Sequences(self.tokens[:, :least], self.lengths[:, :least]),
                method=method,
                reward=self.reward[:, :least],
                log_prior=self.log_probs[-1][:, :least],
                log_proposal=None,
                cost=replace(cost, model_tokens=self.model_tokens),
            )
        if draws is None or least < num_draws:
            p = int(self.num_accepted.argmin())
            raise BudgetError(
                f"{method}: {self.num_accepted[p]} of num_draws = {num_draws} draws of "
                f"{named_prompt(posterior, p)} were accepted in {self.num_proposals[p]} proposals. Raise "
                "max_proposals, use a larger alpha, or use bk.SMC, which has no acceptance step.",
                draws,
            )
        return draws


def accept_reject(
    models: Sequence[LanguageModel],
    posterior: Posterior,
    log_weights: LogWeights,
    log_bound: float,
    num_draws: int,
    max_proposals: int,
    streams: Streams,
    *,
    description: str,
    progress: bool,
    prior_power: float = 0.0,
) -> Accepted:
    """Propose until each prompt has N acceptances or has used up its budget, or some prompt can expect none.

    Parameters
    ----------
    models, posterior
        The models that score completions, of which `models[0]` proposes, and the posterior; see `draw`.
    log_weights
        A function that returns log w of drawn proposals, (P, N).
    log_bound
        The bound log B, in nats.
    num_draws, max_proposals
        Number of acceptances wanted per prompt, N, and the largest number of proposals per prompt.
    streams, description, progress
        Random numbers, title of the progress bar and whether it is shown; see `draw`.
    prior_power
        A number k such that w / B <= p0(x)^k, with the prior as proposal; 0 if none is known. See `Accepted.is_hopeless`.
    """
    keys = prompt_keys(posterior.prompt_ids)
    accepted = Accepted.none(len(models), posterior, num_draws)
    with track(description, num_draws * posterior.num_prompts, progress) as advance:
        while (prompts := accepted.open_prompts(max_proposals)).size:
            before = int(accepted.num_accepted.sum())
            size = accepted.next_block(prompts, max_proposals)
            first = int(accepted.num_drawn[prompts[0]])  # all open prompts have proposed equally often
            drawn = draw(
                models, posterior, size, streams, description=description, progress=False, prompts=prompts, first=first
            )
            log_w = log_weights(drawn)
            log_acceptance = np.minimum(log_w - log_bound, 0.0)
            chances = streams.beside(_ACCEPTANCE).uniforms([keys[p] for p in prompts], first, size, 1)
            with np.errstate(divide="ignore"):
                taken = np.log(chances.reshape(log_w.shape)) < log_acceptance  # never at -inf
            accepted.add(prompts, drawn, log_w, log_acceptance, taken)
            advance(int(accepted.num_accepted.sum()) - before)
            if accepted.is_hopeless(prior_power, max_proposals):
                break  # exact draws are wanted of every prompt
    return accepted


def check_max_proposals(max_proposals: object, num_draws: int) -> None:
    """Raise a `BayesKLRLError` if `max_proposals` is smaller than `num_draws`."""
    check_count("max_proposals", max_proposals)
    if max_proposals < num_draws:  # type: ignore[operator]
        raise BayesKLRLError(
            f"max_proposals = {max_proposals} per prompt is less than num_draws = {num_draws}. Raise max_proposals."
        )
