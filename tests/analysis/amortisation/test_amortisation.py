"""`amortise`: a guide on unseen prompts, held against the enumerated posterior."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import bayes_klrl as bk
from bayes_klrl.analysis.amortisation.judgement import grouped
from bayes_klrl.posterior import completion_log_probs
from bayes_klrl.weights import logmeanexp

LETTERS = bk.NgramLM.fit(["a cat sat", "the cat ran", "a rat sat"], order=2)
VOWELS = bk.Reward(
    lambda completions: [sum(map(text.count, "aeiou")) for text in completions], alpha=0.7, bounds=(0, 3)
)
SEEN = bk.Posterior(LETTERS, VOWELS, prompts=["a c", "the r", "sat "], max_new_tokens=3)
UNSEEN = bk.Posterior(LETTERS, VOWELS, prompts=["a r", "the c", "ran", "a"], max_new_tokens=3)
SVI = bk.SVI(60, 32)


@pytest.fixture(scope="module")
def result() -> bk.Amortisation:
    return bk.amortise(SEEN, UNSEEN, SVI, seed=0)


def true_kl(policy: Any, posterior: bk.Posterior) -> np.ndarray:
    """KL(policy || posterior) of each prompt, by enumeration."""
    everything = bk.Exact().run(posterior, seed=0)
    log_posterior = everything.log_prior + everything.log_likelihood - everything.log_evidence[:, None]
    log_policy = completion_log_probs(policy, posterior.prompt_ids, everything.sequences)
    probs = np.exp(log_policy)
    return np.where(probs > 0, probs * (np.where(probs > 0, log_policy, 0.0) - log_posterior), 0.0).sum(axis=1)


def holds(truth: np.ndarray, interval: np.ndarray) -> bool:
    return bool(((interval[..., 0] <= truth) & (truth <= interval[..., 1])).all())


@pytest.mark.slow
def test_distances_are_the_enumerated_ones(result: bk.Amortisation) -> None:
    for judged, posterior in ((result.training, SEEN), (result.unseen, UNSEEN)):
        for name, policy in (("prior", LETTERS), ("guide", result.guide)):
            truth = true_kl(policy, posterior)
            assert judged.kl[name] == pytest.approx(truth, abs=1e-6)
            assert holds(truth, judged.bounds[name].reverse_kl)
            assert np.ptp(judged.pooled[name].reverse_kl) < 1e-3
        assert (judged.grade, judged.failure_probability) == ("A", 0.0)
    table = result.table()
    assert table.loc[("unseen", "guide"), "kl_posterior"] == pytest.approx(
        true_kl(result.guide, UNSEEN).mean(), abs=1e-6
    )
    assert table.loc[("unseen", "guide"), "kl_posterior"] < 0.3 * table.loc[("unseen", "prior"), "kl_posterior"]


def test_a_kl_that_is_infinite_has_no_upper_end() -> None:
    """A rule that the guide breaks once in thousands of draws: enumeration says inf, and samples must not say less."""
    coin = bk.NgramLM(np.log([0.6, 0.3999, 0.0001]), eos_token_id=0)
    rule = bk.TokenReward(
        lambda tokens, lengths: np.where((tokens == 2).any(axis=1), -np.inf, 0.0), alpha=1.0, bounds=(-np.inf, 0)
    )
    posteriors = [bk.Posterior(coin, rule, prompts=prompts, max_new_tokens=2) for prompts in ([[0]], [[1], [2]])]
    for sampling_only in (True, False):
        found = bk.amortise(*posteriors, coin, seed=0, num_draws=64, sampling_only=sampling_only)
        assert np.isposinf(found.unseen.bounds["guide"].reverse_kl[:, 1]).all()
        assert np.isposinf(found.unseen.pooled["guide"].reverse_kl[1])
    sampled = bk.amortise(*posteriors, coin, seed=0, num_draws=64, sampling_only=True).unseen
    assert "the policy can draw all completions" in sampled.source
    on_support = sampled.pooled["guide"].reverse_kl_on_support
    assert on_support[0] <= 1e-3
    assert on_support[1] < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["enumeration", "rejection"])
def test_bounds_by_sampling_contain_the_truth(way: str, result: bk.Amortisation) -> None:
    """Six runs, each of whose intervals may miss with probability 0.05 and in fact miss far more rarely."""
    truth = {name: true_kl(lm, UNSEEN) for name, lm in (("prior", LETTERS), ("guide", result.guide))}
    options: dict[str, Any] = {"max_sequences": 0} if way == "rejection" else {"sampling_only": True}
    for seed in range(6):
        judged = bk.amortise(SEEN, UNSEEN, result.guide, seed=seed, num_draws=64, **options).unseen
        assert judged.grade == "A"
        assert way in judged.source
        for name, kl in truth.items():
            assert holds(kl, judged.bounds[name].reverse_kl)
            assert holds(kl.mean(), judged.pooled[name].reverse_kl)
            assert np.ptp(judged.pooled[name].reverse_kl) < 1.5
    many = bk.amortise(SEEN, UNSEEN, result.guide, seed=0, num_draws=1000, sampling_only=True).unseen
    for name, kl in truth.items():
        assert many.kl[name] == pytest.approx(kl, abs=0.1)


@pytest.mark.slow
def test_groups_are_unbiased_estimates() -> None:
    """E[Z-hat] = Z and, with an exact draw in each group, E[1 / Z-hat] = 1 / Z."""
    exact = bk.Exact(num_draws=4000).run(SEEN, seed=1)
    draws = bk.ImportanceSampling(16_000).run(SEEN, seed=2)
    runs = grouped(draws.log_weights, exact.log_likelihood, 4000)
    assert runs.upper is not None
    assert runs.lower.shape == runs.upper.shape == (3, 4000)
    for estimates, sign in ((runs.lower, 1), (runs.upper, -1)):
        ratios = np.exp(sign * (estimates - exact.log_evidence[:, None]))
        z = (ratios.mean(axis=1) - 1) / (ratios.std(axis=1) / np.sqrt(ratios.shape[1]))
        assert (np.abs(z) < 4).all()
    assert runs.lower[0, 0] == pytest.approx(logmeanexp(draws.log_weights[0, :4]))


def test_without_exact_draws_there_is_no_upper_end(result: bk.Amortisation) -> None:
    boundless = bk.Reward(lambda completions: [len(text) for text in completions], alpha=1.0)
    seen = bk.Posterior(LETTERS, boundless, prompts=SEEN.prompts, max_new_tokens=3)
    unseen = bk.Posterior(LETTERS, boundless, prompts=UNSEEN.prompts, max_new_tokens=3)
    found = bk.amortise(seen, unseen, result.guide, seed=0, max_sequences=0)
    assert found.unseen.grade == "B"
    assert np.isposinf(found.unseen.pooled["guide"].reverse_kl[1])
    assert found.unseen.pooled["guide"].reverse_kl[0] <= true_kl(result.guide, unseen).mean()
    assert "at least" in found.verdict
    assert "no upper end" in str(found)


def test_tokens_per_effective_draw_are_tokens_over_draws(result: bk.Amortisation) -> None:
    table = result.table()
    for prompts, judged in (("training", result.training), ("unseen", result.unseen)):
        for policy, draws in judged.draws.items():
            row = table.loc[(prompts, policy)]
            assert row["tokens_per_effective_draw"] == pytest.approx(draws.model_tokens / draws.lengths.size)
            assert row["reward"] == pytest.approx(draws.reward.mean())
            assert row["kl_prior"] == pytest.approx((draws.log_proposal - draws.log_prior).mean())
    for name, draws in result.draws.items():
        weights = np.exp(draws.log_weights - logmeanexp(draws.log_weights)[:, None])
        if name != "SMC":  # whose effective sample size counts families
            assert draws.ess == pytest.approx(weights.sum(axis=1) ** 2 / (weights**2).sum(axis=1))
        row = table.loc[("unseen", name)]
        assert row["tokens_per_effective_draw"] == pytest.approx(draws.model_tokens / draws.ess.sum())
        assert row["ess"] == pytest.approx(draws.ess.min())
    trained = table["training_tokens"] > 0
    assert set(table.index[trained]) == {("training", "guide"), ("unseen", "guide"), ("unseen", "guide, then IS")}
    assert set(table.loc[trained, "training_tokens"]) == {result.fit.training_tokens}  # type: ignore[union-attr]


def test_weights_correct_the_draws_of_the_judgement(result: bk.Amortisation) -> None:
    """They are the same completions, drawn once and paid once; their evidence is right within its error."""
    truth = bk.Exact().run(UNSEEN, seed=0).log_evidence
    for name, policy in (("prior IS", "prior"), ("guide, then IS", "guide")):
        assert np.array_equal(result.draws[name].tokens, result.unseen.draws[policy].tokens)
        z = (result.draws[name].log_evidence - truth) / np.maximum(result.draws[name].log_evidence_se, 1e-3)
        assert (np.abs(z) < 4).all()


def test_a_guide_may_be_trained_already(result: bk.Amortisation, tmp_path: Path) -> None:
    given = bk.amortise(SEEN, UNSEEN, result.fit, seed=0)
    assert given.fit is result.fit
    assert given.table().equals(result.table()) or (given.unseen.kl["guide"] == result.unseen.kl["guide"]).all()
    model = bk.amortise(SEEN, UNSEEN, result.guide, seed=0)
    assert model.fit is None
    assert (model.table()["training_tokens"] == 0).all()
    folder = bk.amortise(SEEN, UNSEEN, result.fit.save(tmp_path / "policy"), seed=0)  # type: ignore[union-attr]
    assert folder.unseen.kl["guide"] == pytest.approx(result.unseen.kl["guide"], abs=1e-6)


def test_a_guide_that_cannot_draw_everything_is_no_proposal_for_bounds() -> None:
    """It never draws "a", which has the rewards: its own weights would put the upper end below log Z."""
    table = LETTERS.log_probs.copy()
    table[..., LETTERS.encode(["a"])[0][0]] = -np.inf
    kept = np.where(np.isneginf(table).all(axis=-1, keepdims=True), 0.0, table)
    narrow = bk.NgramLM(
        kept - np.log(np.exp(kept).sum(axis=-1, keepdims=True)),
        eos_token_id=next(iter(LETTERS.eos_token_ids)),
        tokenizer=LETTERS.tokenizer,
    )
    judged = bk.amortise(SEEN, UNSEEN, narrow, seed=0, sampling_only=True).unseen
    assert holds(true_kl(narrow, UNSEEN).mean(), judged.pooled["guide"].reverse_kl)
    assert judged.pooled["guide"].log_evidence_bounds[1] >= bk.Exact().run(UNSEEN, seed=0).log_evidence.mean()


@pytest.mark.slow
def test_everything_is_saved(result: bk.Amortisation, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "out")
    names = {path.name for path in folder.iterdir()}
    assert {"table.csv", "prompts.csv", "amortisation.png", "training.png", "policy"} <= names
    table = pd.read_csv(folder / "table.csv", index_col=[0, 1])
    assert table.loc[("unseen", "guide"), "kl_posterior"] == pytest.approx(result.unseen.kl["guide"].mean())
    prompts = pd.read_csv(folder / "prompts.csv")
    assert (prompts["prompts"].value_counts()[["training", "unseen"]] == [3, 4]).all()
    assert (prompts["guide_kl_low"] <= prompts["guide_kl_high"]).all()
    result.save(folder)  # over what is ours


def test_it_prints_within_the_width_of_a_terminal(result: bk.Amortisation) -> None:
    text = str(result)
    assert "nan" not in text
    assert text.startswith("On 4 unseen prompts the guide is")
    assert max(map(len, text.splitlines())) <= 150


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"prompts": ["a r", "a c"]}, {}, r"1 of the 2 held-out prompts are training prompts, such as a c\."),
        ({"max_new_tokens": 2}, {}, "max_new_tokens is 3 for the training prompts and 2"),
        ({"likelihood": VOWELS**2}, {}, "alpha is 0.7"),
        ({"prior": bk.NgramLM.fit(["a cat sat", "a rat ran"], order=2)}, {}, "different priors"),
        ({}, {"num_draws": 8}, "num_draws"),
        ({}, {"num_runs": 0}, "num_runs"),
        ({}, {"num_runs": 40, "num_draws": 64}, "num_draws = 80 or more"),
        ({}, {"failure_probability": 0.7}, "failure_probability"),
    ],
    ids=["overlap", "length", "alpha", "prior", "draws", "no run", "runs", "delta"],
)
def test_what_cannot_be_right_is_refused_before_training(
    changes: dict[str, Any], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("it was trained")

    monkeypatch.setattr(bk.SVI, "fit", never)
    given = {"prior": LETTERS, "likelihood": VOWELS, "prompts": ["a r"], "max_new_tokens": 3} | changes
    held_out = bk.Posterior(given.pop("prior"), given.pop("likelihood"), **given)
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.amortise(SEEN, held_out, SVI, seed=0, **options)


def test_a_prompt_list_is_no_posterior() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"held_out must be a bk\.Posterior"):
        bk.amortise(SEEN, ["a r"], SVI, seed=0)  # type: ignore[arg-type]
