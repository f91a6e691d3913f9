"""What is compiled for a JaxLM, and algorithms on it against torch and enumeration."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.models.jax_lm.lm import JaxLM
from tests.helpers.tiny_models import tiny_gpt2
from tests.helpers.truth import Truth, z_score
from tests.models.jax_lm.test_lm import close, counted_compilations, jax_lm_of, scored, small_pair
from tests.models.torch_lm.test_lm import random_completions


@pytest.mark.slow
def test_ten_prompts_of_different_lengths_compile_once() -> None:
    """A first prompt compiles; nine others, and other numbers of rows that end at other times, compile nothing."""
    model = tiny_gpt2(n_layer=1, n_embd=8, n_positions=64)  # an architecture that no other test compiles for
    lm = jax_lm_of(model)

    def work(length: int, num_draws: int) -> None:
        prompt = [1 + index % 4 for index in range(length)]
        posterior = bk.Posterior(lm, longer_is_better(), prompts=prompt, max_new_tokens=6)
        draws = bk.ImportanceSampling(num_draws).run(posterior, seed=length)
        posterior.log_prior(draws)

    with counted_compilations() as first:
        work(16, 16)
        work(9, 16)
    assert 4 <= len(first) <= 16
    with counted_compilations() as later:
        for length in range(9, 17):
            work(length, num_draws=9 + length % 8)
    assert len(later) <= 1, later  # a number of distinct prefixes that has not been met yet


# Algorithms


def longer_is_better() -> bk.TokenReward:
    return bk.TokenReward(lambda tokens, lengths: lengths + (tokens[:, 0] == 2), alpha=0.7, bounds=(0, 7))


@functools.cache
def posteriors() -> tuple[bk.Posterior, bk.Posterior]:
    """One posterior on JAX and on torch; prompts of different lengths."""
    jax_prior, torch_prior = small_pair()
    options: dict[str, Any] = {"prompts": [[1, 2, 3], [4]], "max_new_tokens": 4}
    return (
        bk.Posterior(jax_prior, longer_is_better(), **options),
        bk.Posterior(torch_prior, longer_is_better(), **options),
    )


def test_exact_agrees_with_torch_and_with_enumeration() -> None:
    ours, theirs = (bk.Exact().run(posterior, seed=0) for posterior in posteriors())
    assert np.array_equal(ours.tokens, theirs.tokens)
    assert close(ours.log_prior, theirs.log_prior, 1e-4)
    assert close(ours.log_evidence, theirs.log_evidence)
    assert close(ours.log_evidence, Truth(posteriors()[0]).log_evidence)


@pytest.mark.parametrize("algorithm", [bk.ImportanceSampling(64), bk.SMC(num_particles=64)], ids=["is", "smc"])
def test_evidence_is_unbiased(algorithm: Any) -> None:
    posterior = posteriors()[0]
    truth = Truth(posterior).log_evidence
    ratios = np.exp([algorithm.run(posterior, seed=seed).log_evidence - truth for seed in range(30)])
    assert max(abs(z_score(ratio, 1.0)) for ratio in ratios.T) < 4


@pytest.mark.slow
def test_certificate_and_frontier() -> None:
    ours, theirs = posteriors()
    certificate = bk.certify(ours, ours.prior, seed=0)
    assert (certificate.reverse_kl[:, 0] <= certificate.reverse_kl[:, 1]).all()
    assert close(certificate.elbo, bk.certify(theirs, theirs.prior, seed=0).elbo, 1e-4)
    curves = [bk.frontier(posterior, num_draws=256, seed=0) for posterior in posteriors()]
    assert close(curves[0].reward, curves[1].reward, 1e-4)


@pytest.mark.slow
def test_torch_is_not_imported(tmp_cwd: Path) -> None:
    code = """
import sys
import bayes_klrl as bk
lm = bk.JaxLM.from_pretrained("austen")
cheerful = bk.Reward(lambda completions: [float("a" in text) for text in completions], alpha=0.5, bounds=(0, 1))
posterior = bk.Posterior(lm, cheerful, prompts="It was a fine morning", max_new_tokens=3)
draws = [algorithm.run(posterior, seed=0) for algorithm in (bk.ImportanceSampling(8), bk.SMC(8))]
lm.save_pretrained("saved")
assert lm.decode(lm.encode(["It was"])) == ["It was"]
print("torch" in sys.modules, draws[0].log_evidence[0])
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    imported, log_evidence = run.stdout.split()
    assert imported == "False"
    assert np.isfinite(float(log_evidence))


def test_the_shipped_model_is_torchs(tmp_path: Path) -> None:
    lm, theirs = JaxLM.from_pretrained("austen"), bk.TorchLM.from_pretrained("austen")
    texts = ["It was a fine morning", "Emma"]
    assert lm.encode(texts) == theirs.encode(texts)
    assert (lm.eos_token_ids, lm.bos_token_id, lm.context_length) == (
        theirs.eos_token_ids,
        theirs.bos_token_id,
        theirs.context_length,
    )
    sequences = random_completions(lm, 2, 3, 7)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = theirs.token_log_probs(theirs.encode(texts), sequences)
    assert close(scored(lm, lm.encode(texts), sequences), expected, 3e-5)  # log-probs of up to 20 nats
