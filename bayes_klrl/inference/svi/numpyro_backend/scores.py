"""Score-function gradients of any objective, as a NumPyro `ELBO`.

    surrogate = 1/N sum_n sum_p a_np log q(x_np)  (a without a gradient), whose gradient is minus that of the loss

a_np, shape (N, P), is the weight that the objective gives to draw n of prompt p (see `svi.objectives.weights`). Objectives may
read the log Z-hat of each prompt, in nats, which moves with the steps,

    log Z-hat <- log(0.9 Z-hat + 0.1 mean_n w_n),      at a prompt's first step log mean_n w_n,

and is a part of NumPyro's mutable state: a training that goes on from a checkpoint has it again, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.numpyro_backend.elbo import EVIDENCE, LeaveOneOutELBO, Parts
from bayes_klrl.inference.svi.objectives import Objective
from bayes_klrl.models.programs.numpyro_program import NumpyroGuide, NumpyroModel
from bayes_klrl.models.programs.traced_rewards import abstract, first_lines, float_type
from bayes_klrl.typing import Array

__all__ = ["ScoreELBO", "check_weights"]

_MOVING = 0.9


class ScoreELBO(LeaveOneOutELBO):
    """The scores of whole completions, weighted by an objective; for a posterior's own programs.

    Its value is -ELBO whatever the objective. Without mutable state, as in `numpyro.infer.SVI` of your own, log Z-hat is that
    of each step's draws alone; `SVIState.mutable_state = loss.start(num_prompts)` lets it move.

    Parameters
    ----------
    num_particles
        N, the number of completions per prompt, at least 2.
    objective
        The objective. Its method `weights` gets JAX arrays, which are traced.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> model, guide = posterior.numpyro_model(), posterior.numpyro_guide(coin)
    >>> loss, key = ScoreELBO(1000, bk.ForwardKL()), jax.random.key(0)
    >>> found = loss.loss_with_mutable_state(key, loss.start(1), model, guide)
    >>> bool(abs(found["loss"] + 1.75) < 0.1)  # the prior's: -E[r]
    True
    >>> exact = bk.Exact().run(posterior, seed=0)
    >>> bool(abs(found["mutable_state"][EVIDENCE] - exact.log_evidence)[0] < 0.1)
    True
    """

    def __init__(self, num_particles: int, objective: Objective) -> None:
        super().__init__(num_particles)
        self.objective = objective

    def start(self, num_prompts: int) -> dict[str, Array]:
        """Return log Z-hat before the first step: -inf for each of P prompts, which have no draws yet."""
        return {EVIDENCE: jnp.full(num_prompts, -jnp.inf, dtype=float_type())}

    def surrogate(self, parts: Parts, state: Mapping[str, Any]) -> tuple[Array, dict[str, Array]]:
        """Return sum_p a_np log q(x_np), (N,), times P / prompts_per_step, and the moved log Z-hats of all prompts."""
        scale, chosen = parts.step["scale"], parts.step["prompt_index"]
        log_weights = parts.weights / scale
        kept = state.get(EVIDENCE)
        before = jnp.full(len(chosen), -jnp.inf) if kept is None else kept[chosen]
        log_evidence = self.follow_evidence(before, log_weights)
        weights = stop_gradient(self.objective.weights(log_weights, log_evidence, jnp))
        carried = {} if kept is None else {EVIDENCE: kept.at[chosen].set(log_evidence)}
        return scale * (weights * parts.score).sum(axis=1), carried

    def follow_evidence(self, before: Array, log_weights: Array) -> Array:
        """Return log Z-hat of the step's prompts, (P,) in nats, moved towards that of its draws.

        Parameters
        ----------
        before
            log Z-hat after earlier steps, (P,) in nats; -inf: there are none.
        log_weights
            log w of the draws, (N, P), in nats.
        """
        now = jax.nn.logsumexp(log_weights, axis=0) - math.log(len(log_weights))
        moved = jnp.logaddexp(math.log(_MOVING) + before, math.log(1 - _MOVING) + now)
        return jnp.where(jnp.isneginf(before), now, moved)

    def _executed(self, rng_key: Any, param_map: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> Parts:
        """Return the terms of N particles; programs of the user's own are refused."""
        if not (isinstance(model, NumpyroModel) and isinstance(guide, NumpyroGuide)):
            raise BayesKLRLError(
                f"ScoreELBO is for the programs that posterior.numpyro_model() and posterior.numpyro_guide(lm) return; got "
                f"{model!r} and {guide!r}. Use LeaveOneOutELBO, which takes programs of your own."
            )
        return super()._executed(rng_key, param_map, model, guide, args, kwargs)


def check_weights(objective: Objective, num_particles: int, num_prompts: int) -> None:
    """Refuse an objective whose weights JAX cannot trace, or whose weights are not one per draw, before anything is drawn.

    Parameters
    ----------
    objective
        The objective.
    num_particles, num_prompts
        N and P of a step.
    """
    shape = (num_particles, num_prompts)
    arrays = abstract(shape, float_type()), abstract(shape[1:], float_type())
    try:
        found = jax.eval_shape(lambda log_w, log_z: jnp.asarray(objective.weights(log_w, log_z, jnp)), *arrays)
    except Exception as error:  # any error of a function that reads the values of a traced array
        raise BayesKLRLError(
            f"The weights of the objective {objective!r} cannot be traced by JAX, {type(error).__name__}: "
            f"{first_lines(error)}. Compute them by functions of xp, with no loop or `if` over values, or use a bk.TorchLM."
        ) from error
    if found.shape != shape:
        raise BayesKLRLError(
            f"The objective {objective!r} returned weights of shape {found.shape}; it must return one per draw, (N, P) = "
            f"{shape}."
        )
