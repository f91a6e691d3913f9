"""Score-function gradients of the ELBO, as NumPyro `ELBO`s that keep the terms which stock losses drop, with less noise.

With log w = log p(x, theta) - log q(x, theta) and sites of two kinds, x that are not reparametrised (completions) and theta
that are, N particles give

    grad ELBO ~ 1/N sum_n [ grad_theta log w_n  +  (log w_n - mean of the others) grad log q(x_n) ],

the pathwise gradient plus the score term with a leave-one-out baseline (Kool et al. 2019); log q(x) is held fixed in the
former, where its gradient has mean zero. The Rao-Blackwellised variant sums the KL of x over the vocabulary at every prefix
(Amini et al. 2025; theory.md 2.3 and `pyro_backend.elbo` have the formula) and leaves the rest as it is.

Plates that hold every site ("prompts") are independent problems: each index has its own log-weights and its own baseline.
Where a theta is outside of them and the guide draws it before x, the score of one prompt's x is multiplied by that prompt's
terms and the shared ones, since the others are independent of it; where it is drawn after x, by all terms. Stock NumPyro has
no baselines, and its `TraceGraph_ELBO` scales the score term of a subsampled plate twice, so that gradients are
P / prompts_per_step times too long.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jax import random
from jax.lax import stop_gradient
from numpyro import handlers
from numpyro.distributions import MaskedDistribution
from numpyro.infer import ELBO
from numpyro.primitives import Messenger

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.estimators import leave_one_out
from bayes_klrl.inference.svi.numpyro_backend.sites import SiteLogProbs, check_guide, is_concrete, sample_sites
from bayes_klrl.inference.svi.refusals import check_same_latents
from bayes_klrl.models.programs.numpyro_distribution import SequenceDistribution
from bayes_klrl.models.programs.numpyro_program import NumpyroGuide, NumpyroModel
from bayes_klrl.models.programs.traced_rewards import float_type
from bayes_klrl.models.programs.turns import NUMPYRO_TURN, in_turn
from bayes_klrl.typing import Array

__all__ = ["EVIDENCE", "STEP", "LeaveOneOutELBO", "Parts", "RaoBlackwellELBO", "SequenceELBO"]

STEP = "bayes_klrl_step"
"""The name in NumPyro's mutable state under which a loss returns the terms of its draws, if it is given such a state."""

EVIDENCE = "bayes_klrl_evidence"
"""The name in NumPyro's mutable state of the moving log Z-hats, (P,) in nats, of a loss that has them; see `scores`."""


class Parts(NamedTuple):
    """The terms of N particles, in nats; C are the indices of the plates that hold every site: (P,), or none."""

    cost: Array
    """log w without the terms that `kl` replaces, pathwise differentiable, shape (N, C)."""
    weights: Array
    """The part of it that depends on the draw that is scored, without gradient, shape (N, X)."""
    score: Array
    """log q of the sites that are not reparametrised, shape (N, X); X are the indices of their own plates, or C."""
    step: dict[str, Array]
    """The arrays that are returned under `STEP`."""
    kl: Array | None = None
    """KL of the guide's next token to the model's, at every position of site "x", shape (N, P, T)."""
    drawn: Array | None = None
    """log q of the token drawn there, shape (N, P, T)."""


class SequenceELBO(ELBO):
    """Common part: run guide and model with all particles at once, and differentiate a surrogate.

    The programs of `Posterior.numpyro_model` and `numpyro_guide` run once, with their particles in a plate; any other are
    mapped over particles by `jax.vmap`, with one subsample of plates for all of them.

    Parameters
    ----------
    num_particles
        N, the number of particles per prompt, at least 2.
    """

    can_infer_discrete = True

    def __init__(self, num_particles: int = 64) -> None:
        if num_particles < 2:
            raise BayesKLRLError(f"A leave-one-out baseline needs num_particles >= 2; got {num_particles}.")
        super().__init__(num_particles=num_particles)

    @in_turn(NUMPYRO_TURN)
    def loss_with_mutable_state(
        self, rng_key: Any, param_map: dict[str, Any], model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Return {"loss": -ELBO summed over prompts, with the estimator's gradient, "mutable_state": see `STEP`}.

        A draw of likelihood 0 makes loss and gradient NaN: in your own loop, use `SVI.stable_update`. Outside of `jax.jit`
        and `jax.grad` such a draw raises an error that names site and completion: `SVI.evaluate(state)`, with the state
        before a step, raises it for that step's draws.
        """
        parts = self._executed(rng_key, param_map, model, guide, args, kwargs)
        surrogate, carried = self.surrogate(parts, param_map)
        value = _per_particle(parts.cost)
        if parts.kl is not None:
            value = value - _per_particle(parts.kl)
        loss = -(stop_gradient(value.mean()) + surrogate.mean() - stop_gradient(surrogate.mean()))
        if is_concrete(loss) and not jnp.isfinite(loss):
            reader = _SiteReader(self.num_particles)
            found: Any = reader._executed(rng_key, param_map, model, guide, args, kwargs)
            reader.log_probs.check(found)
        if STEP in param_map:
            carried = {**carried, STEP: _step(parts)}
        return {"loss": loss, "mutable_state": stop_gradient(carried) if carried else None}

    def surrogate(self, parts: Parts, state: Mapping[str, Any]) -> tuple[Array, dict[str, Array]]:
        """Return a number per particle, (N,), whose mean has minus the loss's gradient, and what later steps need, by name.

        Parameters
        ----------
        parts
            The terms of N particles.
        state
            NumPyro's mutable state, among the parameters; what this loss carries on has the same names in it.
        """
        found = _per_particle(parts.cost) + _per_particle(leave_one_out(parts.weights) * parts.score)
        if parts.kl is not None:
            fixed = stop_gradient(parts.kl)
            later = jnp.flip(jnp.cumsum(jnp.flip(fixed, -1), -1), -1) - fixed
            found = found - _per_particle(parts.kl + leave_one_out(later) * parts.drawn)
        return found, {}

    def start(self, num_prompts: int) -> dict[str, Array]:
        """Return what `surrogate` carries on, as it is before the first step of P prompts, by name."""
        return {}

    @abstractmethod
    def parts(self, model_trace: Any, guide_trace: Any) -> Parts:
        """Return the terms of one execution, of all particles or of one."""

    def _executed(self, rng_key: Any, param_map: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> Parts:
        """Return the terms of N particles."""
        params = {name: value for name, value in param_map.items() if name not in (STEP, EVIDENCE)}

        def execution(key: Any, model: Any, guide: Any) -> Parts:
            return self.parts(*_traces(key, params, model, guide, args, kwargs))

        if isinstance(model, NumpyroModel) and isinstance(guide, NumpyroGuide):
            return execution(rng_key, self._in_plate(model), self._in_plate(guide))
        plates, particles = random.split(rng_key)
        model, guide = (handlers.seed(program, plates, hide_types=_NOT_PLATES) for program in (model, guide))
        return jax.vmap(lambda key: execution(key, model, guide))(random.split(particles, self.num_particles))

    def _in_plate(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """Return a program of this package with its particles in a plate."""

        def particles(*args: Any, **kwargs: Any) -> Any:
            with numpyro.plate("particles", self.num_particles, dim=-2):
                return program(*args, **kwargs)

        return particles


class LeaveOneOutELBO(SequenceELBO):
    """The ELBO with a leave-one-out baseline of the whole log-weight; see the module's formula.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> model, guide = posterior.numpyro_model(), posterior.numpyro_guide(coin)
    >>> loss = LeaveOneOutELBO(1000).loss(random.key(0), {}, model, guide)  # the prior's: -E[r] = -1.75
    >>> bool(abs(loss + 1.75) < 0.1)
    True
    """

    def parts(self, model_trace: Any, guide_trace: Any) -> Parts:
        """Return log w, and log q of the sites that are not reparametrised."""
        scored = [site for site in _sites(guide_trace) if _needs_score(site)]
        terms = [(site, _log_prob(site)) for site in _sites(model_trace)]
        # log q of what is not reparametrised is fixed: the mean of its gradient is 0
        terms += [(site, -_fixed_if(_needs_score(site), _log_prob(site))) for site in _sites(guide_trace)]
        return _parts(terms, scored, model_trace, guide_trace)


class RaoBlackwellELBO(SequenceELBO):
    """The ELBO with the KL of site "x" summed over the vocabulary at every prefix.

    Both models must offer `score_positions`, as `JaxLM` does; the tables (N, P, T, V) must fit into memory. Sites other than
    "x" must be reparametrised.
    """

    def parts(self, model_trace: Any, guide_trace: Any) -> Parts:
        """Return log w without the pair of site "x", its log q, and its KL at every position."""
        for site in _sites(guide_trace):
            if _needs_score(site) and site["name"] != "x":
                raise BayesKLRLError(
                    f"The guide's site {site['name']!r} is not reparametrised, and this loss sums the KL of 'x' alone. Use "
                    "LeaveOneOutELBO."
                )
        guide_site, model_site = guide_trace["x"], model_trace["x"]
        if not all(isinstance(site["fn"], SequenceDistribution) for site in (guide_site, model_site)):
            raise BayesKLRLError("The site 'x' must be a SequenceDistribution in model and guide. Use LeaveOneOutELBO.")
        log_q, tokens, inside = guide_site["fn"].position_log_probs(guide_site["value"])
        log_p, _, _ = model_site["fn"].position_log_probs(guide_site["value"])
        # a token of probability 0 adds nothing to the KL and nothing to its gradient
        possible = stop_gradient(log_q) > -jnp.inf
        difference = jnp.where(possible, log_q - jnp.where(possible, log_p, 0.0), 0.0)
        kl = (jnp.where(possible, jnp.exp(jnp.where(possible, log_q, 0.0)), 0.0) * difference).sum(axis=-1)
        drawn = jnp.take_along_axis(log_q, tokens[..., None], axis=-1)[..., 0]
        kl, drawn = (jnp.where(inside, array, 0.0) for array in (kl, drawn))
        guide_site["unscaled"] = drawn.sum(axis=-1)
        terms = [(site, _log_prob(site)) for site in _sites(model_trace) if site["name"] != "x"]
        terms += [(site, -_log_prob(site)) for site in _sites(guide_trace) if site["name"] != "x"]
        scale = 1.0 if model_site["scale"] is None else model_site["scale"]
        return _parts(terms, [guide_site], model_trace, guide_trace)._replace(kl=scale * kl, drawn=drawn)


class _SiteReader(SequenceELBO):
    """A loss that executes programs as the others do, and only reads the log-probs of their sites."""

    def __init__(self, num_particles: int) -> None:
        super().__init__(num_particles)
        self.log_probs = SiteLogProbs()

    def parts(self, model_trace: Any, guide_trace: Any) -> Any:
        """Return the arrays that `SiteLogProbs.check` reads."""
        return self.log_probs.read(model_trace, guide_trace)


_NOT_PLATES = ["sample", "prng_key", "control_flow"]


class _Fixed(Messenger):
    """An effect handler that stops gradients at the values of latent sites that are not reparametrised."""

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and _needs_score(msg):
            msg["value"] = stop_gradient(msg["value"])
            msg["intermediates"] = []


def _traces(key: Any, params: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the traces of one execution: the model replayed on the guide's draws."""
    model_key, guide_key = random.split(key)
    guide = handlers.substitute(handlers.seed(guide, guide_key), data=params)
    with _Fixed():
        guide_trace = handlers.trace(guide).get_trace(*args, **kwargs)
    check_guide(guide_trace)
    model = handlers.substitute(handlers.replay(handlers.seed(model, model_key), guide_trace), data=params)
    model_trace = handlers.trace(model).get_trace(*args, **kwargs)
    check_same_latents(sample_sites(model_trace), sample_sites(guide_trace))
    return model_trace, guide_trace


def _sites(trace: Any) -> list[Any]:
    """Return the sample sites of a trace, factors and observations included."""
    return [site for site in trace.values() if site["type"] == "sample"]


def _needs_score(site: Any) -> bool:
    """Return whether a site's draws are not a differentiable function of its parameters."""
    return not site["is_observed"] and not site["fn"].has_rsample


def _fixed_if(condition: bool, values: Array) -> Array:
    """Return values, without their gradient if the condition holds."""
    return stop_gradient(values) if condition else values


def _unscaled(site: Any) -> Array:
    """Return a site's log-prob without the scale of a subsampled plate; computed once."""
    if "unscaled" not in site:
        extra = [site["intermediates"]] if site["intermediates"] else []
        site["unscaled"] = site["fn"].log_prob(site["value"], *extra)
    return site["unscaled"]


def _score(site: Any) -> Array:
    """Return log q of a draw, neither scaled nor masked: other terms depend on a masked draw, too."""
    if not isinstance(site["fn"], MaskedDistribution):
        return _unscaled(site)
    unmasked = site["fn"].base_dist
    while isinstance(unmasked, MaskedDistribution):
        unmasked = unmasked.base_dist
    return unmasked.log_prob(site["value"])


def _log_prob(site: Any) -> Array:
    """Return a site's log-prob."""
    log_prob = _unscaled(site)
    return log_prob if site["scale"] is None else site["scale"] * log_prob


def _parts(terms: list[tuple[Any, Array]], scored: list[Any], model_trace: Any, guide_trace: Any) -> Parts:
    """Return the parts of one execution.

    Parameters
    ----------
    terms
        The terms that log w is the sum of: sites and their log-probs, with their signs.
    scored
        The sites that are not reparametrised.
    model_trace, guide_trace
        The traces of the execution.
    """
    common = set.intersection(*(set(site["cond_indep_stack"]) for site in _sites(model_trace) + _sites(guide_trace)))
    cost = sum((_summed(log_prob, common) for _, log_prob in terms), start=jnp.zeros(()))
    step = _completions(model_trace, guide_trace)
    own = set(scored[0]["cond_indep_stack"]) if len(scored) == 1 else common
    if not scored or own == common or _any_outside_after(scored[0], own, guide_trace):
        score = sum((_summed(_score(site), common) for site in scored), start=jnp.zeros_like(cost))
        return Parts(cost, stop_gradient(cost), score, step)
    weights = jnp.zeros(())
    for site, log_prob in terms:
        inside = own <= set(site["cond_indep_stack"])
        weights = weights + (_summed(log_prob, own) if inside else log_prob.sum())
    return Parts(cost, stop_gradient(weights), _summed(_score(scored[0]), own), step)


def _any_outside_after(scored: Any, own: set[Any], guide_trace: Any) -> bool:
    """Return whether the guide draws a site after this one and outside of its plates, which may couple their indices."""
    names = [site["name"] for site in _sites(guide_trace)]
    after = _sites(guide_trace)[names.index(scored["name"]) + 1 :]
    return any(not own <= set(site["cond_indep_stack"]) for site in after)


def _summed(log_prob: Array, plates: set[Any]) -> Array:
    """Return a log-prob summed over all dimensions but those of these plates."""
    log_prob, dims = jnp.asarray(log_prob), {frame.dim for frame in plates}
    others = tuple(axis for axis in range(log_prob.ndim) if axis - log_prob.ndim not in dims)
    return log_prob.sum(axis=others)


def _per_particle(values: Array) -> Array:
    """Return values (N, ...) summed over all but N."""
    return values.reshape(len(values), -1).sum(axis=1)


def _completions(model_trace: Any, guide_trace: Any) -> dict[str, Array]:
    """Return the arrays under `STEP` but the log-weights, for a posterior's program, each (N, P) but for tokens (N, P, T)."""
    if not {"x", "likelihood", "prompts"} <= model_trace.keys():
        return {}
    x, likelihood = guide_trace["x"], model_trace["likelihood"]
    return {
        "tokens": x["value"],
        "prompt_index": model_trace["prompts"]["value"],
        "log_likelihood": _unscaled(likelihood),
        "log_guide": _unscaled(x),
        "scale": jnp.asarray(1.0 if x["scale"] is None else x["scale"], dtype=float_type()),
    }


def _step(parts: Parts) -> dict[str, Array]:
    """Return the arrays under `STEP`: log-weights (N, P) without the scale of a subsample, and those of `_completions`."""
    log_weights = parts.cost if parts.kl is None else parts.cost - parts.kl.sum(axis=-1)
    return {"log_weights": log_weights / parts.step["scale"], **parts.step}
