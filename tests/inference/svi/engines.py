"""Pyro and NumPyro behind one face, so that a test of what both estimators of the gradient promise is written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

import bayes_klrl as bk
from tests.helpers.truth import Truth

__all__ = ["ENGINES", "ESTIMATORS", "Engine", "NumpyroEngine", "PyroEngine", "enumerated", "minus_elbo", "of_each_key"]

ESTIMATORS = ("LeaveOneOutELBO", "RaoBlackwellELBO")


class Engine(Protocol):
    """Gradients are vectors of float64 over the logits of a table, in one order for both engines."""

    def exactly(self, tolerance: float) -> float:
        """Return the tolerance: as given in float64, a few roundings in float32."""

    def prior(self, table: bk.NgramLM) -> Any:
        """Return the table as a prior that the engine scores."""

    def guide(self, table: bk.NgramLM) -> Any:
        """Return the table as a guide that the engine trains."""

    def elbo(self, estimator: str, num_particles: int) -> Any:
        """Return the engine's loss."""

    def scores(self, num_particles: int, objective: Any, log_evidence: np.ndarray) -> Any:
        """Return the engine's loss of an objective whose log Z-hats, (P,), do not move."""

    def gradients(
        self, posterior: bk.Posterior, guide: Any, loss: Any, num_runs: int, *, seed: int = 1, **options: Any
    ) -> np.ndarray:
        """Return the gradients of -ELBO of independent steps, (runs, parameters); options are those of the programs."""

    def losses(self, posterior: bk.Posterior, guide: Any, loss: Any, num_runs: int, **options: Any) -> np.ndarray:
        """Return the values of -ELBO of independent steps, (runs,)."""

    def losses_and_gradients(
        self, posterior: bk.Posterior, guide: Any, loss: Any, num_runs: int, *, seed: int = 1, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return both, of the same steps."""

    def step(
        self, posterior: bk.Posterior, guide: Any, num_particles: int, seed: int
    ) -> tuple[np.ndarray, bk.Sequences]:
        """Return the leave-one-out gradient of one step and what it drew."""

    def gradient_of(
        self, posterior: bk.Posterior, guide: Any, sequences: bk.Sequences, value: Callable[[Any, Any], Any]
    ) -> np.ndarray:
        """Return the gradient of value(exp, log q) in the guide's parameters, log q (P, N) of given completions."""


class PyroEngine:
    """Tables of float64, gradients by torch."""

    def exactly(self, tolerance: float) -> float:
        return tolerance

    def prior(self, table: bk.NgramLM) -> Any:
        return table

    def guide(self, table: bk.NgramLM) -> Any:
        from bayes_klrl.models.torch_lm.table import TableLM

        return TableLM(table)

    def elbo(self, estimator: str, num_particles: int) -> Any:
        from bayes_klrl.inference.svi.pyro_backend import elbo

        return getattr(elbo, estimator)(num_particles)

    def scores(self, num_particles: int, objective: Any, log_evidence: np.ndarray) -> Any:
        from bayes_klrl.inference.svi.pyro_backend.scores import ScoreELBO

        class Held(ScoreELBO):
            def follow_evidence(self, chosen: Any, log_w: Any) -> None:
                self.log_evidence = dict(enumerate(log_evidence.tolist()))

        return Held(num_particles, objective)

    def gradients(
        self, posterior: bk.Posterior, guide: Any, loss: Any, num_runs: int, *, seed: int = 1, **options: Any
    ) -> np.ndarray:
        return self.losses_and_gradients(posterior, guide, loss, num_runs, seed=seed, **options)[1]

    def losses(self, posterior: bk.Posterior, guide: Any, loss: Any, num_runs: int, **options: Any) -> np.ndarray:
        return np.array(_on_pyro(posterior, guide, loss.loss, num_runs, 0, options))

    def losses_and_gradients(
        self, posterior: bk.Posterior, guide: Any, loss: Any, num_runs: int, *, seed: int = 1, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        def one(model: Any, program: Any) -> tuple[float, np.ndarray]:
            return loss.loss_and_grads(model, program), _taken(guide)

        values, found = zip(*_on_pyro(posterior, guide, one, num_runs, seed, options), strict=True)
        return np.array(values), np.array(found)

    def step(
        self, posterior: bk.Posterior, guide: Any, num_particles: int, seed: int
    ) -> tuple[np.ndarray, bk.Sequences]:
        from bayes_klrl.inference.svi.pyro_backend.elbo import LeaveOneOutELBO
        from bayes_klrl.models.programs.pyro_program import to_sequences

        drawn: list[bk.Sequences] = []

        class Recording(LeaveOneOutELBO):
            def terms(self, model_trace: Any, guide_trace: Any) -> Any:
                site = guide_trace.nodes["x"]
                drawn.append(to_sequences(site["value"], site["fn"].lm))
                return super().terms(model_trace, guide_trace)

        gradient = self.gradients(posterior, guide, Recording(num_particles), 1, seed=seed)[0]
        return gradient, drawn[0]

    def gradient_of(
        self, posterior: bk.Posterior, guide: Any, sequences: bk.Sequences, value: Callable[[Any, Any], Any]
    ) -> np.ndarray:
        import torch

        log_q = guide.token_log_probs(posterior.prompt_ids, sequences).sum(dim=2).double()
        value(torch.exp, log_q).backward()
        return _taken(guide)


def _on_pyro(
    posterior: bk.Posterior, guide: Any, one: Callable[[Any, Any], Any], num_runs: int, seed: int, options: Any
) -> list[Any]:
    """What steps return, one after the other, Pyro's and torch's global state put back."""
    import pyro
    import torch

    from bayes_klrl.models.programs.pyro_program import pyro_guide, pyro_model

    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, program = pyro_model(posterior, **options), pyro_guide(posterior, guide, **options)
        return [one(model, program) for _ in range(num_runs)]


def _taken(guide: Any) -> np.ndarray:
    """The parameters' gradients as one vector, taken away from them."""
    import torch

    parameters = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    parts = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().double() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return np.array(torch.cat(parts).numpy())


class NumpyroEngine:
    """Tables of float32, gradients by JAX, all steps in one compiled program."""

    def exactly(self, tolerance: float) -> float:
        return max(tolerance, 2e-5)

    def prior(self, table: bk.NgramLM) -> Any:
        from tests.helpers.jax_table import JaxTable

        return JaxTable(table)

    guide = prior

    def elbo(self, estimator: str, num_particles: int) -> Any:
        from bayes_klrl.inference.svi.numpyro_backend import elbo

        return getattr(elbo, estimator)(num_particles)

    def scores(self, num_particles: int, objective: Any, log_evidence: np.ndarray) -> Any:
        import jax.numpy as jnp

        from bayes_klrl.inference.svi.numpyro_backend.elbo import EVIDENCE
        from bayes_klrl.inference.svi.numpyro_backend.scores import ScoreELBO

        class Held(ScoreELBO):
            def start(self, num_prompts: int) -> dict[str, Any]:
                return {EVIDENCE: jnp.asarray(log_evidence)}

            def follow_evidence(self, before: Any, log_weights: Any) -> Any:
                return before

        return Held(num_particles, objective)

    def gradients(
        self, posterior: bk.Posterior, guide: Any, loss: Any, num_runs: int, *, seed: int = 1, **options: Any
    ) -> np.ndarray:
        return self.losses_and_gradients(posterior, guide, loss, num_runs, seed=seed, **options)[1]

    def losses(self, posterior: bk.Posterior, guide: Any, loss: Any, num_runs: int, **options: Any) -> np.ndarray:
        value = _loss_of(posterior, guide, loss, options)
        return np.asarray(of_each_key(value, guide.parameters, num_runs, 0), dtype=np.float64)

    def losses_and_gradients(
        self, posterior: bk.Posterior, guide: Any, loss: Any, num_runs: int, *, seed: int = 1, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        import jax

        step = jax.value_and_grad(_loss_of(posterior, guide, loss, options))
        values, found = of_each_key(step, guide.parameters, num_runs, seed)
        return np.asarray(values, dtype=np.float64), _flat(found, num_runs)

    def step(
        self, posterior: bk.Posterior, guide: Any, num_particles: int, seed: int
    ) -> tuple[np.ndarray, bk.Sequences]:
        import jax

        from bayes_klrl.inference.svi.numpyro_backend.elbo import STEP, LeaveOneOutELBO
        from bayes_klrl.models.programs.numpyro_program import numpyro_guide, numpyro_model
        from bayes_klrl.sequences import completion_lengths

        loss, programs = LeaveOneOutELBO(num_particles), (numpyro_model(posterior), numpyro_guide(posterior, guide))

        def of_step(parameters: Any, key: Any) -> Any:
            found = loss.loss_with_mutable_state(key, {"language_model": parameters, STEP: None}, *programs)
            return found["loss"], found["mutable_state"][STEP]["tokens"]

        gradient, drawn = jax.jit(jax.grad(of_step, has_aux=True))(guide.parameters, jax.random.key(seed))
        tokens = np.asarray(drawn).swapaxes(0, 1)
        return _flat(gradient), bk.Sequences(tokens, completion_lengths(tokens, guide.eos_token_ids))

    def gradient_of(
        self, posterior: bk.Posterior, guide: Any, sequences: bk.Sequences, value: Callable[[Any, Any], Any]
    ) -> np.ndarray:
        import jax
        import jax.numpy as jnp

        def of_parameters(parameters: Any) -> Any:
            lm = guide.with_parameters(parameters)
            scores = lm.score_tokens(lm.pad_prompts(posterior.prompt_ids), jnp.asarray(sequences.tokens))
            return value(jnp.exp, scores.sum(axis=2))

        return _flat(jax.jit(jax.grad(of_parameters))(guide.parameters))


def _loss_of(posterior: bk.Posterior, guide: Any, loss: Any, options: Any) -> Callable[[Any, Any], Any]:
    from bayes_klrl.models.programs.numpyro_program import numpyro_guide, numpyro_model

    model, program = numpyro_model(posterior, **options), numpyro_guide(posterior, guide, **options)
    carried = loss.start(posterior.num_prompts) if hasattr(loss, "start") else {}  # stock losses carry nothing
    return lambda parameters, key: loss.loss(key, {"language_model": parameters, **carried}, model, program)


def of_each_key(fn: Callable[[Any, Any], Any], parameters: Any, num_runs: int, seed: int) -> Any:
    """fn(parameters, key) for as many keys of JAX, in one compiled program; its arrays get a first axis of runs."""
    import jax

    def of_all(parameters: Any) -> Any:
        keys = jax.random.split(jax.random.key(seed), num_runs)
        return jax.lax.map(lambda key: fn(parameters, key), keys)

    return jax.jit(of_all)(parameters)


def _flat(tree: Any, *first: int) -> np.ndarray:
    """The leaves of a tree of gradients as one vector, or as one per run with the number of runs as their first axis."""
    import jax

    leaves = [np.asarray(leaf, dtype=np.float64).reshape(*first, -1) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=-1)


ENGINES: dict[str, Engine] = {"pyro": PyroEngine(), "numpyro": NumpyroEngine()}


def minus_elbo(exp: Any, log_q: Any, log_p: Any, log_lik: Any) -> Any:
    """-ELBO summed over prompts, each array (P, all completions)."""
    return (exp(log_q) * (log_q - log_p - log_lik)).sum()


def enumerated(
    engine: Engine,
    posterior: bk.Posterior,
    guide: Any,
    value: Callable[[Any, Any, Any, Any], Any] = minus_elbo,
    chosen: Sequence[bool] | np.ndarray | slice = slice(None),
) -> np.ndarray:
    """The gradient of value(exp, log q, log p0, r / alpha) over all completions, or over the chosen ones alone.

    It is computed by torch in float64 whatever the engine, so arrays are tensors; a table on JAX is copied.
    """
    import torch

    truth = Truth(posterior)
    sequences = bk.Sequences(truth.sequences.tokens[:, chosen], truth.sequences.lengths[:, chosen])
    log_p, log_lik = (
        torch.as_tensor(of_all[:, chosen]) for of_all in (truth.log_prior, truth.reward / posterior.alpha)
    )
    if not isinstance(engine, PyroEngine):
        engine = ENGINES["pyro"]
        guide = engine.guide(guide.to_ngram())
    return engine.gradient_of(posterior, guide, sequences, lambda exp, log_q: value(exp, log_q, log_p, log_lik))
