"""The NumPyro program of a linear reward, and its posterior by NUTS.

    theta ~ Normal(0, tau^2 I),   tau given or tau ~ HalfNormal(1)
    preferences   P(x_w > x_l) = sigmoid(theta . (f(x_w) - f(x_l)))          (Bradley and Terry)
    scores        y = theta . f(x) + noise,   noise given or ~ HalfNormal(sd of y)

It runs in float64, which takes 1.3 times the time of float32: NUTS needs differences of the energy of thousands of pairs, and
in float64 results agree with quadrature. All chains advance in one program ("vectorized"): each leapfrog step is one matrix
product for all of them, which takes half the time of running one chain after another on one thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro.infer import MCMC, NUTS

from bayes_klrl.models.programs.turns import NUMPYRO_TURN, in_turn
from bayes_klrl.typing import FloatArray

__all__ = ["reward_program", "run_nuts"]

_DECISIVE = 50  # observations per weight, above which they determine it more than its prior
_FIELDS = ("diverging", "num_steps", "accept_prob", "potential_energy")


def reward_program(
    design: Any,
    scores: Any = None,
    noise: Any = None,
    noise_scale: Any = None,
    prior_scale: Any = None,
    *,
    centred: bool = False,
) -> None:
    """The joint model of weights theta of standardised features, site "theta", and of the observations.

    Parameters
    ----------
    design
        The difference f(x_w) - f(x_l) for each pair, or f(x) for each score, shape (n, J).
    scores
        The observed scores, shape (n,); None for preferences.
    noise
        Standard deviation of the scores; None: it is inferred, site "noise", with the prior HalfNormal(noise_scale).
    prior_scale
        tau; None: it is inferred, site "prior_scale".
    centred
        Whether to sample theta itself, which mixes better where the data determine it, instead of z = theta / tau.
    """
    if prior_scale is None:
        prior_scale = numpyro.sample("prior_scale", dist.HalfNormal(1.0))
    size = design.shape[1]
    if centred:
        theta = numpyro.sample("theta", dist.Normal(0.0, prior_scale).expand([size]).to_event(1))
    else:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
        theta = numpyro.deterministic("theta", prior_scale * z)
    reward = design @ theta
    if scores is None:
        numpyro.sample("preferred", dist.Bernoulli(logits=reward), obs=jnp.ones(design.shape[0]))
        return
    if noise is None:
        noise = numpyro.sample("noise", dist.HalfNormal(noise_scale))
    numpyro.sample("scores", dist.Normal(reward, noise), obs=scores)


@in_turn(NUMPYRO_TURN)
def run_nuts(
    data: Mapping[str, FloatArray | float],
    *,
    num_chains: int,
    num_warmup: int,
    num_draws: int,
    target_accept: float,
    seed: int,
) -> tuple[dict[str, FloatArray], dict[str, np.ndarray]]:
    """Return the draws of each site, shape (C, S, ...), and NUTS's statistics of each draw, shape (C, S).

    Parameters
    ----------
    data
        The arguments of `reward_program`. Data of the same kind and shape are compiled only once.
    num_chains, num_warmup, num_draws, target_accept
        See `RewardModel`.
    seed
        Seed for all random numbers.
    """
    with jax.enable_x64(True):
        arguments = {name: jnp.asarray(value, dtype=jnp.float64) for name, value in data.items()}
        num, size = arguments["design"].shape
        run = _compiled(num_chains, num_warmup, num_draws, target_accept, num >= _DECISIVE * size)
        samples, statistics = run(jax.random.PRNGKey(seed), arguments)
        sites = {name: np.array(samples[name]) for name in ("theta", "prior_scale", "noise") if name in samples}
        return sites, {name: np.array(statistics[name]) for name in _FIELDS}


@lru_cache(maxsize=16)
def _compiled(num_chains: int, num_warmup: int, num_draws: int, target_accept: float, centred: bool) -> Any:
    """Return the whole run as one jitted function of key and data, which compiles once for each shape of the data.

    `MCMC.run` itself compiles its loop anew in every run, which takes three seconds each time.
    """

    @jax.jit
    def run(key: Any, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        sampler = MCMC(
            NUTS(partial(reward_program, centred=centred), target_accept_prob=target_accept),
            num_warmup=num_warmup,
            num_samples=num_draws,
            num_chains=num_chains,
            chain_method="vectorized",
            progress_bar=False,
        )
        sampler.run(key, extra_fields=_FIELDS, **arguments)
        return sampler.get_samples(group_by_chain=True), sampler.get_extra_fields(group_by_chain=True)

    return run
