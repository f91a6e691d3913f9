"""Exact fixed points of training losses: the posterior, the myopic policies, and the alpha that fits a policy best.

With b = 1 / alpha, by one recursion from the completions back to the empty prefix (theory.md 2.8):

    posterior        U(end) = b r;  U(s) = log sum_a p0(a|s) exp U(sa);        p*(a|s) = p0(a|s) exp(U(sa) - U(s))
    myopic           V(end) = r;    V(s) = sum_a q(a|s) V(sa);                 q(a|s) prop. to p0(a|s) exp(b V(sa))
    forward myopic   the same V;                                               q(a|s) = alpha p0(a|s) / (lambda(s) - V(sa))

The posterior's value of a prefix is soft; the myopic one is hard, because a KL summed over tokens with given prefixes has no
term for the KL that a token causes at later tokens (theory.md 2.8). The myopic policy is the fixed point of
the reverse KL of every token, sum_t KL(q_t || p0_t): GRPO with TRL's bias correction. The forward myopic one is that of
sum_t KL(p0_t || q_t), the plain k3 of the original GRPO: there q (Q - V) = alpha (q - p0) at every prefix, which is the
formula above with lambda = alpha + V. With T = 1 the first two coincide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bayes_klrl.checks import check_positive
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.enumeration import all_sequences, num_sequences
from bayes_klrl.models.prefix_policy import PrefixPolicy, PrefixTree
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import logsumexp

__all__ = ["Enumerated", "implied_inverse_alpha", "myopic_policy", "nearest_myopic", "posterior_policy"]

_MAX_SEQUENCES = 20_000  # a table over the prefixes and some hundred passes over it stay within seconds
_NUM_GRID, _NUM_REFINEMENTS = 61, 7  # to 1e-10 of log alpha
_MAX_INVERSE_ALPHA_NATS = 500.0  # b times the rewards' range, past which a posterior is a point mass to float64


@dataclass(frozen=True, eq=False)
class Enumerated:
    """A posterior with all of its M completions and S prefixes enumerated.

    Parameters
    ----------
    posterior
        The posterior.
    tree
        The tree of its prefixes.
    log_prior, reward
        log p0(x) and reward of every completion, shape (P, M) each.
    prior_table
        log p0(a | s), shape (P, S, V).
    """

    posterior: Posterior
    tree: PrefixTree
    log_prior: FloatArray
    reward: FloatArray
    prior_table: FloatArray

    @classmethod
    def of(cls, posterior: Posterior) -> Enumerated:
        """Return the enumeration of a posterior.

        Raises
        ------
        BayesKLRLError
            If there are more than 20,000 completions, or a reward is -inf.
        """
        prior = posterior.prior
        count = num_sequences(prior.vocab_size, len(prior.eos_token_ids), posterior.max_new_tokens)
        if count * posterior.num_prompts > _MAX_SEQUENCES:
            raise BayesKLRLError(
                f"A table over every prefix is for problems of at most {_MAX_SEQUENCES:,} completions; this one has "
                f"{float(count) * posterior.num_prompts:.3g} (vocabulary {prior.vocab_size}, {posterior.max_new_tokens} "
                "tokens). Use a smaller vocabulary or max_new_tokens; a loss shows its behaviour on a small problem, too."
            )
        tree = PrefixTree(
            all_sequences(prior.vocab_size, prior.eos_token_ids, posterior.max_new_tokens), prior.vocab_size
        )
        empty = PrefixPolicy(posterior, tree, np.zeros((posterior.num_prompts, tree.num_states, prior.vocab_size)))
        reward = posterior.reward(empty.sequences)
        if not np.isfinite(reward).all():
            p, m = np.argwhere(~np.isfinite(reward))[0]
            raise BayesKLRLError(
                f"The completion {tree.sequences.lists()[m]} of prompt {p} has reward {reward[p, m]}. A table over every "
                "prefix needs finite rewards: after some prefixes everything would be excluded, and means over rewards would "
                "be -inf. Relax the constraint: a reward of alpha * log(eps), say eps = 1e-3."
            )
        log_prior = posterior.log_prior(empty.sequences)
        return cls(posterior, tree, log_prior, reward, tree.conditionals(log_prior))

    def log_posterior(self, inverse_alpha: float) -> FloatArray:
        """Return log p*_b(x) of every completion at b = `inverse_alpha`, shape (P, M); b may be 0 or negative."""
        log_joint = self.log_prior + inverse_alpha * self.reward
        log_p: FloatArray = log_joint - logsumexp(log_joint)[:, None]
        return log_p

    def policy(self, table: FloatArray) -> PrefixPolicy:
        """Return the policy with next-token log-probs `table`, shape (P, S, V)."""
        return PrefixPolicy(self.posterior, self.tree, table)

    def myopic(self, alpha: float, *, forward: bool = False) -> PrefixPolicy:
        """Return the myopic policy at `alpha`; see `myopic_policy`."""
        return self.policy(self.myopic_tables(np.array([alpha]), forward=forward))

    def myopic_tables(self, alphas: FloatArray, *, forward: bool = False) -> FloatArray:
        """Return next-token log-probs of the myopic policies of P prompts at one alpha, or of one prompt at A alphas.

        Shape (P, S, V) or (A, S, V).
        """
        tokens = _forward_tokens if forward else _reverse_tokens
        alpha = alphas[:, None, None]

        def value(states: IntArray, q: FloatArray) -> FloatArray:
            mean: FloatArray = (np.exp(tokens(self.prior_table[:, states], q, alpha)) * q).sum(axis=-1)
            return mean

        rows = max(len(alphas), len(self.reward))
        q = self.tree.backward(np.broadcast_to(self.reward, (rows, self.reward.shape[1])), value)
        return tokens(self.prior_table, q, alpha)


def posterior_policy(posterior: Posterior) -> PrefixPolicy:
    """Return the posterior itself as a table of next-token distributions, the fixed point of leave-one-out (RLOO, `SVI`).

    Parameters
    ----------
    posterior
        The posterior, with at most 20,000 completions.

    Returns
    -------
    A policy with `log_probs` of every completion, shape (P, M), `table` of every prefix, and `language_model()`.

    Raises
    ------
    BayesKLRLError
        If the problem is too large, or a reward is -inf.

    Examples
    --------
    A completion is one token, whose reward is 0 or log 3, so that token 1 has posterior probability 3 / 4.

    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    >>> reward = bk.TokenReward(lambda tokens, lengths: np.log(3) * tokens[:, 0], alpha=1.0)
    >>> policy = bk.posterior_policy(bk.Posterior(coin, reward, max_new_tokens=1))
    >>> np.exp(policy.log_probs).round(6)
    array([[0.25, 0.75]])
    """
    problem = Enumerated.of(posterior)
    return problem.policy(problem.tree.conditionals(problem.log_prior + problem.reward / posterior.alpha))


def myopic_policy(posterior: Posterior, *, alpha: float | None = None, forward: bool = False) -> PrefixPolicy:
    """Return the fixed point of a KL penalty in the loss, summed over tokens; "GRPO with beta" should be compared to this.

        q(a|s) prop. to p0(a|s) exp(V(sa) / alpha),   V(s) = sum_a q(a|s) V(sa),   V(end) = r      (theory.md 2.8)

    Parameters
    ----------
    posterior
        The posterior, with at most 20,000 completions.
    alpha
        KL coefficient in units of reward per nat; None for the posterior's.
    forward
        Return the fixed point of sum_t KL(p0_t || q_t), the k3 of the original GRPO, instead:
        q(a|s) = alpha p0(a|s) / (lambda(s) - V(sa)).

    Returns
    -------
    A policy with `log_probs` of every completion, shape (P, M), `table` of every prefix, and `language_model()`.

    Raises
    ------
    BayesKLRLError
        If the problem is too large, or a reward is -inf.

    Examples
    --------
    At the same alpha, the myopic policy is further from the prior than the posterior is.

    >>> from bayes_klrl import problems
    >>> posterior = problems.audit_posterior()
    >>> problem = Enumerated.of(posterior)
    >>> bool(myopic_policy(posterior).kl_to(problem.log_prior) > posterior_policy(posterior).kl_to(problem.log_prior))
    True
    """
    if alpha is not None:
        check_positive("alpha", alpha)
    return Enumerated.of(posterior).myopic(alpha or posterior.alpha, forward=forward)


def implied_inverse_alpha(problem: Enumerated, log_q: FloatArray) -> float:
    """Return the b of the posterior nearest to a policy, for one prompt; it solves R(b) = E_q[r] (theory.md 1.7).

    This b minimises KL(q || p*_b), and the minimum is KL(q || p0) - KL(p*_b || p0). It is negative if the policy's mean reward
    is below the prior's, and limited to values at which the posterior is not yet a point mass in float64.

    Parameters
    ----------
    problem
        The enumerated posterior, with one prompt.
    log_q
        log q(x) of every completion, shape (M,).
    """
    reward = problem.reward[0]
    spread = float(np.ptp(reward))
    if spread == 0.0:
        return 0.0
    wanted = float(np.exp(log_q) @ reward)

    def excess(b: float) -> float:
        return float(np.exp(problem.log_posterior(b)[0]) @ reward) - wanted

    low, high = -_MAX_INVERSE_ALPHA_NATS / spread, _MAX_INVERSE_ALPHA_NATS / spread
    for _ in range(100):  # R(b) grows in b
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return (low + high) / 2


def nearest_myopic(problem: Enumerated, log_q: FloatArray, *, forward: bool = False) -> tuple[float, float]:
    """Return the alpha whose myopic policy is nearest to q, and KL(q || that policy), for one prompt and log q(x) (M,).

    The search uses a grid from 1/1000 to 1000 times the posterior's alpha, which is refined around its best point.
    """
    low, high = np.log(problem.posterior.alpha) + np.array([-1.0, 1.0]) * np.log(1e3)
    for _ in range(_NUM_REFINEMENTS):
        grid = np.linspace(low, high, _NUM_GRID)
        log_p = problem.tree.log_probs(problem.myopic_tables(np.exp(grid), forward=forward))
        kl = (np.exp(log_q) * (log_q - log_p)).sum(axis=1)
        best = int(kl.argmin())
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, _NUM_GRID - 1)]
    return float(np.exp(grid[best])), float(kl[best])


def _reverse_tokens(log_prior: FloatArray, q: FloatArray, alpha: FloatArray) -> FloatArray:
    """Return log of p0 exp(Q / alpha), normalised over tokens, shape (P, K, V), for alpha of shape (P or 1, 1, 1)."""
    log_joint = log_prior + q / alpha
    log_p: FloatArray = log_joint - logsumexp(log_joint)[..., None]
    return log_p


def _forward_tokens(log_prior: FloatArray, q: FloatArray, alpha: FloatArray) -> FloatArray:
    """Return log of alpha p0 / (lambda - Q), shape (P, K, V); bisection finds lambda, since the total decreases in lambda.

    With g = lambda - max Q, the total sum_a alpha p0 / (g + max Q - Q) is at most 1 at g = alpha and at least 1 at
    g = alpha p0 of the best token.
    """
    gap = q.max(axis=-1, keepdims=True) - q
    log_best = np.where(gap == 0, log_prior, -np.inf).max(axis=-1, keepdims=True)
    low, high = np.log(alpha) + log_best, np.log(alpha) + np.zeros_like(log_best)
    for _ in range(80):
        middle = (low + high) / 2
        above = (alpha * np.exp(log_prior) / (np.exp(middle) + gap)).sum(axis=-1, keepdims=True) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    log_p = np.log(alpha) + log_prior - np.log(np.exp((low + high) / 2) + gap)
    normal: FloatArray = log_p - logsumexp(log_p)[..., None]
    return normal
