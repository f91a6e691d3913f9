"""The NumPyro program of a linear reward, and its posterior by NUTS.

    theta ~ Normal(0, tau^2 I),   tau given or tau ~ HalfNormal(1)
    preferences   P(x_w > x_l) = sigmoid(theta . (f(x_w) - f(x_l)))          (Bradley and Terry)
    scores        y = theta . f(x) + noise,   noise given or ~ HalfNormal(sd of y)

Float64, 1.3 times the time of float32: the energy of thousands of pairs is then exact to all digits that its differences
are judged by, and results meet quadrature. All chains advance in one program ("vectorized"): one matrix product a leapfrog
step serves them all, half the time of one chain after another on one thread.
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

from bayes_klrl.typing import FloatArray

__all__ = ["reward_program", "run_nuts"]

_DECISIVE = 50  # observations a weight, from where on they decide it more than its prior
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
    """Weights theta of standardised features, site "theta", and what was observed.

    Parameters
    ----------
    design
        f(x_w) - f(x_l) of each pair, or f(x) of each score, shape (n, J).
    scores
        What was observed, shape (n,); None for preferences.
    noise
        Standard deviation of the scores; None: inferred, site "noise", with `noise_scale`.
    prior_scale
        tau; None: inferred, site "prior_scale".
    centred
        Sample theta itself, which mixes better where the data decide it, instead of z = theta / tau.
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


def run_nuts(
    data: Mapping[str, FloatArray | float],
    *,
    num_chains: int,
    num_warmup: int,
    num_draws: int,
    target_accept: float,
    seed: int,
) -> tuple[dict[str, FloatArray], dict[str, np.ndarray]]:
    """Return draws of each site, (C, S, ...), and NUTS's own statistics of each, (C, S).

    Parameters
    ----------
    data
        The arguments of `reward_program`; those of one kind and shape are compiled for once.
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
    """Return the whole run as one jitted function of key and data, which compiles once for each shape of them.

    `MCMC.run` itself compiles its loop anew in every run, three seconds each.
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
