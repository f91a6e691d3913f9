"""Completions and an uncertain reward in one Pyro program: `python examples/joint_pyro.py` (about ten seconds).

    theta ~ Normal(0, 1)^2                    weights of the reward r(x) = theta . f(x)
    winner over loser ~ Bernoulli(sigma(theta . (f(winner) - f(loser))))      a few observed preferences, if any
    x ~ p0                                    a language model: forty completions, so that the truth can be enumerated
    factor exp(theta . f(x) / alpha)

SVI infers theta and x together, with the guide q(x) q(theta | x): a logit table, and a Gaussian whose mean is linear in f(x).
Without preferences the posterior is of that family: theta | x ~ Normal(f(x) / alpha, 1).

This is the *joint* posterior of an uncertain reward: its completions come from p0(x) E_theta[exp(r_theta(x) / alpha)], a
mixture of the posteriors under each theta with weights p(theta) Z_theta. It is optimistic: generating makes rewards that are
easy to please more likely (without any data E[theta] is not 0 here), and it changes if a constant a_theta is added to the
reward. If preferences should inform generations but not the other way round, use the *cut* posterior: draw theta from its own
posterior given the preferences, and for each draw condition p0 on that reward alone.
"""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive

import bayes_klrl as bk
from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO
from bayes_klrl.models.programs.pyro_program import SequenceDistribution
from bayes_klrl.models.torch_lm.table import TableLM
from bayes_klrl.problems import joint_truth

WORDS = ["please", "wait", "now", "<end>"]
NUM_TOKENS, ALPHA = 3, 1.2
PRIOR = bk.NgramLM(
    np.log([[0.10, 0.40, 0.20, 0.30], [0.20, 0.10, 0.40, 0.30], [0.15, 0.15, 0.10, 0.60], [0.25, 0.35, 0.30, 0.10]]),
    eos_token_id=3,
)
PREFERENCES = np.array([[1, 0], [1, -1], [0, -1], [1, 0], [-1, -1], [0, -1]])  # f(winner) - f(loser)


def features(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:  # noqa: ARG001  (the signature of all such functions)
    """f(x): how often it says please, and whether it says now."""
    return np.stack([(tokens == 0).sum(axis=1), (tokens == 2).any(axis=1)], axis=1)


def programs(preferences: np.ndarray):
    """Return the Pyro model and guide."""
    differences = torch.as_tensor(preferences, dtype=torch.float64)
    # every prefix has a row of its own, so that any distribution over completions is in the family
    table = TableLM(bk.NgramLM(np.broadcast_to(PRIOR.log_probs, (4,) * (NUM_TOKENS + 1)), eos_token_id=3))

    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        if len(differences):
            with pyro.plate("preferences", len(differences), dim=-1):
                logits = (theta * differences).sum(-1)
                pyro.sample("won", dist.Bernoulli(logits=logits), obs=torch.ones(len(differences), dtype=torch.float64))
        with pyro.plate("prompts", 1, dim=-1):
            p0 = SequenceDistribution(PRIOR, [()], NUM_TOKENS, frozen=True)
            x = pyro.sample("x", p0)
            pyro.factor("likelihood", (theta * p0.features(features, x)).sum(-1) / ALPHA)

    def guide() -> None:
        pyro.module("table", table)
        zeros = partial(torch.zeros, dtype=torch.float64)
        loc, slope, log_sd = (
            pyro.param("loc", zeros(2)),
            pyro.param("slope", zeros(2, 2)),
            pyro.param("log_sd", zeros(2)),
        )
        with pyro.plate("prompts", 1, dim=-1):
            q = SequenceDistribution(table, [()], NUM_TOKENS)
            f = q.features(features, pyro.sample("x", q))
        pyro.sample("theta", dist.Normal(loc + f @ slope, log_sd.exp()).to_event(1))

    return model, guide


def fit(preferences: np.ndarray, num_steps: int = 500, seed: int = 0):
    """Return the trained guide as a function, and its model."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide = programs(preferences)
    optimiser = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / num_steps)})
    svi = SVI(model, guide, optimiser, loss=LeaveOneOutELBO(64))
    for _ in range(num_steps):
        svi.step()
    return model, guide


def summary(theta: np.ndarray, f: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return weighted mean and standard deviation of both thetas, and the mean of both features: six numbers."""
    mean = weights @ theta
    return np.concatenate([mean, np.sqrt(weights @ (theta - mean) ** 2), weights @ f])


def drawn(model, guide, num_draws: int = 20_000) -> np.ndarray:
    """Return the summary of the guide's draws."""
    draws = Predictive(model, guide=guide, num_samples=num_draws, parallel=True)()
    x, theta = draws["x"].reshape(num_draws, NUM_TOKENS).numpy(), draws["theta"].reshape(num_draws, 2).detach().numpy()
    f = features(x, np.full(num_draws, NUM_TOKENS))
    return summary(theta, f, np.full(num_draws, 1 / num_draws))


def exact(preferences: np.ndarray) -> np.ndarray:
    """Return the summary of the posterior, by enumeration and quadrature."""
    truth = joint_truth(PRIOR, features, alpha=ALPHA, max_new_tokens=NUM_TOKENS, preferences=preferences)
    return summary(truth.theta, truth.features, truth.weights)


def main() -> None:
    quantities = ["E[theta_please]", "E[theta_now]", "sd[theta_please]", "sd[theta_now]", "E[f_please]", "E[f_now]"]
    for title, preferences in (("no preferences", PREFERENCES[:0]), ("six preferences", PREFERENCES)):
        found, truth = drawn(*fit(preferences)), exact(preferences)
        print(f"{title:<20}{'SVI':>8}{'exact':>8}")
        for name, ours, theirs in zip(quantities, found, truth, strict=True):
            print(f"  {name:<18}{ours:8.3f}{theirs:8.3f}")


if __name__ == "__main__":
    main()
