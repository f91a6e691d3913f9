"""Exact expectations under a solved posterior: moments by a second backward pass, marginals by a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayes_klrl.inference.exact.backward_pass import BackwardPass, Step, StoredMessages
from bayes_klrl.inference.exact.prior_chains import Chain
from bayes_klrl.typing import FloatArray, IntArray

__all__ = ["Marginals", "PathMoments", "forward_marginals", "path_moments", "prior_mean"]


@dataclass(frozen=True, eq=False)
class Marginals:
    """Exact marginal distributions of a completion under the posterior.

    Parameters
    ----------
    length_law
        P(|x| = t) for t = 1..T, shape (P, T); a completion that is cut at T tokens has length T.
    truncated
        P(x does not end with EOS), shape (P,).
    tokens
        P(x_t = a and t <= |x|), shape (P, T, V).
    automaton_states
        P(automaton is in state d after t tokens) for t = 0..T, shape (P, T + 1, D); after a completion ends, the state does
        not change. The automaton is the smallest one for the whole likelihood, `Messages.potential`.
    """

    length_law: FloatArray
    truncated: FloatArray
    tokens: FloatArray
    automaton_states: FloatArray


@dataclass(frozen=True, eq=False)
class PathMoments:
    """Posterior moments of the rest of a completion from the states (h, d), all of shape (H, D).

    Parameters
    ----------
    mean, variance
        Mean and variance of the remaining log-likelihood r / alpha.
    log_prior
        E[log p0(rest)]; None for a hidden Markov prior.
    """

    mean: FloatArray
    variance: FloatArray
    log_prior: FloatArray | None


def path_moments(backward: BackwardPass, messages: StoredMessages, num_tokens: int) -> PathMoments:
    """Return the moments at t = 0 under the posterior.

    With w the weights p*(a | h, d, t), f = r_a / alpha + mean_{t+1}:

        mean_t = sum_a w f,   variance_t = sum_a w (variance_{t+1} + f^2) - mean_t^2,

    f is taken relative to a constant near its mean, so that the difference of squares loses no digits.
    """
    paid = np.where(np.isneginf(backward.log_paid), 0.0, backward.log_paid)
    mean = np.where(np.isneginf(backward.last_message), 0.0, backward.last_message)
    variance, log_prior = np.zeros(mean.shape), np.zeros(mean.shape)
    has_log_prior = True
    for t in range(num_tokens - 1, -1, -1):
        step = backward.step(messages.at(t + 1))
        f = paid + backward.gather(mean)
        centre = float((step.weights * f).sum() / max(step.weights.sum(), np.finfo(float).tiny))
        f -= centre
        f_square = backward.gather(variance) + f**2
        later = backward.gather(log_prior)
        mean, square, log_prior = _averages(backward.chain, step, (f, f_square, later))
        variance = np.maximum(square - mean**2, 0.0)
        mean += np.where(np.isneginf(step.message), 0.0, centre)
        own = backward.chain.expect_log(step.weights)
        has_log_prior = own is not None
        if own is not None:
            log_prior += _own_log_prior(step, own)
    return PathMoments(mean, variance, log_prior if has_log_prior else None)


def _averages(chain: Chain, step: Step, values: tuple[FloatArray, ...]) -> list[FloatArray]:
    """Return sum_j p*(j | h, d) values[j, d] for each array of values, shape (H, D) each; 0 in impossible cells."""
    stacked = np.concatenate([step.weights * value for value in values], axis=1)
    averages = []
    for value, total in zip(values, np.split(chain.expect(stacked)[0], len(values), axis=1), strict=True):
        average = np.where(step.totals > 0, total / np.where(step.totals > 0, step.totals, 1.0), 0.0)
        for cell in step.exact:
            average[cell.state, cell.column] = cell.weights @ value[cell.arrivals, cell.column]
        averages.append(average)
    return averages


def _own_log_prior(step: Step, expected: FloatArray) -> FloatArray:
    """Return sum_a p*(a | h, d) log p0(a | h), shape (H, D), from the weighted sums of p0 log p0 in `expected`."""
    average = np.where(step.totals > 0, expected / np.where(step.totals > 0, step.totals, 1.0), 0.0)
    for cell in step.exact:
        possible = cell.weights > 0
        average[cell.state, cell.column] = cell.weights[possible] @ cell.log_probs[possible]
    return average


def prior_mean(backward: BackwardPass, num_tokens: int) -> FloatArray:
    """Return E_p0[log-likelihood of the rest] from (h, d), shape (H, D); -inf if likelihood 0 has positive probability."""
    hopeless_paid = np.isneginf(backward.log_paid)
    paid = np.where(hopeless_paid, 0.0, backward.log_paid)
    hopeless = np.isneginf(backward.last_message)
    mean = np.where(hopeless, 0.0, backward.last_message)
    for _ in range(num_tokens):
        met = (hopeless_paid | (backward.gather(hopeless.astype(np.float64)) > 0)).astype(np.float64)
        stacked, cancelled = backward.chain.expect(np.concatenate([met, paid + backward.gather(mean)], axis=1))
        chance, mean = np.split(stacked, 2, axis=1)
        if cancelled is not None:
            for state, column in np.argwhere(cancelled[:, : backward.num_columns]):
                log_probs, arrivals = backward.chain.row(int(state))
                chance[state, column] = np.exp(log_probs) @ met[arrivals, column]
        hopeless = chance > 0
    return np.where(hopeless, -np.inf, mean)


def forward_marginals(
    backward: BackwardPass,
    messages: StoredMessages,
    num_tokens: int,
    vocab_size: int,
    start: tuple[IntArray, FloatArray],
) -> Marginals:
    """Return the marginals of each prompt.

    pi_t(h, d), the posterior probability of being unfinished in state (h, d) after t tokens, follows
    pi_{t+1}(h', d') = sum over arrivals of pi_t(h, d) p*(j | h, d, t).

    Parameters
    ----------
    backward, messages, num_tokens, vocab_size
        The recursion, its messages, T and V of the solved posterior.
    start
        The chain's possible states after each prompt and their posterior probabilities, (P, m) each.
    """
    chain, num_columns = backward.chain, backward.num_columns
    states, probs = start
    num_prompts = len(states)
    growing = np.zeros((num_prompts, chain.num_states, num_columns))
    for p in range(num_prompts):
        np.add.at(growing[p, :, 0], states[p], probs[p])
    length_law = np.zeros((num_prompts, num_tokens))
    tokens = np.zeros((num_prompts, num_tokens, vocab_size))
    occupied = np.zeros((num_prompts, num_tokens + 1, num_columns))
    ended = np.zeros((num_prompts, num_columns))
    occupied[:, 0] = growing.sum(axis=1)
    ending = np.where(backward.ends[:, None], backward.next_columns, num_columns)
    for t in range(num_tokens):
        step = backward.step(messages.at(t + 1))
        for p, mass in enumerate(_arrived(chain, step, growing)):
            tokens[p, t] = np.bincount(chain.arrival_tokens, weights=mass.sum(axis=1), minlength=vocab_size)
            now = np.bincount(ending.ravel(), weights=mass.ravel(), minlength=num_columns + 1)[:num_columns]
            ended[p] += now
            length_law[p, t] = now.sum()
            moved = np.bincount(backward.after.ravel(), weights=mass.ravel(), minlength=growing[p].size + 1)
            growing[p] = moved[: growing[p].size].reshape(growing[p].shape)
        occupied[:, t + 1] = growing.sum(axis=1) + ended
    truncated = growing.sum(axis=(1, 2))
    length_law[:, -1] += truncated
    return Marginals(length_law, truncated, tokens, occupied)


def _arrived(chain: Chain, step: Step, growing: FloatArray) -> list[FloatArray]:
    """Return the mass of each arrival from each automaton state, (J, D) for each prompt, given the mass of (h, d)."""
    possible = step.totals > 0
    sources = np.where(possible, growing / np.where(possible, step.totals, 1.0), 0.0)
    num_prompts, num_states, num_columns = growing.shape
    collected = chain.collect(sources.transpose(1, 0, 2).reshape(num_states, -1)).reshape(-1, num_prompts, num_columns)
    arrived = [collected[:, p] * step.weights for p in range(num_prompts)]
    for cell in step.exact:
        for p in range(num_prompts):
            share = growing[p, cell.state, cell.column] * cell.weights
            np.add.at(arrived[p][:, cell.column], cell.arrivals, share)
    return arrived
