"""SVI on JAX end to end: it reaches the posterior, agrees with torch, keeps what it learned, and says what goes wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.inference.svi.numpyro_backend import training as svi_numpyro
from bayes_klrl.inference.svi.numpyro_backend.elbo import EVIDENCE
from bayes_klrl.inference.svi.numpyro_backend.scores import ScoreELBO
from bayes_klrl.inference.svi.objectives import JS
from tests.helpers.jax_table import JaxTable
from tests.helpers.truth import Truth, full_table, random_posterior

HISTORY = {"elbo", "reward", "kl", "log_weight_sd", "gradient_norm", "learning_rate", "step_kl", "seconds"}


def pairs(tokens: Any, lengths: Any) -> Any:
    pair = (tokens[:, :-1] == 0) & (tokens[:, 1:] == 1)
    return 0.8 * pair.any(axis=1) + 0.3 * (tokens == 1).sum(axis=1) - 0.1 * lengths


def tabular_problem(prompts: Any = ((),), likelihood: Any = None) -> bk.Posterior:
    """Forty completions, every prefix a row of the table."""
    base = random_posterior(51, num_tokens=3)
    table = JaxTable(full_table(base.prior, 3 + max(map(len, prompts))))
    likelihood = likelihood or bk.TokenReward(pairs, alpha=0.2)
    return bk.Posterior(table, likelihood, prompts=[list(p) for p in prompts], max_new_tokens=3)


def with_reward(fn: Any, alpha: float = 1.0, prompts: Any = ((),), **options: Any) -> bk.Posterior:
    return tabular_problem(prompts, bk.TokenReward(fn, alpha=alpha, name="mine", **options))


def policy(guide: Any) -> bk.NgramLM:
    found: bk.NgramLM = guide.to_ngram()
    return found


# --- the answer is right ------------------------------------------------------------------------------------


def test_the_optimiser_is_torchs() -> None:
    """The same gradients, some too long, give the same parameters: clipping, Adam, learning rates one a step."""
    import torch

    rates = 0.1 * np.array([svi_numpyro.learning_rate_schedule(30)(step) for step in range(30)])
    gradients = np.random.default_rng(0).normal(size=(30, 7)) * np.geomspace(0.01, 10, 30)[:, None]
    ours, theirs = jnp.ones(7), torch.nn.Parameter(torch.ones(7))
    chain = svi_numpyro.optimiser(rates)
    update = jax.jit(chain.update)
    state, adam = chain.init(ours), torch.optim.Adam([theirs], lr=1.0)
    for rate, gradient in zip(rates, gradients, strict=True):
        updates, state = update(gradient.astype(np.float32), state, ours)
        ours = ours + updates
        assert float(state[0]) == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
        theirs.grad = torch.tensor(gradient, dtype=torch.float32)
        torch.nn.utils.clip_grad_norm_([theirs], svi_numpyro.MAX_GRADIENT_NORM)
        adam.param_groups[0]["lr"] = rate
        adam.step()
    np.testing.assert_allclose(ours, theirs.detach(), atol=1e-4)


@pytest.mark.slow
def test_a_step_is_shortened_to_what_the_trust_region_allows() -> None:
    """A learning rate far too high, whose steps are long ones by 1/2 mean (log q_now - log q)^2 on their own draws."""
    posterior = tabular_problem()
    bounded = bk.SVI(20, num_particles=64, learning_rate=0.3, max_step_kl=0.02)
    history = bounded.fit(posterior, seed=0).history
    assert history["step_kl"][0] == pytest.approx(0.02)
    assert np.nanmax(history["step_kl"]) <= 0.02 + 1e-9
    free = bk.SVI(20, num_particles=64, learning_rate=0.3, max_step_kl=np.inf).fit(posterior, seed=0)
    assert np.isnan(free.history["step_kl"]).all()
    assert history["elbo"][0] == free.history["elbo"][0]
    assert history["elbo"][1] != free.history["elbo"][1]
    # one step alone, measured by hand
    training = svi_numpyro.Training(bounded, posterior, svi_numpyro.jax_key(0))
    next(training.steps())
    draws = training.state.mutable_state[svi_numpyro.STEP]
    lm = training.guide_so_far()
    now = lm.score_tokens(lm.pad_prompts([[]]), jnp.asarray(draws["tokens"]).swapaxes(0, 1)).sum(axis=2).T
    assert float(jnp.square(now - draws["log_guide"]).mean() / 2) == pytest.approx(0.02, rel=0.1)
    small = bk.SVI(30, num_particles=8, learning_rate=1e-4).fit(posterior, seed=0).history["step_kl"]
    assert np.flatnonzero(np.isfinite(small)).tolist() == [0, 10, 20]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_fit() -> None:
    posterior = tabular_problem()
    svi = bk.SVI(3, num_particles=8)
    first, again, other = (svi.fit(posterior, seed=seed) for seed in (2**62 + 3, 2**62 + 3, 4))
    for name in HISTORY - {"seconds"}:
        np.testing.assert_array_equal(first.history[name], again.history[name])
    np.testing.assert_array_equal(first.guide.parameters["logits"], again.guide.parameters["logits"])
    assert not np.array_equal(first.history["elbo"], other.history["elbo"])
    np.testing.assert_array_equal(posterior.prior.parameters["logits"], tabular_problem().prior.parameters["logits"])


# --- objectives, and guides to start from ----------------------------------------------------------------------


@pytest.mark.slow
def test_the_evidence_of_each_prompt_moves_when_it_has_draws() -> None:
    """log Z-hat after every step, against a loop over the steps' log-weights."""
    posterior = tabular_problem(((), (0,), (1,)))
    svi = bk.SVI(9, num_particles=8, objective="js", prompts_per_step=2, learning_rate=0.1)
    training = svi_numpyro.Training(svi, posterior, svi_numpyro.jax_key(0))
    expected = np.full(3, -np.inf)
    for _ in training.steps():
        draws = training.state.mutable_state[svi_numpyro.STEP]
        for p, log_w in zip(np.asarray(draws["prompt_index"]), np.asarray(draws["log_weights"]).T, strict=True):
            now = np.log(np.exp(log_w.astype(np.float64)).mean())
            moved = np.log(0.9 * np.exp(expected[p]) + 0.1 * np.exp(now))
            expected[p] = now if np.isneginf(expected[p]) else moved
        np.testing.assert_allclose(training.state.mutable_state[EVIDENCE], expected, atol=1e-5)
    assert np.isfinite(expected).all()
    assert np.ptp(expected) > 0.05


@pytest.mark.slow
def test_an_objective_of_ones_own() -> None:
    class Twice:
        def weights(self, log_weights: Any, log_evidence: Any, xp: Any) -> Any:
            return xp.asarray(2.0) * (log_weights - log_evidence)

    posterior = tabular_problem()
    fit = bk.SVI(60, num_particles=32, objective=Twice(), learning_rate=0.15).fit(posterior, seed=0)
    assert Truth(posterior).kl(policy(fit.guide))[0] < 0.3 * Truth(posterior).kl(posterior.prior)[0]


@dataclass
class OnHost:
    """An objective that JAX cannot trace, or whose weights are not one per draw."""

    traced: bool

    def weights(self, log_weights: Any, log_evidence: Any, xp: Any) -> Any:
        return log_weights.mean(axis=0) if self.traced else np.exp(np.asarray(log_weights))


@dataclass(frozen=True)
class Sampled(JS):
    """An objective that learns from other draws than the guide's."""

    sampler: str


@pytest.mark.parametrize(
    "objective, message",
    [
        (
            OnHost(traced=False),
            r"OnHost\(traced=False\) cannot be traced by JAX, TracerArrayConversionError.*functions of xp",
        ),
        (OnHost(traced=True), r"OnHost\(traced=True\) returned weights of shape \(1,\).*\(N, P\) = \(4, 1\)"),
        (Sampled("SMC"), r"Learning from the draws of a sampler is for priors on torch.*Leave sampler out"),
        (bk.LogVariance(replay=8), r"Replay .* on torch; got objective=LogVariance\(replay=8\). Leave replay out"),
        (lambda batch: batch.log_probs.sum(), r"A loss as bk.audit takes it is for priors on torch; got objective="),
    ],
    ids=["on the host", "of another shape", "a sampler", "replay", "a loss"],
)
def test_objectives_that_jax_cannot_have_are_refused(objective: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.SVI(2, num_particles=4, objective=objective).fit(tabular_problem(), seed=0)


def test_scores_are_for_a_posteriors_own_programs() -> None:
    posterior = tabular_problem()
    model, guide = posterior.numpyro_model(), posterior.numpyro_guide(posterior.prior)
    with pytest.raises(bk.BayesKLRLError, match=r"ScoreELBO is for the programs .* Use LeaveOneOutELBO"):
        ScoreELBO(4, JS()).loss(jax.random.key(0), {}, model.__call__, guide)


@pytest.mark.slow
def test_a_training_may_begin_from_another_guide() -> None:
    """A step of no length from a guide of its own; and a longer training, which leaves the guide that was given as it was."""
    posterior = tabular_problem()
    truth = Truth(posterior)
    start = JaxTable(full_table(posterior.prior.to_ngram(), 3, noise=0.5, seed=2))  # type: ignore[attr-defined]
    options: dict[str, Any] = {"learning_rate": 1e-9, "optimizer": "adam", "twist": "none"}
    fit = bk.SVI(1, num_particles=8, initial_guide=start, **options).fit(posterior, seed=1)
    np.testing.assert_allclose(truth.kl(policy(fit.guide)), truth.kl(start), atol=1e-5)
    assert abs(truth.kl(start) - truth.kl(posterior.prior))[0] > 0.05
    before = np.array(start.parameters["logits"])
    fit = bk.SVI(5, num_particles=8, learning_rate=0.1, initial_guide=start).fit(posterior, seed=1)
    np.testing.assert_array_equal(start.parameters["logits"], before)
    assert not np.array_equal(fit.guide.parameters["logits"], before)


@pytest.mark.parametrize(
    "guide, error, message",
    [
        (full_table(random_posterior(51, num_tokens=3).prior, 3), bk.BayesKLRLError, "is a NgramLM.*Give a bk.JaxLM"),  # type: ignore[arg-type]
        (
            JaxTable(bk.NgramLM(np.log([[0.5, 0.5]] * 2), eos_token_id=1)),
            bk.CheckpointError,
            "^initial_guide has 2 tokens",
        ),
        ("gpt2", bk.BayesKLRLError, "^initial_guide "),
    ],
    ids=["on the host", "of another vocabulary", "a name"],
)
def test_guides_that_jax_cannot_start_from_are_refused(guide: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        bk.SVI(2, num_particles=4, initial_guide=guide).fit(tabular_problem(), seed=0)


def test_a_guide_that_draws_what_the_prior_cannot_is_refused() -> None:
    posterior = tabular_problem()
    parameters = {"logits": posterior.prior.parameters["logits"].at[:, 0].set(-jnp.inf)}  # type: ignore[attr-defined]
    never = posterior.prior.with_parameters(parameters)  # type: ignore[attr-defined]
    narrow = bk.Posterior(never, posterior.likelihood, prompts=[[]], max_new_tokens=3)
    with pytest.raises(bk.UnboundedLossError, match=r"ids \[.*0.*\], whose prior probability is 0.*copy of the prior"):
        bk.SVI(2, num_particles=64, initial_guide=posterior.prior).fit(narrow, seed=0)


# --- rewards of every kind -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_text_reward_trains_through_the_callback() -> None:
    prior = full_table(bk.NgramLM.fit(["abab", "bba", "ab", "ba", "aab", "b"], order=2), 4)
    reward = bk.Reward(lambda completions: [2.0 * c.count("b") - 0.5 * len(c) for c in completions], alpha=0.7)
    posterior = bk.Posterior(JaxTable(prior), reward, prompts=["a", "b"], max_new_tokens=3)
    truth = Truth(posterior)
    fit = bk.SVI(200, num_particles=32, learning_rate=0.15).fit(posterior, seed=0)
    assert (truth.kl(posterior.prior) > 0.3).all()
    assert (truth.kl(policy(fit.guide)) < 0.1 * truth.kl(posterior.prior)).all()


@pytest.mark.slow
def test_products_train_each_factor_its_own_way() -> None:
    on_host = bk.TokenReward(lambda tokens, lengths: np.where(tokens[:, 0] == 1, 1.0, 0.0), alpha=1.0, callback=True)
    posterior = tabular_problem(likelihood=bk.TokenReward(pairs, alpha=0.3) * on_host)
    fit = bk.SVI(250, num_particles=32, learning_rate=0.15).fit(posterior, seed=0)
    assert Truth(posterior).kl(policy(fit.guide))[0] < 0.02


def test_a_reward_that_cannot_be_traced_is_refused_before_training() -> None:
    posterior = with_reward(lambda tokens, lengths: np.where(tokens[:, 0] == 1, 1.0, 0.0))
    with pytest.raises(bk.RewardError, match=r"TokenReward 'mine' cannot be traced by JAX.*callback=True"):
        bk.SVI(2).fit(posterior, seed=0)


def at_length(value: float) -> Any:
    return lambda tokens, lengths: jnp.where(lengths == 2, value, 1.0)


@pytest.mark.parametrize(
    "value, bounds, message",
    [
        (jnp.nan, None, r"'mine' returned nan for completion \d+ \(ids \[\d, \d\]"),
        (jnp.inf, None, r"'mine' returned inf for completion \d+ \(ids \[\d, \d\]"),
        (3.0, (0.0, 2.0), r"'mine' returned 3.0, outside its declared bounds"),
    ],
)
def test_values_that_are_no_rewards_are_named_with_their_completion(value: Any, bounds: Any, message: str) -> None:
    with pytest.raises(bk.RewardError, match=message):
        bk.SVI(3).fit(with_reward(at_length(value), bounds=bounds), seed=0)


def test_values_of_a_callback_are_checked_too() -> None:
    with pytest.raises(bk.RewardError, match=r"'mine' returned nan for completion \d+ \(ids \[\d, \d\]"):
        bk.SVI(3).fit(with_reward(at_length(jnp.nan), callback=True), seed=0)


def test_bounds_leave_room_for_rounding_to_float32() -> None:
    bk.SVI(2).fit(with_reward(at_length(2.0 / 3.0), bounds=(2.0 / 3.0, 1.0)), seed=0)


@pytest.mark.slow
def test_a_reward_that_is_another_when_traced_is_refused() -> None:
    """JAX takes an index past the end for the last one; NumPy, and so every other algorithm, refuses it."""
    short = jnp.array([1.0, 2.0])
    with pytest.raises(bk.RewardError, match=r"is \S+ when JAX traces it, and \S+ on the host.*callback=True"):
        bk.SVI(2).fit(with_reward(counter()), seed=0)
    host_refuses = with_reward(lambda tokens, lengths: table_of(tokens, short)[tokens].sum(axis=1))
    with pytest.raises(bk.RewardError, match=r"'mine' raised IndexError"):
        bk.SVI(2).fit(host_refuses, seed=0)


def counter() -> Any:
    """A function that changes from call to call."""
    calls: list[int] = []

    def counted(tokens: Any, lengths: Any) -> Any:
        calls.append(1)
        return 0.0 * lengths + len(calls)

    return counted


def table_of(tokens: Any, table: Any) -> Any:
    return np.asarray(table) if isinstance(tokens, np.ndarray) else table


def test_a_likelihood_of_zero_is_refused_with_the_completion_and_the_cure() -> None:
    never = lambda tokens, lengths: jnp.where((tokens[:, 0] == 1) & (lengths == 3), -jnp.inf, 0.0)  # noqa: E731
    with pytest.raises(bk.UnboundedLossError, match=r"with ids \[1, \d, \d\].*eps.*bk.SMC"):
        bk.SVI(5).fit(with_reward(never), seed=0)


class Failing:
    """A reward on the host whose k-th call goes wrong."""

    def __init__(self, call: int, error: type[BaseException]) -> None:
        self.left, self.error = call, error

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.left -= 1
        if self.left <= 0:
            raise self.error("of mine")
        return 2.0 * (tokens == 0).sum(axis=1)


@pytest.mark.slow
def test_errors_carry_what_was_learned() -> None:
    posterior = with_reward(Failing(5, ArithmeticError), callback=True)
    svi = bk.SVI(50, num_particles=16, learning_rate=0.1)
    with pytest.raises(bk.RewardError, match=r"'mine' raised ArithmeticError: of mine -- at completion \d") as caught:
        svi.fit(posterior, seed=0)
    fit = caught.value.fit
    assert fit is not None
    assert {len(values) for values in fit.history.values()} == {4}
    whole = svi.fit(with_reward(Failing(1000, ArithmeticError), callback=True), seed=0)
    np.testing.assert_array_equal(whole.history["elbo"][:4], fit.history["elbo"])
    assert np.abs(fit.guide.parameters["logits"] - posterior.prior.parameters["logits"]).max() > 0.01
    with pytest.raises(bk.RewardError) as at_once:
        svi.fit(with_reward(Failing(1, ArithmeticError), callback=True), seed=0)
    assert at_once.value.fit is None


def test_adapters_are_not_for_jax() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"Adapters are for a bk\.TorchLM; the prior is a JaxTable"):
        bk.SVI(2, adapter="lora").fit(tabular_problem(), seed=0)


# --- a JaxLM ---------------------------------------------------------------------------------------------------


def ones(tokens: Any, lengths: Any) -> Any:
    return 1.0 * (tokens == 1).sum(axis=1) - 0.3 * lengths


RECIPE = bk.SVI(90, num_particles=64, learning_rate=2e-2, num_draws=100)


@pytest.fixture(scope="module")
def transformers() -> tuple[bk.Posterior, bk.Posterior]:
    """One posterior on both backends."""
    from tests.helpers.tiny_models import tiny_gpt2
    from tests.models.jax_lm.test_lm import jax_lm_of

    model = tiny_gpt2(vocab_size=4, n_layer=1)
    on_jax, on_torch = (
        bk.Posterior(lm, bk.TokenReward(ones, alpha=0.25), prompts=[[1, 2], [3]], max_new_tokens=3)
        for lm in (jax_lm_of(model), bk.TorchLM(model))
    )
    return on_jax, on_torch


@pytest.fixture(scope="module")
def transformer_fit(transformers: tuple[bk.Posterior, bk.Posterior]) -> bk.Fit:
    return RECIPE.fit(transformers[0], seed=0)


@pytest.mark.slow
def test_a_transformer_reaches_the_posterior_as_on_torch(
    transformers: tuple[bk.Posterior, bk.Posterior], transformer_fit: bk.Fit
) -> None:
    on_jax, on_torch = transformers
    truth = Truth(on_jax)
    np.testing.assert_allclose(truth.log_evidence, Truth(on_torch).log_evidence, atol=1e-5)
    theirs = RECIPE.fit(on_torch, seed=0)
    assert (truth.kl(on_jax.prior) > 0.3).all()
    assert (truth.kl(transformer_fit.guide) < 0.02).all()
    assert (truth.kl(theirs.guide) < 0.02).all()
    assert set(theirs.history) == set(transformer_fit.history)
    assert transformer_fit.training_tokens == pytest.approx(theirs.training_tokens, rel=0.05)


@pytest.mark.slow
def test_a_saved_fit_is_a_hugging_face_folder(transformer_fit: bk.Fit, tmp_path: Path) -> None:
    folder = transformer_fit.save(tmp_path / "policy")
    truth = Truth(transformer_fit.posterior)
    ours = truth.kl(transformer_fit.guide)
    for again in (bk.JaxLM.from_pretrained(folder), bk.TorchLM.from_pretrained(folder)):
        np.testing.assert_allclose(truth.kl(again), ours, atol=1e-4)


@pytest.mark.slow
def test_it_takes_part_in_comparisons_and_certificates(transformer_fit: bk.Fit) -> None:
    posterior = transformer_fit.posterior
    truth = Truth(posterior)
    methods = {"IS": bk.ImportanceSampling(200), "SVI": RECIPE, "both": bk.ImportanceSampling(200, proposal=RECIPE)}
    result = bk.compare(posterior, methods, seed=0)
    table = str(result.table())
    assert all(name in table for name in methods), table
    corrected = bk.ImportanceSampling(500, proposal=transformer_fit.guide).run(posterior, seed=2)
    assert (corrected.ess > 450).all()
    certificate = bk.certify(posterior, transformer_fit.guide, seed=0)
    low, high = certificate.log_evidence_bounds.T
    assert ((low <= truth.log_evidence + 1e-6) & (truth.log_evidence - 1e-6 <= high)).all()


# --- what is imported ---------------------------------------------------------------------------------------


PROGRAM = """
import sys, numpy as np, bayes_klrl as bk
sys.path.insert(0, {root!r})
from tests.helpers.jax_table import JaxTable
prior = JaxTable(bk.NgramLM(np.log(np.full((3, 3, 3), 1 / 3)), eos_token_id=2))
reward = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1), alpha=1.0)
fit = bk.SVI(2, num_particles=4).fit(bk.Posterior(prior, reward, max_new_tokens=2), seed=0)
fit.run(10, seed=0)
print([name in sys.modules for name in ("torch", "pyro", "jax", "numpyro")])
"""


@pytest.mark.slow
def test_training_on_jax_imports_no_torch() -> None:
    """`ranks/test_group.py` has the opposite: training on torch imports no JAX."""
    root = str(Path(__file__).parents[3])
    code = PROGRAM.format(root=root)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == "[False, False, True, True]"
