"""`power_sampling`: local temperature is normalised and is not p0^a; SMC corrects it; greedy and the counting are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.posterior import completion_log_probs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def example() -> Any:
    from bayes_klrl.gallery.language import power_sampling as module

    return module


@pytest.fixture(scope="module")
def small(example: Any) -> bk.Posterior:
    """A GPT-2 of six tokens with sharp next-token distributions, whose 781 completions can be counted."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=6, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=5, eos_token_id=5
    )
    module = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3)
    lm = bk.TorchLM(module, eos_token_id=5)
    return bk.Posterior(lm, bk.Power(example.EXPONENT), prompts=[[0, 1], [2]], max_new_tokens=4)


def test_local_temperature_is_normalised_and_scores_what_it_samples(example: Any, small: bk.Posterior) -> None:
    cold, everything = example.colder(small.prior), bk.Exact().run(small, seed=0)
    log_q = completion_log_probs(cold, small.prompt_ids, everything.sequences)
    assert np.abs(np.exp(log_q).sum(axis=1) - 1).max() < 1e-5
    state = small.prior.prefill(small.prompt_ids)
    powers = example.EXPONENT * small.prior.next_log_probs(state).detach().numpy().astype(np.float64)
    wanted = powers - np.logaddexp.reduce(powers, axis=1, keepdims=True)
    found = cold.next_log_probs(cold.prefill(small.prompt_ids)).detach().numpy()
    assert np.abs(found - wanted).max() < 1e-4


def test_its_distance_to_the_power_posterior_is_that_of_the_certificate(example: Any, small: bk.Posterior) -> None:
    """KL(q || p0^a) and log E_q[prod_t Z_t] by counting all completions, against `certify` and `Exact`."""
    cold, everything = example.colder(small.prior), bk.Exact().run(small, seed=0)
    log_q = completion_log_probs(cold, small.prompt_ids, everything.sequences)
    log_target = everything.log_prior + everything.log_likelihood
    assert np.abs(np.logaddexp.reduce(log_target, axis=1) - everything.log_evidence).max() < 1e-9
    assert np.abs(log_target - example.EXPONENT * everything.log_prior).max() < 1e-4
    exact = (np.exp(log_q) * (log_q - log_target)).sum(axis=1) + everything.log_evidence
    assert (exact > 0.05).all()  # temperature is not the power
    certificate = bk.certify(small, cold, seed=0)
    assert (certificate.reverse_kl[:, 0] - 1e-4 < exact).all()
    assert (exact < certificate.reverse_kl[:, 1] + 1e-4).all()


@pytest.mark.slow
def test_the_evidence_of_smc_is_unbiased(example: Any, small: bk.Posterior) -> None:
    cold = example.colder(small.prior)
    twist = small.likelihood.twist(proposal=cold).fit(small, seed=1)
    exact = bk.Exact().run(small, seed=0).log_evidence
    runs = [bk.SMC(32, proposal=cold, twist=twist).run(small, seed=seed).log_evidence for seed in range(40)]
    ratio = np.exp(np.array(runs) - exact)
    assert (np.abs(ratio.mean(axis=0) - 1) < 3.5 * ratio.std(axis=0, ddof=1) / np.sqrt(40)).all()


def test_greedy_and_the_answers(example: Any, small: bk.Posterior) -> None:
    found = example.greedy(small)
    ids = [*small.prompt_ids[0]]
    wanted: list[int] = []
    for _ in range(4):
        logits = small.prior.module(torch.tensor([ids])).logits[0, -1]
        token = int(logits.argmax())
        if token == 5:
            break
        wanted, ids = [*wanted, token], [*ids, token]
    assert found[0] == wanted
    assert [example.answer_in(text) for text in ("3 + 4 = 7.", "none", "", "12 is it")] == ["7", "", "", "12"]
    marks = example.right([["3 + 4 = 7", "it is 8"], ["", "5"]], [(3, 4), (2, 3)])
    assert marks.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    sums = example.problems(40)
    assert len(set(sums)) == 40
    assert {number for pair in sums for number in pair} <= set(range(2, 10))


@pytest.mark.slow
def test_the_example_ends_in_a_report(example: Any, tmp_path: Path) -> None:
    """On the shipped model, which cannot add: the report is whole, and says so."""
    prior = bk.TorchLM.from_pretrained("austen")
    found = example.main(
        tmp_path / "out", prior=prior, num_problems=3, num_draws=4, certified=1, num_runs=4, max_proposals=4
    )
    page = found.report.read_text(encoding="utf-8")
    assert page.count("<figure>") >= 3
    assert f"SMC for p0^4 is right on {100 * found.numbers['SMC, p0^4, right']:.0f} " in found.better
    assert "nats from p0^4 (certified)" in found.worse
    assert all(np.isfinite(value) for name, value in found.numbers.items() if "KL high" not in name)
