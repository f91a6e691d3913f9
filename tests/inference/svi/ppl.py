"""Pyro and NumPyro as one language of programs, so that a joint program is written once; `joint.py` has them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bayes_klrl as bk
from tests.inference.svi.engines import ENGINES, of_each_key

__all__ = ["PPLS", "Ppl", "Program", "flat_gradient"]

Program = Callable[[], Any]


class Ppl(ABC):
    """A probabilistic programming language: the functions that both have, and the few that differ.

    Parameters
    ----------
    name
        The name of the package, "pyro" or "numpyro".
    """

    def __init__(self, name: str) -> None:
        self.name, self.engine = name, ENGINES[name]

    @property
    def dist(self) -> Any:
        """The distributions."""
        return import_module(f"{self.name}.distributions")

    def sample(self, name: str, fn: Any, obs: Any = None) -> Any:
        return import_module(self.name).sample(name, fn, obs=obs)

    def factor(self, name: str, log_factor: Any) -> None:
        import_module(self.name).factor(name, log_factor)

    def param(self, name: str, value: Any) -> Any:
        return import_module(self.name).param(name, self.array(value))

    def plate(self, name: str, size: int, subsample_size: int | None = None) -> Any:
        return import_module(self.name).plate(name, size, subsample_size=subsample_size, dim=-1)

    def normal(self, name: str, loc: Any = 0.0, sd: Any = 1.0, obs: Any = None) -> Any:
        """Draw a normal latent, or observe it."""
        return self.sample(name, self.dist.Normal(self.array(loc), self.array(sd)), obs=obs)

    def loss(self, num_particles: int) -> Any:
        """Return our own loss."""
        return self.engine.elbo("LeaveOneOutELBO", num_particles)

    @abstractmethod
    def array(self, values: Any) -> Any:
        """Return numbers as the language's array, floats of torch in float64."""

    @abstractmethod
    def exp(self, values: Any) -> Any:
        """Return exp of an array."""

    @abstractmethod
    def completions(self, lm: Any, prompts: Any, chosen: Any, num_tokens: int) -> Any:
        """Return a language model as a distribution over completions of the chosen prompts."""

    @abstractmethod
    def table(self, start: bk.NgramLM, logits: Any) -> Any:
        """Return the language model whose table has these logits."""

    @abstractmethod
    def programs(self, posterior: bk.Posterior, guide: Any) -> tuple[Program, Program]:
        """Return the programs of a posterior and of a language model as its guide."""

    @abstractmethod
    def graph_loss(self, num_particles: int) -> Any:
        """Return the language's own loss, `TraceGraph_ELBO`."""

    @abstractmethod
    def autoguide(self, model: Program, loc: float, sd: float) -> Program:
        """Return a normal autoguide of all latents but "x", which starts with theta ~ N(loc, sd^2)."""

    @abstractmethod
    def step(self, loss: Any, model: Program, guide: Program, *, validate: bool = True) -> None:
        """Compute a loss once, outside of any compiled program; validate: let the language check log-probs itself."""

    @abstractmethod
    def sampled(
        self, loss: Any, model: Program, guide: Program, params: Mapping[str, Any], num_runs: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return -ELBO (runs,) and gradients in these parameters (runs, numbers), of independent steps."""


class PyroPpl(Ppl):
    """Numbers are float64."""

    def array(self, values: Any) -> Any:
        return values if isinstance(values, Tensor) else torch.as_tensor(np.array(values))

    def exp(self, values: Any) -> Any:
        return torch.exp(values)

    def completions(self, lm: Any, prompts: Any, chosen: Any, num_tokens: int) -> Any:
        from bayes_klrl.models.programs.pyro_program import SequenceDistribution

        frozen = isinstance(lm, bk.NgramLM)
        return SequenceDistribution(lm, [prompts[p] for p in chosen.tolist()], num_tokens, frozen=frozen)

    def table(self, start: bk.NgramLM, logits: Any) -> Any:
        lm = self.engine.guide(start)
        del lm.logits
        lm.logits = self.array(logits)
        return lm

    def programs(self, posterior: bk.Posterior, guide: Any) -> tuple[Program, Program]:
        return posterior.pyro_model(), posterior.pyro_guide(guide)

    def graph_loss(self, num_particles: int) -> Any:
        from pyro.infer import TraceGraph_ELBO

        return TraceGraph_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)

    def autoguide(self, model: Program, loc: float, sd: float) -> Program:
        from pyro import poutine
        from pyro.infer.autoguide import AutoNormal, init_to_value

        start = init_to_value(values={"theta": self.array(loc)})
        return AutoNormal(poutine.block(model, hide=["x"]), init_loc_fn=start, init_scale=sd)  # type: ignore[no-any-return]

    def step(self, loss: Any, model: Program, guide: Program, *, validate: bool = True) -> None:
        import pyro

        with pyro.get_param_store().scope(), pyro.validation_enabled(validate):
            loss.loss_and_grads(model, guide)

    def sampled(
        self, loss: Any, model: Program, guide: Program, params: Mapping[str, Any], num_runs: int
    ) -> tuple[np.ndarray, np.ndarray]:
        import pyro

        values, gradients = [], []
        with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for _ in range(num_runs):
                values.append(loss.loss_and_grads(model, guide))
                gradients.append(flat_gradient([pyro.param(name) for name in params]))
        return np.array(values), np.array(gradients)


class NumpyroPpl(Ppl):
    """Numbers are float32; all steps are compiled at once."""

    def array(self, values: Any) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(values)

    def exp(self, values: Any) -> Any:
        import jax.numpy as jnp

        return jnp.exp(values)

    def completions(self, lm: Any, prompts: Any, chosen: Any, num_tokens: int) -> Any:
        from bayes_klrl.models.programs.numpyro_program import SequenceDistribution

        return SequenceDistribution(lm, prompts, num_tokens, chosen=chosen)

    def table(self, start: bk.NgramLM, logits: Any) -> Any:
        return self.engine.guide(start).with_parameters({"logits": self.array(logits)})

    def programs(self, posterior: bk.Posterior, guide: Any) -> tuple[Program, Program]:
        return posterior.numpyro_model(), posterior.numpyro_guide(guide)

    def graph_loss(self, num_particles: int) -> Any:
        from numpyro.infer import TraceGraph_ELBO

        return TraceGraph_ELBO(num_particles)

    def autoguide(self, model: Program, loc: float, sd: float) -> Program:
        import jax
        from numpyro import handlers
        from numpyro.infer import init_to_value
        from numpyro.infer.autoguide import AutoMultivariateNormal

        start = init_to_value(values={"theta": loc})
        auto = AutoMultivariateNormal(handlers.block(model, hide=["x"]), init_loc_fn=start, init_scale=sd)
        handlers.seed(auto, jax.random.key(0))()  # its first call reads the model, outside of a compiled program
        return auto  # type: ignore[no-any-return]

    def step(self, loss: Any, model: Program, guide: Program, *, validate: bool = True) -> None:
        import jax

        loss.loss(jax.random.key(0), {}, model, guide)

    def sampled(
        self, loss: Any, model: Program, guide: Program, params: Mapping[str, Any], num_runs: int
    ) -> tuple[np.ndarray, np.ndarray]:
        import jax

        step = jax.value_and_grad(lambda params, key: loss.loss(key, params, model, guide))
        start = {name: np.asarray(value, dtype=np.float32) for name, value in params.items()}
        values, found = of_each_key(step, start, num_runs, seed=1)
        rows = [np.asarray(found[name], dtype=np.float64).reshape(num_runs, -1) for name in params]
        return np.asarray(values, dtype=np.float64), np.concatenate(rows, axis=1)


PPLS: dict[str, Ppl] = {"pyro": PyroPpl("pyro"), "numpyro": NumpyroPpl("numpyro")}


def flat_gradient(parameters: list[Tensor]) -> np.ndarray:
    """The gradients as one vector, taken away from the parameters."""
    parts = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return np.array(torch.cat([part.double() for part in parts]).numpy())
