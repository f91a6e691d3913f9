"""`compare`: one row a method, honest notes, shared trainings, streams of their own."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import bayes_klrl as bk
from bayes_klrl.draws import Cost
from bayes_klrl.export.datatree import comparison_to_datatree
from bayes_klrl.inference.sampling.order_statistics import best_of_n_log_probs
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.problems import gold_posterior

POSTERIOR = gold_posterior(alpha=0.5, max_new_tokens=3)
LONGER = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
NAMED = bk.Posterior(bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1), LONGER, max_new_tokens=2)
METHODS = {"prior IS": bk.ImportanceSampling(500), "SMC": bk.SMC(200), "best of 4": bk.BestOfN(4, 50)}


class Failing:
    """An algorithm whose runs fail from the second on."""

    def __init__(self) -> None:
        self.num_runs = 0

    def run(self, posterior: bk.Posterior, *, seed: int, progress: bool = False) -> bk.Draws:
        self.num_runs += 1
        if self.num_runs > 1:
            raise bk.BayesKLRLError("out of luck")
        return bk.ImportanceSampling(200).run(posterior, seed=seed)


def test_the_exact_row_makes_the_others_exact() -> None:
    table = bk.compare(
        POSTERIOR, {**METHODS, "exact": bk.Exact(), "SVI": bk.SVI(5, 16, num_draws=4000)}, seed=0
    ).table()
    truth = bk.Exact().run(POSTERIOR, seed=0)
    assert table.loc["exact", "log_evidence"] == pytest.approx(truth.log_evidence[0])
    assert table.loc["exact", "kl_prior"] == pytest.approx(
        float((truth.mean(truth.log_likelihood) - truth.log_evidence)[0])
    )
    assert table.loc["SVI", "kl_posterior_sign"] == "="
    assert table.loc["SVI", "kl_posterior"] == pytest.approx(truth.log_evidence[0] - table.loc["SVI", "elbo"])
    for name in ("prior IS", "SMC"):
        z = (table.loc[name, "log_evidence"] - truth.log_evidence[0]) / table.loc[name, "log_evidence_se"]
        assert abs(z) < 4
    assert "nan" not in str(table)


def test_divergences_of_methods_that_have_no_evidence() -> None:
    """Best-of-n's KLs by order statistics, close to the exact ones; of exact draws E[r] / alpha - log Z and 0."""
    rows = {
        "exact": bk.Exact(),
        "best of 16": bk.BestOfN(16, 2000),
        "rejection": bk.RejectionSampling(2000),
        "quasi-rejection": bk.QuasiRejection(2000, bound=1.0),
    }
    table = bk.compare(POSTERIOR, rows, seed=0).table()
    exact = bk.Exact().run(POSTERIOR, seed=0)
    log_law = best_of_n_log_probs(exact, 16)
    law, log_posterior = np.exp(log_law), exact.log_prior + exact.log_likelihood - exact.log_evidence[:, None]
    some = law > 0
    spread = exact.log_likelihood - (law * exact.log_likelihood).sum()
    error = np.sqrt(
        (law * spread**2).sum() / 2000
    )  # of E[r] / alpha by 2,000 draws, which is nearly all the error there is
    for column, other in (("kl_prior", exact.log_prior), ("kl_posterior", log_posterior)):
        truth = (law[some] * (log_law[some] - other[some])).sum()
        assert table.loc["best of 16", column] == pytest.approx(truth, abs=4 * error)
    assert table.loc["best of 16", "kl_prior"] < np.log(16) - 15 / 16 - 0.03  # what the bound alone would say
    assert table.loc["rejection", "kl_prior"] == pytest.approx(table.loc["exact", "kl_prior"], abs=0.05)
    assert (table.loc["rejection", "kl_posterior_sign"], table.loc["rejection", "kl_posterior"]) == ("=", 0.0)
    assert table.loc["quasi-rejection", "kl_posterior_sign"] == "~"
    assert table.loc["quasi-rejection", "kl_posterior"] > 0.1
    alone = bk.compare(POSTERIOR, {"rejection": rows["rejection"]}, seed=0).table()
    assert np.isnan(alone.loc["rejection", "kl_prior"])  # nobody knows log Z


@pytest.mark.slow
def test_chains_that_have_not_mixed_say_so() -> None:
    rows = {
        "exact": bk.Exact(),
        "short": bk.SuffixMH(4, 20, num_warmup=0),
        "long": bk.SuffixMH(8, 4000),
        "annealed": bk.AnnealedSMC(500),
    }
    table = bk.compare(POSTERIOR, rows, seed=0).table()
    assert "R-hat" in table.loc["short", "note"]
    assert "R-hat" not in table.loc["long", "note"]
    for name in ("long", "annealed"):
        assert table.loc[name, "kl_prior"] == pytest.approx(table.loc["exact", "kl_prior"], abs=0.1)
    assert np.isnan(table.loc["long", "kl_posterior"])  # nobody can say how far chains are
    assert table.loc["annealed", "kl_posterior_sign"] == "~"
    assert "nan" not in str(table)


def test_a_row_does_not_depend_on_the_others_or_their_order() -> None:
    alone = bk.compare(POSTERIOR, {"SMC": METHODS["SMC"]}, seed=3)["SMC"]
    among = bk.compare(POSTERIOR, dict(reversed(METHODS.items())), seed=3)["SMC"]
    other = bk.compare(POSTERIOR, {"SMC": METHODS["SMC"]}, seed=4)["SMC"]
    assert np.array_equal(alone.tokens, among.tokens)
    assert not np.array_equal(alone.tokens, other.tokens)


def test_equal_trainings_are_shared_and_billed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[Fit] = []
    train = bk.SVI.fit
    monkeypatch.setattr(
        bk.SVI, "fit", lambda self, *args, **kwargs: fits.append(train(self, *args, **kwargs)) or fits[-1]
    )
    svi = bk.SVI(3, 8, num_draws=20)
    rows = {"SVI": svi, "SVI, then IS": bk.ImportanceSampling(30, proposal=bk.SVI(3, 8)), "other": bk.SVI(4, 8)}
    result = bk.compare(POSTERIOR, rows, seed=0, repeats=2)
    assert len(fits) == 4  # two recipes, two repeats
    assert set(result.fits) == {"SVI", "other"}
    table = result.table()
    assert table.loc["SVI", "training_tokens"] == table.loc["SVI, then IS", "training_tokens"] > 0
    assert table.loc["SVI", "training_seconds"] == pytest.approx(table.loc["SVI, then IS", "training_seconds"])
    assert result["SVI"].guide is not None


def test_a_training_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(self: bk.SVI, *args: object, **kwargs: object) -> Fit:
        calls.append(self)
        raise bk.UnboundedLossError("likelihood 0")

    monkeypatch.setattr(bk.SVI, "fit", fail)
    svi = bk.SVI(3, 8)
    rows = {"SVI": svi, "SVI, then IS": bk.ImportanceSampling(30, proposal=svi), "SMC": METHODS["SMC"]}
    result = bk.compare(POSTERIOR, rows, seed=0)
    assert len(calls) == 1
    assert set(result.failures) == {"SVI", "SVI, then IS"}
    assert "likelihood 0" in result.table().loc["SVI", "note"]
    assert np.isfinite(result.table().loc["SMC", "log_evidence"])


def test_a_repeat_that_fails_is_not_hidden() -> None:
    table = bk.compare(POSTERIOR, {"unlucky": Failing()}, seed=0, repeats=3).table()
    assert "out of luck" in table.loc["unlucky", "note"]
    assert np.isfinite(table.loc["unlucky", "log_evidence"])


def test_it_raises_if_nothing_succeeds() -> None:
    failing = Failing()
    failing.num_runs = 1
    with pytest.raises(bk.BayesKLRLError, match="out of luck"):
        bk.compare(POSTERIOR, {"unlucky": failing}, seed=0)


def test_a_missed_mode_neither_sets_the_reference_nor_goes_unnoted() -> None:
    """A proposal that hardly reaches half of the posterior has a fine ESS and a log evidence far too low."""
    flat = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    posterior = bk.Posterior(
        flat, bk.TokenReward(lambda tokens, lengths: 6.0 * tokens[:, 0], alpha=1.0), max_new_tokens=4
    )
    blind = bk.NgramLM(np.log([1 - 1e-9, 1e-9]), eos_token_id=None)
    rows = {"blind": bk.ImportanceSampling(2000, proposal=blind), "prior IS": bk.ImportanceSampling(2000)}
    table = bk.compare(posterior, {**rows, "SVI": bk.SVI(2, 8, num_draws=500)}, seed=0).table()
    assert table.loc["blind", "ess"] > 1000
    assert "too low" in table.loc["blind", "note"]
    assert not table.loc["prior IS", "note"]
    assert table.loc["SVI", "kl_posterior"] > 0


def test_a_reward_of_few_levels_prints_no_minus_infinity() -> None:
    """Its largest weights are equal: Pareto k is -inf in the table, and words in print."""
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=None)
    heads = bk.TokenReward(lambda tokens, lengths: tokens[:, 0], alpha=1.0)
    compared = bk.compare(bk.Posterior(coin, heads, max_new_tokens=1), {"IS": bk.ImportanceSampling(200)}, seed=0)
    table = compared.table()
    assert np.isneginf(table["pareto_k"].iloc[0])
    assert "no tail" in str(table)
    assert "-inf" not in str(table)


def test_dead_rows_say_so() -> None:
    never = bk.TokenReward(lambda tokens, lengths: np.where(lengths > 0, -np.inf, 0.0), alpha=1.0)
    posterior = bk.Posterior(POSTERIOR.prior, never, max_new_tokens=2)
    table = bk.compare(
        posterior, {"prior IS": bk.ImportanceSampling(20), "best of 2": bk.BestOfN(2, 5)}, seed=0
    ).table()
    assert (table["note"].str.contains("no draw has positive likelihood")).all()


@pytest.mark.parametrize(
    "algorithms",
    [{}, [bk.SMC(4)], {"x": bk.SMC}, {"x": 3}, {"a/b": bk.SMC(4)}, {"x": bk.ImportanceSampling(4, proposal="austen")}],
    ids=["none", "list", "class", "number", "slash", "name for a proposal"],
)
def test_what_no_run_could_make_right_is_refused_first(algorithms: object) -> None:
    with pytest.raises(bk.BayesKLRLError):
        bk.compare(POSTERIOR, algorithms, seed=0)


@pytest.mark.slow
def test_everything_is_saved_and_only_over_what_is_ours(tmp_path) -> None:
    result = bk.compare(POSTERIOR, {**METHODS, "SVI": bk.SVI(3, 8, num_draws=50)}, seed=0)
    folder = result.save(tmp_path / "out")
    assert {"draws.nc", "table.csv", "comparison.png", "training.png", "policy"} <= {p.name for p in folder.iterdir()}
    assert bk.NgramLM.from_pretrained(folder / "policy").order == POSTERIOR.prior.order
    bk.compare(POSTERIOR, METHODS, seed=0).save(folder)
    assert not (folder / "policy").exists()  # nothing of the earlier run stays beside the new table
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    with pytest.raises(bk.BayesKLRLError, match="not written by bayes-klrl"):
        result.save(tmp_path / "theirs")


def test_a_fit_is_not_an_algorithm() -> None:
    """It has a `run`, which takes other arguments; refused before any other row runs."""
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)

    def never(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        raise AssertionError("A method was run.")

    posterior = bk.Posterior(coin, bk.TokenReward(never, alpha=1.0), max_new_tokens=2)
    fit = Fit(coin, {}, posterior, Cost())
    with pytest.raises(bk.BayesKLRLError, match=r"'tuned' is not an algorithm.*proposal=fit\.guide"):
        bk.compare(posterior, {"IS": bk.ImportanceSampling(4), "tuned": fit}, seed=0)  # type: ignore[dict-item]


# --- names of rows, which become groups of a file ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\x00b", "\x00", "\ud800", 3, None])
def test_a_name_that_cannot_be_saved_is_refused_before_anything_runs(name: Any) -> None:
    class Never:
        def run(self, posterior: bk.Posterior, *, seed: int, progress: bool = False) -> bk.Draws:
            raise AssertionError("it ran")

    with pytest.raises(bk.BayesKLRLError, match=r"becomes the name of a group in draws\.nc"):
        bk.compare(NAMED, {"fine": Never(), name: Never()}, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names, repeats",
    [([" ", "...", ".a", "a.", "\n", "ä", "name", "posterior"], 1), (["a", "a #3"], 2)],
    ids=["odd", "repeats"],
)
def test_any_other_name_is_saved(names: list[str], repeats: int, tmp_path: Path) -> None:
    comparison = bk.compare(NAMED, dict.fromkeys(names, bk.Exact()), seed=0, repeats=repeats)
    comparison.to_arviz().to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "draws.nc", engine="h5netcdf") as tree:
        assert set(tree.children) == {*names, *(f"{name} #2" for name in names if repeats > 1)}


def test_repeats_do_not_take_the_name_of_another_row() -> None:
    rows = {"a": bk.Exact(), "a #2": bk.ImportanceSampling(4)}
    assert set(bk.compare(NAMED, rows, seed=0).to_arviz().children) == set(rows)
    with pytest.raises(bk.BayesKLRLError, match=r"'a #2' is the name of repeat 2 of 'a'"):
        bk.compare(NAMED, rows, seed=0, repeats=2)


@pytest.mark.parametrize("name", ["", ".", "..", "a\x00b"])
def test_nor_can_it_be_exported(name: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match="becomes the name of a group"):
        comparison_to_datatree({name: bk.Exact().run(NAMED, seed=0)})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\x00b"])
def test_columns_are_not_saved_and_may_have_any_name(name: str, tmp_path: Path) -> None:
    posterior = bk.Posterior(NAMED.prior, NAMED.likelihood, max_new_tokens=2, **{name: [1]})
    draws = bk.Exact().run(posterior, seed=0)
    assert bk.Draws.load(draws.save(tmp_path / "draws.nc")).shape == draws.shape


# --- the price of a draw ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tokens_per_effective_draw_of_each_kind_of_answer() -> None:
    """Effective sample sizes where there are any, summed over prompts; one for each independent draw of equal weight."""
    prior = bk.NgramLM.fit(["a cat sat", "the cat ran"], order=2)
    likes = bk.Reward(lambda completions: [text.count("a") for text in completions], alpha=1.0, bounds=(0, 3))
    posterior = bk.Posterior(prior, likes, prompts=["a", "th"], max_new_tokens=3)
    rows = {
        "exact": bk.Exact(),
        "exact draws": bk.Exact(num_draws=40),
        "prior IS": bk.ImportanceSampling(300),
        "SMC": bk.SMC(100),
        "annealed": bk.AnnealedSMC(100),
        "best of 4": bk.BestOfN(4, 50),
        "rejection": bk.RejectionSampling(30),
        "SVI": bk.SVI(3, 8, num_draws=70),
        "chains": bk.SuffixMH(4, 100),
    }
    result = bk.compare(posterior, rows, seed=0, repeats=2)
    shown = result.table()["tokens_per_effective_draw"]
    equal = {"exact draws": 40, "best of 4": 50, "rejection": 30, "SVI": 70}
    for name, repeats in result.draws.items():
        tokens = sum(draws.model_tokens for draws in repeats)
        if name == "exact":
            assert np.isnan(shown[name])
            continue
        count = 4 * equal[name] if name in equal else sum(draws.ess.sum() for draws in repeats)
        assert shown[name] == pytest.approx(tokens / count)
    assert "tokens per" in str(result.table())


def test_chains_of_which_nothing_varies_have_no_price() -> None:
    one = bk.NgramLM(np.array([-np.inf, 0.0]), eos_token_id=1)
    posterior = bk.Posterior(one, LONGER, max_new_tokens=2)
    shown = bk.compare(posterior, {"chains": bk.SuffixMH(2, 10), "prior IS": bk.ImportanceSampling(8)}, seed=0).table()
    assert np.isnan(shown.loc["chains", "tokens_per_effective_draw"])
    assert np.isfinite(shown.loc["prior IS", "tokens_per_effective_draw"])


def test_a_row_that_missed_a_mode_is_told_by_another() -> None:
    """A rare token holds nine tenths of the posterior. Rows that drew none of it have even weights, and look certain."""
    prior = bk.NgramLM(np.log([0.4975, 0.4975, 0.005]), eos_token_id=0)
    won = bk.TokenReward(lambda tokens, lengths: 7.5 * (tokens[:, 0] == 2), alpha=1.0)
    posterior = bk.Posterior(prior, won, max_new_tokens=1)
    told = {False: 0, True: 0}
    for seed in range(12):
        rows = {"few": bk.ImportanceSampling(150), "many": bk.ImportanceSampling(40_000), "best": bk.BestOfN(400, 10)}
        result = bk.compare(posterior, rows, seed=seed)
        notes = result.table()["note"]
        missed = not (result["few"].reward > 0).any()
        told[missed] += 1
        assert ("it may have missed them" in notes["few"]) == missed
        assert "it may have missed them" not in notes["many"]
        if missed:
            assert result["few"].ess[0] > 149
            held = re.search(r"hold (\d+)% of the posterior by 'many'", notes["few"])
            assert held is not None
            assert 87 <= int(held[1]) <= 93  # 90 %, from about 200 draws of the rare token
    assert min(told.values()) >= 2


def test_what_a_small_sample_or_a_heavy_tail_cannot_know_is_not_printed() -> None:
    """Below an ESS of 100 there is no KL; with a Pareto k above 0.7 the row says that few draws decide."""
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=())
    rng = np.random.default_rng(0)
    worth = rng.exponential(size=2**16)  # so that weights have a Pareto tail

    def wild(tokens: Any, lengths: Any) -> Any:
        return 0.39 * worth[(tokens * 2 ** np.arange(tokens.shape[1])).sum(axis=1) % len(worth)]

    heavy = bk.Posterior(coin, bk.TokenReward(wild, alpha=0.5), max_new_tokens=16)
    table = bk.compare(
        heavy, {"few": bk.ImportanceSampling(150), "many": bk.ImportanceSampling(20_000)}, seed=0
    ).table()
    few, many = table.loc["few"], table.loc["many"]
    assert few["ess"] < 100 < many["ess"]
    assert np.isnan(few["kl_posterior"])
    assert many["kl_posterior"] > 0
    assert many["pareto_k"] > 0.7
    assert "few draws decide" in many["note"]
    assert "few draws decide" not in few["note"]  # it has a warning of its own
