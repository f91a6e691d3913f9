"""Alphas that change in a training: which posterior the guide is then one of, targets that are held, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.posterior import completion_log_probs
from tests.helpers.truth import Truth, full_table, random_posterior


@pytest.fixture(scope="module")
def posterior() -> bk.Posterior:
    """Two prompts, 39 completions each, and a table that can be any policy over them."""
    base = random_posterior(51, vocab_size=4, num_tokens=3, prompts=[(0,), (1,)])
    reward: Any = base.likelihood
    return bk.Posterior(
        full_table(base.prior, 4),  # type: ignore[arg-type]
        bk.TokenReward(reward.fn, alpha=reward.alpha, bounds=(-5, 5)),
        prompts=[[0], [1]],
        max_new_tokens=3,
    )


def exactly(guide: Any, posterior: bk.Posterior) -> dict[str, float]:
    """Means over prompts: KL(q || p0), E_q[r], KL(q || p*), by all completions."""
    truth = Truth(posterior)
    log_q = completion_log_probs(guide, posterior.prompt_ids, truth.sequences)
    log_p, reward = posterior.log_prior(truth.sequences), posterior.reward(truth.sequences)
    means = {"kl": log_q - log_p, "reward": reward, "to posterior": log_q - truth.log_posterior}
    return {name: float((np.exp(log_q) * values).sum(axis=1).mean()) for name, values in means.items()}


@pytest.mark.slow
def test_annealing_goes_by_one_factor_per_step_and_ends_at_the_posterior(posterior: bk.Posterior) -> None:
    fit = bk.SVI(200, 64).fit(posterior, seed=0, callbacks=[bk.AnnealedAlpha(start=5.0, share=0.5)])
    alphas = fit.history["alpha"]
    np.testing.assert_allclose(alphas[1:100] / alphas[:99], alphas[1] / alphas[0])
    assert alphas[0] == 5.0
    assert (alphas[100:] == posterior.alpha).all()
    assert fit.posterior is posterior
    assert exactly(fit.guide, posterior)["to posterior"] < 0.02


def test_each_step_aims_at_its_own_alpha(posterior: bk.Posterior) -> None:
    """At a huge alpha the posterior is the prior, and nothing but noise moves the guide."""

    class Huge:
        def next_alpha(self, step: int, num_steps: int, history: Any, posterior: bk.Posterior) -> float:
            return 1e9

        def __call__(self, record: bk.StepRecord, guide: Any) -> None:
            assert record.posterior.alpha == pytest.approx(1e9)

    fit = bk.SVI(30, 64).fit(posterior, seed=0, callbacks=[Huge()])
    assert exactly(fit.guide, posterior)["kl"] < 1e-3
    assert fit.posterior.alpha == pytest.approx(1e9)
    np.testing.assert_allclose(fit.history["elbo"] - fit.history["reward"] / 1e9, -fit.history["kl"], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "target,optimizer", [({"kl": 0.4}, "kl_sgd"), ({"kl": 1.2}, "adam"), ({"reward": 1.5}, "kl_sgd")], ids=str
)
def test_the_target_is_held_and_the_posterior_is_the_one_that_is_said(
    target: dict[str, float], optimizer: str, posterior: bk.Posterior
) -> None:
    adaptive = bk.AdaptiveAlpha(**target)
    fit = bk.SVI(200, 256, optimizer=optimizer).fit(posterior, seed=0, callbacks=[adaptive])
    found = exactly(fit.guide, fit.posterior)
    ((name, value),) = target.items()
    assert found[name] == pytest.approx(value, rel=0.05)
    assert found["to posterior"] < 0.02
    assert fit.posterior.alpha == pytest.approx(fit.history["alpha"][-1])
    other = posterior.at_alpha(1.3 * fit.posterior.alpha)
    assert exactly(fit.guide, other)["to posterior"] > 2 * found["to posterior"]


@pytest.mark.slow
def test_the_search_moves_alpha_where_the_frontier_was_wrong(posterior: bk.Posterior) -> None:
    """Rare completions have a high reward, so that a thousand draws give an alpha with a fifth less KL than asked for."""
    fits = [
        bk.SVI(200, 256).fit(posterior, seed=0, callbacks=[bk.AdaptiveAlpha(kl=0.4, gain=gain)]) for gain in (1e-9, 2.0)
    ]
    assert exactly(fits[0].guide, posterior)["kl"] < 0.34
    assert exactly(fits[1].guide, posterior)["kl"] == pytest.approx(0.4, rel=0.05)
    assert abs(np.log(fits[1].history["alpha"][-1] / fits[1].history["alpha"][0])) > 0.05


@pytest.mark.parametrize(
    "callback", [bk.AdaptiveAlpha(kl=0.7), bk.AnnealedAlpha(start=3.0)], ids=["adaptive", "annealed"]
)
def test_a_resumed_training_finds_the_same_alphas(callback: Any, posterior: bk.Posterior, tmp_path: Path) -> None:
    svi = bk.SVI(20, 16)
    whole = svi.fit(posterior, seed=0, callbacks=[callback])

    def stop(record: bk.StepRecord, guide: Any) -> None:
        if record.step == 13:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        svi.fit(posterior, seed=0, callbacks=[callback, stop], checkpoint=bk.Checkpoint(tmp_path, every=4))
    again = svi.fit(posterior, seed=0, callbacks=[type(callback)(**_fields(callback))], resume=tmp_path)
    np.testing.assert_array_equal(whole.history["alpha"], again.history["alpha"])
    np.testing.assert_array_equal(whole.history["elbo"], again.history["elbo"])
    assert whole.posterior.alpha == again.posterior.alpha


def _fields(callback: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(callback).items() if not name.startswith("_")}


@pytest.mark.parametrize("options", [{}, {"kl": 1.0, "reward": 1.0}], ids=["none", "two"])
def test_one_target_is_needed(options: dict[str, float]) -> None:
    with pytest.raises(bk.BayesKLRLError, match="exactly one of kl= and reward="):
        bk.AdaptiveAlpha(**options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bk.AdaptiveAlpha(kl=0.0),
        lambda: bk.AdaptiveAlpha(kl=np.nan),
        lambda: bk.AdaptiveAlpha(reward=np.inf),
        lambda: bk.AdaptiveAlpha(kl=1.0, gain=-1.0),
        lambda: bk.AnnealedAlpha(start=0.0),
        lambda: bk.AnnealedAlpha(start=1.0, share=0.0),
        lambda: bk.AnnealedAlpha(start=1.0, share=1.5),
    ],
)
def test_numbers_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(bk.BayesKLRLError):
        make()


@pytest.mark.parametrize("reward", [-4.0, 5.0, 7.0])
def test_a_reward_that_no_alpha_gives_is_refused(reward: float, posterior: bk.Posterior) -> None:
    with pytest.raises(bk.BayesKLRLError, match="No alpha gives a mean reward of"):
        bk.SVI(5, 8).fit(posterior, seed=0, callbacks=[bk.AdaptiveAlpha(reward=reward)])


def test_a_kl_that_no_alpha_gives_is_refused() -> None:
    """Half of all completions have the highest reward: keeping only these costs log 2."""
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    first = bk.TokenReward(lambda tokens, lengths: tokens[:, 0], alpha=1.0, bounds=(0, 1))
    target = bk.Posterior(coin, first, max_new_tokens=3)
    with pytest.raises(bk.BayesKLRLError, match=r"No alpha gives a KL of 0.75 nats.*costs 0.7002"):
        bk.SVI(5, 8).fit(target, seed=0, callbacks=[bk.AdaptiveAlpha(kl=0.75)])


def test_a_target_that_is_missed_is_said(posterior: bk.Posterior) -> None:
    with pytest.warns(UserWarning, match=r"AdaptiveAlpha: the guide's kl is .* at the end, not 1.2"):
        bk.SVI(5, 8).fit(posterior, seed=0, callbacks=[bk.AdaptiveAlpha(kl=1.2)])


def shifted(posterior: bk.Posterior, constant: float) -> bk.Posterior:
    """The same posterior, whose rewards are larger by a constant."""
    reward: Any = posterior.likelihood

    def more(tokens: np.ndarray, lengths: np.ndarray, prompt_index: np.ndarray) -> np.ndarray:
        return np.asarray(reward.fn(tokens, lengths, prompt_index)) + constant

    moved = bk.TokenReward(more, alpha=reward.alpha)
    return bk.Posterior(posterior.prior, moved, prompts=[[0], [1]], max_new_tokens=3)


@pytest.mark.parametrize("constant", [0.0, 1000.0, -1.35])
@pytest.mark.parametrize("num_steps, missed", [(5, True), (200, False)])
def test_a_missed_reward_is_measured_from_the_priors(
    constant: float, num_steps: int, missed: bool, posterior: bk.Posterior
) -> None:
    """A constant added to the reward, even one that makes the target 0.15, neither silences the warning nor raises it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adaptive = bk.AdaptiveAlpha(reward=1.5 + constant)
        svi = bk.SVI(num_steps, 64, optimizer="kl_sgd", twist="none")  # a critic would follow each alpha with a delay
        svi.fit(shifted(posterior, constant), seed=0, callbacks=[adaptive])
    assert any("AdaptiveAlpha: the guide's reward" in str(each.message) for each in caught) is missed


def test_a_target_has_settled_whatever_constant_the_reward_has(posterior: bk.Posterior) -> None:
    settled = []
    for constant in (0.0, 1000.0):
        adaptive = bk.AdaptiveAlpha(reward=1.5 + constant)
        history = {"reward": [1.4 + constant], "alpha": [1.0]}
        settled.append(adaptive.has_settled(90, 100, history, shifted(posterior, constant)))
    assert settled == [False, False]


def test_two_that_choose_alpha_are_refused(posterior: bk.Posterior) -> None:
    both = [bk.AdaptiveAlpha(kl=1.0), bk.AnnealedAlpha(start=2.0)]
    with pytest.raises(bk.BayesKLRLError, match="Only one callback can choose alpha"):
        bk.SVI(5, 8).fit(posterior, seed=0, callbacks=both)


def test_likelihoods_without_one_alpha_are_refused(posterior: bk.Posterior) -> None:
    never = bk.Constraint(lambda completion_ids: [True for _ in completion_ids])
    only = bk.Posterior(posterior.prior, never, prompts=[[0]], max_new_tokens=3)
    with pytest.raises(bk.BayesKLRLError, match="constraints alone has no alpha"):
        bk.SVI(5, 8).fit(only, seed=0, callbacks=[bk.AnnealedAlpha(start=2.0)])
    length = bk.TokenReward(lambda tokens, lengths: lengths, alpha=2.0)
    mixed = bk.Posterior(posterior.prior, length * posterior.likelihood, prompts=[[0], [1]], max_new_tokens=3)
    with pytest.raises(bk.BayesKLRLError, match="have different alphas"):
        mixed.at_alpha(1.0)


def test_constraints_are_untouched_by_alpha(posterior: bk.Posterior) -> None:
    short = bk.Constraint(lambda completion_ids: [len(ids) < 3 for ids in completion_ids])
    both = bk.Posterior(posterior.prior, posterior.likelihood * short, prompts=[[0], [1]], max_new_tokens=3)
    truth = Truth(both)
    there, here = both.at_alpha(0.1).log_likelihood(truth.sequences), both.log_likelihood(truth.sequences)
    np.testing.assert_allclose(there, here * both.alpha / 0.1)
    assert np.isneginf(here).any()
    np.testing.assert_array_equal(both.at_alpha(both.alpha).log_likelihood(truth.sequences), here)


def test_selected_prompts_keep_their_columns_and_rewards() -> None:
    coin = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=2)
    reward = bk.Reward(
        lambda completion_ids, bonus: [b + len(ids) for ids, b in zip(completion_ids, bonus, strict=True)], alpha=0.5
    )
    whole = bk.Posterior(coin, reward, prompts=[[0], [1], [0, 1]], max_new_tokens=3, bonus=[1.0, 10.0, 100.0])
    part = whole.at_alpha(0.25).select([2, 0])
    assert part.alpha == 0.25
    assert part.prompt_ids == ((0, 1), (0,))
    assert part.columns == {"bonus": (100.0, 1.0)}
    tokens = np.array([[[0, 2, 2]], [[1, 2, 2]]])
    np.testing.assert_array_equal(part.reward(bk.Sequences(tokens, np.array([[2], [2]]))), [[102.0], [3.0]])


@pytest.mark.parametrize("indices", [[], [3], [-4, 0]])
def test_prompts_that_are_not_there_cannot_be_selected(indices: list[int], posterior: bk.Posterior) -> None:
    with pytest.raises(bk.BayesKLRLError, match="Indices of prompts are from 0 to 1"):
        posterior.select(indices)


def test_alphas_that_change_are_for_torch() -> None:
    from tests.helpers.jax_table import JaxTable

    coin = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=2)
    longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=0.5)
    on_jax = bk.Posterior(JaxTable(full_table(coin, 2)), longer, prompts=[[0]], max_new_tokens=3)
    with pytest.raises(bk.BayesKLRLError, match="compiled for one alpha"):
        bk.SVI(5, 8).fit(on_jax, seed=0, callbacks=[bk.AnnealedAlpha(start=2.0)])


@pytest.mark.slow
def test_a_fixed_twist_is_no_critic_of_other_alphas(posterior: bk.Posterior) -> None:
    def zero(posterior: bk.Posterior, prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        return np.zeros(len(prefixes))

    annealed = bk.AnnealedAlpha(start=2.0)
    with pytest.raises(bk.BayesKLRLError, match="critic of one alpha"):
        bk.SVI(5, 8, twist=zero).fit(posterior, seed=0, callbacks=[annealed])
    fit = bk.SVI(200, 64, twist=zero, discount=1.0).fit(posterior, seed=0, callbacks=[annealed])
    assert exactly(fit.guide, posterior)["to posterior"] < 0.1


@pytest.mark.slow
def test_early_stopping_waits_until_alpha_has_settled(posterior: bk.Posterior) -> None:
    stopping = bk.EarlyStopping(gap=0.02)
    annealed = bk.SVI(200, 64).fit(posterior, seed=0, callbacks=[bk.AnnealedAlpha(start=50.0), stopping])
    assert annealed.posterior.alpha == posterior.alpha
    assert 100 <= len(annealed.history["elbo"]) < 200
    adaptive = bk.SVI(200, 64).fit(posterior, seed=0, callbacks=[bk.AdaptiveAlpha(kl=1.0), stopping])
    assert len(adaptive.history["elbo"]) >= 80
    assert exactly(adaptive.guide, posterior)["kl"] == pytest.approx(1.0, rel=0.15)


def test_a_checkpoint_knows_who_chose_alpha(posterior: bk.Posterior, tmp_path: Path) -> None:
    svi = bk.SVI(8, 8)
    svi.fit(posterior, seed=0, callbacks=[bk.AnnealedAlpha(start=3.0)], checkpoint=tmp_path)
    for other in ([], [bk.AnnealedAlpha(start=4.0)]):
        with pytest.raises(bk.CheckpointError, match="recipe schedule of alpha"):
            svi.fit(posterior, seed=0, callbacks=other, resume=tmp_path)


def test_annealing_over_all_steps_ends_at_the_posteriors_alpha(posterior: bk.Posterior) -> None:
    fit = bk.SVI(10, 8).fit(posterior, seed=0, callbacks=[bk.AnnealedAlpha(start=4.0, share=1.0)])
    assert fit.history["alpha"][[0, -1]].tolist() == [4.0, posterior.alpha]
    assert fit.posterior is posterior


@pytest.mark.slow
def test_certificates_of_other_alphas_are_not_compared(posterior: bk.Posterior) -> None:
    every = bk.CertifyEvery(10)
    bk.SVI(60, 64).fit(posterior, seed=0, callbacks=[bk.AnnealedAlpha(start=50.0), every])
    assert every.best_step is not None
    assert every.best_step >= 30  # where alpha has come to the posterior's


def test_rewards_of_impossible_draws_leave_alpha_where_it_is() -> None:
    base = random_posterior(51, vocab_size=4, num_tokens=3, prompts=[(0,)])
    no_ones = bk.Constraint(lambda completion_ids: [1 not in ids for ids in completion_ids])
    prior = full_table(base.prior, 4)  # type: ignore[arg-type]
    both = bk.Posterior(prior, base.likelihood * no_ones, prompts=[[0]], max_new_tokens=3)
    target = 0.2 + float(bk.ImportanceSampling(4000).run(both, seed=0).reward.max()) / 2
    fit = bk.SVI(30, 64, objective="js").fit(both, seed=0, callbacks=[bk.AdaptiveAlpha(reward=target)])
    alphas, rewards = fit.history["alpha"], fit.history["reward"]
    assert np.isneginf(rewards).any()
    assert alphas[-1] == alphas[0]


def test_the_draws_of_the_frontier_are_counted(posterior: bk.Posterior) -> None:
    """The first step draws from the prior whatever alpha is, so that all else is equal."""
    plain = bk.SVI(1, 8).fit(posterior, seed=0).training_tokens
    adaptive = bk.SVI(1, 8).fit(posterior, seed=0, callbacks=[bk.AdaptiveAlpha(kl=0.4, num_draws=400)])
    cost = bk.frontier(posterior, num_draws=200, seed=0).cost
    assert adaptive.training_tokens == plain + cost.model_tokens > plain
