"""Suffix moves: the Metropolis-Hastings step on completions that Markov chains and annealing share (theory.md 6.6).

    cut x at t, keep x_1:t, draw the rest from q, accept the new x' with probability min(1, ratio)

    ratio = w(x') / w(x) [|x| / |x'| if t is uniform on 0 .. |x| - 1],   w(x) = p0(x) exp(s r(x) / alpha) / q(x)

The prefix cancels, so the ratio can be computed from whole completions; with q = p0 it is exp(s (r' - r) / alpha). The move
leaves the posterior invariant for s = 1, and a tempered posterior for 0 < s < 1. If t is uniform on 0 .. T - 1 whatever |x|,
with no move for t >= |x|, both directions are equally likely and there is no factor |x| / |x'|. In the other case the factor
is needed, because a long completion is cut at any given place less often; omitting it is a common mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.completions import Completions, joined
from bayes_klrl.models.decoding import Decoding
from bayes_klrl.models.memory import Part
from bayes_klrl.models.out_of_memory import by_halves
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Generators
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel

__all__ = ["CUTS", "States", "check_cut", "draw_cuts", "log_acceptance", "suffix_move", "tempered"]

CUTS = ("own_length", "max_length")


@dataclass(frozen=True, eq=False)
class States:
    """One completion per chain or particle, R = P * N rows, prompt by prompt.

    Parameters
    ----------
    tokens, lengths, reward
        The completions and their rewards, shapes (R, T), (R,) and (R,).
    log_probs
        log q(x) and log p0(x) in nats, (2, R).
    """

    tokens: IntArray
    lengths: IntArray
    reward: FloatArray
    log_probs: FloatArray

    def taken(self, rows: IntArray) -> States:
        """Return the states of some rows."""
        return States(self.tokens[rows], self.lengths[rows], self.reward[rows], self.log_probs[:, rows])

    def where(self, chosen: np.ndarray, other: States) -> States:
        """Return the rows of `other` where `chosen` (R,) is true, and its own rows elsewhere."""
        return States(
            np.where(chosen[:, None], other.tokens, self.tokens),
            np.where(chosen, other.lengths, self.lengths),
            np.where(chosen, other.reward, self.reward),
            np.where(chosen, other.log_probs, self.log_probs),
        )

    def log_weights(self, posterior: Posterior, power: FloatArray | float) -> FloatArray:
        """Return log p0 + s r / alpha - log q, (R,), with s = `power`, a number or an array (R,)."""
        log_proposal, log_prior = self.log_probs
        log_ratio = np.where(np.isneginf(log_prior), -np.inf, log_prior - log_proposal)
        weights: FloatArray = log_ratio + tempered(posterior.likelihood.log_likelihood(self.reward), power)
        return weights


def tempered(log_likelihood: FloatArray, power: FloatArray | float) -> FloatArray:
    """Return s times the log-likelihood; -inf stays -inf at every s, including 0."""
    with np.errstate(invalid="ignore"):  # 0 * -inf
        result: FloatArray = np.where(np.isneginf(log_likelihood), -np.inf, power * log_likelihood)
    return result


def check_cut(cut: object) -> None:
    """Raise a `BayesKLRLError` for an unknown rule for cuts."""
    if cut not in CUTS:
        raise BayesKLRLError(f"Unknown rule for cuts {cut!r}; choose one of {list(CUTS)}.")


def draw_cuts(lengths: IntArray, max_new_tokens: int, cut: str, uniforms: FloatArray) -> IntArray:
    """Return t, the number of kept tokens of each row, (R,): uniform on 0 .. |x| - 1, or on 0 .. T - 1 for "max_length".

    `uniforms` are random numbers from [0, 1), shape (R,).
    """
    below = lengths if cut == "own_length" else np.full(lengths.shape, max_new_tokens)
    return np.minimum((uniforms * below).astype(np.int64), below - 1)


def log_acceptance(
    log_weights: FloatArray, new_log_weights: FloatArray, lengths: IntArray, new_lengths: IntArray, cut: str
) -> FloatArray:
    """Return log min(1, ratio) of moves from x to x', (R,); 0 if x has weight 0, so that such a state is always left.

    Parameters
    ----------
    log_weights, new_log_weights
        log w(x) and log w(x'), (R,) each.
    lengths, new_lengths
        |x| and |x'|, (R,) each.
    cut
        The rule for cuts, one of `CUTS`.
    """
    with np.errstate(invalid="ignore"):  # -inf - -inf
        log_ratio = new_log_weights - log_weights
    if cut == "own_length":
        log_ratio = log_ratio + np.log(lengths) - np.log(new_lengths)
    result: FloatArray = np.minimum(np.where(np.isneginf(log_weights), 0.0, log_ratio), 0.0)
    return result


@dataclass(frozen=True, eq=False)
class Moved:
    """The result of one move of every row.

    Parameters
    ----------
    states
        The states after the move.
    proposed, accepted
        Whether a row was cut before its end, and whether its new suffix was accepted, bool (R,) each.
    model_tokens
        Number of tokens that passed through a model.
    """

    states: States
    proposed: np.ndarray
    accepted: np.ndarray
    model_tokens: int


def suffix_move(
    posterior: Posterior,
    models: Sequence[LanguageModel],
    states: States,
    power: FloatArray | float,
    cut: str,
    rngs: Generators,
) -> Moved:
    """Move every row once, all rows in one decoding: kept tokens are forced, the others are drawn.

    Parameters
    ----------
    posterior
        The posterior.
    models
        The language models (q, p0).
    states
        The current completions, N per prompt.
    power
        s, a number or an array (R,).
    cut
        The rule for cuts, one of `CUTS`.
    rngs
        One generator per prompt for cuts, tokens and decisions. Every move takes the same number of values from each,
        whatever the lengths of completions.
    """
    num_rows = states.lengths.size
    num_draws = num_rows // posterior.num_prompts
    width = posterior.max_new_tokens
    each = [rng.random((width + 2, num_draws)) for rng in rngs]
    uniforms = np.concatenate(each, axis=1)  # (T + 2, R)
    cuts = draw_cuts(states.lengths, width, cut, uniforms[width])
    index = np.arange(num_rows).reshape(-1, num_draws)

    def decoded(part: Part) -> Completions:
        own, ids = part.of(index), [posterior.prompt_ids[p] for p in part.prompts]
        decoding = Decoding(models, ids, part.last - part.first, width)
        while not decoding.done:
            t = decoding.step_count
            decoding.step(uniforms[t, own], np.where(t < cuts[own], states.tokens[own, t], -1))
        return decoding

    whole = Part(np.arange(posterior.num_prompts), 0, num_draws)
    found = list(by_halves(decoded, [whole], Part.size, Part.halves, doing="moved", models=models, num_tokens=width))
    rows = [part.of(index) for part, _ in found]
    decoding = joined([each for _, each in found], rows, np.repeat(np.arange(posterior.num_prompts), num_draws))
    reward = posterior.reward_of_rows(decoding.tokens, decoding.lengths, decoding.prompt_index)
    new = States(decoding.tokens, decoding.lengths, reward, decoding.log_probs)
    log_accept = log_acceptance(
        states.log_weights(posterior, power), new.log_weights(posterior, power), states.lengths, new.lengths, cut
    )
    with np.errstate(divide="ignore"):
        accepted = np.log(uniforms[width + 1]) < log_accept
    proposed = cuts < states.lengths
    return Moved(states.where(accepted, new), proposed, accepted & proposed, decoding.model_tokens)
