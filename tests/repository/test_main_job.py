"""The main job end to end: the shipped model, tiny models in every shape, and as default device one that holds nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.inference.svi.pyro_backend.trust_region import TrustRegion
from bayes_klrl.posterior import completion_log_probs
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama, tiny_t5

LONGER = bk.TokenReward(lambda tokens, lengths: 0.5 * lengths, alpha=0.5)


def posterior_of(model: torch.nn.Module, **options: object) -> bk.Posterior:
    lm = bk.TorchLM(model, **options)
    return bk.Posterior(lm, LONGER, prompts=[[1, 2, 3], [2]], max_new_tokens=3)


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, tiny_t5])
def test_every_method_answers_with_another_default_device(build) -> None:
    """No GPU here: a tensor made without a device would land on meta, and mix with nothing."""
    posterior = posterior_of(build(), eos_token_id=0)
    rows = {
        "exact": bk.Exact(),
        "prior IS": bk.ImportanceSampling(200),
        "best of 2": bk.BestOfN(2, 10),
        "SMC": bk.SMC(50),
        "SVI": bk.SVI(2, 8, num_draws=10),
        "LoRA, Rao-Blackwell": bk.SVI(2, 8, num_draws=10, adapter="lora", estimator="rao_blackwell"),
        "SVI, then IS": bk.ImportanceSampling(100, proposal=bk.SVI(2, 8)),
    }
    with torch.device("meta"):
        result = bk.compare(posterior, rows, seed=0)
    assert not result.failures
    assert np.allclose(np.exp(result["exact"].log_prior).sum(axis=1), 1, atol=1e-5)


def test_an_n_gram_of_order_one_trains() -> None:
    coin = bk.NgramLM(np.log([0.3, 0.3, 0.4]), eos_token_id=2)
    fit = bk.SVI(60, 32).fit(bk.Posterior(coin, LONGER, max_new_tokens=3), seed=0)
    assert np.exp(fit.guide.log_probs[2]) < 0.35  # longer pays


def test_half_precision_says_how_far_it_is_from_one_distribution() -> None:
    half = posterior_of(tiny_gpt2().to(torch.bfloat16), eos_token_id=0)
    full = posterior_of(tiny_gpt2(), eos_token_id=0)
    for algorithm in (bk.ImportanceSampling(50), bk.SMC(50)):
        gap = algorithm.run(half, seed=0).info["scoring_gap"]
        assert gap.shape == (2,)
        assert (gap < 0.2).all()
        assert "scoring_gap" not in algorithm.run(full, seed=0).info
    draws = bk.ImportanceSampling(50).run(half, seed=0)
    assert np.array_equal(draws.log_weights, draws.log_likelihood)


@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"eos_token_id": ()}, {"eos_token_id": {0, 3}}])
def test_what_is_saved_is_the_same_distribution(options: dict, tmp_path: Path) -> None:
    posterior = posterior_of(tiny_gpt2(), **options)
    posterior.prior.save_pretrained(tmp_path)
    again = bk.TorchLM.from_pretrained(tmp_path)
    assert again.eos_token_ids == posterior.prior.eos_token_ids
    draws = bk.ImportanceSampling(20).run(posterior, seed=0)
    scored = completion_log_probs(again, posterior.prompt_ids, draws.sequences)
    assert np.allclose(scored, draws.log_prior, atol=1e-5)


def test_an_encoder_has_a_context_of_its_own() -> None:
    model = tiny_t5()
    model.config.max_position_embeddings = 4
    assert bk.Posterior(bk.TorchLM(model), LONGER, prompts=[[1, 2, 3]], max_new_tokens=4).num_prompts == 1
    with pytest.raises(bk.BayesKLRLError, match="context of 4"):
        bk.Posterior(bk.TorchLM(model), LONGER, prompts=[[1, 2, 3]], max_new_tokens=5)


@pytest.mark.parametrize("bad", [{"eos_token_id": "x"}, {"temperature": "hot"}, {"temperature": 0.0}])
def test_strange_options_are_refused(bad: dict) -> None:
    with pytest.raises(bk.BayesKLRLError):
        bk.TorchLM(tiny_gpt2(), **bad)


@pytest.mark.parametrize("no_lm", [torch.nn.Linear(2, 2), "austen"])
def test_what_is_no_language_model_is_refused(no_lm: object) -> None:
    with pytest.raises(bk.CheckpointError, match="language model"):
        bk.TorchLM(no_lm)


def test_an_interrupted_step_was_not_taken() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)

    def interrupted() -> float:
        raise KeyboardInterrupt

    region = TrustRegion([parameter], 0.1, interrupted)
    with pytest.raises(KeyboardInterrupt):
        region.step(torch.optim.SGD([parameter], lr=1.0))
    assert torch.equal(parameter.detach(), torch.zeros(3))


@pytest.mark.parametrize("kl, share", [(0.4, 0.5), (0.1, 1.0), (1e-6, 1.0)])
def test_a_step_is_shortened_to_what_is_allowed(kl: float, share: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    TrustRegion([parameter], 0.1, lambda: kl).step(torch.optim.SGD([parameter], lr=1.0))
    assert torch.allclose(parameter.detach(), torch.full((3,), -share))


def test_the_prior_as_its_own_guide_is_not_trained() -> None:
    import pyro

    posterior = posterior_of(tiny_gpt2(), eos_token_id=0)
    before = [parameter.clone() for parameter in posterior.prior.module.parameters()]
    with pyro.get_param_store().scope():
        guide = posterior.pyro_guide(posterior.prior)
        svi = pyro.infer.SVI(
            posterior.pyro_model(), guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO(max_plate_nesting=1)
        )
        svi.step()
    assert all(torch.equal(a, b) for a, b in zip(before, posterior.prior.module.parameters(), strict=True))


@pytest.mark.slow
def test_the_shipped_model_is_a_language_of_sentences() -> None:
    lm = bk.TorchLM.from_pretrained("austen")
    text = "She had been forced into prudence in her youth; she learned romance as she grew older."
    ids = lm.encode([text])[0]
    assert lm.decode([ids]) == [text]
    scored = completion_log_probs(lm, [[0]], bk.Sequences(np.array([[ids]]), np.array([[len(ids)]])))
    assert -scored[0, 0] / len(text) / np.log(2) < 2.0  # bits per character of a sentence of hers
    happy = bk.Reward(lambda completions: ["happy" in text for text in completions], alpha=0.5)
    draws = bk.ImportanceSampling(200).run(bk.Posterior(lm, happy, prompts=["", "It was"], max_new_tokens=12), seed=0)
    assert len(set(draws.texts()[0])) > 150
    assert (draws.lengths.std(axis=1) > 0.5).all()  # it ends its sentences
    assert bool(bk.check_posterior(bk.Posterior(lm, happy, prompts="It was", max_new_tokens=12)))
