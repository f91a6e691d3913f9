"""Minibatches of prompts: counts, blocks that cross an epoch, unbiased gradients, and trainings that go on."""

from __future__ import annotations

from collections import Counter
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import bayes_klrl as bk
from bayes_klrl.inference.svi.callbacks.callbacks import StepRecord
from bayes_klrl.inference.svi.steps.minibatches import prompts_of_step
from tests.helpers.jax_table import JaxTable
from tests.helpers.truth import full_table, random_posterior, t_square_p
from tests.inference.svi.engines import ENGINES, enumerated

SIZES = [(1, 1), (4, 2), (5, 2), (5, 3), (7, 5), (8, 7), (8, 8), (11, 4)]
COIN = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=2)


def posterior(lm: Any = COIN, num_prompts: int = 3) -> bk.Posterior:
    """Prompts whose rewards differ, so that a reward tells which prompts there were."""
    reward = bk.TokenReward(
        lambda tokens, lengths, prompt_index: 1.0 * (tokens == 1).sum(axis=1) + prompt_index, alpha=0.7
    )
    return bk.Posterior(lm, reward, prompts=[[0], [1], [0, 1], [1, 1]][:num_prompts], max_new_tokens=4)


# --- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_prompts,size", SIZES)
@pytest.mark.parametrize("seed", [0, 2**70])
def test_prompts_are_used_equally_often_and_once_per_block(num_prompts: int, size: int, seed: int) -> None:
    num_steps = 3 * num_prompts  # whole epochs: 3 * size of them
    blocks = [prompts_of_step(seed, step, num_prompts, size) for step in range(num_steps)]
    assert all(len(block) == size and (np.diff(block) > 0).all() for block in blocks)
    for step in range(num_steps):
        counts = np.bincount(np.concatenate(blocks[: step + 1]), minlength=num_prompts)
        assert counts.sum() == (step + 1) * size
        # at the end of an epoch all are equal; a block that crosses one may be ahead by a prompt of the next
        at_an_end = (step + 1) * size % num_prompts == 0
        assert np.ptp(counts) <= (0 if at_an_end else 2)


def test_a_step_depends_on_seed_and_number_alone() -> None:
    forwards = [prompts_of_step(3, step, 7, 3).tolist() for step in range(40)]
    backwards = [prompts_of_step(3, step, 7, 3).tolist() for step in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert forwards != [prompts_of_step(4, step, 7, 3).tolist() for step in range(40)]
    epochs = [forwards[7 * i : 7 * (i + 1)] for i in range(5)]
    assert len({str(epoch) for epoch in epochs}) == 5
    assert prompts_of_step(0, 999, 1001, 1000).shape == (1000,)  # as many epochs back as there can be


@pytest.mark.parametrize("step", range(4))
def test_every_set_of_prompts_is_equally_likely_at_every_step(step: int) -> None:
    """Steps 1 and 3 of five prompts, three at a time, cross the end of an epoch."""
    found = Counter(tuple(prompts_of_step(seed, step, 5, 3).tolist()) for seed in range(2000))
    assert len(found) == comb(5, 3)
    assert stats.chisquare(list(found.values())).pvalue > 0.005


@pytest.mark.parametrize("options", [{"step": -1}, {"size": 0}, {"size": 6}])
def test_numbers_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(bk.BayesKLRLError):
        prompts_of_step(0, options.get("step", 0), 5, options.get("size", 2))


# --- the gradient ---------------------------------------------------------------------------------------------------


def gradients(name: str, target: bk.Posterior, guide: Any, loss: Any, chosen: list[Any]) -> np.ndarray:
    """The gradients of -ELBO of independent steps on these prompts, (steps, parameters)."""
    if name == "pyro":
        import pyro
        import torch

        from bayes_klrl.models.programs.pyro_program import pyro_guide, pyro_model

        with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            programs, found = (pyro_model(target, 2), pyro_guide(target, guide, 2)), []
            for prompts in chosen:
                for parameter in guide.parameters():
                    parameter.grad = None
                loss.loss_and_grads(*programs, torch.as_tensor(prompts))
                found.append(np.concatenate([p.grad.flatten().double().numpy() for p in guide.parameters()]))
            return np.array(found)
    import jax

    from bayes_klrl.models.programs.numpyro_program import numpyro_guide, numpyro_model

    programs = (numpyro_model(target, 2), numpyro_guide(target, guide, 2))
    step = jax.jit(
        jax.grad(lambda parameters, key, prompts: loss.loss(key, {"language_model": parameters}, *programs, prompts))
    )
    keys = jax.random.split(jax.random.key(0), len(chosen))
    leaves = [jax.tree.leaves(step(guide.parameters, key, prompts)) for key, prompts in zip(keys, chosen, strict=True)]
    return np.array([np.concatenate([np.asarray(leaf, dtype=float).ravel() for leaf in each]) for each in leaves])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,step", [("pyro", 0), ("pyro", 1), pytest.param("numpyro", 1, marks=pytest.mark.slow)]
)  # the host chooses the prompts, so that what JAX compiles is the same at every step
def test_the_gradient_of_a_step_is_unbiased(name: str, step: int) -> None:
    """Over seeds, the gradient of a step is that of the sum over all prompts; step 1 crosses the end of an epoch."""
    engine = ENGINES[name]
    base = random_posterior(10, vocab_size=3, eos=(2,), num_tokens=3, prompts=[[0], [1], [1, 0]])
    reward = bk.TokenReward(
        lambda tokens, lengths, prompt_index: (1.0 + prompt_index) * (tokens == 1).sum(axis=1), alpha=1.0
    )
    target = bk.Posterior(
        engine.prior(base.prior),  # type: ignore[arg-type]
        reward,
        prompts=[list(ids) for ids in base.prompt_ids],
        max_new_tokens=3,
    )
    guide = engine.guide(full_table(base.prior, 4, noise=0.6, seed=1))
    exact = enumerated(engine, target, guide)
    loss = engine.elbo("LeaveOneOutELBO", 8)
    runs = gradients(name, target, guide, loss, [prompts_of_step(seed, step, 3, 2) for seed in range(240)])
    assert t_square_p(runs, exact) > 0.005
    assert t_square_p(runs * 2 / 3, exact) < 0.005  # the test bites: without the factor P / B it is found out


# --- trainings ------------------------------------------------------------------------------------------------------


def prompts_used(lm: Any, svi: bk.SVI, seed: int, num_prompts: int, **options: Any) -> tuple[list[list[int]], bk.Fit]:
    """The prompts of each step, read from its draws, and the fit."""
    from bayes_klrl.inference.svi.numpyro_backend import training as on_jax
    from bayes_klrl.inference.svi.pyro_backend import training as on_torch

    found: list[list[int]] = []
    module, kind = (on_jax, "Training") if hasattr(lm, "score_tokens") else (on_torch, "TorchTraining")
    original = getattr(module, kind)

    class Watched(original):  # type: ignore[misc, valid-type]
        def step(self, number: int) -> Any:
            values = super().step(number)
            if kind == "Training":
                index = self.state.mutable_state[on_jax.STEP]["prompt_index"]
                found.append(np.asarray(index).tolist())
            else:
                rows = [list(ids) for ids in self.elbo.last_site["fn"].prompt_ids]
                found.append([[list(ids) for ids in self.posterior.prompt_ids].index(row) for row in rows])
            return values

    setattr(module, kind, Watched)
    try:
        fit = svi.fit(posterior(lm, num_prompts), seed=seed, **options)
    finally:
        setattr(module, kind, original)
    return found, fit


def test_a_training_uses_these_prompts() -> None:
    found, _ = prompts_used(COIN, bk.SVI(4, 4, prompts_per_step=3), 5, 4)
    assert found == [prompts_of_step(5, step, 4, 3).tolist() for step in range(4)]


@pytest.mark.parametrize(
    "options", [{}, {"particles_per_pass": 2}, {"objective": "js"}, {"optimizer": "natural"}], ids=str
)
def test_so_does_every_loss(options: dict[str, Any]) -> None:
    found, _ = prompts_used(COIN, bk.SVI(3, 4, prompts_per_step=2, **options), 1, 3)
    assert found == [prompts_of_step(1, step, 3, 2).tolist() for step in range(3)]


def test_all_prompts_at_once_is_the_training_without_minibatches() -> None:
    without, with_all = (bk.SVI(3, 4, prompts_per_step=size).fit(posterior(), seed=0) for size in (None, 3))
    for name in set(without.history) - {"seconds"}:
        np.testing.assert_array_equal(without.history[name], with_all.history[name])


@pytest.mark.parametrize("prior", ["table", pytest.param("jax", marks=pytest.mark.slow)])
def test_a_training_that_goes_on_uses_the_prompts_it_would_have_used(prior: str, tmp_path: Path) -> None:
    lm = COIN if prior == "table" else JaxTable(full_table(COIN, 2))
    svi = bk.SVI(6, 4, prompts_per_step=2)

    def after_three(record: StepRecord, guide: Any) -> bool:
        return record.step == 2

    of_whole, whole = prompts_used(lm, svi, 2, 3)
    svi.fit(posterior(lm), seed=2, checkpoint=tmp_path, callbacks=[after_three])
    of_rest, again = prompts_used(lm, svi, 2, 3, resume=tmp_path)
    assert of_whole == [prompts_of_step(2, step, 3, 2).tolist() for step in range(6)]
    assert of_rest == of_whole[3:]
    np.testing.assert_array_equal(whole.history["elbo"], again.history["elbo"])


def test_nothing_of_the_order_is_in_a_checkpoint(tmp_path: Path) -> None:
    from safetensors import safe_open

    names = []
    for size in (None, 2):
        bk.SVI(2, 4, prompts_per_step=size).fit(posterior(), seed=0, checkpoint=tmp_path)
        with safe_open(tmp_path / "training.safetensors", framework="pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1]


def test_programs_of_users_keep_their_random_subsample() -> None:
    import pyro
    import torch

    from bayes_klrl.models.programs.pyro_program import pyro_model

    model = pyro_model(posterior(), prompts_per_step=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        chosen = [int(pyro.poutine.trace(model).get_trace().nodes["prompts"]["value"]) for _ in range(30)]
    assert set(chosen) == {0, 1, 2}
    given = pyro.poutine.trace(model).get_trace(torch.tensor([0, 2])).nodes
    assert given["prompts"]["value"].tolist() == [0, 2]
    assert given["x"]["scale"] == 3 / 2
