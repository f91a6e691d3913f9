"""Completions and an uncertain reward in one NumPyro program: `python examples/joint_numpyro.py` (about half a minute).

    theta ~ Normal(0, 1)^2                    weights of the reward r(x) = theta . f(x)
    winner over loser ~ Bernoulli(sigma(theta . (f(winner) - f(loser))))      a few observed preferences, if any
    x ~ p0                                    a language model: forty completions, so that the truth can be enumerated
    factor exp(theta . f(x) / alpha)

SVI infers theta and x together, with the guide q(x) q(theta | x): a copy of the language model, and a Gaussian whose mean is
linear in f(x). Without preferences the posterior is nearly of that family: theta | x ~ Normal(f(x) / alpha, 1).

This is the *joint* posterior of an uncertain reward: its completions come from p0(x) E_theta[exp(r_theta(x) / alpha)], a
mixture of the posteriors under each theta with weights p(theta) Z_theta. It is optimistic: generating makes rewards that are
easy to please more likely (without any data E[theta] is not 0 here), and it changes if a constant a_theta is added to the
reward. If preferences should inform generations but not the other way round, use the *cut* posterior: draw theta from its own
posterior given the preferences, and for each draw condition p0 on that reward alone.

`joint_pyro.py` is the same problem in Pyro. Here everything is one compiled JAX program, and torch is not imported.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Predictive

import bayes_klrl as bk
from bayes_klrl.inference.svi.numpyro_backend.elbo import LeaveOneOutELBO
from bayes_klrl.models.programs.numpyro_program import SequenceDistribution
from bayes_klrl.problems import joint_truth

WORDS = ["please", "wait", "now", "<end>"]
NUM_TOKENS, ALPHA = 3, 1.2
START = (3,)  # a sentence begins after the end of another
NEXT_WORD = np.array(
    [[0.10, 0.40, 0.20, 0.30], [0.20, 0.10, 0.40, 0.30], [0.15, 0.15, 0.10, 0.60], [0.25, 0.35, 0.30, 0.10]]
)
PREFERENCES = np.array([[1, 0], [1, -1], [0, -1], [1, 0], [-1, -1], [0, -1]])  # f(winner) - f(loser)


def language_model(hidden: int = 16, inner: int = 64, seed: int = 0) -> bk.JaxLM:
    """Return p(next | word) = NEXT_WORD[word, next] as a Llama of one layer, which the guide will make use of.

    Words are one-hot vectors and the head holds log-probabilities. What attention and MLP compute is random, and multiplied
    by 0 before it is added.
    """
    rng = np.random.default_rng(seed)
    config = {"model_type": "llama", "vocab_size": 4, "hidden_size": hidden, "intermediate_size": inner}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8}
    shapes = dict.fromkeys([f"self_attn.{name}_proj" for name in "qkvo"], (1, hidden, hidden))
    shapes |= {
        "mlp.gate_proj": (1, inner, hidden),
        "mlp.up_proj": (1, inner, hidden),
        "mlp.down_proj": (1, hidden, inner),
    }
    layers = {f"{name}.weight": rng.normal(0.0, hidden**-0.5, shape) for name, shape in shapes.items()}
    layers["self_attn.o_proj.weight"] *= 0.0
    layers["mlp.down_proj.weight"] *= 0.0
    layers |= dict.fromkeys(["input_layernorm.weight", "post_attention_layernorm.weight"], np.ones((1, hidden)))
    outer = {
        "tokens": np.eye(4, hidden),
        "final_norm.weight": np.full(hidden, hidden**-0.5),
        "head.weight": np.log(NEXT_WORD).T @ np.eye(4, hidden),
    }
    parameters = jax.tree.map(lambda array: jnp.asarray(array, dtype=jnp.float32), {"outer": outer, "layers": layers})
    return bk.JaxLM(parameters, config, eos_token_id=3)


PRIOR = language_model()


def features(tokens, lengths):  # noqa: ARG001  (the signature of all such functions)
    """f(x): how often it says please, and whether it says now."""
    return jnp.stack([(tokens == 0).sum(axis=1), (tokens == 2).any(axis=1)], axis=1)


def programs(preferences: np.ndarray):
    """Return the NumPyro model and guide."""
    differences = jnp.asarray(preferences, dtype=float)

    def model() -> None:
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        if len(differences):
            with numpyro.plate("preferences", len(differences), dim=-1):
                numpyro.sample("won", dist.Bernoulli(logits=differences @ theta), obs=jnp.ones(len(differences)))
        with numpyro.plate("prompts", 1, dim=-1):
            p0 = SequenceDistribution(PRIOR, [START], NUM_TOKENS)
            x = numpyro.sample("x", p0)
            numpyro.factor("likelihood", p0.features(features, x) @ theta / ALPHA)

    def guide() -> None:
        lm = PRIOR.with_parameters(numpyro.param("lm", PRIOR.parameters))
        loc, log_sd = numpyro.param("loc", jnp.zeros(2)), numpyro.param("log_sd", jnp.zeros(2))
        slope = numpyro.param("slope", jnp.zeros((2, 2)))
        with numpyro.plate("prompts", 1, dim=-1):
            q = SequenceDistribution(lm, [START], NUM_TOKENS)
            f = q.features(features, numpyro.sample("x", q))
        numpyro.sample("theta", dist.Normal(loc + f[0] @ slope, jnp.exp(log_sd)).to_event(1))

    return model, guide


def fit(preferences: np.ndarray, num_steps: int = 1000, seed: int = 0):
    """Return the guide and its trained parameters."""
    model, guide = programs(preferences)
    optimiser = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.exponential_decay(0.02, num_steps, 0.01)))
    svi = SVI(model, guide, optimiser, LeaveOneOutELBO(64))
    result = svi.run(jax.random.key(seed), num_steps, progress_bar=False)
    return guide, result.params


def summary(theta: np.ndarray, f: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return weighted mean and standard deviation of both thetas, and the mean of both features: six numbers."""
    mean = weights @ theta
    return np.concatenate([mean, np.sqrt(weights @ (theta - mean) ** 2), weights @ f])


def drawn(guide, params, num_draws: int = 20_000, seed: int = 1) -> np.ndarray:
    """Return the summary of the guide's draws."""
    predictive = Predictive(guide, params=params, num_samples=num_draws, parallel=True)
    draws = jax.jit(predictive)(jax.random.key(seed))
    x = np.asarray(draws["x"])[:, 0]
    return summary(np.asarray(draws["theta"]), np.asarray(features(x, None)), np.full(num_draws, 1 / num_draws))


def exact(preferences: np.ndarray) -> np.ndarray:
    """Return the summary of the posterior, by enumeration and quadrature."""
    truth = joint_truth(
        PRIOR, features, alpha=ALPHA, max_new_tokens=NUM_TOKENS, preferences=preferences, prompt_ids=START
    )
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
