"""The training loop of `SVI` on JAX: a NumPyro model, a NumPyro guide, the loss of an objective, Adam from optax.

A step is one compiled program: draw, score, differentiate, update. Its draws come back to the host, where rewards are checked
as everywhere else before the step is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from jax import random

from bayes_klrl.errors import BayesKLRLError, RewardError
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.inference.svi.loop import Habits, TrainingPlan, trained
from bayes_klrl.inference.svi.numpyro_backend.elbo import STEP, LeaveOneOutELBO, RaoBlackwellELBO, SequenceELBO
from bayes_klrl.inference.svi.numpyro_backend.scores import ScoreELBO, check_weights
from bayes_klrl.inference.svi.objectives import ELBO, objective_of
from bayes_klrl.inference.svi.optimizers import Adam, optimizer_of
from bayes_klrl.inference.svi.refusals import completion_text, no_adapter, no_other_alpha, unbounded_loss
from bayes_klrl.inference.svi.steps import MAX_GRADIENT_NORM, StepLimit, learning_rate_schedule
from bayes_klrl.inference.svi.steps.minibatches import prompts_of_step
from bayes_klrl.likelihood import MAX_NATS
from bayes_klrl.models.decoding import check_shares_vocabulary
from bayes_klrl.models.programs.numpyro_program import (
    NumpyroGuide,
    completion_distribution,
    numpyro_guide,
    numpyro_model,
)
from bayes_klrl.models.programs.traced_rewards import check_traceable, host_errors, is_traced
from bayes_klrl.models.programs.turns import NUMPYRO_TURN, in_turn
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import generator
from bayes_klrl.sequences import completion_lengths
from bayes_klrl.typing import FloatArray, IntArray, JaxModel
from bayes_klrl.weights import effective_sample_size

__all__ = ["Completions", "Training", "fit_guide", "jax_key", "optimiser"]

_ELBOS = {"leave_one_out": LeaveOneOutELBO, "rao_blackwell": RaoBlackwellELBO}
_LEARNING_RATE = 2e-3
_TRACING_TOLERANCE = 1e-3
"""Allowed difference of a traced reward from the same function on the host, relative to the largest reward (float32)."""


@in_turn(NUMPYRO_TURN)
def fit_guide(plan: TrainingPlan, posterior: Posterior, habits: Habits, *, seed: int, progress: bool) -> Fit:
    """Return the guide after `plan.num_steps` steps; see `SVI.fit`."""
    start = time.perf_counter()
    no_adapter(posterior.prior, plan.adapter)
    only_on_torch(plan)
    check_traceable(posterior)
    training = Training(plan, posterior, jax_key(seed), seed)
    return trained(plan, posterior, training, habits, start=start, progress=progress)


def only_on_torch(plan: TrainingPlan) -> None:
    """Refuse what the backend on torch alone has."""
    objective = objective_of(plan.objective)
    if not callable(getattr(objective, "weights", None)):
        raise BayesKLRLError(
            f"A loss as bk.audit takes it is for priors on torch; got objective={plan.objective!r}. On JAX an objective is a "
            "name, or an object with the method `weights` (see svi.objectives). Use one, or a bk.TorchLM."
        )
    for name, what in (("replay", "Replay of earlier draws"), ("sampler", "Learning from the draws of a sampler")):
        if getattr(objective, name, None):
            raise BayesKLRLError(
                f"{what} is for priors on torch; got objective={plan.objective!r}. Leave {name} out, or use a bk.TorchLM."
            )
    asked = {
        "optimizer": plan.optimizer is not None and not isinstance(optimizer_of(plan.optimizer), Adam),
        "twist": plan.twist not in (None, "none"),
        "particles_per_pass": plan.particles_per_pass is not None,
        "gradient_checkpointing": plan.gradient_checkpointing,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise BayesKLRLError(
                f"SVI({name}=...) is for priors on torch; a JaxLM is trained by Adam, by whole completions, all of a step at "
                f"once. Leave {name} out, or use a bk.TorchLM."
            )


def loss_of(plan: TrainingPlan, posterior: Posterior) -> SequenceELBO:
    """Return the loss: the estimators of its own for the ELBO, else the one of scores."""
    objective = objective_of(plan.objective)
    if isinstance(objective, ELBO):
        return _ELBOS[plan.estimator](plan.num_particles)
    check_weights(objective, plan.num_particles, plan.prompts_per_step or posterior.num_prompts)
    return ScoreELBO(plan.num_particles, objective)


def starting_guide(plan: TrainingPlan, posterior: Posterior) -> Any:
    """Return the language model that the training starts from, with parameters of its own: the prior, or another policy."""
    start: Any = posterior.prior if plan.initial_guide is None else plan.initial_guide
    check_shares_vocabulary("initial_guide", start, posterior.prior)
    if not isinstance(start, JaxModel):
        raise BayesKLRLError(
            f"initial_guide is a {type(start).__name__}, and the prior a {type(posterior.prior).__name__}, whose guide is "
            "trained on JAX. Give a bk.JaxLM; bk.JaxLM.from_pretrained reads the folder that a TorchLM was saved in."
        )
    return start.with_parameters(start.parameters)


def jax_key(seed: object) -> Any:
    """Return the JAX key of a seed, which may be larger than JAX accepts."""
    first, second = generator(seed).integers(2**32, size=2, dtype=np.uint32)
    return random.fold_in(random.key(first), second)


class Training:
    """NumPyro's SVI of a posterior, with its newest state.

    Parameters
    ----------
    plan, posterior
        The numbers of the training, and the posterior that the guide approximates.
    key
        The JAX key for all random numbers but the choice of prompts.
    seed
        Seed for the prompts of each step.

    Attributes
    ----------
    state
        NumPyro's state after the newest step; its `mutable_state` holds that step's draws, and the moving log Z-hats of
        objectives that have them.
    """

    def __init__(self, plan: TrainingPlan, posterior: Posterior, key: Any, seed: int = 0) -> None:
        self.posterior, self.seed, self._prompts_per_step = posterior, seed, plan.prompts_per_step
        self.guide: NumpyroGuide = numpyro_guide(posterior, starting_guide(plan, posterior), plan.prompts_per_step)
        model = numpyro_model(posterior, plan.prompts_per_step)
        elbo = loss_of(plan, posterior)
        schedule = learning_rate_schedule(plan.num_steps)
        highest = plan.learning_rate or _LEARNING_RATE
        self.learning_rates = highest * np.array([schedule(step) for step in range(plan.num_steps)])
        self.svi = numpyro.infer.SVI(model, self.guide, optimiser(self.learning_rates), elbo)
        self.state = jax.jit(self.svi.init)(key)
        carried = elbo.start(posterior.num_prompts)
        shapes = jax.eval_shape(
            lambda params: elbo.loss_with_mutable_state(key, {**params, **carried, STEP: None}, model, self.guide),
            self.svi.get_params(self.state),
        )
        blank = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), shapes["mutable_state"])
        self.state = self.state._replace(mutable_state={**blank, **carried})
        self.limit = StepLimit(plan.max_step_kl)
        self._compiled: Any = None

    def steps(self) -> Iterator[dict[str, float]]:
        """Take one gradient step per item; see `step`."""
        for number in range(len(self.learning_rates)):
            yield self.step(number)

    def step(self, number: int) -> dict[str, float]:
        """See `Training.step` of `svi.loop`."""
        if self._compiled is None:
            self._compiled = jax.jit(self.svi.update), jax.jit(self._change)
        update, change = self._compiled
        with host_errors(self.posterior):
            state, _ = update(self.state, *self._prompts_of(number))
            record = jax.device_get(state.mutable_state[STEP])
        completions = Completions(self.posterior, record)
        completions.check(against_host=number == 0)
        if self.limit.is_due():
            share = self.limit.share(float(change(state)))
            state = state if share == 1 else _shortened(self.state, state, share)
        self.state = state
        return {
            **completions.history,
            "gradient_norm": float(_optax_state(state)[0]),
            "learning_rate": float(self.learning_rates[number]),
            "step_kl": self.limit.last_kl,
            "tokens": completions.model_tokens,
        }

    def saved(self) -> dict[str, np.ndarray]:
        """See `Training.saved` of `svi.loop`: the leaves of NumPyro's state, by number."""
        leaves = jax.tree.leaves(self.state._replace(rng_key=random.key_data(self.state.rng_key)))
        found = {f"state.{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        return found | {"unmeasured": np.array([self.limit.unmeasured])}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """See `Training.restore` of `svi.loop`."""
        bare = self.state._replace(rng_key=random.key_data(self.state.rng_key))
        leaves, structure = jax.tree.flatten(bare)
        loaded = [  # files have no numbers, only arrays of one
            jnp.asarray(arrays[f"state.{i}"], dtype=leaf.dtype).reshape(leaf.shape) for i, leaf in enumerate(leaves)
        ]
        state = jax.tree.unflatten(structure, loaded)
        self.state = state._replace(rng_key=random.wrap_key_data(state.rng_key))
        self.limit.unmeasured = int(arrays["unmeasured"].item())

    def aim_at(self, posterior: Posterior) -> None:
        """Refuse: a step is compiled for one alpha."""
        raise no_other_alpha()

    def guide_so_far(self) -> Any:
        """Return the guide as a language model."""
        return self.guide.language_model(self.svi.get_params(self.state))

    def _prompts_of(self, number: int) -> tuple[IntArray, ...]:
        """Return the argument of the programs that chooses a step's prompts; none where all are used."""
        size = self._prompts_per_step
        return () if size is None else (prompts_of_step(self.seed, number, self.posterior.num_prompts, size),)

    def _change(self, state: Any) -> Any:
        """Return the KL by which the guide has moved since the step's draws x, 1/2 mean (log q_now(x) - log q(x))^2 nats."""
        record = state.mutable_state[STEP]
        lm = self.guide.language_model(self.svi.get_params(state))
        now = completion_distribution(self.posterior, lm, record["prompt_index"]).log_prob(record["tokens"])
        return jnp.square(now - record["log_guide"]).mean() / 2


def optimiser(learning_rates: FloatArray) -> Any:
    """Return Adam with these learning rates, one per step, on gradients of bounded norm; its first state is the norm."""
    rates = jnp.asarray(learning_rates, dtype=jnp.float32)
    noted = optax.GradientTransformation(
        lambda params: jnp.zeros(()), lambda updates, state, params=None: (updates, optax.tree.norm(updates))
    )
    return optax.chain(
        noted,
        optax.clip_by_global_norm(MAX_GRADIENT_NORM),
        optax.adam(lambda step: rates[jnp.minimum(step, len(rates) - 1)]),
    )


def _optax_state(state: Any) -> Any:
    """Return optax's state of NumPyro's (steps, (parameters, optax's))."""
    return state.optim_state[1][1]


def _shortened(before: Any, after: Any, share: float) -> Any:
    """Return the state after a step whose parameters went only a share of the way."""
    number, (parameters, rest) = after.optim_state
    start = before.optim_state[1][0]
    part = jax.tree.map(lambda old, new: jnp.where(old == new, old, old + share * (new - old)), start, parameters)
    return after._replace(optim_state=(number, (part, rest)))


class Completions:
    """The draws of a step, on the host: N completions of each of its P prompts.

    Parameters
    ----------
    posterior
        The posterior that they are draws for.
    record
        The arrays that the loss returned for its draws, see `numpyro_backend.elbo.STEP`.
    """

    def __init__(self, posterior: Posterior, record: dict[str, np.ndarray]) -> None:
        self.posterior = posterior
        self.log_weights: FloatArray = record["log_weights"].astype(np.float64)
        self.log_likelihood: FloatArray = record["log_likelihood"].astype(np.float64)
        self.lengths = completion_lengths(record["tokens"], posterior.prior.eos_token_ids)
        inside = np.arange(record["tokens"].shape[-1]) < self.lengths[..., None]
        self.tokens: IntArray = np.where(inside, record["tokens"], posterior.pad_token).astype(np.int64)
        self.prompt_index = record["prompt_index"].astype(np.int64)

    @property
    def history(self) -> dict[str, float]:
        """The step's means, see `Fit.history`."""
        return {
            "elbo": float(self.log_weights.mean()),
            "reward": float(self.log_likelihood.mean()) * self.posterior.alpha,
            "kl": float((self.log_likelihood - self.log_weights).mean()),
            "log_weight_sd": float(self.log_weights.std(axis=0, ddof=1).mean()),
            "ess": float(effective_sample_size(self.log_weights.T).mean()),
        }

    @property
    def model_tokens(self) -> int:
        """Tokens of the step: every completion is drawn once and scored twice, with its prompt each time."""
        return 3 * (int(self.lengths.sum()) + sum(len(self.posterior.prompt_ids[p]) for p in self.prompt_index))

    def check(self, *, against_host: bool) -> None:
        """Refuse invalid rewards, a likelihood of 0 and, if asked, a reward whose values change when JAX traces it.

        Raises
        ------
        RewardError
            If the reward raises it on the host, or has another value there: an index past the end of a table, which JAX moves
            to its last entry, or a function that changes from call to call.
        UnboundedLossError
            If a completion has likelihood 0, or prior probability 0, which a guide that started elsewhere may draw.
        BayesKLRLError
            If the guide's log-probs are not finite.
        """
        likelihood = self.posterior.likelihood
        traced = any(map(is_traced, likelihood.factors))
        reward = self.log_likelihood * self.posterior.alpha
        low, high = likelihood.bounds or (-np.inf, np.inf)
        slack = _TRACING_TOLERANCE * (1 + np.abs(reward[np.isfinite(reward)]).max(initial=0.0))
        fine = (reward < np.inf) & (reward >= low - slack) & (reward <= high + slack)  # NaN is not
        fine &= (np.abs(self.log_likelihood) <= MAX_NATS) | np.isneginf(reward)
        if traced and (against_host or not fine.all()):
            on_host = self._host_reward()
            with np.errstate(invalid="ignore"):
                same = (reward == on_host) | (np.abs(reward - on_host) <= slack)
            if not same.all():
                n, p = np.argwhere(~same)[0]
                raise RewardError(
                    f"The reward of the completion with ids {self._ids(n, p)} is {reward[n, p]:.6g} when JAX traces it, and "
                    f"{on_host[n, p]:.6g} on the host. Check for an index past the end of a table, which JAX moves to its "
                    "last entry, and for a function that changes from call to call; or use bk.TokenReward(..., callback=True)."
                )
        impossible = np.isneginf(reward)
        if impossible.any():
            raise unbounded_loss(self._text(impossible))
        impossible = np.isneginf(self.log_weights)
        if impossible.any():
            raise unbounded_loss(self._text(impossible), "prior probability")
        if not np.isfinite(self.log_weights).all():
            raise BayesKLRLError(
                "The guide's log-probs are no longer finite, so the training has diverged. Lower learning_rate or max_step_kl."
            )

    def _text(self, which: np.ndarray) -> str:
        """Return the words for the first completion of those where `which`, (N, P), is true."""
        n, p = np.argwhere(which)[0]
        return completion_text(self.posterior.prior, self._ids(n, p), self.posterior.prompt_ids[self.prompt_index[p]])

    def _ids(self, n: int, p: int) -> list[int]:
        """Return one completion's ids."""
        ids: list[int] = self.tokens[n, p, : self.lengths[n, p]].tolist()
        return ids

    def _host_reward(self) -> FloatArray:
        """Return the reward as all other algorithms compute it, shape (N, P)."""
        num_tokens = self.tokens.shape[-1]
        prompts = np.broadcast_to(self.prompt_index, self.lengths.shape).ravel()
        rows = self.posterior.reward_of_rows(self.tokens.reshape(-1, num_tokens), self.lengths.ravel(), prompts)
        return rows.reshape(self.lengths.shape)
