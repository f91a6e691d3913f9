"""What outsiders tried: arguments that nobody meant to give, each of which must be refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.reward_models.features import FeatureMap, TokenFeatures

COIN = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=2)
LONGER = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
POSTERIOR = bk.Posterior(COIN, LONGER, max_new_tokens=2)


# --- guides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pyro_guide", "numpyro_guide"])
@pytest.mark.parametrize(
    "guide, message",
    [
        ("austen", "The guide must be a language model"),
        (None, "The guide must be a language model"),
        (bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1), "The guide has 2 tokens"),
        (bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=1), r"The guide has 3 tokens and EOS \[1\]"),
    ],
)
def test_a_guide_shares_the_vocabulary_of_the_prior(kind: str, guide: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        getattr(POSTERIOR, kind)(guide)


# --- Bayesian policies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ["all", "bias", "lora"])
def test_policies_are_not_loaded_onto_another_prior_of_the_same_shape(parameters: str, tmp_path: Path) -> None:
    from tests.helpers.tiny_models import tiny_gpt2

    if parameters == "lora":
        pytest.importorskip("peft")
    ours, theirs = (
        bk.Posterior(bk.TorchLM(tiny_gpt2(4, n_layer=1, seed=seed)), LONGER, prompts=[[1]], max_new_tokens=2)
        for seed in (5, 6)
    )
    fit = bk.BayesianSVI(1, 2, 1, parameters=parameters, num_predictive=1).fit(ours, seed=0)
    folder = fit.save(tmp_path / "fit")
    bk.BayesianFit.load(folder, ours)
    with pytest.raises(bk.CheckpointError, match="not of this prior: its weights are others"):
        bk.BayesianFit.load(folder, theirs)


# --- reward models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns, message",
    [
        (None, "columns is a dictionary"),
        ({"k": 3}, "'k' needs one value per row"),
        ({"k": "ab"}, "'k' needs one value"),
    ],
)
def test_columns_of_preferences_are_lists_by_name(columns: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.Preferences("p", ["a", "b"], ["b", "a"], columns)


@pytest.mark.parametrize("noise", ["x", [0.1, None], 0.0, [0.1], [[0.1, 0.2]]])
def test_noise_is_a_positive_number(noise: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="noise"):
        bk.Scores("p", ["a", "b"], [1.0, 2.0], noise=noise)


def test_one_preference_by_its_index() -> None:
    pairs = bk.Preferences("p", ["a", "b"], ["c", "d"], {"k": [1, 2]})
    assert (pairs[1].chosen, pairs[1].columns) == (("b",), {"k": (2,)})
    assert pairs[np.int64(-1)].rejected == ("d",)


def test_features_whose_variance_overflows_are_named() -> None:
    features = TokenFeatures(lambda tokens, lengths: lengths)
    raw = np.array([[1.0, 1e200], [2.0, -1e200]])
    with pytest.raises(bk.BayesKLRLError, match=r"Feature 1 is as large as 1e\+200"):
        FeatureMap.fitted(features, raw)


def exact_reward(lm: bk.LanguageModel, features: Any, *, components: int | None = None) -> bk.RewardPosterior:
    """A reward model of two draws, which no chain made: enough to be asked."""
    pairs = bk.Preferences([1], [[1, 1], [0], [1, 2]], [[0], [1, 2], [1, 1, 2]])
    model = bk.RewardModel(features, num_draws=2, num_warmup=2, num_chains=1, num_components=components)
    return model.fit(lm, pairs, seed=0, accept_unconverged=True)


@pytest.mark.slow
def test_the_uncertainty_of_draws_of_another_likelihood_is_refused() -> None:
    known = exact_reward(COIN, TokenFeatures(lambda tokens, lengths: np.stack([lengths, tokens[:, 0]], axis=1)))
    cut, plug_in = (
        bk.Posterior(COIN, known.reward(alpha=0.5, num_thetas=2, target=target), prompts=[[1]], max_new_tokens=2)
        for target in ("cut", "plug-in")
    )
    draws = bk.ImportanceSampling(50).run(cut, seed=0)
    told = bk.reward_uncertainty(cut, draws)
    with pytest.raises(bk.BayesKLRLError, match="their rewards differ from those of its likelihood"):
        bk.reward_uncertainty(plug_in, draws)
    with pytest.raises(bk.BayesKLRLError, match="values must be numbers"):
        told.decompose(["a"] * 50)  # type: ignore[arg-type]


@pytest.mark.slow
def test_hidden_states_need_room_for_one_more_token() -> None:
    from tests.helpers.tiny_models import tiny_gpt2

    lm = bk.TorchLM(tiny_gpt2(4, n_layer=1, n_positions=8))
    reward = exact_reward(lm, bk.HiddenStates(), components=1).reward(alpha=1.0, num_thetas=2)
    bk.Exact().run(bk.Posterior(lm, reward, prompts=[[1] * 5], max_new_tokens=2), seed=0)
    with pytest.raises(bk.BayesKLRLError, match="and one more token"):
        bk.Posterior(lm, reward, prompts=[[1] * 6], max_new_tokens=2)


# --- rewards and token ids --------------------------------------------------------------------------------------


def test_a_complex_reward_is_not_cut_to_its_real_part() -> None:
    rotated = bk.TokenReward(lambda tokens, lengths: lengths * 1j, alpha=1.0)
    with pytest.raises(bk.RewardError, match="A reward is a finite number"):
        bk.Exact().run(bk.Posterior(COIN, rotated, max_new_tokens=2), seed=0)


@pytest.mark.parametrize(
    "prompts, message",
    [([1, 2], "Prompt 0 must be a list of token ids"), (["ab"], "must be a list"), ([[1.5]], "must be integers")],
)
def test_prompts_are_lists_of_whole_numbers(prompts: Any, message: str) -> None:
    from tests.helpers.tiny_models import tiny_gpt2

    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.TorchLM(tiny_gpt2(4, n_layer=1)).prefill(prompts)


def test_the_repr_of_a_posterior_names_a_reward_that_has_no_name() -> None:
    assert "likelihood='<lambda>'" in repr(POSTERIOR)


# --- mixtures ---------------------------------------------------------------------------------------------------


def test_a_mixture_refuses_what_is_no_list_of_models_and_no_weight() -> None:
    for models in (COIN, [], None):
        with pytest.raises(bk.BayesKLRLError, match="A mixture is of a list of language models"):
            bk.MixtureLM(models)  # type: ignore[arg-type]
    for weights in ("ab", ["a", "b"], [[1.0], [1.0, 2.0]]):
        with pytest.raises(bk.BayesKLRLError, match="needs as many positive weights"):
            bk.MixtureLM([COIN, COIN], weights)  # type: ignore[arg-type]
    mixture = bk.MixtureLM([COIN, COIN])
    for token in (3, -1):
        with pytest.raises(bk.BayesKLRLError, match="Token ids must be in"):
            mixture.append(mixture.prefill([[]]), np.array([token]))


# --- checkpoints for JAX ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"eos_token_id": "x"}, "eos_token_id is a token id"),
        ({"eos_token_id": 1.5}, "eos_token_id is a token id"),
        ({"bayes_klrl": 3}, "The entry 'bayes_klrl' of config"),
        ({"bayes_klrl": {"beta": 1}}, "The entry 'bayes_klrl' of config"),
    ],
)
def test_entries_of_a_configuration_that_nobody_wrote(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    from tests.helpers.tiny_models import tiny_gpt2

    tiny_gpt2(4, n_layer=1).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.JaxLM.from_pretrained(tmp_path)


def test_parameters_are_a_tree() -> None:
    lm = bk.JaxLM.from_pretrained("austen")
    for parameters in (None, [1], {"outer": 3}):
        with pytest.raises(bk.CheckpointError, match="Parameters are a tree of arrays by name"):
            lm.with_parameters(parameters)  # type: ignore[arg-type]


# --- programs and checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["pyro_model", "numpyro_model"])
def test_a_program_cannot_subsample_more_prompts_than_there_are(make: str) -> None:
    from bayes_klrl.models.programs import numpyro_program as numpyro_model
    from bayes_klrl.models.programs import pyro_program as pyro_model

    module: Any = pyro_model if make == "pyro_model" else numpyro_model
    with pytest.raises(bk.BayesKLRLError, match="prompts_per_step = 5, but the posterior has 1 prompts"):
        getattr(module, make)(POSTERIOR, 5)


def test_completions_of_another_shape_are_named_in_a_numpyro_program() -> None:
    from numpyro import handlers

    model = handlers.seed(handlers.condition(POSTERIOR.numpyro_model(), {"x": np.array([[1, 0, 2]])}), 0)
    with pytest.raises(bk.BayesKLRLError, match=r"shape \(\.\.\., P, T\) = \(\.\.\., 1, 2\).*got \(1, 3\)"):
        model()


def test_a_fit_is_not_a_proposal_but_its_guide_is() -> None:
    fit = bk.SVI(1, 2).fit(POSTERIOR, seed=0)
    with pytest.raises(bk.BayesKLRLError, match="of a Fit give its `guide`"):
        bk.ImportanceSampling(5, proposal=fit).run(POSTERIOR, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["TorchLM", "JaxLM"])
def test_a_checkpoint_of_a_training_that_diverged(kind: str, tmp_path: Path) -> None:
    from tests.helpers.tiny_models import tiny_gpt2

    model = tiny_gpt2()
    model.transformer.ln_f.bias.data[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(bk.CheckpointError, match=r"ln_f\.bias in .* holds NaN"):
        getattr(bk, kind).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, options, message",
    [
        (None, {}, "A model is given as a folder or the name of a shipped model; got None"),
        ("austen", {"foo": 1}, "has no option 'foo'"),
        ("austen", {"device": "abacus"}, "JAX has no device 'abacus' here; it has cpu"),
    ],
)
def test_what_jax_cannot_load(name: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.JaxLM.from_pretrained(name, **options)


def test_a_jax_platform_may_be_named() -> None:
    import jax

    lm = bk.JaxLM.from_pretrained("austen", device="cpu")
    assert {place.platform for leaf in jax.tree.leaves(lm.parameters) for place in leaf.devices()} == {"cpu"}
