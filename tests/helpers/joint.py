"""How far a guide q(x) q(theta | x) is from the posterior of `problems.joint_truth`, and what that allows its moments."""

from __future__ import annotations

from typing import Any

import numpy as np

import bayes_klrl as bk
from bayes_klrl.models.programs.completion_features import host_features
from bayes_klrl.posterior import completion_log_probs
from bayes_klrl.problems import joint_truth
from bayes_klrl.problems.joint import normal_nodes
from tests.helpers.truth import completions

__all__ = ["joint_kl", "moment_tolerances"]


def joint_kl(
    example: dict[str, Any],
    preferences: np.ndarray,
    policy: bk.LanguageModel,
    loc: np.ndarray,
    slope: np.ndarray,
    log_sd: np.ndarray,
    prompt_ids: Any = (),
) -> float:
    """KL(q(x) q(theta | x) || p(x, theta | data)), by enumeration and a quadrature around each theta | x.

    theta | x ~ Normal(loc + f(x) slope, exp(log_sd)); prior, features, alpha and T are those of an example.
    """
    prior, alpha, num_tokens = example["PRIOR"], example["ALPHA"], example["NUM_TOKENS"]
    xs = completions(prior.vocab_size, prior.eos_token_ids, num_tokens)
    sequences = bk.Sequences.from_lists(xs, max_new_tokens=num_tokens, pad_token=min(prior.eos_token_ids))
    f = host_features(example["features"], sequences.tokens[0], prior)
    log_prior, log_q = (completion_log_probs(lm, [prompt_ids], sequences)[0] for lm in (prior, policy))
    eps, log_mass = normal_nodes(30, f.shape[1])
    theta = loc + f @ slope + np.exp(log_sd) * eps[:, None]  # (J, M, K)
    log_p = log_prior + (theta * f).sum(axis=2) / alpha - 0.5 * (theta**2).sum(axis=2)
    log_p = log_p - np.logaddexp(0.0, -theta @ preferences.T).sum(axis=2)
    log_q_theta = -0.5 * (eps[:, None] ** 2).sum(axis=2) - log_sd.sum()
    elbo = np.exp(log_q) @ (np.exp(log_mass) @ (log_p - log_q_theta) - log_q)
    settings = {"alpha": alpha, "max_new_tokens": num_tokens, "preferences": preferences, "prompt_ids": prompt_ids}
    return joint_truth(prior, example["features"], **settings).log_evidence - float(elbo)


def moment_tolerances(example: dict[str, Any], kl: float, sds: np.ndarray, num_draws: int) -> np.ndarray:
    """By how much means of theta, sds of theta and means of f, two of each, may be off for a guide of this KL.

    Means of a bounded f by at most range(f) sqrt(KL / 2) (Pinsker), those of theta by that of E[theta | x] and sqrt(2 KL)
    (Talagrand, as p(theta | x) is 1-strongly log-concave); a standard deviation that is off by a share d costs a Gaussian
    about d^2 nats. To that comes the error of as many draws.
    """
    ranges, error = np.array([3, 1]), 4 / np.sqrt(num_draws)
    means = ranges / example["ALPHA"] * np.sqrt(kl / 2) + np.sqrt(2 * kl) + error * sds
    return np.concatenate([means, sds * (np.sqrt(kl) + error), ranges * (np.sqrt(kl / 2) + error / 2)])
