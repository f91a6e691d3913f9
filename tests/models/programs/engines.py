"""Pyro and NumPyro behind one face, so that a test of what both promise of a posterior's program is written once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pyro
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.models.programs import numpyro_program, pyro_program
from bayes_klrl.sequences import completion_lengths
from tests.helpers.truth import full_table
from tests.inference.svi import engines as svi_engines

__all__ = [
    "ENGINES",
    "Engine",
    "NumpyroEngine",
    "PyroEngine",
    "Trace",
    "Trained",
    "sequences_of",
    "slow_on_jax",
    "table_of",
    "text_posterior",
]

Program = Callable[[], Any]


@dataclass(frozen=True)
class Trace:
    """What one execution of a program did, as NumPy arrays; the reward and the factor of a guide are empty."""

    x: np.ndarray  # (..., P, T)
    log_prob: np.ndarray  # of x, (..., P)
    reward: np.ndarray  # (..., P)
    log_factor: np.ndarray  # (..., P)
    log_density: float  # of all sites together, by the engine
    native: Any  # the engine's own trace


@dataclass(frozen=True)
class Trained:
    """What a user's own SVI returned: the losses of its steps, the policy, and losses that it evaluated afterwards."""

    losses: np.ndarray
    policy: bk.NgramLM
    evaluated: np.ndarray


class Engine(svi_engines.Engine, Protocol):
    """Language models are those of `prior` and `guide`; arrays come back as NumPy arrays or become such."""

    token_type: Any

    def model(self, posterior: bk.Posterior) -> Program:
        """Return the posterior as a program."""

    def guide_program(self, posterior: bk.Posterior, guide: Any) -> Program:
        """Return a language model of `guide` as a program."""

    def run(self, program: Program, seed: int) -> np.ndarray:
        """Return what the program returns."""

    def trace(self, program: Program, seed: int = 0) -> Trace:
        """Return what the program did."""

    def scored(self, model: Program, x: np.ndarray) -> Trace:
        """Return what the model did when its completions are given, (P, T)."""

    def condition(self, model: Program, xs: np.ndarray) -> np.ndarray:
        """Return the log densities of the model conditioned on each of N sets of completions, (N, P, T)."""

    def replay(self, model: Program, guide_trace: Trace) -> Program:
        """Return the model with the guide's draws."""

    def in_plate(self, program: Program, num_particles: int) -> Program:
        """Return the program inside a plate of particles."""

    def distribution(self, lm: Any, posterior: bk.Posterior) -> Any:
        """Return a language model as the engine's distribution over completions of the posterior's prompts."""

    def sample(self, distribution: Any, shape: tuple[int, ...] = (), seed: int = 0) -> Any:
        """Return draws as the engine's own array."""

    def predictive(
        self, posterior: bk.Posterior, num_samples: int, *, parallel: bool, guide: Any = None
    ) -> dict[str, np.ndarray]:
        """Return the sites "x" and "reward" of `Predictive`."""

    def trace_graph_elbo(self, num_particles: int) -> Any:
        """Return the engine's stock loss for sites that have no reparametrisation."""

    def svi(
        self, posterior: bk.Posterior, guide: Any, loss: Any, num_steps: int, rate: float, decay: float = 1.0
    ) -> Trained:
        """Train the guide by the engine's SVI and Adam, whose rate is multiplied by `decay` at every step."""


class PyroEngine(svi_engines.PyroEngine):
    """Every method seeds Pyro, and puts its parameter store and torch's generator back."""

    token_type = np.int64

    def model(self, posterior: bk.Posterior) -> Program:
        return posterior.pyro_model()

    def guide_program(self, posterior: bk.Posterior, guide: Any) -> Program:
        return posterior.pyro_guide(guide)

    def run(self, program: Program, seed: int) -> np.ndarray:
        with _seeded(seed):
            return np.asarray(program())

    def trace(self, program: Program, seed: int = 0) -> Trace:
        with _seeded(seed):
            trace = pyro.poutine.trace(program).get_trace()
        trace.compute_log_prob()
        values = [trace.nodes["x"]["value"], trace.nodes["x"]["log_prob"], torch.zeros(0), torch.zeros(0)]
        if "reward" in trace.nodes:
            values[2:] = [trace.nodes["reward"]["value"], trace.nodes["likelihood"]["log_prob"]]
        x, log_prob, reward, log_factor = (value.detach().numpy() for value in values)
        return Trace(x, log_prob, reward, log_factor, float(trace.log_prob_sum().detach()), trace)

    def scored(self, model: Program, x: np.ndarray) -> Trace:
        return self.trace(pyro.poutine.condition(model, data={"x": torch.as_tensor(x)}))

    def condition(self, model: Program, xs: np.ndarray) -> np.ndarray:
        return np.array([self.scored(model, x).log_density for x in xs])

    def replay(self, model: Program, guide_trace: Trace) -> Program:
        return pyro.poutine.replay(model, trace=guide_trace.native)  # type: ignore[no-any-return]

    def in_plate(self, program: Program, num_particles: int) -> Program:
        return pyro.plate("particles", num_particles, dim=-2)(program)  # type: ignore[no-any-return]

    def distribution(self, lm: Any, posterior: bk.Posterior) -> Any:
        return pyro_program.SequenceDistribution(lm, posterior.prompt_ids, posterior.max_new_tokens, frozen=True)

    def sample(self, distribution: Any, shape: tuple[int, ...] = (), seed: int = 0) -> Any:
        with _seeded(seed):
            return distribution.sample(shape)

    def predictive(
        self, posterior: bk.Posterior, num_samples: int, *, parallel: bool, guide: Any = None
    ) -> dict[str, np.ndarray]:
        program = None if guide is None else posterior.pyro_guide(guide)
        with _seeded(0):
            predictive = pyro.infer.Predictive(
                posterior.pyro_model(), guide=program, num_samples=num_samples, parallel=parallel
            )
            found = predictive()
        return {name: found[name].numpy() for name in ("x", "reward")}

    def trace_graph_elbo(self, num_particles: int) -> Any:
        return pyro.infer.TraceGraph_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)

    def svi(
        self, posterior: bk.Posterior, guide: Any, loss: Any, num_steps: int, rate: float, decay: float = 1.0
    ) -> Trained:
        with _seeded(0):
            decaying = pyro.optim.ClippedAdam({"lr": rate, "lrd": decay})
            adam = pyro.optim.Adam({"lr": rate}) if decay == 1 else decaying
            svi = pyro.infer.SVI(posterior.pyro_model(), posterior.pyro_guide(guide), adam, loss=loss)
            losses = [svi.step() for _ in range(num_steps)]
            evaluated = [svi.evaluate_loss() for _ in range(20)]
        return Trained(np.array(losses), guide.to_ngram(), np.array(evaluated))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        pyro.set_rng_seed(seed)
        yield


class NumpyroEngine(svi_engines.NumpyroEngine):
    """The prior is traced, or is a NumPy table that is called on the host; guides are always traced."""

    token_type = np.int32

    def __init__(self, *, on_host: bool = False) -> None:
        self.on_host = on_host

    def exactly(self, tolerance: float) -> float:
        return max(tolerance, 1e-6)

    def prior(self, table: bk.NgramLM) -> Any:
        return table if self.on_host else super().prior(table)

    def model(self, posterior: bk.Posterior) -> Program:
        return posterior.numpyro_model()

    def guide_program(self, posterior: bk.Posterior, guide: Any) -> Program:
        return posterior.numpyro_guide(guide)

    def run(self, program: Program, seed: int) -> np.ndarray:
        return np.asarray(numpyro.handlers.seed(program, seed)())

    def trace(self, program: Program, seed: int = 0) -> Trace:
        return _traced(*_log_density(numpyro.handlers.seed(program, seed), {}))

    def scored(self, model: Program, x: np.ndarray) -> Trace:
        return _traced(*_log_density(model, {"x": jnp.asarray(x)}))

    def condition(self, model: Program, xs: np.ndarray) -> np.ndarray:
        conditioned = jax.jit(lambda x: _log_density(numpyro.handlers.condition(model, data={"x": x}), {})[0])
        return np.array([float(conditioned(x)) for x in xs])

    def replay(self, model: Program, guide_trace: Trace) -> Program:
        return numpyro.handlers.replay(model, guide_trace.native)  # type: ignore[no-any-return]

    def in_plate(self, program: Program, num_particles: int) -> Program:
        def inside() -> Any:
            with numpyro.plate("particles", num_particles, dim=-2):
                return program()

        return inside

    def distribution(self, lm: Any, posterior: bk.Posterior) -> Any:
        return numpyro_program.SequenceDistribution(lm, posterior.prompt_ids, posterior.max_new_tokens)

    def sample(self, distribution: Any, shape: tuple[int, ...] = (), seed: int = 0) -> Any:
        return jax.jit(lambda key: distribution.sample(key, shape))(jax.random.key(seed))

    def predictive(
        self, posterior: bk.Posterior, num_samples: int, *, parallel: bool, guide: Any = None
    ) -> dict[str, np.ndarray]:
        options: dict[str, Any] = {"num_samples": num_samples, "parallel": parallel}
        if guide is not None:
            options |= {"guide": posterior.numpyro_guide(guide), "return_sites": ("x", "reward"), "params": {}}
        found = numpyro.infer.Predictive(posterior.numpyro_model(), **options)(jax.random.key(0))
        return {name: np.asarray(found[name]) for name in ("x", "reward")}

    def trace_graph_elbo(self, num_particles: int) -> Any:
        return numpyro.infer.TraceGraph_ELBO(num_particles)

    def svi(
        self, posterior: bk.Posterior, guide: Any, loss: Any, num_steps: int, rate: float, decay: float = 1.0
    ) -> Trained:
        program = posterior.numpyro_guide(guide)
        adam = optax.adam(optax.exponential_decay(rate, 1, decay))
        svi = numpyro.infer.SVI(posterior.numpyro_model(), program, adam, loss)
        result = svi.run(jax.random.key(0), num_steps, progress_bar=False)
        evaluate = jax.jit(lambda key: svi.evaluate(result.state._replace(rng_key=key)))
        evaluated = [float(evaluate(key)) for key in jax.random.split(jax.random.key(1), 20)]
        policy = program.language_model(svi.get_params(result.state)).to_ngram()
        return Trained(np.asarray(result.losses), policy, np.array(evaluated))


def _log_density(program: Program, values: dict[str, Any]) -> tuple[Any, Any]:
    """NumPyro's log density of a program whose completions may be given, and its trace."""
    return numpyro.infer.util.log_density(program, (), {}, values)  # type: ignore[no-any-return]


def _traced(log_density: Any, trace: Any) -> Trace:
    values = [trace["x"]["value"], trace["x"]["fn"].log_prob(trace["x"]["value"]), np.zeros(0), np.zeros(0)]
    if "reward" in trace:
        factor = trace["likelihood"]
        values[2:] = [trace["reward"]["value"], factor["fn"].log_prob(factor["value"])]
    x, log_prob, reward, log_factor = map(np.asarray, values)
    return Trace(x, log_prob, reward, log_factor, float(log_density), trace)


ENGINES: dict[str, Engine] = {
    "pyro": PyroEngine(),
    "numpyro": NumpyroEngine(),
    "numpyro, prior on the host": NumpyroEngine(on_host=True),
}


def slow_on_jax(*names: str) -> list[Any]:
    """Names of engines as parameters of a test that is slow only where JAX compiles."""
    return [name if name == "pyro" else pytest.param(name, marks=pytest.mark.slow) for name in names]


# --- posteriors ----------------------------------------------------------------------------------------------

TEXTS = ["abab", "bba", "ab", "ba", "aab", "b"]


def text_posterior(engine: Engine, prompts: Any = "a") -> bk.Posterior:
    """Fifteen completions, and a reward that reads them as text."""
    prior = full_table(bk.NgramLM.fit(TEXTS, order=2), 4)
    reward = bk.Reward(lambda completions: [2.0 * c.count("b") - 0.5 * len(c) for c in completions], alpha=0.7)
    return bk.Posterior(engine.prior(prior), reward, prompts=prompts, max_new_tokens=3)


def table_of(posterior: bk.Posterior) -> bk.NgramLM:
    """The table that an engine's prior was made from."""
    table = getattr(posterior.prior, "start", posterior.prior)
    assert isinstance(table, bk.NgramLM)
    return table


def sequences_of(posterior: bk.Posterior, x: Any) -> bk.Sequences:
    """Completions (..., P, T) as `Sequences`."""
    tokens = np.asarray(x).astype(np.int64)
    by_prompt = tokens.reshape(-1, *tokens.shape[-2:]).swapaxes(0, 1)
    return bk.Sequences(by_prompt, completion_lengths(by_prompt, posterior.prior.eos_token_ids))
