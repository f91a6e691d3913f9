"""A device whose memory holds so many rows and no more: half as much at once, said, and the same draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.models import decoding as decoding_module
from bayes_klrl.models.out_of_memory import by_halves, is_out_of_memory
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama, tiny_other

PROMPTS = [[1, 2, 3], [4, 0], [2, 2], [3]]
RAN_OUT = "The memory of the device ran out while"


def limited(lm: bk.TorchLM, most: int, *, backward: int | None = None) -> bk.TorchLM:
    """Return the model, whose forward raises torch's error for more than `most` rows, and its backward for `backward`.

    The backward pass raises at the embedding, when most other parameters have their gradients.
    """
    embedding = lm.module.get_input_embeddings()
    plain = embedding.forward
    seen = [0]  # the most rows whose gradient is to come

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) > most:
            raise torch.OutOfMemoryError(f"CUDA out of memory. {len(tokens)} rows")
        found: torch.Tensor = plain(tokens)
        seen[0] = max(seen[0], len(tokens) if found.requires_grad else 0)
        return found

    def accumulated(_: torch.Tensor) -> None:
        rows, seen[0] = seen[0], 0
        if backward is not None and rows > backward:
            raise torch.OutOfMemoryError(f"CUDA out of memory. {rows} rows in the backward pass")

    embedding.forward = forward
    if backward is not None:
        embedding.weight.register_post_accumulate_grad_hook(accumulated)
    return lm


def posterior_of(prior: Any, prompts: Any = PROMPTS, num_tokens: int = 4) -> bk.Posterior:
    ones = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) * 1.0, alpha=0.7, bounds=(0, 4))
    return bk.Posterior(prior, ones, prompts=prompts, max_new_tokens=num_tokens)


def said(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return what a function returns, and the warnings about memory."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run()
    assert all(str(each.message).startswith(RAN_OUT) for each in caught)
    return found, [str(each.message) for each in caught]


@pytest.mark.parametrize(
    "method", [bk.ImportanceSampling(11), bk.BestOfN(2, 5), bk.SuffixMH(3, 4, num_warmup=3)], ids=str
)
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, lambda n: tiny_other("opt", n)], ids=["gpt2", "llama", "opt"])
def test_draws_are_the_same_in_halves(method: Any, build: Any) -> None:
    whole = method.run(posterior_of(bk.TorchLM(build(8))), seed=0)
    found, messages = said(lambda: method.run(posterior_of(limited(bk.TorchLM(build(8)), 5)), seed=0))
    assert messages
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_allclose(found.log_prior, whole.log_prior, rtol=0, atol=2e-5)
    if isinstance(method, bk.ImportanceSampling):
        assert found.info["particles_per_pass"].tolist() == [5] * 4
        assert "44 completions were decoded at once. From here on at most 22" in messages[0]


def test_what_did_not_fit_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_module, "ROWS_PER_BLOCK", 32)
    prior = limited(bk.TorchLM(tiny_gpt2(8)), 9)
    found, messages = said(lambda: bk.ImportanceSampling(40).run(posterior_of(prior), seed=0))
    assert len(messages) == 2  # 32, 16: once each over five blocks
    whole = bk.ImportanceSampling(40).run(posterior_of(bk.TorchLM(tiny_gpt2(8))), seed=0)
    np.testing.assert_array_equal(found.tokens, whole.tokens)


def test_one_completion_that_does_not_fit_is_an_error_with_a_cure() -> None:
    prior = limited(bk.TorchLM(tiny_gpt2(8)), 0)
    with pytest.warns(UserWarning, match=RAN_OUT), pytest.raises(bk.DeviceMemoryError, match="bfloat16") as caught:
        bk.ImportanceSampling(2).run(posterior_of(prior), seed=0)
    assert "while one completion was decoded" in str(caught.value)


def test_other_errors_pass() -> None:
    prior = bk.TorchLM(tiny_gpt2(8))

    def fails(tokens: Any) -> Any:
        raise RuntimeError("device-side assert triggered")

    prior.module.get_input_embeddings().forward = fails
    with pytest.raises(RuntimeError, match="device-side assert"):
        bk.ImportanceSampling(4).run(posterior_of(prior), seed=0)


@pytest.mark.parametrize("gradient", [False, True])
def test_scores_are_the_same_in_halves(gradient: bool) -> None:
    sequences = bk.Sequences(np.random.default_rng(0).integers(1, 8, (4, 6, 5)), np.full((4, 6), 5))
    plain, prior = bk.TorchLM(tiny_gpt2(8)), limited(bk.TorchLM(tiny_gpt2(8)), 7)

    def scored(lm: bk.TorchLM) -> torch.Tensor:
        with torch.set_grad_enabled(gradient):
            return lm.token_log_probs(PROMPTS, sequences)

    found, messages = said(lambda: scored(prior))
    assert len(messages) == 2  # 24, 12
    assert ("differentiated" if gradient else "scored") in messages[0]
    np.testing.assert_allclose(found.detach(), scored(plain).detach(), rtol=0, atol=1e-5)
    assert said(lambda: scored(prior))[1] == []  # it is remembered
    if gradient:
        both = [torch.autograd.grad(scored(lm).sum(), list(lm.parameters())) for lm in (plain, prior)]
        for own, other in zip(*both, strict=True):
            np.testing.assert_allclose(other, own, rtol=0, atol=1e-4 * float(own.abs().max()) + 1e-6)


@pytest.mark.parametrize("twist", [None, 0.3])
def test_populations_of_smc_are_halved_over_prompts(twist: float | None) -> None:
    smc = bk.SMC(8, twist=twist, ess_threshold=0.9)
    whole = smc.run(posterior_of(bk.TorchLM(tiny_gpt2(8))), seed=0)
    found, messages = said(lambda: smc.run(posterior_of(limited(bk.TorchLM(tiny_gpt2(8)), 9)), seed=0))
    assert [message.split()[8] for message in messages] == ["32", "16"]
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_allclose(found.log_evidence, whole.log_evidence, rtol=0, atol=1e-4)


def test_runs_of_smc_are_halved_too() -> None:
    smc, one = bk.SMC(8, ess_threshold=0.9), PROMPTS[:2]
    whole = smc.log_evidences(posterior_of(bk.TorchLM(tiny_gpt2(8)), one), 5, seed=0)
    prior = limited(bk.TorchLM(tiny_gpt2(8)), 17)
    found, messages = said(lambda: smc.log_evidences(posterior_of(prior, one), 5, seed=0))
    assert messages
    np.testing.assert_allclose(found.log_evidence, whole.log_evidence, rtol=0, atol=1e-4)


def test_one_population_that_does_not_fit_names_its_size_and_a_cure() -> None:
    prior = limited(bk.TorchLM(tiny_gpt2(8)), 5)
    with pytest.raises(bk.DeviceMemoryError, match=r"All 8 particles .* bk\.SMC\(4, num_islands=2\)"):
        bk.SMC(8).run(posterior_of(prior, PROMPTS[:1]), seed=0)
    found, _ = said(lambda: bk.SMC(4, num_islands=2).run(posterior_of(prior, PROMPTS[:1]), seed=0))
    assert found.shape == (1, 8)


@pytest.mark.slow
def test_a_certificate_is_the_same() -> None:
    def certificate(most: int) -> bk.Certificate:
        prior = bk.TorchLM(tiny_gpt2(8, eos_token_id=None))
        policy = bk.TorchLM(tiny_gpt2(8, eos_token_id=None, seed=1))
        for lm in (prior, policy):
            limited(lm, most)
        return bk.certify(posterior_of(prior, PROMPTS[:2]), policy, seed=0, num_draws=64, num_runs=12, num_particles=8)

    whole = certificate(10**6)
    found, messages = said(lambda: certificate(20))
    assert messages
    for name in ("elbo", "log_evidence_bounds", "reverse_kl"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), rtol=0, atol=1e-3)


SVIS: dict[str, dict[str, Any]] = {
    "leave-one-out": {"optimizer": "adam", "twist": "none"},
    "a critic that learns": {"optimizer": "kl_sgd"},
    "passes": {"optimizer": "adam", "twist": "none", "particles_per_pass": 6},
    "replay": {"objective": bk.LogVariance(replay=16), "optimizer": "adam"},
    "some prompts": {"optimizer": "adam", "twist": "none", "prompts_per_step": 2},
    "a sampler's draws": {"objective": bk.ForwardKL(sampler=bk.SMC(8)), "optimizer": "adam"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SVIS)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_of_svi_is_the_same_in_halves(case: str, where: str) -> None:
    """The draws, what critic and replay hold, and the gradient up to rounding."""
    svi = bk.SVI(3, 8, **SVIS[case])

    def fit(most: int) -> bk.Fit:
        prior = bk.TorchLM(tiny_gpt2(8))
        posterior = posterior_of(prior)
        limits = {"most": most} if where == "forward" else {"most": 10**6, "backward": most}
        copy = bk.TorchLM.copy
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bk.TorchLM, "copy", lambda self: limited(copy(self), **limits))
            return svi.fit(posterior, seed=0)

    whole = fit(10**6)
    found, messages = said(lambda: fit(10))
    assert messages
    for name in ("elbo", "reward", "kl"):
        np.testing.assert_allclose(found.history[name], whole.history[name], rtol=0, atol=1e-3)
    gradients = (each.history["gradient_norm"][0] for each in (found, whole))
    np.testing.assert_allclose(*gradients, rtol=1e-4)
    for own, other in zip(whole.guide.parameters(), found.guide.parameters(), strict=True):
        np.testing.assert_allclose(other.detach(), own.detach(), rtol=0, atol=2e-3)


def test_a_step_that_cannot_be_halved_any_more_is_an_error_with_a_cure() -> None:
    copy = bk.TorchLM.copy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bk.TorchLM, "copy", lambda self: limited(copy(self), 10**6, backward=0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(bk.DeviceMemoryError, match="one completion was differentiated"):
                bk.SVI(2, 4, optimizer="adam", twist="none").fit(posterior_of(bk.TorchLM(tiny_gpt2(8))), seed=0)


def test_jax_says_it_in_its_own_words() -> None:
    error = type("XlaRuntimeError", (RuntimeError,), {})
    assert is_out_of_memory(error("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."))
    assert not is_out_of_memory(error("INTERNAL: something else"))


def test_halves_hold_everything_once_and_in_order() -> None:
    tried = []

    def run(piece: list[int]) -> list[int]:
        tried.append(len(piece))
        if len(piece) > 3:
            raise torch.OutOfMemoryError
        return piece

    def halves(piece: list[int]) -> list[list[int]]:
        middle = len(piece) // 2
        return [piece[:middle], piece[middle:]] if len(piece) > 1 else []

    pieces = [list(range(10)), list(range(10, 20))]
    with pytest.warns(UserWarning, match=RAN_OUT):
        found = list(by_halves(run, pieces, len, halves, doing="added"))
    assert [number for _, result in found for number in result] == list(range(20))
    assert tried[:3] == [10, 5, 2]
    assert max(tried[3:]) <= 2
