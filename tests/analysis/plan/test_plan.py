"""Plans: tokens against the cost of draws, a model of seven billion parameters that is never loaded, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import bayes_klrl as bk
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama

GIB = 2**30


def posterior_of(prior: Any, prompts: Any = ((1, 2, 3), (4, 0)), num_tokens: int = 5) -> bk.Posterior:
    ones = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) * 1.0, alpha=0.7, bounds=(0, num_tokens))
    return bk.Posterior(prior, ones, prompts=[list(prompt) for prompt in prompts], max_new_tokens=num_tokens)


def without_weights(**options: Any) -> bk.TorchLM:
    with torch.device("meta"):
        return bk.TorchLM(hf.LlamaForCausalLM(hf.LlamaConfig(**options)).to(torch.bfloat16))


@pytest.fixture(scope="module")
def large() -> bk.TorchLM:
    """The configuration of Llama-2-7B."""
    return without_weights()


# --- tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm", [bk.ImportanceSampling(1), bk.BestOfN(1, 1), bk.ImportanceSampling(3), bk.SMC(2)], ids=str
)
def test_tokens_are_those_of_the_draws(algorithm: Any) -> None:
    """No EOS, and so large a vocabulary that no two completions begin alike."""
    posterior = posterior_of(bk.TorchLM(tiny_gpt2(50_000, None), check=False))
    draws = algorithm.run(posterior, seed=0)
    planned = bk.plan(posterior, algorithm)
    assert draws.cost.model_tokens == planned.model_tokens


@pytest.mark.parametrize(
    "algorithm", [bk.ImportanceSampling(700), bk.SMC(64), bk.Exact(), bk.RejectionSampling(5)], ids=str
)
def test_tokens_are_a_bound_where_completions_end_early(algorithm: Any) -> None:
    posterior = posterior_of(bk.TorchLM(tiny_llama(5)), num_tokens=3)
    draws, planned = algorithm.run(posterior, seed=0), bk.plan(posterior, algorithm)
    assert draws.cost.model_tokens <= planned.model_tokens
    if isinstance(algorithm, bk.Exact):
        assert draws.cost.model_tokens == planned.model_tokens


def test_training_tokens_bound_those_of_a_fit() -> None:
    posterior = posterior_of(bk.TorchLM(tiny_gpt2(6, None)))
    recipe = bk.SVI(3, 4, optimizer="adam", twist="none", num_draws=7)
    fit = recipe.fit(posterior, seed=0)
    planned = bk.plan(posterior, recipe)
    assert planned.training_tokens == fit.training_tokens
    assert fit.run(7, seed=0).cost.model_tokens <= planned.model_tokens  # type: ignore[operator]


@pytest.mark.parametrize(
    "algorithm",
    [
        bk.SMC(2, twist=bk.PartialRewardTwist(num_pilot=5)),
        bk.SMC(2, twist=bk.LearnedTwist(2, num_draws=128)),
        bk.SVI(2, 3, optimizer="kl_sgd", twist="none", num_draws=2),
        bk.SVI(2, 3, optimizer="kl_sgd", twist=bk.PartialRewardTwist(), num_draws=2),
        bk.SVI(2, 3, optimizer=bk.KLSGD(frequency_scaling=False), twist="none", num_draws=2),
        bk.SVI(2, 3, optimizer="adam", twist=bk.PartialRewardTwist(), num_draws=2),
        bk.ImportanceSampling(3, proposal=bk.SVI(2, 3, optimizer="adam", twist=bk.PartialRewardTwist())),
        bk.SuffixMH(2, 3, num_warmup=2, thinning=2, cut="max_length"),
        bk.AnnealedSMC(3, schedule=(0.5, 1.0), num_moves=2),
        bk.AnnealedSMC(3, num_pilot=4),
        bk.QuasiRejection(2, bound=5 / 0.7, max_proposals=2000),
    ],
    ids=str,
)
@pytest.mark.parametrize("eos", [None, 0])
def test_what_is_fitted_before_and_moved_later_is_counted(algorithm: Any, eos: int | None) -> None:
    """Without EOS and with so many tokens that no two completions begin alike, fitting takes what the plan says."""
    posterior = posterior_of(bk.TorchLM(tiny_gpt2(2_000 if eos is None else 5, eos), check=False))
    draws, planned = algorithm.run(posterior, seed=0), bk.plan(posterior, algorithm)
    assert planned.is_bound
    assert f"at most {planned.model_tokens:,}" in str(planned)
    assert draws.cost.model_tokens <= planned.model_tokens  # type: ignore[operator]
    assert draws.cost.training_tokens <= planned.training_tokens
    if eos is None:
        assert planned.training_tokens <= 1.05 * draws.cost.training_tokens
    if planned.training_tokens:
        assert draws.cost.training_tokens > 0
        assert f"and {planned.training_tokens:,} in training" in str(planned)


def test_what_cannot_be_counted_is_no_bound() -> None:
    class Custom:
        def fit(self, posterior: bk.Posterior, *, seed: int, progress: bool = False) -> Any:
            return lambda posterior, prompt_index, prefixes: np.zeros(len(prefixes))

    posterior = posterior_of(bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1), prompts=((), ()))
    unbounded = bk.Posterior(
        posterior.prior, bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0), max_new_tokens=3
    )
    for target, algorithm, note in (
        (posterior, bk.SMC(4, twist=Custom()), "fitting the twist is not counted"),
        (posterior, bk.SVI(2, 4, twist=Custom()), "fitting the critic is not counted"),
        (unbounded, bk.SuffixMH(2, 2), "the search for others is not counted"),
    ):
        planned = bk.plan(target, algorithm)
        assert not planned.is_bound
        assert "at most" not in str(planned)
        assert "(no bound: see the notes)" in str(planned)
        assert any(note in each for each in planned.notes)


def test_parts_are_counted_as_they_will_be_read() -> None:
    """Each part reads its prompts again."""
    lm = bk.TorchLM(tiny_gpt2(50_000, None), check=False, particles_per_pass=4)
    posterior = posterior_of(lm)
    draws, planned = bk.ImportanceSampling(10).run(posterior, seed=0), bk.plan(posterior, bk.ImportanceSampling(10))
    assert planned.particles_per_pass == 4
    assert draws.info["particles_per_pass"].tolist() == [4, 4]
    assert 0 <= planned.model_tokens - draws.cost.model_tokens <= 4  # type: ignore[operator]


# --- a model that is not loaded -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_seven_billion_parameters(large: bk.TorchLM) -> None:
    posterior = posterior_of(large)
    sampling = bk.plan(posterior, bk.ImportanceSampling(4096), memory=24 * GIB)
    assert sampling.num_parameters == 6_738_415_616
    assert sampling.kept["parameters of the prior"] == 2 * 6_738_415_616
    assert sampling.fits()
    assert not sampling.fits(12 * GIB)
    assert sampling.peak_bytes < 24 * GIB
    per_row = 2 * 32 * 4096 * 2 * 8  # keys and values, layers, hidden size, bytes, tokens
    assert sampling.phases["decoding"]["key-value cache"] == 1.5 * per_row * sampling.particles_per_pass
    adapter = bk.plan(posterior, bk.SVI(10, adapter="lora"), memory=24 * GIB)
    assert adapter.fits()
    assert 0 < adapter.num_trained < 0.01 * adapter.num_parameters
    assert adapter.checkpointed_bytes < 0.2 * adapter.activation_bytes
    assert adapter.gradient_rows is not None
    whole = bk.plan(posterior, bk.SVI(10), memory=24 * GIB)
    assert whole.num_trained == whole.num_parameters
    assert not whole.fits()
    assert whole.peak_bytes > 6 * sampling.kept["parameters of the prior"]
    again = bk.plan(posterior, bk.ImportanceSampling(64, proposal=bk.SVI(10, adapter="lora")), memory=24 * GIB)
    assert again.training_tokens == adapter.training_tokens


@pytest.mark.slow
def test_less_memory_means_fewer_at_once(large: bk.TorchLM) -> None:
    posterior = posterior_of(large, prompts=[[1] * 500] * 8, num_tokens=64)
    found = [bk.plan(posterior, bk.SVI(1, adapter="lora"), memory=size * GIB) for size in (24, 40, 80)]
    assert all(one.fits() for one in found)
    for name in ("particles_per_pass", "gradient_rows"):
        numbers = [getattr(one, name) for one in found]
        assert numbers == sorted(numbers)
        assert numbers[0] < numbers[-1]


def test_a_model_without_weights_is_not_run(large: bk.TorchLM, tmp_path: Path) -> None:
    posterior = posterior_of(large)
    for run in (bk.ImportanceSampling(4), bk.SMC(4), bk.SVI(1, 4, adapter="lora")):
        with pytest.raises(bk.BayesKLRLError, match=r"on the device 'meta' has no weights, .*from_pretrained"):
            run.run(posterior, seed=0)
    with pytest.raises(bk.BayesKLRLError, match="not saved"):
        large.save_pretrained(tmp_path / "model")
    with pytest.raises(bk.BayesKLRLError, match="not moved to 'cpu'"):
        bk.TorchLM(large.module, device="cpu")
    assert large.unloaded
    assert large.self_check is None


def test_a_folder_needs_its_configuration_alone(tmp_path: Path) -> None:
    lm = bk.TorchLM(tiny_llama(50), eos_token_id=[3, 4])
    lm.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    planned = bk.TorchLM.from_pretrained(tmp_path, device="meta", dtype="bfloat16")
    assert planned.unloaded
    assert planned.eos_token_ids == {3, 4}
    assert {parameter.dtype for parameter in planned.module.parameters()} == {torch.bfloat16}
    count = sum(parameter.numel() for parameter in lm.module.parameters())
    assert bk.plan(posterior_of(planned), bk.SMC(4)).num_parameters == count
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(bk.CheckpointError, match="no configuration of a language model"):
        bk.TorchLM.from_pretrained(tmp_path, device="meta")


def test_the_shipped_model_can_be_planned() -> None:
    planned = bk.TorchLM.from_pretrained("austen", device="meta")
    assert planned.encode(["It was"]) == bk.TorchLM.from_pretrained("austen").encode(["It was"])


# --- what is said ---------------------------------------------------------------------------------------------------


def test_the_table_and_the_words(large: bk.TorchLM) -> None:
    planned = bk.plan(posterior_of(large), bk.SVI(10, adapter="lora", optimizer="adam"), memory=24 * GIB)
    table = planned.table()
    assert (table["bytes"] > 0).all()
    np.testing.assert_allclose(table["GiB"], table["bytes"] / GIB)
    kept = table[table["phase"] == "always"]["bytes"].sum()
    assert planned.peak_bytes == kept + table[table["phase"] != "always"].groupby("phase")["bytes"].sum().max()
    for part in ("6,738,415,616 parameters", "12.55 GiB", "optimizer (adam)", "24.00 GiB at hand: it fits", "gradient"):
        assert part in str(planned)


def test_refusals() -> None:
    posterior = posterior_of(bk.TorchLM(tiny_llama(50)), num_tokens=20)
    exact = bk.plan(posterior, bk.Exact())
    assert exact.model_tokens is None
    assert "would refuse: enumeration would take about 10^" in str(exact)
    assert not exact.fits(1e15)
    unbounded = bk.Posterior(
        posterior.prior, bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0), max_new_tokens=3
    )
    assert "Declare them" in str(bk.plan(unbounded, bk.RejectionSampling(3)).refusal)
    with pytest.raises(bk.BayesKLRLError, match=r"no plan for a ConditionalSMC.*bk\.SMC"):
        bk.plan(posterior, bk.ConditionalSMC(bk.SMC(2)))
    with pytest.raises(bk.BayesKLRLError, match="memory must be a positive"):
        bk.plan(posterior, bk.SMC(2), memory=0)


def test_expected_proposals() -> None:
    posterior = posterior_of(bk.TorchLM(tiny_llama(5)), prompts=[[1, 2, 3]], num_tokens=3)
    log_evidence = float(bk.Exact().run(posterior, seed=0).log_evidence.mean())
    known = bk.plan(posterior, bk.RejectionSampling(100), log_evidence=log_evidence)
    worst = bk.plan(posterior, bk.RejectionSampling(100))
    assert not known.is_bound  # an expectation
    assert bk.plan(posterior, bk.RejectionSampling(100, max_proposals=100)).is_bound
    assert known.model_tokens < worst.model_tokens  # type: ignore[operator]
    drawn = bk.RejectionSampling(100).run(posterior, seed=0)
    assert drawn.cost.model_tokens < known.model_tokens  # type: ignore[operator]
    counted = int(known.notes[0].split()[0].replace(",", ""))
    assert 0.8 < drawn.info["num_proposals"].mean() / counted < 1.25


def test_a_table_has_tokens_and_no_memory() -> None:
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    planned = bk.plan(posterior_of(coin, prompts=((), ())), bk.SMC(8))
    assert planned.model_tokens == 2 * 8 * 4
    assert planned.phases == {}
    assert "the memory of a NgramLM is not estimated" in planned.notes
