"""The disagreement of several policies: the epistemic part of the uncertainty of a Bayesian policy.

Var r = Var_s(E_s[r])  +  E_s(Var_s[r])                            over policies (epistemic), and within them
I(policy; x) = 1/S sum_s KL(p_s || q-bar),   q-bar = 1/S sum_s p_s    = ELBO(q-bar) - 1/S sum_s ELBO(p_s)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bayes_klrl.checks import check_count
from bayes_klrl.inference.sampling.drawing import draw
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import FloatArray, LanguageModel
from bayes_klrl.weights import logmeanexp

__all__ = ["PolicyUncertainty", "policy_uncertainty"]


@dataclass(frozen=True, eq=False)
class PolicyUncertainty:
    """The disagreement of S policies for P prompts, estimated from N completions of each policy.

    Parameters
    ----------
    policy_reward, policy_elbo
        E[r] and ELBO (in nats) of each policy, shape (S, P).
    reward_variance
        Var_s(E_s[r]), the variance of a policy's mean reward over policies, shape (P,): the epistemic part. The Monte Carlo
        variance of the S means is subtracted, so that an estimate near 0 may be negative.
    reward_noise
        E_s(Var_s[r]), the variance that remains when the policy is known, shape (P,).
    mutual_information, mutual_information_se
        I(policy; x) in nats and its standard error, shape (P,); at most log S.
    """

    policy_reward: FloatArray
    policy_elbo: FloatArray
    reward_variance: FloatArray
    reward_noise: FloatArray
    mutual_information: FloatArray
    mutual_information_se: FloatArray

    def __repr__(self) -> str:
        return (
            f"PolicyUncertainty(sd of E[r] over {len(self.policy_reward)} policies "
            f"{np.sqrt(np.maximum(self.reward_variance, 0)).round(4).tolist()}, I(policy; x) "
            f"{self.mutual_information.round(4).tolist()} nats)"
        )


def policy_uncertainty(
    posterior: Posterior, policies: Sequence[LanguageModel], num_draws: int, *, seed: int, progress: bool = False
) -> PolicyUncertainty:
    """Return the disagreement of S policies; the completions of each are scored by all, which takes S^2 runs of a model."""
    check_count("num_draws", num_draws, least=2)
    means, within, elbos, information, errors = [], [], [], [], []
    for s, policy in enumerate(policies):
        models = (policy, posterior.prior, *policies)
        drawn = draw(
            models,
            posterior,
            num_draws,
            Streams.of(seed, s),
            description=f"policy {s + 1} of {len(policies)}",
            progress=progress,
        )
        log_policy, log_prior, log_all = drawn.log_probs[0], drawn.log_probs[1], drawn.log_probs[2:]
        gain = log_policy - logmeanexp(np.moveaxis(log_all, 0, -1))
        log_likelihood = posterior.likelihood.log_likelihood(drawn.reward)
        means.append(drawn.reward.mean(axis=1))
        within.append(drawn.reward.var(axis=1, ddof=1))
        elbos.append((log_prior + log_likelihood - log_policy).mean(axis=1))
        information.append(gain.mean(axis=1))
        errors.append(gain.var(axis=1, ddof=1) / num_draws)
    noise = np.mean(within, axis=0)
    between = np.var(means, axis=0, ddof=1) if len(policies) > 1 else np.zeros_like(noise) + noise / num_draws
    return PolicyUncertainty(
        policy_reward=np.array(means),
        policy_elbo=np.array(elbos),
        reward_variance=between - noise / num_draws,
        reward_noise=noise,
        mutual_information=np.mean(information, axis=0),
        mutual_information_se=np.sqrt(np.sum(errors, axis=0)) / len(policies),
    )
