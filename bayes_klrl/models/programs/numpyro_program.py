"""The posterior as a NumPyro program, and a language model as its guide.

    x ~ prior(. | prompt)                 sample site "x": tokens, one sequence per site, event_dim 1
    reward = r(x)                         deterministic site "reward"
    factor exp(reward / alpha)            factor site "likelihood"

The programs are genuine: `numpyro.handlers`, `Predictive`, `log_density` and a user's own `numpyro.infer.SVI` work on them.
With a `JaxLM` and a `TokenReward` everything is traced and compiled. A reward of another kind, or a model that is not on JAX,
runs on the host in a callback (see `traced_rewards` and `numpyro_distribution`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpyro

from bayes_klrl.checks import check_prompts_per_step
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.decoding import check_shares_vocabulary
from bayes_klrl.models.programs.numpyro_distribution import SequenceDistribution, padded_past_eos
from bayes_klrl.models.programs.traced_rewards import check_traceable, traced_reward
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import Array, JaxModel, LanguageModel

__all__ = [
    "PARAMETERS",
    "NumpyroGuide",
    "NumpyroModel",
    "SequenceDistribution",
    "completion_distribution",
    "numpyro_guide",
    "numpyro_model",
]

PARAMETERS = "language_model"
"""The name of the site of a guide's parameters."""


@dataclass(frozen=True, eq=False)
class NumpyroModel:
    """A posterior as a NumPyro program that returns the completions (..., P, T); see `numpyro_model`."""

    posterior: Posterior
    prompts_per_step: int | None = None

    def __call__(self, prompts: Array | None = None) -> Array:
        """Run the program, on the prompts of these indices if there are any."""
        posterior = self.posterior
        with _prompts(posterior, self.prompts_per_step, prompts) as chosen:
            x = numpyro.sample("x", completion_distribution(posterior, posterior.prior, chosen))
            reward = _reward(posterior, x, chosen)
            numpyro.deterministic("reward", reward)
            numpyro.factor("likelihood", reward / posterior.alpha)
        return x


@dataclass(frozen=True, eq=False)
class NumpyroGuide:
    """A language model as a NumPyro guide of `NumpyroModel`'s site "x"; see `numpyro_guide`."""

    posterior: Posterior
    lm: LanguageModel
    prompts_per_step: int | None = None

    @property
    def trains(self) -> bool:
        """True if the guide has parameters: the model is on JAX, and not the prior itself."""
        return isinstance(self.lm, JaxModel) and self.lm is not self.posterior.prior

    def __call__(self, prompts: Array | None = None) -> Array:
        """Run the program, on the prompts of these indices if there are any."""
        lm = self.lm
        if self.trains:
            lm = lm.with_parameters(numpyro.param(PARAMETERS, lm.parameters))  # type: ignore[attr-defined]
        with _prompts(self.posterior, self.prompts_per_step, prompts) as chosen:
            return numpyro.sample("x", completion_distribution(self.posterior, lm, chosen))

    def language_model(self, params: Mapping[str, Any]) -> Any:
        """Return the trained language model.

        Parameters
        ----------
        params
            The result of `numpyro.infer.SVI.get_params(state)`, or the `params` of the result of `SVI.run`.
        """
        if not self.trains:
            return self.lm
        if PARAMETERS not in params:
            raise BayesKLRLError(
                f"These parameters have no {PARAMETERS!r}, only {sorted(params)}. Give svi.get_params(state) of an SVI "
                "with this guide."
            )
        return self.lm.with_parameters(params[PARAMETERS])  # type: ignore[attr-defined]


def numpyro_model(posterior: Posterior, prompts_per_step: int | None = None) -> NumpyroModel:
    """Return the posterior as a NumPyro program that returns the completions (..., P, T).

    It needs no argument. Its one optional argument is the indices of the prompts to use, an integer array; model and guide of
    a step get the same.

    Parameters
    ----------
    posterior
        The posterior to write as a program, with any prior.
    prompts_per_step
        Number of the P prompts that every execution without indices draws at random; None: all of them. With a subsample the
        gradients of NumPyro's `TraceGraph_ELBO` are too large by the factor P / prompts_per_step; those of our own
        `numpyro_backend.elbo.LeaveOneOutELBO` are not.

    Raises
    ------
    RewardError
        If a `TokenReward` cannot be traced by JAX and does not have `callback=True`.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> model = bk.Posterior(coin, longer, max_new_tokens=3).numpyro_model()
    >>> log_joint, _ = numpyro.infer.util.log_density(model, (), {}, {"x": jnp.array([[0, 1, 1]])})
    >>> bool(np.isclose(float(log_joint), 2 + 2 * np.log(0.5)))
    True
    """
    check_prompts_per_step(prompts_per_step, posterior.num_prompts)
    check_traceable(posterior)
    return NumpyroModel(posterior, prompts_per_step)


def numpyro_guide(posterior: Posterior, lm: LanguageModel, prompts_per_step: int | None = None) -> NumpyroGuide:
    """Return a language model as a NumPyro guide of `numpyro_model`'s site "x".

    The parameters of a model on JAX are one `numpyro.param` site, "language_model", a tree. `guide.language_model(params)`
    returns the language model with the trained parameters. The prior itself as a guide is frozen (train
    `prior.with_parameters(prior.parameters)`), and so is a model that is not on JAX.
    """
    check_shares_vocabulary("The guide", lm, posterior.prior)
    check_prompts_per_step(prompts_per_step, posterior.num_prompts)
    return NumpyroGuide(posterior, lm, prompts_per_step)


def _prompts(posterior: Posterior, prompts_per_step: int | None, prompts: Array | None) -> Any:
    """Return the plate of the prompts: of these indices, or of a random subsample where there are none."""
    if prompts is None:
        return numpyro.plate("prompts", posterior.num_prompts, subsample_size=prompts_per_step, dim=-1)
    with numpyro.handlers.substitute(data={"prompts": jnp.asarray(prompts)}):
        return numpyro.plate("prompts", posterior.num_prompts, subsample_size=len(prompts), dim=-1)


def completion_distribution(posterior: Posterior, lm: LanguageModel, chosen: Array) -> SequenceDistribution:
    """Return a model's distribution over completions of the chosen prompts."""
    return SequenceDistribution(lm, posterior.prompt_ids, posterior.max_new_tokens, chosen=chosen)


def _reward(posterior: Posterior, x: Array, chosen: Array) -> Array:
    """Return r(x) of completions (..., P, T), shape (..., P)."""
    expected = (len(chosen), posterior.max_new_tokens)
    if jnp.shape(x)[-2:] != expected:
        raise BayesKLRLError(
            f'The site "x" holds completions of shape (..., P, T) = (..., {expected[0]}, {expected[1]}), with any ids past '
            f"EOS; got {jnp.shape(x)}."
        )
    tokens, lengths = padded_past_eos(jnp.asarray(x), posterior.prior)
    prompt_index = jnp.broadcast_to(chosen, lengths.shape).ravel()
    rows = tokens.reshape(-1, tokens.shape[-1])
    return traced_reward(posterior, rows, lengths.ravel(), prompt_index).reshape(lengths.shape)
