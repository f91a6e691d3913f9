"""The export: what ArviZ sees, and that a file holds everything. Needs no torch; runs with ArviZ 0.x and 1.x."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import bayes_klrl as bk
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.export.datatree import (
    _draws_of,
    as_installed,
    comparison_to_datatree,
    draws_to_datatree,
    load_draws,
    save_draws,
)
from bayes_klrl.export.installed_arviz import installed_arviz
from tests.algorithms import EVERY_REWARD, named

az = installed_arviz()

ARVIZ_1 = not az.__version__.startswith("0.")
LM = bk.NgramLM.fit(["schön", "schöne Tage", "日本語 text", 'a\nb \\ "c"', "nö"], order=2)
LM_OF_DOLLARS = bk.NgramLM.fit(["$n_ö and $", "sch sch", " schön"], order=2)
REWARD = bk.Reward(lambda completions: [text.count("ö") + len(text) / 4 for text in completions], alpha=0.7)
POSTERIOR = bk.Posterior(LM, REWARD, prompts=["", "sch"], max_new_tokens=6)
COIN = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=2)
IDS_POSTERIOR = bk.Posterior(
    COIN, bk.TokenReward(lambda tokens, lengths: lengths, alpha=0.5), prompts=[[0, 1], [1]], max_new_tokens=4
)

ALGORITHMS = named(tuple(row for row in EVERY_REWARD if row.name != "Exact"), 80)  # too many texts to enumerate


@pytest.fixture(params=ALGORITHMS, scope="module")
def draws(request: pytest.FixtureRequest) -> Draws:
    return ALGORITHMS[request.param].run(POSTERIOR, seed=3)


@pytest.fixture(scope="module")
def file(draws: Draws, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of `draws`, written once for the tests that only read it."""
    return save_draws(draws, tmp_path_factory.mktemp("saved") / "draws.nc")


def assert_same(one: Draws, other: Draws) -> None:
    """Bit by bit, but for the guide and the decoder."""
    for field in fields(Draws):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype, field.name
            assert mine.tobytes() == theirs.tobytes(), field.name
            assert mine.shape == theirs.shape, field.name
        elif field.name == "info":
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(mine[key], theirs[key], equal_nan=True) for key in mine)
        elif field.name not in {"guide", "decoder"}:
            assert mine == theirs, field.name


def dead(draws: Draws, *prompts: int) -> Draws:
    """The draws with all weights of some prompts 0."""
    log_weights = draws.log_weights.copy()
    log_weights[list(prompts)] = -np.inf
    return replace(draws, log_weights=log_weights)


@pytest.mark.slow
def test_a_file_holds_everything(draws: Draws, file: Path) -> None:
    loaded = Draws.load(file)
    assert_same(draws, loaded)
    assert loaded.texts() == draws.texts()
    np.testing.assert_array_equal(loaded.mean(loaded.reward), draws.mean(draws.reward))
    assert loaded.resample(5, seed=0).texts() == draws.resample(5, seed=0).texts()


@pytest.mark.slow
def test_a_file_holds_draws_of_token_ids(tmp_path: Path) -> None:
    for algorithm in (bk.Exact(), bk.Exact(num_draws=7), bk.ImportanceSampling(1)):
        draws = algorithm.run(IDS_POSTERIOR, seed=0)
        loaded = load_draws(save_draws(draws, tmp_path / "ids.nc"))
        assert_same(draws, loaded)
        assert loaded.prompts == ((0, 1), (1,))
        with pytest.raises(bk.BayesKLRLError, match="no tokenizer"):
            loaded.texts()


@pytest.mark.slow
def test_minus_infinity_and_cost_survive(tmp_path: Path) -> None:
    draws = bk.ImportanceSampling(20).run(POSTERIOR, seed=0)
    draws = replace(dead(draws, 1), cost=Cost(1 / 3, 2**40, 7), alpha=0.1, elbo=np.array([-np.inf, np.nan]))
    assert_same(draws, load_draws(save_draws(draws, tmp_path / "draws.nc")))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", " ", "a\x00b", "\udc80", "𝔘 نص\r\n\t", '"\\u0041"', "0" * 5000])
def test_any_text_survives(text: str, tmp_path: Path) -> None:
    draws = bk.ImportanceSampling(3).run(POSTERIOR, seed=0)
    draws = replace(draws, decoder=lambda ids: [text + str(list(row)) for row in ids], prompts=(text, "ö"))
    loaded = load_draws(save_draws(draws, tmp_path / "draws.nc"))
    assert loaded.texts() == draws.texts()
    assert loaded.prompts == draws.prompts


def test_loaded_draws_know_only_their_own_texts(file: Path) -> None:
    loaded = load_draws(file)
    assert loaded.decoder is not None
    with pytest.raises(bk.BayesKLRLError, match=r"\[999\] is not among these draws"):
        loaded.decoder([[999]])


@pytest.mark.slow
def test_files_that_are_not_ours_are_named(tmp_path: Path) -> None:
    draws = bk.ImportanceSampling(8).run(POSTERIOR, seed=3)
    text, other, comparison = tmp_path / "text.nc", tmp_path / "other.nc", tmp_path / "comparison.nc"
    text.write_text("no netCDF")
    xr.Dataset({"a": ("x", [1.0])}).to_netcdf(other, engine="h5netcdf")
    comparison_to_datatree({"IS": draws}).to_netcdf(comparison)
    for path in (text, other, comparison, tmp_path, tmp_path / "missing.nc"):
        with pytest.raises(bk.CheckpointError, match=path.name):
            load_draws(path)
    with pytest.raises(bk.CheckpointError, match=r"a comparison of \['IS'\]"):
        load_draws(comparison)


@pytest.mark.slow
def test_saving_twice_overwrites(draws: Draws, tmp_path: Path) -> None:
    path = draws.save(tmp_path / "draws.nc")
    first = load_draws(path)
    save_draws(draws.resample(3, seed=0), path)
    assert load_draws(path).shape == (2, 3)
    assert_same(first, draws)


def test_the_groups_are_labelled(draws: Draws) -> None:
    tree = draws_to_datatree(draws)
    num_prompts, num_draws = draws.shape
    num_chains = 2 if draws.method == "SuffixMH" else 1
    assert dict(tree["posterior"].sizes) == {
        "chain": num_chains,
        "draw": num_draws // num_chains,
        "prompt": num_prompts,
    }
    assert set(tree["posterior"].data_vars) == {"reward", "length", "log_prior", "log_likelihood"}
    assert set(tree["weighted"].dims) == {"prompt", "draw", "position"}
    assert tree["weighted/text"].values.tolist() == draws.texts()
    assert tree["constant_data/prompts"].values.tolist() == ['""', '"sch"']
    for name in ("posterior", "sample_stats", "weighted", "evidence", "constant_data"):
        assert tree[name]["prompt"].values.tolist() == ["(empty)", "sch"]
    assert tree["constant_data/method"].item() == draws.method
    assert tree["constant_data/max_new_tokens"].item() == POSTERIOR.max_new_tokens
    assert (tree.attrs["convention"], tree.attrs["units"]) == ("absorb", "nats")
    for name in ("log_likelihood/likelihood", "log_prior/x", "sample_stats/log_proposal"):
        assert tree[name].dims == ("chain", "draw", "prompt")
    np.testing.assert_array_equal(tree["log_likelihood/likelihood"].values, tree["posterior/log_likelihood"].values)
    assert ("info" in tree) == (draws.method != "ImportanceSampling")
    if draws.method == "SMC":
        assert tree["info/ancestors"].dims == ("prompt", "position", "draw")
    if "info" in tree:
        assert set(tree["info"].dims) <= {"prompt", "draw", "position", "temperature"}


def test_prompts_are_told_apart_and_dollars_are_no_mathematics() -> None:
    prompts = ["$n_ö and $", "sch", " sch", "sch"]
    draws = bk.ImportanceSampling(5).run(bk.Posterior(LM_OF_DOLLARS, REWARD, prompts=prompts, max_new_tokens=3), seed=0)
    posterior = draws_to_datatree(draws)["posterior"]
    names = [r"\$n_ö and \$", "sch (prompt 1)", "␣sch", "sch (prompt 3)"]
    assert posterior["prompt"].values.tolist() == names
    np.testing.assert_array_equal(posterior["reward"].sel(prompt="␣sch"), posterior["reward"].isel(prompt=2))


def test_trees_of_before_still_load() -> None:
    """They have numbers for prompts, and do not say which ids end a completion."""
    draws = bk.ImportanceSampling(40).run(POSTERIOR, seed=0)
    assert draws.finished.any()
    assert not draws.finished.all()
    old = draws_to_datatree(draws)
    del old.attrs["eos_token_ids"]
    groups = {
        node.path: node.to_dataset().assign_coords({"prompt": np.arange(2)} if "prompt" in node.dims else {})
        for node in old.subtree
    }
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = old.attrs
    loaded = _draws_of(tree)
    assert_same(draws, loaded)
    np.testing.assert_array_equal(loaded.finished, draws.finished)


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pictures without a display."""
    import matplotlib
    import matplotlib.pyplot as plt

    before = matplotlib.get_backend()
    plt.switch_backend("agg")
    with warnings.catch_warnings():  # ArviZ 0.23 under matplotlib 3.11
        warnings.simplefilter(
            "ignore", category=getattr(matplotlib, "MatplotlibDeprecationWarning", DeprecationWarning)
        )
        yield
    plt.close("all")
    plt.switch_backend(before)


def test_arviz_draws_what_we_export(pictures: None) -> None:
    prompts = ["$n_ö and $", "sch", "sch"]
    posterior = bk.Posterior(LM_OF_DOLLARS, REWARD, prompts=prompts, max_new_tokens=4)
    draws = {"IS": bk.ImportanceSampling(30).run(posterior, seed=0), "SMC": bk.SMC(30).run(posterior, seed=0)}
    tree = comparison_to_datatree(draws)
    children = dict(tree.children) if ARVIZ_1 else {name: as_installed(tree[name]) for name in draws}
    for one in (draws["IS"].to_arviz(), children["SMC"]):
        assert "reward[sch (prompt 1)]" in az.summary(one, var_names=["reward"]).index
        forest = az.plot_forest(one, var_names=["reward"], combined=True)
        shown = forest.viz["figure"].item() if ARVIZ_1 else forest[0].figure
        shown.canvas.draw()  # labels that are no mathematics for matplotlib fail here
        (az.plot_dist if ARVIZ_1 else az.plot_posterior)(one, var_names=["reward"])
    if ARVIZ_1:
        az.plot_forest(children, var_names=["reward"])
    else:
        az.plot_forest(list(children.values()), model_names=list(children), var_names=["reward"], combined=True)


def test_draws_that_weigh_equally_are_taken_as_they_are() -> None:
    draws = bk.BestOfN(3, 40).run(POSTERIOR, seed=3)
    np.testing.assert_array_equal(draws_to_datatree(draws)["posterior/reward"].values[0].T, draws.reward)


@pytest.mark.parametrize("algorithm", [bk.ImportanceSampling(3000), bk.Exact()])
def test_the_resample_has_the_weighted_mean(algorithm: Any) -> None:
    draws = algorithm.run(IDS_POSTERIOR if isinstance(algorithm, bk.Exact) else POSTERIOR, seed=1)
    posterior = draws_to_datatree(draws)["posterior"]
    for name in ("reward", "log_prior"):
        values = getattr(draws, name)
        mean = draws.mean(values)
        sd = np.sqrt(draws.mean((values - mean[:, None]) ** 2))
        z = (posterior[name].values[0].mean(axis=0) - mean) / (sd / np.sqrt(draws.shape[1]))
        assert np.abs(z).max() < 4


def test_dead_draws_are_never_resampled() -> None:
    no_eos = bk.Constraint(lambda completions: [not text.startswith("s") for text in completions])
    draws = bk.ImportanceSampling(300).run(bk.Posterior(LM, no_eos, max_new_tokens=6), seed=0)
    assert np.isneginf(draws.log_weights).any()
    assert np.isfinite(draws_to_datatree(draws)["posterior/log_likelihood"].values).all()


def test_a_prompt_without_any_weight_is_nan() -> None:
    draws = dead(bk.ImportanceSampling(30).run(POSTERIOR, seed=0), 1)
    reward = draws_to_datatree(draws)["posterior/reward"].values[0]
    assert np.isfinite(reward[:, 0]).all()
    assert np.isnan(reward[:, 1]).all()
    assert np.isnan(draws_to_datatree(dead(draws, 0, 1))["posterior/length"].values).all()


def test_arviz_summarises(draws: Draws) -> None:
    summary = az.summary(draws.to_arviz())
    means = summary["mean"].astype(float)
    np.testing.assert_allclose(means[["reward[(empty)]", "reward[sch]"]], draws.mean(draws.reward), atol=0.5)
    assert not any("token" in name for name in summary.index)


def test_arviz_counts_copies_of_a_draw_once() -> None:
    """Its effective sample size is near Kish's, not near N."""
    reward = bk.Reward(lambda completions: [3 * text.startswith("nö") for text in completions], alpha=1.0)
    draws = bk.ImportanceSampling(4000).run(bk.Posterior(LM, reward, max_new_tokens=6), seed=0)
    seen = float(az.ess(draws.to_arviz(), var_names=["log_prior"], method="mean")["log_prior"].values.squeeze())
    assert draws.ess[0] < 0.5 * draws.shape[1]
    assert 0.6 < seen / draws.ess[0] < 1.7


@pytest.mark.skipif(not ARVIZ_1, reason="power-scaling came with ArviZ 1")
def test_power_scaling_finds_its_groups() -> None:
    draws = bk.ImportanceSampling(500).run(POSTERIOR, seed=0)
    sensitivity = az.psense_summary(draws.to_arviz(), var_names=["reward"])
    assert {"prior", "likelihood"} <= set(sensitivity.columns)


@pytest.mark.slow
def test_a_comparison_keeps_its_names(tmp_path: Path) -> None:
    draws = bk.ImportanceSampling(20).run(POSTERIOR, seed=0)
    names = ["SVI, then IS", "a/b", "SMC (N = 256) #2", "β=½", "100%", "Exact"]
    tree = comparison_to_datatree(dict.fromkeys(names, draws))
    tree.to_netcdf(tmp_path / "comparison.nc")
    with xr.open_datatree(tmp_path / "comparison.nc", engine="h5netcdf") as opened:
        assert set(opened.children) == {name.replace("/", "-") for name in names}
        assert {child.attrs["name"] for child in opened.children.values()} == set(names)
        for child in opened.children.values():
            np.testing.assert_array_equal(child["weighted/log_weights"].values, draws.log_weights)
            assert child["weighted/text"].values.tolist() == draws.texts()
    with pytest.raises(bk.BayesKLRLError, match="rename 'a-b'"):
        comparison_to_datatree({"a/b": draws, "a-b": draws})


def test_arviz_opens_the_file(draws: Draws, file: Path) -> None:
    if ARVIZ_1:
        opened = az.from_netcdf(str(file), engine="h5netcdf")
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*not defined in the InferenceData scheme", UserWarning)
            opened = az.from_netcdf(str(file), engine="h5netcdf")
    assert "reward[sch]" in az.summary(opened).index
    np.testing.assert_array_equal(opened["weighted"]["log_weights"].values, draws.log_weights)
    opened.close()


@pytest.mark.slow
def test_arviz_complains_to_no_user(tmp_path: Path) -> None:
    """ArviZ 0.23 announces version 1 once a day, from wherever it is imported first."""
    code = (
        "import numpy as np, bayes_klrl as bk\n"
        "coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)\n"
        "reward = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)\n"
        "bk.ImportanceSampling(9).run(bk.Posterior(coin, reward, max_new_tokens=2), seed=0).to_arviz()\n"
    )
    environment = {
        "PATH": "",
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": ":".join(sys.path),
    }
    command = [sys.executable, "-W", "error::FutureWarning", "-W", "error::UserWarning", "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_an_enumeration_of_few_completions_has_their_means() -> None:
    """Of seven completions seven draws would be made; the means of 4,000 are the exact ones by z-score."""
    coin = bk.NgramLM(np.log([0.7, 0.3]), eos_token_id=1)
    longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=0.8)
    draws = bk.Exact().run(bk.Posterior(coin, longer, prompts=[[0], [1]], max_new_tokens=6), seed=0)
    tree = draws_to_datatree(draws)
    rewards = tree["posterior"]["reward"].to_numpy()[0]  # (draws, prompts)
    assert rewards.shape == (4000, 2)
    mean = (draws.weights * draws.reward).sum(axis=1)
    variance = (draws.weights * (draws.reward - mean[:, None]) ** 2).sum(axis=1)
    assert (np.abs(rewards.mean(axis=0) - mean) < 4 * np.sqrt(variance / 4000)).all()
    assert tree["weighted"]["log_weights"].shape == (2, 7)
