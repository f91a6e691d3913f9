"""Joint posteriors of completions and of the weights of their reward, by enumeration times quadrature.

    theta ~ Normal(0, 1)^K,   x ~ p0,   factor exp(theta . f(x) / alpha),
    winner over loser ~ Bernoulli(sigma(theta . (f(winner) - f(loser))))        observed preferences, if any

The truth for joint programs: the joint target of theory.md 1.10, in which completions inform the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.checks import check_count, check_positive
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.enumeration import all_sequences
from bayes_klrl.models.programs.completion_features import host_features
from bayes_klrl.posterior import completion_log_probs
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, TokenIds
from bayes_klrl.weights import logsumexp, normalised

__all__ = ["JointTruth", "joint_truth"]


@dataclass(frozen=True, eq=False)
class JointTruth:
    """Every completion at every node of a quadrature: M completions x J nodes, flat.

    Parameters
    ----------
    theta, features
        Shape (J M, K).
    log_joint
        log p(theta, x, preferences), with the mass of theta's node in it, shape (J M,).
    """

    theta: FloatArray
    features: FloatArray
    log_joint: FloatArray

    @property
    def weights(self) -> FloatArray:
        """Posterior probabilities, shape (J M,)."""
        return normalised(self.log_joint)

    @property
    def log_evidence(self) -> float:
        """The log of the sum over completions and the integral over theta, in nats."""
        return float(logsumexp(self.log_joint))


def joint_truth(
    prior: LanguageModel,
    features: Callable[[IntArray, IntArray], ArrayLike],
    *,
    alpha: float,
    max_new_tokens: int,
    preferences: ArrayLike | None = None,
    prompt_ids: TokenIds = (),
    num_nodes: int = 60,
) -> JointTruth:
    """Return the joint posterior of theta and x, up to the quadrature's error.

    Parameters
    ----------
    prior
        The prior p0, small enough that its completions can be enumerated.
    features
        The function f, `fn(tokens (M, T), lengths (M,)) -> (M, K)`.
    alpha
        Units of reward per nat.
    max_new_tokens
        T.
    preferences
        f(winner) - f(loser) of each pair, shape (pairs, K); None: no data.
    prompt_ids
        The token ids of the prompt.
    num_nodes
        Nodes of the Gauss-Hermite rule in each of the K dimensions.

    Examples
    --------
    Without data E[theta] is not 0, as x and theta inform each other: theta | x ~ Normal(f(x) / alpha, 1).

    >>> from bayes_klrl.models.ngram_lm.lm import NgramLM
    >>> coin = NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> truth = joint_truth(coin, lambda tokens, lengths: (tokens == 0).sum(axis=1)[:, None], alpha=2.0, max_new_tokens=1)
    >>> p = 1 / (1 + np.exp(-1 / 8))  # of a zero: E exp(theta / 2) = exp(1 / 8)
    >>> bool(np.allclose([truth.weights @ truth.features[:, 0], truth.weights @ truth.theta[:, 0]], [p, p / 2]))
    True
    """
    check_positive("alpha", alpha)
    check_count("num_nodes", num_nodes)
    sequences = all_sequences(prior.vocab_size, prior.eos_token_ids, max_new_tokens)
    f = host_features(features, sequences.tokens[0], prior)
    if f.ndim != 2:
        raise BayesKLRLError(
            f"Features must be rows of shape (M, K), with one weight per column; got the shape {f.shape}."
        )
    theta, log_mass = normal_nodes(num_nodes, f.shape[1])
    log_joint = log_mass[:, None] + completion_log_probs(prior, [prompt_ids], sequences) + theta @ f.T / alpha
    if preferences is not None:
        differences = np.asarray(preferences, dtype=np.float64)
        if differences.ndim != 2 or differences.shape[1] != f.shape[1]:
            raise BayesKLRLError(
                f"preferences must be differences of features, shape (pairs, {f.shape[1]}); got {differences.shape}."
            )
        log_joint -= np.logaddexp(0.0, -theta @ differences.T).sum(axis=1)[:, None]
    return JointTruth(np.repeat(theta, len(f), axis=0), np.tile(f, (len(theta), 1)), log_joint.ravel())


def normal_nodes(num_nodes: int, num_dims: int) -> tuple[FloatArray, FloatArray]:
    """Return the nodes of a product Gauss-Hermite rule for Normal(0, 1)^K, shape (J, K), and their log mass, shape (J,)."""
    nodes, mass = np.polynomial.hermite_e.hermegauss(num_nodes)
    grid = np.stack(np.meshgrid(*[nodes] * num_dims, indexing="ij"), axis=-1).reshape(-1, num_dims)
    log_mass = np.log(mass / mass.sum())
    of_grid = np.stack(np.meshgrid(*[log_mass] * num_dims, indexing="ij"), axis=-1).reshape(-1, num_dims)
    return grid, of_grid.sum(axis=1)
